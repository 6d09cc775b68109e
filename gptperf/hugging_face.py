"""Starts from a Hugging Face model: `python -m gptperf.hugging_face hf:openai-community/gpt2 --out_dir=out/gpt2`.

The command writes a checkpoint with the weights of a GPT-2 or LLaMA, and its architecture to OUT_DIR/model.toml. These
commands then use the checkpoint:

    python -m gptperf.train OUT_DIR/model.toml --init_from=OUT_DIR --out_dir=OTHER --dataset=...
    python -m gptperf.sample OUT_DIR --prompt="..."

The model is a folder with config.json and *.safetensors, or hf:REPO, which is downloaded (pip install 'gptperf[hf]').
A tokenizer.json in the folder goes into the checkpoint.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptperf import checkpoint
from gptperf.config import Config, ModelConfig
from gptperf.config.flags import Flags, parse
from gptperf.data.hub import CACHE, by_hand
from gptperf.data.json_tokenizer import TOKENIZER_JSON
from gptperf.data.tokenizers import load_tokenizer
from gptperf.errors import CheckpointError, DataError, DeviceError, GptperfError, run_main
from gptperf.files import replace_text
from gptperf.model import GPT
from gptperf.monitor.run_lock import RunLock
from gptperf.training.saved_state import VOCABULARY, vocabulary_tensors

__all__ = ["convert", "main", "model_config", "weights"]

_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Suffixes of the names of masks and tables that some files hold and that are not weights."""
# Hugging Face's name of a part of a GPT-2 block -> its name here.
_GPT2 = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.out"}
_GPT2 |= {"ln_1": "norm1", "ln_2": "norm2"}

Described = Mapping[str, Any]
"""Content of a config.json."""
Find = Callable[[str], Tensor]
"""Returns a tensor by its name in Hugging Face's model."""


@dataclass(frozen=True, kw_only=True)
class _ConvertFlags(Flags):
    """Which model, and where the checkpoint goes."""

    model: str
    """Folder with config.json and *.safetensors, or hf:REPO."""
    out_dir: Path
    """Folder for the checkpoint."""
    tokenizer: str = ""
    """Tokenizer of the model, a name as for prepare, or unknown; default: the folder's tokenizer.json, else gpt2 for a
    vocabulary of 50257, else unknown."""
    eot: str = ""
    """Token that ends a document; default: the one that the tokenizer names."""


def model_config(described: Described) -> ModelConfig:
    """Returns the architecture that a config.json describes.

    Raises:
        CheckpointError: The model is neither a GPT-2 nor a LLaMA, or has a part that gptperf does not have.
    """
    kind = described.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"config.json: model_type: found {kind!r}, wanted gpt2 or llama")
    try:
        return ModelConfig(**(_gpt2_keys if kind == "gpt2" else _llama_keys)(described))
    except GptperfError:
        raise
    except KeyError as error:
        raise CheckpointError(f"config.json: found no {error}, which a {kind} has") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: does not describe a {kind}: {error}") from error


def _gpt2_keys(described: Described) -> dict[str, Any]:
    for key, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        _want(described, key, wanted)
    name = described.get("activation_function", "gelu_new")
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"config.json: activation_function: found {name!r}, wanted one of {', '.join(_ACTIVATIONS)}"
        )
    return {
        "arch_preset": "gpt2_openai",
        "n_layer": described["n_layer"],
        "n_head": described["n_head"],
        "n_embd": described["n_embd"],
        "d_ff": described.get("n_inner"),
        "block_size": described["n_positions"],
        "vocab_size": described["vocab_size"],
        "normalization": "layernorm",
        "activation": _ACTIVATIONS[name],
        "position_encoding": "learned_absolute",
        "norm_position": "pre",
        "ffn_type": "standard",
        "bias": True,
        "weight_tying": described.get("tie_word_embeddings", True),
        "norm_eps": described.get("layer_norm_epsilon", 1e-5),
    }


def _llama_keys(described: Described) -> dict[str, Any]:
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        _want(described, key, wanted)
    rope = described.get("rope_scaling") or described.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or "factor" in rope:
        raise CheckpointError(f"config.json: RoPE: found {kind!r}, wanted no scaling of the positions")
    width, heads = described["hidden_size"], described["num_attention_heads"]
    head_dim = described.get("head_dim") or width // heads
    if head_dim * heads != width:
        raise CheckpointError(
            f"config.json: head_dim: found {head_dim}, wanted hidden_size / heads = {width / heads:g}"
        )
    return {
        "arch_preset": "llama",
        "n_layer": described["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": described.get("num_key_value_heads"),
        "n_embd": width,
        "d_ff": described["intermediate_size"],
        "block_size": described["max_position_embeddings"],
        "vocab_size": described["vocab_size"],
        "normalization": "rmsnorm",
        "position_encoding": "rope",
        "norm_position": "pre",
        "ffn_type": "swiglu",
        "bias": False,
        "weight_tying": described.get("tie_word_embeddings", False),
        "norm_eps": described["rms_norm_eps"],
        "rope_theta": float(described.get("rope_theta") or rope.get("rope_theta", 1e4)),
    }


def _want(described: Described, key: str, wanted: object) -> None:
    """Checks that a key has the only value that gptperf supports; a missing key counts as that value.

    Raises:
        CheckpointError: The key has another value.
    """
    found = described.get(key, wanted)
    if found != wanted:
        raise CheckpointError(f"config.json: {key}: found {json.dumps(found)}, wanted {json.dumps(wanted)}")


def weights(model: ModelConfig, find: Find) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and value of every parameter of gptperf's model, made from the tensors of Hugging Face's model.

    Args:
        model: What `model_config` returned.
        find: Returns a tensor by its name in Hugging Face's model, without the prefix "transformer." or "model.".
    """
    blocks = range(model.n_layer)
    if model.ffn_type == "swiglu":
        yield "wte.weight", find("embed_tokens.weight")
        for i in blocks:
            theirs, ours = f"layers.{i}.", f"blocks.{i}."
            yield ours + "norm1.weight", find(theirs + "input_layernorm.weight")
            yield ours + "norm2.weight", find(theirs + "post_attention_layernorm.weight")
            yield ours + "attention.qkv.weight", torch.cat([find(f"{theirs}self_attn.{x}_proj.weight") for x in "qkv"])
            yield ours + "attention.out.weight", find(theirs + "self_attn.o_proj.weight")
            gate_up = [find(f"{theirs}mlp.{x}_proj.weight") for x in ("gate", "up")]
            yield ours + "ffn.gate_up.weight", torch.cat(gate_up)
            yield ours + "ffn.out.weight", find(theirs + "mlp.down_proj.weight")
        yield "norm.weight", find("norm.weight")
    else:
        yield "wte.weight", find("wte.weight")
        yield "position.wpe.weight", find("wpe.weight")
        for kind in ("weight", "bias"):
            for i in blocks:
                for theirs, ours in _GPT2.items():  # GPT-2 stores transposed matrices; .t() does not change a vector
                    yield f"blocks.{i}.{ours}.{kind}", find(f"h.{i}.{theirs}.{kind}").t()
            yield f"norm.{kind}", find(f"ln_f.{kind}")
    if not model.weight_tying:
        yield "lm_head.weight", find("lm_head.weight")


class _StoredTensors:
    """Reads tensors of the *.safetensors files of a folder by name, one at a time."""

    def __init__(self, folder: Path):
        self.folder, self.used = folder, set[str]()
        self.places: dict[str, tuple[Any, str]] = {}
        for path in self._paths():
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
            for name in file.keys():  # noqa: SIM118 - the file is not a dict
                self.places[name.removeprefix("transformer.").removeprefix("model.")] = (file, name)

    def _paths(self) -> list[Path]:
        """Returns the files that the index names, or the only file; the folder may hold other variants too."""
        index = self.folder / _FILES[2]
        if index.exists():
            try:
                names = set(json.loads(index.read_bytes())["weight_map"].values())
                return [self.folder / name for name in sorted(names)]
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: cannot be read: {error!r}") from error
        one = self.folder / "model.safetensors"
        paths = [one] if one.exists() else sorted(self.folder.glob(_FILES[1]))
        if len(paths) != 1:
            raise CheckpointError(
                f"{self.folder}: found {len(paths)} {_FILES[1]}, wanted model.safetensors or an index"
            )
        return paths

    def find(self, name: str) -> Tensor:
        """Returns a tensor in float32."""
        if name not in self.places:
            raise CheckpointError(f"{self.folder}: found no tensor {name}")
        self.used.add(name)
        file, stored = self.places[name]
        tensor: Tensor = file.get_tensor(stored)
        return tensor.float()

    def unused(self) -> list[str]:
        """Returns the names of the tensors that `find` has not returned, except a tied lm_head."""
        left = self.places.keys() - self.used - {"lm_head.weight"}
        return sorted(name for name in left if not name.endswith(_NO_WEIGHTS))


def convert(folder: Path, out_dir: Path, tokenizer: str = "", eot: str = "") -> tuple[Path, ModelConfig]:
    """Writes the checkpoint and model.toml of a Hugging Face model.

    Args:
        folder: Folder of the Hugging Face model.
        out_dir: Folder for the checkpoint and model.toml.
        tokenizer: Name of the tokenizer for `load_tokenizer`, or "unknown". "" means the folder's tokenizer.json;
            without one, gpt2 for a vocabulary of 50257, and unknown for any other.
        eot: Token that ends a document; "": the one that the tokenizer names.

    Returns:
        Folder of the checkpoint, and the architecture.

    Raises:
        CheckpointError: gptperf does not support the model, its files are corrupt, or `out_dir` has checkpoints.
        DataError: The tokenizer is unknown, cannot be loaded, or has more ids than the model.
        DeviceError: A package of the tokenizer is not installed.
        DiskError: The checkpoint cannot be written.
    """
    try:
        described = json.loads((folder / _FILES[0]).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / _FILES[0]}: cannot be read: {error}") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{folder / _FILES[0]}: found no object, wanted the description of a model")
    model = model_config(described)
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in GPT(model).named_parameters()}
    stored = _StoredTensors(folder)
    found = {name: tensor.contiguous() for name, tensor in weights(model, stored.find)}
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{folder}: found {tuple(found[name].shape)} for {name}, wanted {tuple(shape)}")
    if stored.unused():
        raise CheckpointError(f"{folder}: found weights that the model does not have: {', '.join(stored.unused()[:5])}")
    described_tokenizer, vocabulary = _tokenizer(folder, model, tokenizer, eot)
    config = Config(model=model)
    state: dict[str, Any] = {
        "config": config.sections(),
        "model": {name: getattr(model, name) for name in ("kv_heads", "ffn_width", "padded_vocab_size")},
        "tokenizer": described_tokenizer,
        "source": str(folder),
    }
    with RunLock(out_dir):
        checkpoint.clean(out_dir / "checkpoints")
        if any((out_dir / "checkpoints").glob("step-*")):
            raise CheckpointError(f"{out_dir}: found checkpoints, wanted another --out_dir")
        keys = config.sections()["model"] | {"n_kv_head": model.kv_heads, "d_ff": model.ffn_width}
        lines = ["[model]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        replace_text(out_dir / "model.toml", "\n".join(lines) + "\n")
        tensors = {"model": found} | ({VOCABULARY: vocabulary_tensors(vocabulary)} if vocabulary else {})
        return checkpoint.save(out_dir / "checkpoints", step=0, tensors=tensors, state=state), model


def _tokenizer(
    folder: Path, model: ModelConfig, name: str, eot: str
) -> tuple[dict[str, str | int], Mapping[str, bytes]]:
    """Returns what a checkpoint's state tells about the tokenizer, and the files of the tokenizer; see `convert`."""
    if not name:
        inside = folder / TOKENIZER_JSON
        name = str(inside) if inside.exists() else "gpt2" if model.vocab_size == 50257 else "unknown"
    if name == "unknown":
        return {"name": name, "fingerprint": ""}, {}
    tokenizer = load_tokenizer(name, eot=eot or None)
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{folder}: found tokenizer {tokenizer.name} with {tokenizer.vocab_size:,} ids, and vocab_size = "
            f"{model.vocab_size:,} in config.json; wanted --tokenizer=PATH of the model's own, or --tokenizer=unknown"
        )
    described: dict[str, str | int] = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    return described | {"vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}, tokenizer.files


def _downloaded(name: str) -> Path:
    """Downloads a model from the Hugging Face hub and returns its folder."""
    repo = name.removeprefix("hf:")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise DeviceError(f"{name} needs the package huggingface_hub: pip install 'gptperf[hf]'") from error
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=list(_FILES)))
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).splitlines() or [""])[0]
        remedy = by_hand(", ".join(_FILES), f"{repo}/tree/main", "give FOLDER in place of the name")
        raise CheckpointError(
            f"{name}: cannot be downloaded ({type(error).__name__}: {line}). {remedy}, {CACHE}"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        GptperfError: the command line is wrong, or the model cannot be converted.
    """
    about = "Make a checkpoint of the weights of a Hugging Face GPT-2 or LLaMA."
    flags = parse(_ConvertFlags, argv, "gptperf.hugging_face", about)
    folder = _downloaded(flags.model) if flags.model.startswith("hf:") else Path(flags.model)
    path, model = convert(folder, flags.out_dir, flags.tokenizer, flags.eot)
    print(f"{path}: {model.n_layer} layers of {model.n_embd}, vocab_size {model.vocab_size:,}")
    out = flags.out_dir
    print(f"python -m gptperf.train {out}/model.toml --init_from={out} --out_dir=... --dataset=...")
    return 0


if __name__ == "__main__":
    run_main(main)
