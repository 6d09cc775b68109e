"""The whole resumable state of a run: to a checkpoint and back.

What a batch holds and what dropout drops are functions of seed and iteration alone, so the data position is the
iteration. The random states are saved besides, for components from outside that draw from them.
"""

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptperf.checkpoint import Checkpoint
from gptperf.config import KEYS, Config
from gptperf.errors import CheckpointError, DataError
from gptperf.optim import AdamW
from gptperf.parallel import Replicated

__all__ = ["TrainState", "changed_keys", "restore", "restore_weights", "snapshot"]

_MAY_DIFFER = frozenset({"arch_preset", "attention_backend", "dropout", "d_ff_multiple", "vocab_multiple"})
_MUST_MATCH = frozenset({"dtype", "seed"}) | {k for k, key in KEYS.items() if key.section == "model"} - _MAY_DIFFER
_DERIVED = ("kv_heads", "ffn_width", "padded_vocab_size")


@dataclass
class TrainState:
    """Where a run stands, beside its tensors."""

    step: int = 0
    """Iterations done; also the position in the data."""
    tokens: int = 0
    """Tokens trained on."""
    train_s: float = 0.0
    """Seconds spent in iterations, without evaluation, saving and compilation."""
    timed_tokens: int = 0
    """Tokens of those iterations."""
    best_val_loss: float | None = None
    best_step: int | None = None
    run_name: str = ""
    """Stem of the run's journal."""


def snapshot(
    weights: Replicated,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    config: Config,
    fingerprint: str,
    tokenizer: Mapping[str, Any],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file and the JSON state of this iteration. The tensors are views, not copies."""
    moments = {
        f"{key}.{name}": view
        for key in ("exp_avg", "exp_avg_sq")
        for name, view in weights.optimizer_views(optimizer, key)
    }
    rng = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        rng["cuda"] = torch.cuda.get_rng_state()
    tensors = {
        "model": dict(weights.masters()),
        "optimizer": moments | {"steps": optimizer.steps},
        "rng": rng,
    }
    kind, keys, *position = np.random.get_state()
    version, internal, gauss = random.getstate()
    tensors["rng"]["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return tensors, {
        "train_state": dataclasses.asdict(state),
        "scaler": scaler.state_dict(),
        "rng": {"python": [version, list(internal), gauss], "numpy": [kind, *position]},
        "config": config.sections(),
        "model": {name: getattr(config.model, name) for name in _DERIVED},
        "dataset_fingerprint": fingerprint,
        "tokenizer": dict(tokenizer),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What the bits of a run depend on beside its configuration."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": "" if cuda else str(torch.get_num_threads()),
    }


def changed_keys(saved: Mapping[str, Any], config: Config) -> list[str]:
    """`key: saved -> now` for what differs between a checkpoint's configuration and this one.

    Raises:
        CheckpointError: a key differs that fixes the weights, the numbers or the order of the data; all are named.
    """
    before = {name: value for section in saved["config"].values() for name, value in section.items()}
    now = config.flat()
    before |= saved["model"]
    now |= {name: getattr(config.model, name) for name in _DERIVED}
    before["d_ff"] = before["n_kv_head"] = now["d_ff"] = now["n_kv_head"] = None  # by what follows from them
    per_iter = ("batch_size", "gradient_accumulation_steps")
    must = _MUST_MATCH | set(_DERIVED)
    if before[per_iter[0]] * before[per_iter[1]] != now[per_iter[0]] * now[per_iter[1]]:
        must |= set(per_iter)
    lines = {name: f"{name}: {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]}
    fatal = [line for name, line in lines.items() if name in must]
    if fatal:
        raise CheckpointError(f"the checkpoint was made with another configuration (saved -> now): {'; '.join(fatal)}")
    return list(lines.values())


def restore(
    checkpoint: Checkpoint,
    weights: Replicated,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    fingerprint: str,
) -> TrainState:
    """Put a checkpoint's state into the objects of a run; call it after all of them are built.

    Raises:
        DataError: the data set is another one.
        CheckpointError: a tensor is missing or has another shape.
    """
    saved = checkpoint.state
    if saved["dataset_fingerprint"] != fingerprint:
        raise DataError(
            f"{checkpoint.path}: it was trained on the data set {saved['dataset_fingerprint'][:12]} (fingerprint), "
            f"found {fingerprint[:12]}; wanted the same shards"
        )
    restore_weights(checkpoint, weights)
    for key in ("exp_avg", "exp_avg_sq"):
        for name, view in weights.optimizer_views(optimizer, key):
            view.copy_(_tensor(checkpoint, "optimizer", f"{key}.{name}", view.shape))
    optimizer.steps.copy_(_tensor(checkpoint, "optimizer", "steps", optimizer.steps.shape))
    scaler.load_state_dict(saved["scaler"])
    rng = checkpoint.tensors["rng"]
    torch.set_rng_state(rng["torch"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    version, internal, gauss = saved["rng"]["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, *position = saved["rng"]["numpy"]
    np.random.set_state((kind, rng["numpy"].numpy().astype(np.uint32), *position))
    return TrainState(**saved["train_state"])


@torch.no_grad()
def restore_weights(checkpoint: Checkpoint, weights: Replicated) -> None:
    """Put a checkpoint's master weights into a model.

    Raises:
        CheckpointError: names or shapes differ.
    """
    extra = checkpoint.tensors["model"].keys() - weights.places.keys()
    if extra:
        raise CheckpointError(
            f"{checkpoint.path}: found weights that this model has not: {', '.join(sorted(extra)[:5])}"
        )
    for name, master in weights.masters():
        master.copy_(_tensor(checkpoint, "model", name, master.shape))
    weights.publish()


def _tensor(checkpoint: Checkpoint, stem: str, name: str, shape: torch.Size) -> Tensor:
    found = checkpoint.tensors[stem].get(name)
    if found is None or found.shape != shape:
        what = "nothing" if found is None else str(tuple(found.shape))
        raise CheckpointError(f"{checkpoint.path}: {stem}: found {what} for {name}, wanted {tuple(shape)}")
    return found
