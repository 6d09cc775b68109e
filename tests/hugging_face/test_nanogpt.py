"""Checkpoints of nanoGPT: the logits of its model, written out here, and files that are refused."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hugging_face_models import BLOCK, loaded, tokens
from torch import Tensor

from gptperf import api
from gptperf.config import KEYS
from gptperf.errors import CheckpointError, DataError
from gptperf.hugging_face import convert
from gptperf.hugging_face.__main__ import main as command

ARGUMENTS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": BLOCK, "vocab_size": 257}


def state(bias: bool, vocab_size: int = 257) -> dict[str, Tensor]:
    """The state dict of a random model under nanoGPT's names; the head is the embedding."""
    torch.manual_seed(0)
    shapes = {"wte.weight": (vocab_size, 32), "wpe.weight": (BLOCK, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    for i in range(2):
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (32,), f"h.{i}.{name}.bias": (32,)}
        linears = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
        for name, shape in linears.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
    found = {f"transformer.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    found = {name: value for name, value in found.items() if bias or not name.endswith("bias")}
    return found | {"lm_head.weight": found["transformer.wte.weight"]}


def logits(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The forward pass of nanoGPT in float64."""
    w = {name.removeprefix("transformer."): value.double() for name, value in weights.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    x = w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
    for i in range(2):
        q, k, v = (
            part.unflatten(-1, (4, 8)).transpose(1, 2)
            for part in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(32, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / 8**0.5
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].t()


def saved(path: Path, weights: dict[str, Tensor], prefix: str = "", **arguments: Any) -> Path:
    """A checkpoint as nanoGPT saves it, with the states of the optimizer and the mask that older versions have."""
    named = {prefix + name: value for name, value in weights.items()}
    named |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, BLOCK, BLOCK).tril() for i in range(2)}
    content = {"model": named, "model_args": ARGUMENTS | arguments, "iter_num": 7, "best_val_loss": torch.tensor(1.5)}
    content |= {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}}
    torch.save(content | {"config": {"dataset": "shakespeare_char", "compile": True}}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("arguments", [{"bias": True, "dropout": 0.0}, {"bias": False, "dropout": 0.2}, {}])
def test_the_logits_are_those_of_nanogpt(arguments: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    weights = state(arguments.get("bias", True))
    path = saved(tmp_path / "ckpt.pt", weights, prefix, **arguments)
    checkpoint, model = convert(path, tmp_path / "out", "byte", nanogpt=True)
    assert model.dropout == arguments.get("dropout", 0)
    assert (model.weight_tying, model.norm_eps) == (True, KEYS["norm_eps"].default)
    with torch.no_grad():
        found = loaded(checkpoint, model)(tokens()).double()
    torch.testing.assert_close(found, logits(weights, tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [["--nanogpt", "PATH"], ["--nanogpt=PATH"]])
def test_the_command_says_that_a_vocabulary_of_characters_is_not_read(
    form: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "ckpt.pt", state(False, 65), bias=False, vocab_size=65)
    (tmp_path / "meta.pkl").write_bytes(b"not read")
    words = [word.replace("PATH", str(path)) for word in form]
    assert command([*words, f"--out_dir={tmp_path / 'out'}"]) == 0
    assert "tokenizer: found no tokenizer.json" in capsys.readouterr().out
    with pytest.raises(DataError, match="found no tokenizer"):
        api.load_model(tmp_path / "out", device="cpu")


class Planted:
    """An object whose pickle runs a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"vocab_size": None}, "vocab_size: found None"),
        ({"n_head": 5}, "n_embd = 32 is not a multiple of n_head = 5"),
        ({"n_experts": 8}, "found n_experts = 8, wanted n_layer, n_head"),
        ({"bias": "yes"}, "bias: found 'yes'"),
        ({"n_layer": 3}, "found no tensor h.2.ln_1.weight"),
        ({"n_layer": 1}, "weights that the model does not have: h.1.attn"),
        ({"bias": False}, "weights that the model does not have: h.0.attn.c_attn.bias"),
        ({"vocab_size": 300}, r"found \(257, 32\) for wte.weight, wanted \(300, 32\)"),
    ],
)
def test_what_is_no_model_of_nanogpt_is_refused(changed: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "ckpt.pt", state(True), **changed)
    with pytest.raises(CheckpointError, match=text):
        convert(path, tmp_path / "out", "unknown", nanogpt=True)
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    path, mark = tmp_path / "ckpt.pt", tmp_path / "mark"

    def refused(text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            convert(path, tmp_path / "out", "unknown", nanogpt=True)

    torch.save({"model": {}, "model_args": Planted(mark)}, path)
    refused("cannot be read as tensors and plain values")
    assert not mark.exists()
    torch.save({"model": {}}, path)
    refused("found no model and model_args")
    torch.save([1], path)
    refused("found no model and model_args")
    for content in (b"", b"nonsense", saved(path, state(True)).read_bytes()[:-900]):
        path.write_bytes(content)
        refused("cannot be read")
    path.unlink()
    refused("cannot be read")
