"""Where a context ends and its continuation begins, contexts that do not fit, and items that stand before an item."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_helpers import CHOICES, LAMBADA, TARGET, WINOGRANDE, write_lines
from tokenizer_helpers import CORPUS

from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.errors import DataError
from gptperf.tasks import encode_task, load_tasks
from gptperf.tasks.requests import encode_pair

TEXT = st.text(st.sampled_from("the tokenizer's =12\n\t\u00e9\u4e2d\U0001f600"), max_size=30)


@pytest.fixture(scope="module")
def trained() -> JsonTokenizer:
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    from gptperf.data.train_tokenizer import train_tokenizer

    return train_tokenizer("train:400", CORPUS)


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT.filter(str.strip))
def test_the_tokens_are_those_of_the_whole_text(trained: JsonTokenizer, context: str, continuation: str) -> None:
    """Whatever the boundary is, context and continuation are the text, and something is before the continuation."""
    for tokenizer in (trained, ByteTokenizer()):
        ids, targets = encode_pair(tokenizer, context, continuation)
        assert 1 <= targets < len(ids)
        first = int(ids[0]) == tokenizer.eot
        whole = tokenizer.encode(context + continuation).tolist()
        assert ids[first:].tolist() == whole
        assert first == (not context.strip() or len(whole) == 1)


def test_white_space_belongs_to_the_continuation(trained: JsonTokenizer) -> None:
    """`the` and ` tokenizer` are a token each; a space alone, as a context with it would end, is another one."""
    for context, continuation in (("the", " tokenizer"), ("the ", "tokenizer")):
        ids, targets = encode_pair(trained, context, continuation)
        assert ids.tolist() == trained.encode("the tokenizer").tolist()
        assert trained.decode(ids[-targets:]) == " tokenizer"
    ids, targets = encode_pair(ByteTokenizer(), "ab \n", "c")
    assert (ids.tolist(), targets) == ([97, 98, 32, 10, 99], 3)
    ids, targets = encode_pair(ByteTokenizer(), " ", "c")
    assert (ids.tolist(), targets) == ([256, 32, 99], 2)


def test_a_token_that_joins_context_and_continuation_is_scored(trained: JsonTokenizer) -> None:
    texts = [trained.decode([token]) for token in range(trained.vocab_size)]
    text = next(text for text in texts if text.isalpha() and len(text) > 2 and len(trained.encode(text)) == 1)
    ids, targets = encode_pair(trained, text[:1], text[1:])
    assert (ids.tolist(), targets) == ([trained.eot, *trained.encode(text).tolist()], 1)


def test_a_context_that_is_too_long_loses_its_start(tmp_path: Path) -> None:
    records = [TARGET | {"prompt": "x" * 20 + "abcdef", "target": "gh"}, TARGET | {"prompt": "abcdef", "target": "gh"}]
    (task,) = load_tasks([write_lines(tmp_path / "t.jsonl", records)])
    encoded = encode_task(task, ByteTokenizer(), 8)
    assert encoded.truncated == 1
    assert encoded.requests[0].ids.tolist() == list(b"abcdef gh")  # 8 inputs and the last target
    assert encoded.requests[1].ids.tolist() == encoded.requests[0].ids.tolist()
    assert encoded.tokens == 16
    assert encode_task(task, ByteTokenizer(), 40).truncated == 0
    assert encode_task(task, ByteTokenizer(), 3).requests[0].ids.tolist() == list(b"f gh")
    with pytest.raises(DataError, match=r"t\.jsonl:1: found a continuation of 3 tokens .* at most block_size = 2"):
        encode_task(task, ByteTokenizer(), 2)


def test_examples_are_other_items_with_their_right_answers(tmp_path: Path) -> None:
    records = [CHOICES | {"prompt": f"{number} =", "choices": ["no", f"n{number}"], "answer": 1} for number in range(9)]
    (task,) = load_tasks([write_lines(tmp_path / "t.jsonl", records)])
    shown = [encode_task(task, ByteTokenizer(), 200, shots=3, seed=seed) for seed in (1, 1, 2)]
    texts = [[ByteTokenizer().decode(request.ids) for request in one.requests] for one in shown]
    assert texts[0] == texts[1] != texts[2]
    for number in range(9):
        wrong, right = texts[0][2 * number : 2 * number + 2]
        *examples, last = right.split("\n\n")
        assert wrong == "\n\n".join([*examples, f"{number} = no"])
        assert last == f"{number} = n{number}"
        own = [example.partition(" =")[0] for example in examples]
        assert examples == [f"{other} = n{other}" for other in own]
        assert len({*own, str(number)}) == 4
    assert len({text.split(" =")[0] for text in texts[0]}) > 2  # drawn anew for each item
    with pytest.raises(DataError, match="found 9 items, wanted more than shots = 9; nearest: --shots=8"):
        encode_task(task, ByteTokenizer(), 200, shots=9)


@pytest.mark.parametrize(
    ("record", "example"),
    [(WINOGRANDE, "Ann beat Bob as Ann was fast."), (LAMBADA, LAMBADA["text"]), (TARGET, "one two three")],
)
def test_an_example_is_the_text_that_is_right(record: dict[str, str], example: str, tmp_path: Path) -> None:
    (task,) = load_tasks([write_lines(tmp_path / "t.jsonl", [record, record])])
    request = encode_task(task, ByteTokenizer(), 200, shots=1).requests[0]
    assert ByteTokenizer().decode(request.ids).startswith(example + "\n\n")
