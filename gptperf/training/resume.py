"""The whole resumable state of a run: to a checkpoint and back.

What a batch holds and what dropout drops are functions of seed and iteration alone, so the data position is the
iteration. The random states are saved besides, for components from outside that draw from them.
"""

import dataclasses
import hashlib
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptperf import checkpoint as checkpoints
from gptperf.checkpoint import Checkpoint
from gptperf.checkpoint.tensor_file import Part, part_name
from gptperf.config import KEYS, Config
from gptperf.data.tokenizers import Tokenizer
from gptperf.distributed.buckets import Bucket, Piece
from gptperf.distributed.process import Process
from gptperf.distributed.replicated import Replicated
from gptperf.errors import CheckpointError, DataError, GptperfError
from gptperf.monitor.console import Console
from gptperf.training.engine import Engine

__all__ = ["TrainState", "changed_keys", "changed_versions", "find_checkpoint", "restore", "restore_weights"]
__all__ += ["snapshot", "take_up"]

_MAY_DIFFER = frozenset({"arch_preset", "attention_backend", "dropout", "d_ff_multiple", "vocab_multiple"})
_MUST_MATCH = frozenset({"dtype", "seed"}) | {k for k, key in KEYS.items() if key.section == "model"} - _MAY_DIFFER
_OF_THE_PROCESS = ("init_from", "overwrite", "out_dir", "data_dir", "plugins", "debug", "collective_timeout_s")
_LARGE = ("model", "optimizer")  # read part by part, by each process what it needs
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
    validation: str = ""
    """Fingerprint of the data that `best_val_loss` is of."""


def snapshot(
    engine: Engine, state: TrainState, fingerprint: str, tokenizer: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file and the JSON state of this iteration: this process's part. The tensors are views, not copies.

    Args:
        engine: whose weights, optimizer and scaler are saved.
        state: where the run stands.
        fingerprint: of the training data.
        tokenizer: its name and fingerprint.
    """
    config, optimizer = engine.config, engine.optimizer
    weights = engine.weights
    tensors: dict[str, dict[str, Tensor]] = {
        "model": _stored(weights.pieces(_master, to_save=True)),
        "optimizer": {},
    }
    for bucket in weights.buckets:
        for key, values in optimizer.states(bucket).items():
            tensors["optimizer"] |= _stored(weights.pieces_of(bucket, values, to_save=True), f"{key}.")
    if engine.process.is_main:
        tensors["optimizer"]["steps"] = optimizer.steps
    rng = {"torch": torch.get_rng_state()}
    if engine.process.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state()
    kind, keys, *position = np.random.get_state()
    rng["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, gauss = random.getstate()
    buffers = dict(_buffers(engine.model))
    if engine.process.is_main:
        tensors |= {"rng": rng} | ({"buffers": buffers} if buffers else {})
    return tensors, {
        "train_state": dataclasses.asdict(state),
        "scaler": engine.scaler.state_dict(),
        "rng": {"python": [version, list(internal), gauss], "numpy": [kind, *position]},
        "config": config.sections(),
        "model": {name: getattr(config.model, name) for name in _DERIVED},
        "dataset_fingerprint": fingerprint,
        "tokenizer": dict(tokenizer),
        "versions": versions(engine),
    }


def _master(bucket: Bucket) -> Tensor:
    return bucket.master.data


def _stored(pieces: Iterable[Piece], prefix: str = "") -> dict[str, Tensor]:
    """Pieces by the name that they have in a file."""
    found = {}
    for name, shape, start, values in pieces:
        whole = values.numel() == shape.numel()
        found[prefix + (name if whole else part_name(name, shape, start))] = values.view(shape) if whole else values
    return found


def _fill(found: Checkpoint, stem: str, wanted: Mapping[str, Piece]) -> set[str]:
    """Put a checkpoint's elements where a process has them, by their name in its files.

    Returns:
        All names that the checkpoint has.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    names, missing = set(), {name: piece.values.numel() for name, piece in wanted.items()}
    read = found.tensors.get(stem)
    stored: Iterable[Part] = checkpoints.stored(found.path, stem)
    if read is not None:
        stored = (Part(name, tuple(tensor.shape), 0, tensor.reshape(-1)) for name, tensor in read.items())
    for name, shape, start, values in stored:
        names.add(name)
        piece = wanted.get(name)
        if piece is None:
            continue
        if shape != tuple(piece.shape):
            raise CheckpointError(f"{found.path}: {stem}: found {shape} for {name}, wanted {tuple(piece.shape)}")
        first = max(start, piece.start)
        last = min(start + values.numel(), piece.start + piece.values.numel())
        if first < last:
            target = piece.values[first - piece.start : last - piece.start]
            target.copy_(values[first - start : last - start])
            missing[name] -= last - first
    for name, count in missing.items():
        if count:
            what = f"{count} elements less" if name in names else "nothing"
            raise CheckpointError(f"{found.path}: {stem}: found {what} for {name}, wanted {tuple(wanted[name].shape)}")
    return names


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a model holds beside its trained weights: persistent buffers and frozen parameters, of plugins."""
    kept = model.state_dict(keep_vars=True)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return ((name, tensor.data) for name, tensor in kept.items() if id(tensor) not in trained)


def versions(engine: Engine) -> dict[str, str]:
    """What the bits of a run depend on beside its configuration."""
    process = engine.process
    on_gpu = process.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(process.device) if on_gpu else "cpu",
        "threads": "" if on_gpu else str(torch.get_num_threads()),
        "processes": str(process.world_size),
        "kernels": ",".join(f"{op}={chosen}" for op, chosen in engine.ops.chosen.items()),
        "kernel_sources": _kernel_sources() if "triton" in engine.ops.chosen.values() else "",
        "communication": engine.weights.collectives.name,
    }


def _kernel_sources() -> str:
    """A digest: another shape of program adds up in another order."""
    digest = hashlib.sha256()
    for path in sorted(resources.files("gptperf.kernels").iterdir(), key=str):
        if path.name.endswith(".py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def changed_keys(saved: Mapping[str, Any], config: Config, *, weights_only: bool = False) -> list[str]:
    """`key: saved -> now` for what differs between a checkpoint's configuration and this one.

    Args:
        saved: the checkpoint's state.
        config: of this run.
        weights_only: compare the model alone, and leave it to the caller.

    Raises:
        CheckpointError: a key differs that fixes the weights, the numbers or the order of the data; all are named.
    """
    before = {name: value for section in saved["config"].values() for name, value in section.items()} | saved["model"]
    now = config.flat() | {name: getattr(config.model, name) for name in _DERIVED}
    for name in ("d_ff", "n_kv_head", *_OF_THE_PROCESS):  # the first two by what follows from them
        before[name] = now[name] = None
    must = _MUST_MATCH | set(_DERIVED)
    per_iter = ("batch_size", "gradient_accumulation_steps")
    if before[per_iter[0]] * before[per_iter[1]] != now[per_iter[0]] * now[per_iter[1]]:
        must |= set(per_iter)
    model = {k for k, key in KEYS.items() if key.section == "model"} | set(_DERIVED)
    names = [name for name in now if before.get(name) != now[name] and (name in model or not weights_only)]
    lines = {name: f"{name}: {before.get(name)} -> {now[name]}" for name in names}
    fatal = [line for name, line in lines.items() if name in must]
    if fatal and not weights_only:
        raise CheckpointError(f"the checkpoint was made with another configuration (saved -> now): {'; '.join(fatal)}")
    return list(lines.values())


def changed_versions(saved: Mapping[str, Any], engine: Engine) -> list[str]:
    """`what: saved -> now` for what the bits depend on beside the configuration."""
    now = versions(engine)
    return [
        f"{name}: {saved['versions'].get(name)} -> {now[name]}"
        for name in now
        if saved["versions"].get(name, "") != now[name]
    ]


def restore(checkpoint: Checkpoint, engine: Engine, fingerprint: str) -> TrainState:
    """Put a checkpoint's state into the objects of a run; call it after all of them are built.

    Raises:
        DataError: the data set is another one.
        CheckpointError: a tensor is missing or has another shape.
    """
    saved, optimizer = checkpoint.state, engine.optimizer
    if saved["dataset_fingerprint"] != fingerprint:
        raise DataError(
            f"{checkpoint.path}: it was trained on the data set {saved['dataset_fingerprint'][:12]} (fingerprint), "
            f"found {fingerprint[:12]}; wanted the same shards"
        )
    restore_weights(checkpoint, engine.model, engine.weights)
    wanted = {"steps": Piece("steps", optimizer.steps.shape, 0, optimizer.steps.view(1))}
    for bucket in engine.weights.buckets:
        for key, values in optimizer.states(bucket).items():
            wanted |= {f"{key}.{piece.name}": piece for piece in engine.weights.pieces_of(bucket, values)}
    _fill(checkpoint, "optimizer", wanted)
    if not isinstance(saved["scaler"], dict):
        raise TypeError(f"scaler: {saved['scaler']!r}")
    engine.scaler.load_state_dict(saved["scaler"])
    rng = checkpoint.tensors["rng"]
    torch.set_rng_state(rng["torch"])
    if "cuda" in rng and engine.process.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"])
    version, internal, gauss = saved["rng"]["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, *position = saved["rng"]["numpy"]
    np.random.set_state((kind, rng["numpy"].numpy().astype(np.uint32), *position))
    state = TrainState(**saved["train_state"])
    for name, usual in dataclasses.asdict(TrainState()).items():
        value, kind = getattr(state, name), str if isinstance(usual, str) else (int, float)
        if not (isinstance(value, kind) or value is usual is None):
            raise TypeError(f"train_state: {name}: {value!r}")
    if state.step != checkpoint.step:
        raise CheckpointError(
            f"{checkpoint.path}: found the state of step {state.step}, wanted that of {checkpoint.step}"
        )
    return state


@torch.no_grad()
def restore_weights(checkpoint: Checkpoint, model: nn.Module, weights: Replicated) -> None:
    """Put a checkpoint's master weights, buffers and frozen parameters into a model.

    Raises:
        CheckpointError: names or shapes differ.
    """
    pieces = {piece.name: piece for piece in weights.pieces(_master, to_save=False)}
    extra = _fill(checkpoint, "model", pieces) - weights.places.keys()
    if extra:
        raise CheckpointError(
            f"{checkpoint.path}: found weights that this model has not: {', '.join(sorted(extra)[:5])}"
        )
    for name, tensor in _buffers(model):
        tensor.copy_(_tensor(checkpoint, "buffers", name, tensor.shape))
    weights.publish()


def _tensor(checkpoint: Checkpoint, stem: str, name: str, shape: torch.Size) -> Tensor:
    found = checkpoint.tensors.get(stem, {}).get(name)
    if found is None or found.shape != shape:
        what = "nothing" if found is None else str(tuple(found.shape))
        raise CheckpointError(f"{checkpoint.path}: {stem}: found {what} for {name}, wanted {tuple(shape)}")
    return found


def take_up(found: Checkpoint, engine: Engine, fingerprint: str, tokenizer: Tokenizer, console: Console) -> TrainState:
    """Go on from a checkpoint: the whole state when resuming, the weights alone otherwise.

    Raises:
        CheckpointError: it was made with another configuration, or by a version that kept other things.
        DataError: it was made with another data set.
    """
    resuming = engine.config.train.init_from in ("resume", "auto")
    if resuming and "train_state" not in found.state:
        raise CheckpointError(f"{found.path} has weights alone; wanted --init_from=PATH and another --out_dir")
    try:
        for line in changed_keys(found.state, engine.config, weights_only=not resuming):
            console.warning(f"{found.path} was made with another value (saved -> now): {line}")
        if not resuming:
            if found.state["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
                console.warning(f"{found.path} was made with the tokenizer {found.state['tokenizer']['name']}")
            restore_weights(found, engine.model, engine.weights)
            console.message(f"weights from {found.path}")
            return TrainState()
        for line in changed_versions(found.state, engine):
            console.warning(f"the same numbers, but not the same bits as without the break: {line}")
        state = restore(found, engine, fingerprint)
    except GptperfError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{found.path}: its state does not fit this version of gptperf: {error!r}") from error
    console.message(f"resumed from {found.path} at iteration {state.step}")
    return state


def find_checkpoint(config: Config, folder: Path, process: Process, console: Console) -> Checkpoint | None:
    """The checkpoint that the run goes on from, by `init_from`; the main process chooses it for all.

    Raises:
        CheckpointError: none to resume, or a new run would start where checkpoints lie.
    """
    chosen: Checkpoint | None = None
    path = ""
    if process.is_main:
        checkpoints.clean(folder)
        how = config.train.init_from
        if how in ("resume", "auto"):
            chosen = checkpoints.load_latest(folder, warn=console.warning, later=_LARGE)
            path = "" if chosen is None else str(chosen.path)
            if chosen is None and how == "resume":
                raise CheckpointError(
                    f"{folder}: found no checkpoint to resume; wanted init_from = 'scratch' or 'auto'"
                )
        else:
            lies = bool(checkpoints.checkpoints(folder, strict=True)) or any(folder.glob("step-*"))
            if lies and not config.train.overwrite:
                raise CheckpointError(
                    f"{folder}: found checkpoints of another run; wanted --init_from=resume, another --out_dir, or "
                    "--overwrite=True, which moves them aside"
                )
            chosen = None if how == "scratch" else _load_path(Path(how))
            path = "" if chosen is None else str(chosen.path.resolve())
            if lies:
                folder = folder.resolve()
                aside = folder.with_name(f"checkpoints.{time.strftime('%Y%m%d_%H%M%S')}.{os.getpid()}")
                folder.rename(aside)
                path = path.replace(f"{folder}{os.sep}", f"{aside}{os.sep}")  # it may have been among them
                chosen = chosen and dataclasses.replace(chosen, path=Path(path))
                console.message(f"moved the checkpoints of an earlier run to {aside}")
    path = process.from_main(path)
    if not process.is_main and path:  # the main process has verified all of it
        return checkpoints.load(Path(path), only=("rng", "buffers"))
    return chosen


def _load_path(path: Path) -> Checkpoint:
    """The checkpoint at a path, or the newest one of the run there."""
    folder = path / "checkpoints" if os.path.isdir(path / "checkpoints") else path
    newest = checkpoints.latest(folder) if os.path.isdir(folder) else None
    return checkpoints.load(newest.path if newest is not None else folder, later=_LARGE)
