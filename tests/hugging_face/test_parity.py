"""Every family and option that is imported: the logits and the greedy tokens are those of transformers."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import BLOCK, VOCABULARY, loaded, random_model, tokens

from gptperf import flops, hugging_face
from gptperf.errors import CheckpointError
from gptperf.hugging_face.described import FAMILIES
from gptperf.model import GPT
from gptperf.model.generate import generate
from gptperf.model.position import RoPE, frequencies

transformers = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e2}
LLAMA3 |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}),
    *(("gpt2", {"activation_function": name}) for name in ("gelu", "relu", "relu2", "silu", "leaky_relu")),
    ("llama", {}),
    ("llama", {"num_key_value_heads": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),  # SmolLM2
    ("llama", {"head_dim": 6}),
    ("llama", {"head_dim": 20, "attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"mlp_bias": True, "attention_bias": True}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 0.5, "high_freq_factor": 1.5}, "head_dim": 16}),
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"sliding_window": None, "head_dim": 16}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "max_window_layers": 1, **SLIDING}),
    ("qwen2", {"layer_types": ALTERNATE, **SLIDING}),
    ("qwen2", {"max_window_layers": 0, **SLIDING, "rope_parameters": LINEAR}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 8, "attention_bias": True, "hidden_size": 36, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16, "layer_types": ALTERNATE[::-1], **SLIDING, "rope_parameters": LLAMA3}),
]


def _named(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join((case[0], *case[1]))


@pytest.mark.parametrize("case", CASES, ids=_named)
def test_logits_and_greedy_tokens(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    theirs = random_model(case[0], **case[1])
    theirs.save_pretrained(tmp_path / "theirs")
    path, model = hugging_face.convert(tmp_path / "theirs", tmp_path / "out", "byte")
    ours, prompt = loaded(path, model), tokens()[0, :40]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)
        keys = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = theirs.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **keys)[0, 40:]
        drawn = {"vocab_size": VOCABULARY, "temperature": 0, "top_k": 0, "generator": torch.Generator()}
        assert generate(ours, prompt, 12, **drawn).tolist() == wanted.tolist()
    assert flops.parameters(model).total == theirs.num_parameters()


class _Float64:
    """PyTorch where float32 is float64, for the parts that transformers computes in float32 in any model."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 10, 13, 15, 16, 19, 23, 24)], ids=_named)
def test_in_float64_the_logits_are_nearly_the_same(
    case: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changed = case
    for name in (f"models.{kind}.modeling_{kind}", "modeling_rope_utils"):
        monkeypatch.setattr(importlib.import_module(f"transformers.{name}"), "torch", _Float64())
    theirs = random_model(kind, **changed, attn_implementation="eager").double()
    model = hugging_face.model_config(json.loads(theirs.config.to_json_string(use_diff=False)))
    ours = GPT(model).double().eval()
    stored = {re.sub(r"^(transformer|model)\.", "", name): value for name, value in theirs.state_dict().items()}
    state = dict(hugging_face.weights(model, stored.__getitem__))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(state.pop(name))
        assert not state
        if isinstance(ours.position, RoPE):  # whose tables are float32
            angle = torch.arange(BLOCK, dtype=torch.float64)[:, None] * frequencies(model)
            ours.position.cos, ours.position.sin = angle.cos(), angle.sin()
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kind", "changed"), CASES)
def test_no_option_is_without_effect(kind: str, changed: dict[str, Any]) -> None:
    """A case that computes what the plain model computes would show nothing."""
    plain, model = (hugging_face.model_config(random_model(kind, **keys).config.to_dict()) for keys in ({}, changed))
    assert (model == plain) is not bool(changed)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_key_that_a_description_lacks_has_the_default_of_its_family(kind: str) -> None:
    described = json.loads(transformers.AutoConfig.for_model(kind).to_json_string(use_diff=False))
    wanted = hugging_face.model_config(described)
    for key in described.keys() - {"model_type"}:
        found = hugging_face.model_config({name: value for name, value in described.items() if name != key})
        assert vars(found) | {"n_kv_head": found.kv_heads} == vars(wanted) | {"n_kv_head": wanted.kv_heads}, key


def test_descriptions_of_transformers_4_say_the_same() -> None:
    for kind, changed in CASES:
        described = random_model(kind, **changed).config.to_dict()
        older = {key: value for key, value in described.items() if key not in ("rope_parameters", "dtype")}
        older |= {"torch_dtype": "float32", "_name_or_path": "some/model"}
        if "rope_parameters" in described:
            scaling = dict(described["rope_parameters"])
            older["rope_theta"] = scaling.pop("rope_theta")
            kept = scaling["rope_type"] != "default"
            older["rope_scaling"] = scaling if kept else None
            if scaling["rope_type"] == "linear":
                older["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
        assert hugging_face.model_config(older) == hugging_face.model_config(described)


def test_the_original_context_of_llama3_is_the_context_by_default() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    described = {"model_type": "llama", "max_position_embeddings": 512, "rope_scaling": scaling}
    theirs = transformers.LlamaConfig(max_position_embeddings=512, rope_parameters=dict(scaling))
    wanted = theirs.rope_parameters["original_max_position_embeddings"]
    assert hugging_face.model_config(described).rope_original_block_size == wanted == 512


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"model_type": "mixtral"},
        'model_type: found "mixtral", wanted one of gpt2, llama, mistral, qwen2, qwen3',
    ),
    ("llama", {"model_type": "qwen3_moe"}, 'model_type: found "qwen3_moe"'),
    ("llama", {"model_type": ["llama"]}, "model_type: found"),
    ("gpt2", {"activation_function": "tanh"}, 'activation_function: found "tanh"'),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "found true, wanted false"),
    ("gpt2", {"scale_attn_weights": False}, "found false, wanted true"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: found true"),
    ("gpt2", {"n_layer": None}, "n_layer: found None"),
    ("gpt2", {"n_embd": 33}, "n_embd = 33 is not a multiple of n_head = 4"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act: found "gelu", wanted silu'),
    ("llama", {"num_attention_heads": 0}, "n_head: found 0, .*n_head is num_attention_heads"),
    ("llama", {"hidden_size": "32"}, "n_embd: found '32'.*n_embd is hidden_size"),
    ("llama", {"head_dim": 7}, "head_dim = 7 is odd"),
    ("llama", {"attention_bias": "qkv"}, "attention_bias: found"),
    ("llama", {"num_key_value_heads": 3}, "n_head = 4 is not a multiple of n_kv_head = 3"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, 'rope_scaling.rope_type: found "yarn"'),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 8.0}}, 'rope_type: found "dynamic"'),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, 'rope_parameters.rope_type: found "longrope"'),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, 'rope_type: found "mrope"'),
    ("qwen2", {"rope_scaling": {"mrope_section": [1, 1, 2]}}, "rope_scaling.mrope_section: found"),
    ("llama", {"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor: found 8.0, wanted no such key"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: found null, wanted a number"),
    ("llama", {"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "rope_scaling.attention_factor: found 2.0"),
    ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_high_freq_factor = 4.0 is not above"),
    ("llama", {"rope_scaling": [1]}, r"rope_scaling: found \[1\]"),
    ("qwen3", {"rope_parameters": {"full_attention": LINEAR}}, "rope_parameters.full_attention: found"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, wanted 1"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: found"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: found .* wanted 3 of"),
    ("qwen2", {"layer_types": ALTERNATE}, "layer_types: found .* no window is set and in use"),
    ("mistral", {"sliding_window": 0}, "sliding_window: found 0"),
    ("mistral", {"sliding_window": "8"}, "sliding_window: found"),
    ("mistral", {"attention_bias": True}, "attention_bias: found true, wanted false"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: found"),
    ("llama", {"num_local_experts": 8}, "num_local_experts: found 8"),
    ("llama", {"attention_multiplier": 0.1}, "attention_multiplier: found 0.1"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: found 30.0"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling: found"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved: found true, wanted false"),
    ("llama", {"is_causal": False}, "is_causal: found false"),
    ("qwen2", {"use_mrope": True}, "use_mrope: found true, wanted false"),
    ("llama", {"sliding_window": 8}, "sliding_window: found 8"),
    ("llama", {"auto_map": {"AutoModel": "other.py"}}, "auto_map: found"),
    ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config: found"),
    ("llama", {"layer_types": ALTERNATE}, "layer_types: found"),
]


@pytest.mark.parametrize(("kind", "changed", "text"), REFUSED)
def test_a_part_that_is_not_there_is_refused_with_its_key(kind: str, changed: dict[str, Any], text: str) -> None:
    described = random_model(kind).config.to_dict()
    assert hugging_face.model_config(described)
    with pytest.raises(CheckpointError, match=f"^config.json: .*{text}"):
        hugging_face.model_config(described | changed)


def test_keys_of_published_models_that_change_nothing_are_let_through() -> None:
    for kind, keys in {
        "llama": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        "qwen2": {"use_mrope": False, "sliding_window": None, "use_sliding_window": False},
        "gpt2": {"n_ctx": 64, "_num_labels": 1, "task_specific_params": {"text-generation": {"do_sample": True}}},
        "mistral": {"pad_token_id": 3, "max_length": 20, "unsloth_version": "2025.1"},
    }.items():
        described = random_model(kind).config.to_dict()
        assert hugging_face.model_config(described | keys)


_META = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072}
_META |= {"num_key_value_heads": 8, "vocab_size": 128256, "mlp_bias": False, "attention_bias": False}
_META |= {"rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}}
PUBLISHED: list[tuple[int, dict[str, Any]]] = [
    # Number of parameters; sizes in the order of `_SIZES`, and further keys, of gpt2, Llama-3.2-1B, Llama-3.1-8B,
    # Mistral-7B-v0.1, SmolLM2-135M, Qwen2.5-0.5B and Qwen3-0.6B.
    (124_439_808, {"model_type": "gpt2", "n_ctx": 1024}),
    (1_235_814_400, _META | {"sizes": (2048, 16, 32, 8192), "tie_word_embeddings": True}),
    (8_030_261_248, _META | {"sizes": (4096, 32, 32, 14336)}),
    (7_241_732_096, {"model_type": "mistral", "sizes": (4096, 32, 32, 14336), "sliding_window": 4096}),
    (
        134_515_008,
        {
            "model_type": "llama",
            "sizes": (576, 30, 9, 1536),
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    (
        494_032_768,
        {
            "model_type": "qwen2",
            "sizes": (896, 24, 14, 4864),
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "max_window_layers": 21,
        },
    ),
    (
        596_049_920,
        {
            "model_type": "qwen3",
            "sizes": (1024, 28, 16, 3072),
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
]
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@pytest.mark.parametrize(("count", "described"), PUBLISHED)
def test_published_models_have_their_number_of_parameters(count: int, described: dict[str, Any]) -> None:
    sizes = dict(zip(_SIZES, described.get("sizes", ()), strict=False))
    model = hugging_face.model_config({key: value for key, value in described.items() if key != "sizes"} | sizes)
    assert flops.parameters(model).total == count
