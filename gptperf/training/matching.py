"""Decides what must be equal for a run to continue from a checkpoint, and what may differ with a warning.

A key that determines the weights, the numbers or the order of the data must be equal. Other keys may differ, and so may
the versions and the layout that the bits depend on; the run then continues, but it is not bit for bit the run without
the break.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gptperf.config import KEYS, Config
from gptperf.errors import CheckpointError
from gptperf.training.engine import Engine
from gptperf.training.kernel_digest import kernel_digest

__all__ = ["DERIVED", "Told", "changed_keys", "changed_versions", "keep_schedule", "versions"]

DERIVED = ("kv_heads", "head_width", "ffn_width", "attention_biases", "padded_vocab_size")
"""Properties that follow from several keys. They are compared in place of those keys."""
_TOLD_BY_DERIVED = ("d_ff", "n_kv_head", "head_dim", "attention_bias")
_MAY_DIFFER = frozenset({"arch_preset", "attention_backend", "dropout", "d_ff_multiple", "vocab_multiple"})
_MAY_DIFFER |= {"residual_init"}  # the weights have been trained since
_MUST_MATCH = (
    frozenset({"dtype", "seed", "optimizer", "normuon"})
    | {k for k, key in KEYS.items() if key.section == "model"} - _MAY_DIFFER
)
_MAY_FORK = frozenset({"dtype", "seed", "optimizer", "normuon"})
"""Keys of a fork that may differ from its parent's: no state is in the compute dtype, and those that another optimizer
lacks begin at zero."""
_OF_THE_PROCESS = (
    "init_from",
    "overwrite",
    "out_dir",
    "data_dir",
    "plugins",
    "debug",
    "collective_timeout_s",
    "verify_data",
)


class Told(NamedTuple):
    """A configuration, and what is told of it."""

    config: Config
    origins: Mapping[str, str]
    """Key -> where its value comes from."""
    changes: Mapping[str, str]
    """Key -> a line about how a value of a higher layer, or the checkpoint, changed its value."""


def keep_schedule(told: Told, saved: Mapping[str, Any], path: object) -> Told:
    """Gives a run that resumes the warm-up and the decay of its checkpoint, unless a flag of this start sets them.

    Neither another `max_iters` nor an edited file changes the schedule of a run in its middle.

    Args:
        told: the configuration of this start.
        saved: the checkpoint's state.
        path: the checkpoint, for messages.
    """
    before, now = _saved_values(saved), told.config.optimizer
    end, recorded_end = now.lr_decay_iters or told.config.train.max_iters, _decay_end(before)
    kept, flags = {}, {"warmup_iters": now.warmup_iters, "lr_decay_iters": end}
    if before["warmup_iters"] != now.warmup_iters:
        kept["warmup_iters"] = before["warmup_iters"]
    if recorded_end != end and now.lr_schedule != "constant":
        kept["lr_decay_iters"] = recorded_end
    kept = {key: value for key, value in kept.items() if told.origins[key] not in ("command line", "Python")}
    lines = {key: f"{key} = {value} as in {path}; --{key}={flags[key]} changes it" for key, value in kept.items()}
    last = told.config.train.max_iters
    if kept.get("lr_decay_iters", last) < last:
        lines["lr_decay_iters"] = (
            f"the learning rate stays at min_lr = {now.min_lr:g} in iterations {recorded_end + 1:,} to {last:,}, "
            f"because the decay ends at iteration {recorded_end:,} as in {path}; --lr_decay_iters={last} lets it end "
            "with the run"
        )
    config = replace(told.config, optimizer=replace(now, **kept))
    return Told(config, {**told.origins, **dict.fromkeys(kept, str(path))}, {**told.changes, **lines})


def _saved_values(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns key -> value of a checkpoint's configuration, and its `DERIVED` sizes."""
    # A key that the checkpoint lacks came after it: the run had what is the default now.
    defaults = {name: key.default for name, key in KEYS.items()}
    found = defaults | {name: v for section in saved["config"].values() for name, v in section.items()}
    if "head_width" not in saved["model"]:
        found |= {
            "head_width": found["n_embd"] // found["n_head"],
            "attention_biases": "all" if found["bias"] else "none",
        }
    return found | saved["model"]


def _decay_end(values: Mapping[str, Any]) -> int:
    """Returns the iteration at which the learning rate has fallen to min_lr."""
    return int(values["lr_decay_iters"] or values["max_iters"])


def versions(engine: Engine) -> dict[str, str]:
    """Returns the facts, by name, on which the bits of a run depend besides its configuration."""
    process = engine.process
    on_gpu = process.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(process.device) if on_gpu else "cpu",
        "threads": "" if on_gpu else str(torch.get_num_threads()),
        "processes": str(process.world_size),
        "kernels": ",".join(f"{op}={chosen}" for op, chosen in engine.ops.chosen.items()),
        "kernel_code": kernel_digest() if "triton" in engine.ops.chosen.values() else "",
        "communication": engine.weights.collectives.name,
    }


def changed_keys(
    saved: Mapping[str, Any], config: Config, *, weights_only: bool = False, fork: bool = False
) -> list[str]:
    """Returns `key: saved -> now` for each key that differs between a checkpoint's configuration and this one.

    Args:
        saved: the checkpoint's state.
        config: configuration of this run.
        weights_only: the run uses only the weights: compare the model keys alone, and raise nothing.
        fork: the run is a fork, which may change the keys of `_MAY_FORK` too.

    Raises:
        CheckpointError: a key that must be equal differs; the message names all such keys.
    """
    before = _saved_values(saved)
    now: dict[str, Any] = config.flat() | {name: getattr(config.model, name) for name in DERIVED}
    for name in (*_TOLD_BY_DERIVED, *_OF_THE_PROCESS):
        before[name] = now[name] = None
    before["lr_decay_iters"], now["lr_decay_iters"] = _decay_end(before), _decay_end(now)
    must = (_MUST_MATCH - _MAY_FORK if fork else _MUST_MATCH) | set(DERIVED)
    # The number of samples per iteration determines the order of the data; their split into micro-batches does not.
    per_iter = ("batch_size", "gradient_accumulation_steps")
    if before[per_iter[0]] * before[per_iter[1]] != now[per_iter[0]] * now[per_iter[1]]:
        must |= set(per_iter)
    model = {k for k, key in KEYS.items() if key.section == "model"} | set(DERIVED)
    names = [name for name in now if before.get(name) != now[name] and (name in model or not weights_only)]
    lines = {name: f"{name}: {before.get(name)} -> {now[name]}" for name in names}
    fatal = [line for name, line in lines.items() if name in must]
    if fatal and fork:
        raise CheckpointError(
            f"a fork cannot change these keys of its parent (saved -> now): {'; '.join(fatal)}; --init_from=RUN, "
            "without @STEP, takes the weights alone"
        )
    if fatal and not weights_only:
        raise CheckpointError(f"the checkpoint was made with another configuration (saved -> now): {'; '.join(fatal)}")
    return list(lines.values())


def changed_versions(saved: Mapping[str, Any], engine: Engine) -> list[str]:
    """Returns `what: saved -> now` for each fact of `versions` that differs from the checkpoint.

    A fact that the checkpoint does not record gives no line.
    """
    before, now = dict(saved["versions"]), versions(engine)
    return [f"{name}: {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
