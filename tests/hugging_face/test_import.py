"""Models of Hugging Face as checkpoints: the same logits, and what cannot be taken over is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import run, run_argv, run_log
from tokenizer_helpers import CORPUS

from gptperf import api, checkpoint, hugging_face
from gptperf.data.train_tokenizer import train_tokenizer
from gptperf.distributed.replicated import Replicated
from gptperf.errors import CheckpointError, DataError, DeviceError, GptperfError
from gptperf.model import GPT
from gptperf.train import main
from gptperf.training.saved_state import restore_weights

transformers = pytest.importorskip("transformers")

GPT2 = {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def saved(folder: Path, kind: str, **changed: Any) -> Any:
    """A small model with random weights, saved as Hugging Face does, in several files."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(GPT2 | changed)))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | changed)))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_run_takes_the_weights_up(
    kind: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = saved(tmp_path / "theirs", kind), tmp_path / "out"
    path, model = hugging_face.convert(tmp_path / "theirs", out, "byte")
    ours = GPT(model).eval()
    restore_weights(checkpoint.load(path), ours, Replicated(ours, torch.float32))
    tokens = torch.randint(0, 257, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    first, *others = run_argv(corpus, tmp_path / "run", "--max_iters=1", f"--init_from={out}")
    assert main([first, str(out / "model.toml"), *others]) == 0
    assert f"weights from {path.resolve()}" in capsys.readouterr().out
    log = run_log(tmp_path / "run")
    assert log["startup_info"]["total_parameters"] == theirs.num_parameters()
    assert api.generate(api.load_model(out, device="cpu"), "ab", tokens=3)[0].startswith("ab")


def test_the_tokenizer_of_the_folder_goes_into_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    saved(tmp_path / "theirs", "llama", vocab_size=300)
    tokenizer = train_tokenizer("train:300", CORPUS)
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    hugging_face.convert(tmp_path / "theirs", tmp_path / "out")
    shutil.rmtree(tmp_path / "theirs")
    loaded = api.load_model(tmp_path / "out", device="cpu")
    assert (loaded.tokenizer.name, loaded.tokenizer.fingerprint) == ("theirs", tokenizer.fingerprint)
    assert api.generate(loaded, "the ", tokens=3)[0].startswith("the ")

    saved(tmp_path / "theirs", "llama", vocab_size=299)
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    with pytest.raises(DataError, match=r"tokenizer theirs with 300 ids, and vocab_size = 299 in config\.json"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "small")
    hugging_face.convert(tmp_path / "theirs", tmp_path / "small", "unknown")
    with pytest.raises(DataError, match=r"found no tokenizer, wanted one; convert the model with --tokenizer="):
        api.load_model(tmp_path / "small", device="cpu")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DeviceError, match="needs the package tokenizers"):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "other")
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("kind", "changed", "text"),
    [
        ("gpt2", {"model_type": "mamba"}, "model_type: found 'mamba', wanted gpt2 or llama"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function: found 'tanh'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "found true, wanted false"),
        ("gpt2", {"n_layer": None}, "n_layer"),
        ("llama", {"attention_bias": True}, "attention_bias: found true, wanted false"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE: found 'llama3'"),
        ("llama", {"rope_scaling": {"factor": 8.0}}, "wanted no scaling"),
        ("llama", {"rope_scaling": [1]}, "does not describe a llama"),
        ("llama", {"num_attention_heads": 0}, "does not describe a llama"),
        ("llama", {"hidden_size": "32"}, "does not describe a llama"),
        ("llama", {"head_dim": 16}, "head_dim: found 16"),
        ("llama", {"num_hidden_layers": 3}, "found no tensor layers.2"),
        ("llama", {"num_hidden_layers": 1}, "weights that the model does not have: layers.1"),
        ("llama", {"intermediate_size": 64}, r"found \(96, 32\) for blocks.0.ffn.gate_up.weight, wanted \(128, 32\)"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(kind: str, changed: dict[str, Any], text: str, tmp_path: Path) -> None:
    saved(tmp_path / "theirs", kind)
    described = json.loads((tmp_path / "theirs" / "config.json").read_text()) | changed
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(described))
    with pytest.raises(GptperfError, match=text):
        hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_key_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no 'n_layer', which a gpt2 has"):
        hugging_face.model_config({"model_type": "gpt2"})
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="found no object"):
        hugging_face.convert(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        hugging_face.convert(tmp_path, tmp_path / "out")


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
    with pytest.raises(CheckpointError, match="has weights alone; wanted --init_from=PATH"):
        run(corpus, tmp_path / "out", "--init_from=resume")
