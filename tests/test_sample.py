"""The sample command: text as it is made, stop strings, prompts from files, models of Hugging Face."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_helpers import run
from tokenizer_helpers import CORPUS

from gptperf import api, hugging_face, sample
from gptperf.data.train_tokenizer import train_tokenizer
from gptperf.errors import ConfigError, run_main
from gptperf.model import generate as generation

EURO = "\u20ac"


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "out"
    assert run(corpus, out, "--max_iters=3", "--sample_tokens=0") == 0
    return out


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the model write a fixed text of bytes, whatever the prompt is."""
    text = f"one {EURO} two END three {EURO}"

    def drawn(model: object, prompts: list[object], tokens: int, *_: object, **keys: object) -> Iterator[list[int]]:
        yield from ([byte] * len(prompts) for byte in text.encode()[:tokens])

    monkeypatch.setattr(generation, "generate", drawn)
    return text


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_main(sample.main, [*map(str, arguments), "--device=cpu"])
    code = ended.value.code
    assert isinstance(code, int)
    return code


class Pipe(io.RawIOBase):
    """A pipe that keeps what each write brought."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.parts.append(bytes(data))  # type: ignore[call-overload]
        return len(self.parts[-1])


def test_text_arrives_in_whole_characters_while_it_is_made(
    trained: Path, writes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(pipe), "utf-8"))
    assert command(trained, "--prompt=a", f"--tokens={len(writes.encode())}") == 0
    assert [part.decode() for part in pipe.parts] == ["a", *writes, "\n"]


def test_a_piece_comes_before_the_next_token_is_computed(trained: Path) -> None:
    loaded = api.load_model(trained, device="cpu")
    passes: list[int] = []
    loaded.model.register_forward_hook(lambda *_: passes.append(1))
    pieces = api.stream(loaded, "abc", tokens=12, temperature=0)
    counts = [len(passes) for piece in pieces if piece]
    assert counts == sorted(set(counts)) and counts[0] < 12  # noqa: PT018
    joined = "".join(api.stream(loaded, "abc", tokens=12, temperature=0))
    assert api.generate(loaded, "abc", tokens=12, temperature=0) == ["abc" + joined]


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (["END"], f"one {EURO} two "),
        ([EURO], "one "),
        (["three", " t"], f"one {EURO}"),
        (["\n"], f"one {EURO} two END three {EURO}"),
        ([f"{EURO} two"], "one "),
        (["one"], ""),
    ],
)
def test_a_sample_ends_before_a_stop_string(
    stops: list[str], wanted: str, trained: Path, writes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    flags = [f"--stop={stop}" for stop in stops]
    assert command(trained, "--prompt=END", f"--tokens={len(writes.encode())}", *flags) == 0
    assert capsys.readouterr().out == f"END{wanted}\n"  # the prompt is no part of the search
    loaded = api.load_model(trained, device="cpu")
    assert api.generate(loaded, "a", tokens=len(writes.encode()), stop=stops) == ["a" + wanted]
    assert api.generate(loaded, "a", tokens=len(writes.encode()), stop=stops[0])[0].startswith("a" + wanted)


def test_prompts_from_files(trained: Path, tmp_path: Path, writes: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(f"\ufeffdef f():\r\n  '{EURO}'\r\n".encode())
    (tmp_path / "b.txt").write_bytes("b".encode("utf-16"))
    capsys.readouterr()
    prompts = [f"--prompt=FILE:{tmp_path / 'a.txt'}", f"--prompt=FILE:{tmp_path / 'b.txt'}", "--prompt=c"]
    assert command(trained, *prompts, "--tokens=3", "--num_samples=2") == 0
    texts = [f"def f():\n  '{EURO}'\n", f"def f():\n  '{EURO}'\n", "b", "b", "c", "c"]
    rule = "-" * 32
    wanted = [f"{rule} sample {i} of 6 {rule}\n{text}one\n" for i, text in enumerate(texts, 1)]
    assert capsys.readouterr().out == "".join(wanted)


def test_the_run_may_stand_after_a_prompt(trained: Path, writes: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert command("--stop", "END", "--prompt", "a ", trained, "--tokens=3") == 0
    assert capsys.readouterr().out == "a one\n"


def test_samples_do_not_depend_on_the_other_prompts(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert command(trained, "--prompt=ab", "--num_samples=2") == 0
    alone = capsys.readouterr().out.split(" ----")[-1]
    assert command(trained, "--prompt=c", "--prompt=ab", "--num_samples=2") == 0
    assert capsys.readouterr().out.split(" ----")[-1].partition("\n")[2] == alone.partition("\n")[2]


def test_a_prompt_longer_than_the_context_is_said(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for length, said in ((32, False), (33, True)):
        capsys.readouterr()
        assert command(trained, f"--prompt={'a' * length}", "--tokens=1") == 0
        printed = capsys.readouterr()
        assert ("33 tokens; the model reads the last 32" in printed.err) == said
        assert printed.out.startswith("a" * length)


def test_mistakes_come_before_the_model_is_looked_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for flags, text in (
        (["--stop=", "--temperature=inf"], "stop: found an empty string"),
        (["--temperature=inf"], "temperature: found inf"),
        (["--temperature=nan"], "temperature: found nan"),
        ([f"--prompt=FILE:{tmp_path}"], "cannot be read: Is a directory"),
        ([f"--prompt=FILE: {'long ' * 60}"], "cannot be read: File name too long"),
        ([f"--prompt=FILE:{tmp_path / 'prompt.txt' / 'a'}"], "cannot be read: Not a directory"),
        ([f"--prompt=FILE:{tmp_path / 'promt.txt'}"], f"No such file or directory; nearest: {tmp_path / 'prompt.txt'}"),
        ([f"--prompt=FILE:{tmp_path / 'prompt.txt'}"], "found binary (contains NUL), wanted text"),
        ([f"--prompt=FILE:{tmp_path / 'latin.txt'}"], "found not UTF-8; at offset 3, wanted text"),
    ):
        assert command(tmp_path / "absent", *flags) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(ConfigError, match="empty string"):
        api.generate(api.load_model(trained, device="cpu"), "a", stop="")


@pytest.mark.slow
def test_a_folder_of_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes, **heads)).eval()
    theirs.save_pretrained(tmp_path)
    assert command(tmp_path, "--tokens=1") == 3
    assert "found no tokenizer, wanted one" in capsys.readouterr().err
    tokenizer = train_tokenizer("train:300", CORPUS)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    before = sorted(tmp_path.iterdir())

    ids = torch.tensor([tokenizer.encode("the ids").tolist()])
    new = theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0]
    assert command(tmp_path, "--prompt=the ids", "--tokens=20", "--temperature=0") == 0
    assert capsys.readouterr().out == tokenizer.decode(new) + "\n"
    assert sorted(tmp_path.iterdir()) == before
    loaded = hugging_face.load_model(tmp_path, device="cpu")
    assert (loaded.step, loaded.path, loaded.tokenizer.vocab_size) == (0, tmp_path, 300)
