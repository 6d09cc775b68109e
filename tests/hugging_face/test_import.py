"""Models of Hugging Face as checkpoints: files, dtypes, tied heads, tokenizers, and runs that start from them."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import VOCABULARY, loaded, random_model, tokens
from run_helpers import run, run_argv, run_log
from safetensors.torch import load_file, save_file
from tokenizer_helpers import CORPUS

from gptperf import api, hugging_face
from gptperf.data.loader import validation_batches
from gptperf.data.shards import TokenSource
from gptperf.data.train_tokenizer import train_tokenizer
from gptperf.errors import CheckpointError, DataError, DeviceError, GptperfError
from gptperf.hugging_face.__main__ import main as command
from gptperf.train import main

pytest.importorskip("transformers")


def saved(folder: Path, kind: str, **changed: Any) -> Any:
    """A small model with random weights, saved as Hugging Face does, in several files."""
    model = random_model(kind, **changed)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


@pytest.mark.parametrize(("kind", "changed"), [("gpt2", {}), ("qwen3", {"head_dim": 16, "attention_bias": True})])
def test_a_run_goes_on_at_the_loss_of_the_model(
    kind: str, changed: dict[str, Any], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = saved(tmp_path / "theirs", kind, **changed), tmp_path / "out"
    assert command([str(tmp_path / "theirs"), f"--out_dir={out}", "--tokenizer=byte"]) == 0
    flags = ["--max_iters=1", "--learning_rate=1e-20", "--min_lr=0", f"--init_from={out}", "--block_size=32"]
    flags = flags if kind != "gpt2" else flags[:-1]
    first, *others = run_argv(corpus, tmp_path / "run", *flags)
    assert main([first, str(out / "model.toml"), *others]) == 0
    assert "weights from" in capsys.readouterr().out
    log, source = run_log(tmp_path / "run"), TokenSource.open(corpus / "data" / "text", "val")
    assert log["startup_info"]["total_parameters"] == theirs.num_parameters()
    block = 64 if kind == "gpt2" else 32
    sums = []
    with torch.no_grad():
        for inputs, targets in validation_batches(source, block_size=block, batch_size=2, max_batches=4):
            logits = theirs(inputs).logits
            sums.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    assert log["eval_steps"][-1]["val_loss"] == pytest.approx(sum(sums) / len(sums), abs=1e-5)
    assert api.generate(api.load_model(out, device="cpu"), "ab", tokens=3)[0].startswith("ab")


def test_half_precision_and_mixed_dtypes(tmp_path: Path) -> None:
    theirs = random_model("llama")
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    state = {name: value.to(dtypes[i % 4]).clone() for i, (name, value) in enumerate(theirs.state_dict().items())}
    theirs.load_state_dict(state)  # in float32 again
    theirs.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    ours = loaded(*hugging_face.convert(tmp_path, tmp_path / "out", "byte"))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)
    first = next(iter(state))
    save_file(state | {first: state[first].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{first.removeprefix('model.')}: found torch.float8_e4m3fn, wanted"):
        hugging_face.convert(tmp_path, tmp_path / "other", "byte")


EMBEDDINGS = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}


@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("names", ["embedding", "head", "both", "different"])
def test_a_tied_head_under_either_name(kind: str, names: str, tmp_path: Path) -> None:
    theirs = random_model(kind, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    state, lines = load_file(tmp_path / "model.safetensors"), list[str]()
    embedding = state.pop(EMBEDDINGS[kind])
    if names != "head":
        state[EMBEDDINGS[kind]] = embedding
    if names != "embedding":
        state["lm_head.weight"] = embedding.flip(0).contiguous() if names == "different" else embedding.clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    path, model = hugging_face.convert(tmp_path, tmp_path / "out", "byte", tell=lines.append)
    assert model.weight_tying is (names != "different")
    assert any("both are kept, weight_tying = false" in line for line in lines) is (names == "different")
    with torch.no_grad():
        logits = theirs(tokens()).logits
        wanted = logits.flip(-1) if names == "different" else logits
        torch.testing.assert_close(loaded(path, model)(tokens()), wanted, rtol=0, atol=1e-5)
        again = type(theirs).from_pretrained(tmp_path)(tokens()).logits  # transformers reads the same from the file
        torch.testing.assert_close(again, wanted, rtol=0, atol=1e-5)


def test_a_padded_vocabulary(tmp_path: Path) -> None:
    for kind, tied in [("llama", False), ("qwen2", True), ("gpt2", False)]:
        theirs = random_model(kind, tie_word_embeddings=tied)
        if kind == "gpt2":
            with torch.no_grad():  # logits of about -10, far below those of a row of zeros
                theirs.transformer.ln_f.bias += 1
                theirs.lm_head.weight -= 0.3
            assert theirs(tokens()).logits.mean() < -8
        theirs.save_pretrained(tmp_path / kind)
        out = tmp_path / f"out_{kind}"
        assert command([str(tmp_path / kind), f"--out_dir={out}", "--tokenizer=byte", "--vocab_multiple=64"]) == 0
        model = api.load_model(out, device="cpu").model
        inputs, targets = tokens()[:, :-1], tokens()[:, 1:]
        with torch.no_grad():
            logits = model(inputs)
            assert logits.shape[-1] == 320
            torch.testing.assert_close(logits[..., :VOCABULARY], theirs(inputs).logits, rtol=0, atol=1e-5)
            of_theirs = torch.nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
            more = model(inputs, targets) - of_theirs
        assert 0 < more < math.log(320 / VOCABULARY)


def with_tokenizer(folder: Path, size: int, **files: dict[str, Any]) -> Any:
    tokenizer = train_tokenizer("train:300", CORPUS)
    saved(folder, "llama", vocab_size=size)
    (folder / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    for name, content in files.items():
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | content))
    return tokenizer


def test_the_tokenizer_of_the_folder_goes_into_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    tokenizer = with_tokenizer(tmp_path / "theirs", 300)
    hugging_face.convert(tmp_path / "theirs", tmp_path / "out")
    shutil.rmtree(tmp_path / "theirs")
    found = api.load_model(tmp_path / "out", device="cpu")
    assert (found.tokenizer.name, found.tokenizer.fingerprint) == ("theirs", tokenizer.fingerprint)
    assert api.generate(found, "the ", tokens=3)[0].startswith("the ")

    with_tokenizer(tmp_path / "theirs", 299)
    with pytest.raises(DataError, match="tokenizer theirs with 300 ids, and a model with vocab_size = 299"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "small")
    lines: list[str] = []
    hugging_face.convert(tmp_path / "theirs", tmp_path / "small", "unknown")
    with pytest.raises(DataError, match=r"found no tokenizer, wanted one; convert the model with --tokenizer="):
        api.load_model(tmp_path / "small", device="cpu")
    hugging_face.convert(tmp_path / "theirs", tmp_path / "bytes", "byte", tell=lines.append)
    assert lines == ["tokenizer: byte with 257 ids of 299; 256 ends a document"]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DeviceError, match="needs the package tokenizers"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "other")
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_the_end_of_a_document_is_the_one_that_the_model_names(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    end = {"id": 300, "content": "<|done|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    cases: list[tuple[dict[str, dict[str, Any]], str]] = [
        ({"generation_config": {"eos_token_id": [7, 300]}, "config": {"eos_token_id": 299}}, "<|done|>"),
        ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 300}}, "<|done|>"),
        ({"generation_config": {"eos_token_id": 300}, "tokenizer_config": {"eos_token": "<|endoftext|>"}}, ""),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 7}}, ""),  # 7 is an ordinary token
    ]
    for i, (files, wanted) in enumerate(cases):
        folder = tmp_path / str(i)
        tokenizer = with_tokenizer(folder, 301, **files)
        described = json.loads((folder / "tokenizer.json").read_text())
        described["added_tokens"].append(end | {"normalized": False})
        (folder / "tokenizer.json").write_text(json.dumps(described))
        hugging_face.convert(folder, tmp_path / f"out{i}")
        found = api.load_model(tmp_path / f"out{i}", device="cpu").tokenizer
        assert found.eot == (300 if wanted else tokenizer.eot)
    hugging_face.convert(tmp_path / "2", tmp_path / "named", eot="<|done|>")
    assert api.load_model(tmp_path / "named", device="cpu").tokenizer.eot == 300


QWEN_AS_LLAMA = {"model_type": "llama", "max_window_layers": None}


@pytest.mark.parametrize(
    ("kind", "changed", "text"),
    [
        ("llama", {"num_hidden_layers": 4}, "found no tensor layers.3"),
        ("llama", {"num_hidden_layers": 1}, "weights that the model does not have: layers.1"),
        ("llama", {"intermediate_size": 64}, r"found \(96, 32\) for blocks.0.ffn.gate_up.weight, wanted \(128, 32\)"),
        ("llama", {"vocab_size": 300}, r"found \(257, 32\) for wte.weight, wanted \(300, 32\)"),
        ("llama", {"attention_bias": True}, "found no tensor layers.0.self_attn.q_proj.bias"),
        ("llama", {"model_type": "qwen3", "head_dim": 8}, "found no tensor layers.0.self_attn.q_norm.weight"),
        ("qwen2", QWEN_AS_LLAMA, "weights that the model does not have: layers.0.self_attn.k_proj.bias"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: found"),
    ],
)
def test_weights_that_do_not_fit_are_refused(kind: str, changed: dict[str, Any], text: str, tmp_path: Path) -> None:
    saved(tmp_path / "theirs", kind)
    config = tmp_path / "theirs" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(GptperfError, match=text):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_folders_without_a_model(tmp_path: Path) -> None:
    def refused(text: str, where: Path = tmp_path) -> None:
        with pytest.raises(CheckpointError, match=text):
            hugging_face.convert(where, tmp_path / "out")

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(r"config\.json: cannot be read: .*; nearest: .*model\.gguf")
    (tmp_path / "config.json").write_text("[1]")
    refused("found JSON that is not an object")
    (tmp_path / "config.json").write_text("{")
    refused(r"config\.json: cannot be read")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(r"found 0 \*\.safetensors, wanted model\.safetensors or an index$")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    refused(r"pytorch_model\.bin is a pickle, which is not read: save the model as safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(r"found adapter_config\.json, wanted a whole model")
    (tmp_path / "ckpt.pt").write_bytes(b"not read")
    refused(r"found a file, wanted a folder .*; nearest: --nanogpt", tmp_path / "ckpt.pt")
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_or_torn(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", "gpt2")
    with pytest.raises(DataError, match="nonsense"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "nonsense")
    first, *others = sorted((tmp_path / "theirs").glob("*.safetensors"))
    for path in (first, *others):  # another variant of the same weights, which the index does not name
        path.with_name(path.name.replace("model-", "model.fp16-")).write_bytes(b"not read")
    hugging_face.convert(tmp_path / "theirs", tmp_path / "whole", "byte")
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{first.name}: cannot be read"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")
    index.unlink()
    with pytest.raises(CheckpointError, match=r"found \d+ \*\.safetensors, wanted model\.safetensors or an index"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")


def test_a_run_that_is_there_is_left_alone(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", "gpt2")
    hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")
    with pytest.raises(CheckpointError, match="found checkpoints, wanted another --out_dir"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")
    (tmp_path / "out" / "checkpoints" / "step-00000000" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="found checkpoints, wanted another --out_dir"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")


def test_weights_alone_are_not_resumed(corpus: Path, tmp_path: Path) -> None:
    saved(tmp_path / "theirs", "gpt2")
    hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")
    with pytest.raises(CheckpointError, match="no optimizer state, so it cannot be resumed; wanted --init_from=PATH"):
        run(corpus, tmp_path / "out", "--init_from=resume")


def test_the_command_takes_one_model(tmp_path: Path) -> None:
    for words in ([], ["folder", "--nanogpt=ckpt.pt"]):
        with pytest.raises(GptperfError, match=r"found .*, wanted MODEL or --nanogpt=PATH"):
            command([*words, f"--out_dir={tmp_path / 'out'}"])
