"""The command on runs and on Hugging Face models, alone and on two ranks: losses, scores, and what goes wrong."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_helpers import on_two_ranks
from run_helpers import run, run_log
from task_helpers import ARC, ASKED, CHOICES, reference, write_lines
from tokenizer_helpers import CORPUS

from gptperf import api, hugging_face
from gptperf.data.json_tokenizer import JsonTokenizer
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import ByteTokenizer, load_tokenizer
from gptperf.errors import CheckpointError, ConfigError, DataError, GptperfError, OutOfMemoryError
from gptperf.evaluate import dataset
from gptperf.evaluate.__main__ import main
from gptperf.evaluate.dataset import _same_ids
from gptperf.prepare import main as prepare_main
from gptperf.tasks import load_tasks


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert run(corpus, out, "--max_iters=10") == 0
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Task files of several kinds whose continuations fit 32 tokens."""
    folder = tmp_path_factory.mktemp("tasks")
    chosen = ("hellaswag", "arc", "winogrande", "lambada")
    return [str(write_lines(folder / f"{name}.jsonl", [ASKED[name][0]] * 2)) for name in chosen]


def result(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    assert main([*map(str, argv), "--json", "--device=cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_loss_is_that_of_the_run(trained: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logged,) = run_log(trained)["eval_steps"]
    data = result(capsys, trained)["data"]
    assert data["loss"] == logged["val_loss"]
    assert data["perplexity"] == pytest.approx(math.exp(data["loss"]))
    text = (corpus / "text.txt").read_text()
    val_bytes = len(text) - round(len(text) * 0.9)  # the tail of the only document, and its end
    assert data["bits_per_byte"] == pytest.approx(data["loss"] / math.log(2) * (val_bytes + 1) / val_bytes, rel=1e-3)
    whole = result(capsys, trained, "--dataset=text", f"--data_dir={corpus / 'data'}", "--eval_iters=999")["data"]
    assert whole["loss"] != data["loss"]
    train = result(capsys, trained, "--split=train", "--batch_size=1")["data"]
    assert (train["split"], train["dataset"]) == ("train", "text")
    mixed = result(capsys, trained, f"--dataset=text:3,{corpus / 'data' / 'text'}:1", f"--data_dir={corpus / 'data'}")
    assert [one["weight"] for one in mixed["data"]["sources"].values()] == [0.75, 0.25]
    assert mixed["data"]["loss"] == pytest.approx(data["loss"])


def test_bits_a_byte_count_the_bytes_of_the_text(
    trained: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over a whole split: the nats of its tokens over the bytes of its documents, token by token."""
    texts = ["\u00e9\u00e8 abc" * 9, "def gh" * 20]
    write_lines(tmp_path / "t.jsonl", [{"text": text} for text in texts * 5])
    prepare(str(tmp_path / "t.jsonl"), data_dir=tmp_path, name="t", quiet=True, val_fraction=0.5, dedup="off")
    data = result(capsys, trained, "--dataset=t", f"--data_dir={tmp_path}", "--batch_size=1", "--eval_iters=999")[
        "data"
    ]
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    val = manifest["splits"]["val"]
    n_bytes = val["tokens"] - val["documents"]  # bytes are the tokens
    nats = data["loss"] * val["tokens"]
    assert data["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes)


def test_scores_are_those_of_the_reference_scorer(
    trained: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = api.load_model(trained, device="cpu").model
    found = result(capsys, trained, f"--tasks={files[0]},{files[1]}", "--tasks", *files[2:])
    assert list(found["tasks"]) == ["hellaswag", "arc", "winogrande", "lambada"]
    assert "data" not in found
    for name, scores in found["tasks"].items():
        _, pairs, answer = ASKED[name]
        wanted = [reference(model, ByteTokenizer(), *pair) for pair in pairs]
        logs = [log for log, _ in wanted]
        if name == "lambada":
            assert scores["acc"] == wanted[0][1]
            assert scores["perplexity"] == pytest.approx(math.exp(-logs[0]), rel=1e-4)
            continue
        assert scores["acc"] == (int(np.argmax(logs)) == answer)
        if name != "winogrande":
            per_byte = [log / len(text.strip()) for log, (_, text) in zip(logs, pairs, strict=True)]
            assert scores["acc_norm"] == (int(np.argmax(per_byte)) == answer)
    assert found["core"] == pytest.approx(sum(one["centred"] for one in found["tasks"].values()) / 4)


def test_the_text_has_the_scores(trained: Path, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    scores = result(capsys, trained, "--tasks", *files)["tasks"]
    assert main([str(trained), "--tasks", *files, "--device=cpu"]) == 0
    shown = capsys.readouterr().out
    for name, one in scores.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(name)]
        assert f"{one['acc']:.4f} +- {one['acc_stderr']:.4f}" in line
    assert "truncated: 6 items longer than block_size" in shown
    assert "core, the mean of the centred scores: " in shown
    assert main([str(trained), "--device=cpu"]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_two_ranks_say_the_same(
    trained: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores to the last bit, because the batches do not depend on the number of ranks."""
    argv = [str(trained), f"--tasks={','.join(files)}", "--dataset=text", "--contains", "--batch_size=1"]
    one = result(capsys, *argv)
    first, second = on_two_ranks(lambda: main([*argv, "--json", "--device=cpu"]), tmp_path)
    assert second == ""
    two = json.loads(first)
    assert two["data"]["loss"] == pytest.approx(one["data"]["loss"], rel=1e-9)
    assert two["tasks"] == one["tasks"]
    assert two["contained"] == one["contained"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_of_hugging_face(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its scores are those of transformers, with the tokenizer of its folder, one sequence at a time in float64."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    from gptperf.data.train_tokenizer import train_tokenizer

    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.2, **sizes)
        theirs = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path / "model")
    trained = train_tokenizer("train:300", CORPUS)
    (tmp_path / "model" / "tokenizer.json").write_bytes(trained.files["tokenizer.json"])
    path = write_lines(
        tmp_path / "t.jsonl", [CHOICES, CHOICES | {"prompt": "the tokenizer's", "choices": ["ids", "=="], "answer": 0}]
    )
    arc = write_lines(tmp_path / "arc.jsonl", [ARC])
    found = result(capsys, tmp_path / "model", f"--tasks={path},{arc}")
    assert (found["step"], found["tokenizer"]) == (None, "model")
    hugging_face.convert(tmp_path / "model", tmp_path / "imported")
    imported = result(capsys, tmp_path / "imported", f"--tasks={path},{arc}")
    assert imported["tasks"] == found["tasks"]
    for name, more in itertools.product(("model", "imported"), ([], [f"--tasks={arc}", "--contains"])):
        with pytest.raises(ConfigError, match=rf"{name}: found no data set, .*wanted --dataset=NAME"):
            main([str(tmp_path / name), "--device=cpu", *more])
    with pytest.raises(ConfigError, match="block_size: found 65, wanted at most 64; nearest: 64"):
        main([str(tmp_path / "model"), "--device=cpu", f"--tasks={arc}", "--block_size=65"])
    assert result(capsys, tmp_path / "model", f"--tasks={arc}", "--block_size=12")["tasks"]["arc"]["truncated"] == 1

    encode = library.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode
    exact, right, normed = theirs.double().eval(), [], []
    for task in load_tasks([path, arc]):
        for item in task.items:
            logs = []
            for context, continuation in item.pairs:
                ids = encode(context + continuation, add_special_tokens=False).ids
                begin = len(encode(context, add_special_tokens=False).ids)
                with torch.no_grad():
                    every = exact(torch.tensor([ids])).logits[0].log_softmax(-1)
                logs.append(sum(every[i - 1, ids[i]].item() for i in range(begin, len(ids))))
            right.append(int(np.argmax(logs)) == item.answer)
            per_byte = np.array(logs) / [len(text.strip()) for _, text in item.pairs]
            normed.append(int(np.argmax(per_byte)) == item.answer)
    assert found["tasks"]["t"]["acc"] == np.mean(right[:2])
    assert found["tasks"]["t"]["acc_norm"] == np.mean(normed[:2])
    assert (found["tasks"]["arc"]["acc"], found["tasks"]["arc"]["acc_norm"]) == (right[2], normed[2])


def test_mistakes_of_the_command_line() -> None:
    with pytest.raises(ConfigError) as caught:
        main(["out", "--shots=2", "--contains", "--limit=1", "--ngram=0", "--fewshot=3"])
    for part in ("--shots goes with", "--contains goes", "--limit goes", "ngram: found 0", "nearest: shots"):
        assert any(part in problem for problem in caught.value.problems), part
    with pytest.raises(ConfigError, match="--ngram goes with --contains"):
        main(["out", "--tasks=x", "--ngram=5"])


def test_what_cannot_be_evaluated_is_one_line(
    trained: Path, corpus: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write_lines(tmp_path / "long.jsonl", [CHOICES | {"choices": ["4", "x" * 40]}])
    cases: list[tuple[list[object], type[GptperfError], str]] = [
        ([tmp_path / "none"], CheckpointError, "found no checkpoint"),
        ([trained, "--tasks=nope.jsonl"], DataError, r"nope\.jsonl: cannot be read"),
        (
            [trained, f"--tasks={long}"],
            DataError,
            r"long\.jsonl:1: found a continuation of 41 tokens .* block_size = 32",
        ),
        ([trained, f"--tasks={files[0]}", "--shots=2"], DataError, "task hellaswag: found 2 items.*nearest: --shots=1"),
        ([trained, "--dataset=nope"], DataError, "found no data set 'nope'"),
    ]
    for argv, kind, wrong in cases:
        with pytest.raises(kind, match=wrong):
            main([*map(str, argv), "--device=cpu"])
    assert capsys.readouterr().out == ""


def test_a_gpu_without_memory_is_one_line(trained: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("gptperf.evaluate.run.likelihoods", full)
    with pytest.raises(OutOfMemoryError, match=r"Tried to allocate 2 GiB\. Lower --batch_size or --block_size$"):
        main([str(trained), f"--tasks={files[0]}", "--device=cpu"])


def test_data_of_another_tokenizer_is_refused(
    trained: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    (tmp_path / "text.txt").write_bytes(b" ".join(CORPUS))
    prepare(str(tmp_path / "text.txt"), data_dir=tmp_path, name="bpe", tokenizer="train:257", quiet=True)
    for more in ([], [f"--tasks={files[0]}", "--contains"]):
        with pytest.raises(DataError, match=r"bpe: found the tokenizer train:257 .* wanted data of the same tokenizer"):
            main([str(trained), "--dataset=bpe", f"--data_dir={tmp_path}", "--device=cpu", *more])


def test_data_of_the_same_ids_is_taken_whatever_its_tokenizer_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of one vocabulary have two fingerprints, as those of tiktoken and of a tokenizer.json have."""
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    from gptperf.data.train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer("train:300", CORPUS)
    (tmp_path / "text.txt").write_bytes(b" ".join(CORPUS))
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
        described = json.loads(tokenizer.files["tokenizer.json"])
        unused = {"id": 300, "content": "<|unused|>", "special": True}
        unused |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        described["added_tokens"].append(unused)
        if name == "other":
            described["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(described))
    data = {"data_dir": tmp_path / "data", "quiet": True, "val_fraction": 0.3}
    prepare(str(tmp_path / "text.txt"), name="d", tokenizer=str(tmp_path / "same"), **data)  # type: ignore[arg-type]
    source = TokenSource.open(tmp_path / "data" / "d", "val")
    for folder, wanted in (("same", True), ("other", False)):
        own = tokenizer if wanted else load_tokenizer(str(tmp_path / folder))
        assert own.fingerprint != source.manifest.tokenizer.fingerprint
        for compared in (1 << 16, 100, 101, 102):  # cut anywhere
            monkeypatch.setattr(dataset, "_COMPARED", compared)
            assert _same_ids(own, source) is wanted
    end = JsonTokenizer("end", (tmp_path / "same" / "tokenizer.json").read_bytes(), "<|unused|>")
    assert not _same_ids(end, source)  # another token ends a document


def test_a_run_without_a_vocabulary_has_a_loss_and_no_tasks(
    corpus: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 65, 3000).astype("<u2").tofile(tmp_path / f"{split}.bin")
    prepare_main([f"bin:{tmp_path}", f"--data_dir={tmp_path / 'data'}", "--name=ids", "--tokenizer=ids:65"])
    sizes = ["--dataset=ids", "--max_iters=2", "--sample_tokens=0", f"--data_dir={tmp_path / 'data'}"]
    assert run(corpus, tmp_path / "out", *sizes) == 0
    capsys.readouterr()
    found = result(capsys, tmp_path / "out")
    assert "bits_per_byte" not in found["data"]
    with pytest.raises(DataError, match=r"tasks need a tokenizer: .*these ids have no vocabulary"):
        main([str(tmp_path / "out"), f"--tasks={files[0]}", "--device=cpu"])
