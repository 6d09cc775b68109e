"""GGUF files: models of transformers, written as llama.cpp stores them, have the same logits again."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hugging_face_models import loaded, random_model, tokens

from gptperf.errors import CheckpointError, DeviceError
from gptperf.hugging_face import convert
from gptperf.hugging_face.__main__ import main as command

LAYERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3 |= {"original_max_position_embeddings": 8192}


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="the package gguf (extra gguf) is not installed")


def written(gguf: Any, path: Path, model: Any, kind: str = "F32", *, extra: dict[str, Any] | None = None) -> Path:
    """The file of a model. For LLaMA, rows i and i + D/2 of a head of queries or keys are rows 2i and 2i + 1."""
    config = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    facts = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.model_type == "mistral":
        facts["attention.sliding_window"] = config.sliding_window
    if config.rope_parameters["rope_type"] == "linear":
        facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_parameters["factor"]}
    writer = gguf.GGUFWriter(str(path), arch)
    for name, value in (facts | (extra or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](name if name.startswith("split") else f"{arch}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    if config.rope_parameters["rope_type"] == "llama3":
        plain = 5e5 ** -(np.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    for name, tensor in model.state_dict().items():
        layer, _, last = name.rpartition(".")
        if layer == "lm_head" and config.tie_word_embeddings:
            continue
        rows = tensor.numpy()
        place, _, part = layer.removeprefix("model.layers.").partition(".")
        there = f"blk.{place}.{LAYERS[part]}" if part and "layers" in layer else LAYERS[layer]
        if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            order = np.arange(len(rows)).reshape(heads, 2, -1).transpose(0, 2, 1).reshape(-1)
            rows = rows[order]
        dtype = gguf.GGMLQuantizationType[kind if rows.ndim == 2 else "F32"]
        writer.add_tensor(f"{there}.{last}", gguf.quants.quantize(rows, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": LLAMA3, "head_dim": 32, "max_position_embeddings": 16384}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_the_logits_are_those_of_the_model_that_was_written(
    gguf: Any, kind: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    theirs = random_model(kind, **changed)
    path = written(gguf, tmp_path / "model.gguf", theirs)
    ours = loaded(*convert(path, tmp_path / "out", "byte"))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0"])
def test_other_dtypes_are_the_numbers_that_are_stored(gguf: Any, dtype: str, tmp_path: Path) -> None:
    theirs = random_model("llama", intermediate_size=64)
    ours = loaded(*convert(written(gguf, tmp_path / "model.gguf", theirs, dtype), tmp_path / "out", "byte"))
    code = gguf.GGMLQuantizationType[dtype]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 2:
                stored = gguf.quants.quantize(parameter.numpy(), code)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, code)))
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"expert_count": 8}, "expert_count: found 8"),
        ({"rope.dimension_count": 4}, "rope.dimension_count: found 4, wanted 8"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, 'rope_type: found "yarn"'),
        ({"attention.head_count_kv": [2, 1, 2]}, r"attention.head_count_kv: found \[2, 1, 2\], wanted one number"),
        ({"logit_scale": 2.0}, "logit_scale: found 2.0"),
        ({"split.count": 2}, "found one of 2 files"),
        ({"block_count": 4}, "found no tensor layers.3"),
        ({"block_count": 2}, "weights that the model does not have: layers.2"),
    ],
)
def test_a_part_that_is_not_there_is_refused(gguf: Any, extra: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = written(gguf, tmp_path / "model.gguf", random_model("llama"), extra=extra)
    with pytest.raises(CheckpointError, match=text):
        convert(path, tmp_path / "out", "byte")
    assert not (tmp_path / "out").exists()


def test_other_factors_of_the_wavelengths_are_refused(gguf: Any, tmp_path: Path) -> None:
    scaling = LLAMA3 | {"high_freq_factor": 8.0}
    theirs = random_model("llama", rope_parameters=scaling, head_dim=32, max_position_embeddings=16384)
    path = written(gguf, tmp_path / "model.gguf", theirs)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: found other factors"):
        convert(path, tmp_path / "out", "byte")


def test_files_that_are_no_models(gguf: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(gguf, tmp_path / "model.gguf", random_model("llama"))
    assert command([str(path), f"--out_dir={tmp_path / 'out'}"]) == 0
    assert "--tokenizer=NAME" in capsys.readouterr().out
    whole = path.read_bytes()
    for content in (b"", b"GGUF", whole[:300], whole[:-3000], b"nonsense" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.gguf: "):
            convert(path, tmp_path / "other", "byte")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        DeviceError, match=r"needs the package gguf, which is not installed: pip install 'gptperf\[gguf\]'"
    ):
        convert(tmp_path / "model.gguf", tmp_path / "out")
