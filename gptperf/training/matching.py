"""Decides what must be equal for a run to continue from a checkpoint, and what may differ with a warning.

A key that determines the weights, the numbers or the order of the data must be equal. Other keys may differ, and so may
the versions and the layout that the bits depend on; the run then continues, but it is not bit for bit the run without
the break.
"""

from collections.abc import Mapping
from typing import Any

import torch

from gptperf.config import KEYS, Config
from gptperf.errors import CheckpointError
from gptperf.training.engine import Engine
from gptperf.training.kernel_digest import kernel_digest

__all__ = ["DERIVED", "changed_keys", "changed_versions", "versions"]

DERIVED = ("kv_heads", "ffn_width", "padded_vocab_size")
"""Sizes that follow from several keys. They are compared in place of those keys."""
_MAY_DIFFER = frozenset({"arch_preset", "attention_backend", "dropout", "d_ff_multiple", "vocab_multiple"})
_MUST_MATCH = frozenset({"dtype", "seed"}) | {k for k, key in KEYS.items() if key.section == "model"} - _MAY_DIFFER
_OF_THE_PROCESS = ("init_from", "overwrite", "out_dir", "data_dir", "plugins", "debug", "collective_timeout_s")


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


def changed_keys(saved: Mapping[str, Any], config: Config, *, weights_only: bool = False) -> list[str]:
    """Returns `key: saved -> now` for each key that differs between a checkpoint's configuration and this one.

    Args:
        saved: the checkpoint's state.
        config: configuration of this run.
        weights_only: the run uses only the weights: compare the model keys alone, and raise nothing.

    Raises:
        CheckpointError: a key that must be equal differs; the message names all such keys.
    """
    # A key that the checkpoint lacks came after it: the run had what is the default now.
    before: dict[str, Any] = {name: key.default for name, key in KEYS.items()}
    before |= {name: value for section in saved["config"].values() for name, value in section.items()} | saved["model"]
    now = config.flat() | {name: getattr(config.model, name) for name in DERIVED}
    for name in ("d_ff", "n_kv_head", *_OF_THE_PROCESS):  # the first two are compared by the sizes in `DERIVED`
        before[name] = now[name] = None
    must = _MUST_MATCH | set(DERIVED)
    # The number of samples per iteration determines the order of the data; their split into micro-batches does not.
    per_iter = ("batch_size", "gradient_accumulation_steps")
    if before[per_iter[0]] * before[per_iter[1]] != now[per_iter[0]] * now[per_iter[1]]:
        must |= set(per_iter)
    model = {k for k, key in KEYS.items() if key.section == "model"} | set(DERIVED)
    names = [name for name in now if before.get(name) != now[name] and (name in model or not weights_only)]
    lines = {name: f"{name}: {before.get(name)} -> {now[name]}" for name in names}
    fatal = [line for name, line in lines.items() if name in must]
    if fatal and not weights_only:
        raise CheckpointError(f"the checkpoint was made with another configuration (saved -> now): {'; '.join(fatal)}")
    return list(lines.values())


def changed_versions(saved: Mapping[str, Any], engine: Engine) -> list[str]:
    """Returns `what: saved -> now` for each fact of `versions` that differs from the checkpoint.

    A fact that the checkpoint does not record gives no line.
    """
    before, now = dict(saved["versions"]), versions(engine)
    return [f"{name}: {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
