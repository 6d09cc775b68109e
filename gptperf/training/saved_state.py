"""Saves the whole resumable state of a run in a checkpoint, and restores it.

The state consists of master weights, optimizer states and their step count, the loss scale, the largest values that
decide the scales of fp8, the random states, buffers and frozen parameters of plugins, the tokenizer's vocabulary, the
position in the run, and everything that a later run is compared with (`gptperf.training.matching`).

The iteration is the position in the data, because the tokens of a batch and the elements that dropout drops are
functions of seed and iteration. The random states are saved for plugins that draw from them.

Tensors are saved by parameter, not by bucket. A rank saves the elements that it holds (`Piece`). A rank that resumes
takes the elements that it needs from the files of all ranks. So a job can resume from a checkpoint of any number of
ranks under any strategy.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptperf import checkpoint as checkpoints
from gptperf import flops
from gptperf.checkpoint import Checkpoint
from gptperf.checkpoint.tensor_file import Part, part_name
from gptperf.distributed.buckets import Bucket, Piece
from gptperf.distributed.replicated import Replicated
from gptperf.errors import CheckpointError, DataError
from gptperf.formats import counted
from gptperf.training.engine import Engine
from gptperf.training.matching import DERIVED, versions

__all__ = ["LARGE", "VOCABULARY", "TrainState", "changed_by_forward", "restore", "restore_weights"]
__all__ += ["saved_vocabulary", "snapshot", "vocabulary_tensors"]

VOCABULARY = "tokenizer"
"""Stem of the file with the files of the tokenizer."""
LARGE = ("model", "optimizer")
"""Stems of the files with most of the bytes. They are read part by part, and each rank reads the parts it needs."""


@dataclass
class TrainState:
    """The position of a run: everything that is not a tensor and changes while it trains."""

    step: int = 0
    """Number of iterations done, which is also the position in the data."""
    tokens: int = 0
    """Number of tokens trained on."""
    train_s: float = 0.0
    """Seconds spent in iterations, without evaluation, saving and compilation."""
    timed_tokens: int = 0
    """Tokens of the iterations in `train_s`."""
    timed_pairs: int = 0
    """(query, key) pairs of the iterations in `train_s`, of one head and over all layers."""
    best_val_loss: float | None = None
    best_step: int | None = None
    run_name: str = ""
    """Stem of the file name of the run's journal."""
    validation: str = ""
    """Fingerprint of the validation data on which `best_val_loss` was computed."""
    wall_s: float = 0.0
    """Seconds from the start of each process to the checkpoint with which it ended, of all starts of the run together.
    """
    starts: int = 0
    """Number of processes that have trained the run."""
    unevaluated: bool = False
    """Whether the evaluation of iteration `step` was dropped, so that it is the first thing to do."""


def changed_by_forward(engine: Engine) -> Callable[[], None]:
    """Records the state that micro-batches change before the optimizer's step: random states and plugins' buffers.

    Returns:
        A function that restores it, so that a checkpoint does not depend on an iteration that was dropped.
    """
    on_gpu = engine.process.device.type == "cuda"
    torch_rng, cuda_rng = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None
    numpy_rng, python_rng = np.random.get_state(), random.getstate()
    kept = engine.model.state_dict(keep_vars=True)
    buffers = [(tensor, tensor.clone()) for tensor in kept.values() if not isinstance(tensor, nn.Parameter)]

    def restore_all() -> None:
        torch.set_rng_state(torch_rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng)
        np.random.set_state(numpy_rng)
        random.setstate(python_rng)
        with torch.no_grad():
            for tensor, before in buffers:
                tensor.copy_(before)

    return restore_all


_KIND = ("optimizer", "normuon")
"""Keys that decide which states an optimizer has."""


def snapshot(
    engine: Engine,
    state: TrainState,
    fingerprint: str,
    tokenizer: Mapping[str, Any],
    vocabulary: Mapping[str, bytes] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Returns this rank's part of the state.

    Args:
        engine: the objects whose state is saved.
        state: position of the run.
        fingerprint: fingerprint of the training data.
        tokenizer: name, vocab_size, fingerprint and eot of the tokenizer.
        vocabulary: files of the tokenizer, which `saved_vocabulary` reads back.
        data: the data sets of the training data, from `gptperf.training.dataset.data_record`.

    Returns:
        Named tensors by file stem (views, not copies), and the JSON state.
    """
    config, optimizer, weights = engine.config, engine.optimizer, engine.weights
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
        if engine.float8 is not None:
            tensors["float8"] = engine.float8.tensors()
        if vocabulary:
            tensors[VOCABULARY] = vocabulary_tensors(vocabulary)
    return tensors, {
        "train_state": dataclasses.asdict(state),
        "scaler": engine.scaler.state_dict(),
        "rng": {"python": [version, list(internal), gauss], "numpy": [kind, *position]},
        "config": config.sections(),
        "model": {name: getattr(config.model, name) for name in DERIVED},
        "dataset_fingerprint": fingerprint,
        "dataset": list(data),
        "tokenizer": dict(tokenizer),
        "versions": versions(engine),
    }


def vocabulary_tensors(vocabulary: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Returns the bytes of each file of a tokenizer as a tensor, (size,) uint8, for the file `VOCABULARY`."""
    return {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in vocabulary.items()}


def saved_vocabulary(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Returns the files of the tokenizer in a checkpoint; a checkpoint of bytes or of an earlier version has none."""
    named = checkpoint.tensors.get(VOCABULARY, {})
    return {name: tensor.numpy().tobytes() for name, tensor in named.items()}


def _master(bucket: Bucket) -> Tensor:
    return bucket.master.data


def _stored(pieces: Iterable[Piece], prefix: str = "") -> dict[str, Tensor]:
    """Returns the values of pieces by their names in a file. The name of a part contains its position."""
    found = {}
    for name, shape, start, values in pieces:
        whole = values.numel() == shape.numel()
        found[prefix + (name if whole else part_name(name, shape, start))] = values.view(shape) if whole else values
    return found


def _fill(found: Checkpoint, stem: str, wanted: Mapping[str, Piece], *, optional: bool = False) -> set[str]:
    """Copies elements from the files of a checkpoint into the tensors of this rank.

    Args:
        found: the checkpoint.
        stem: stem of the files.
        wanted: pieces that are overwritten with the elements, by the name of the whole tensor.
        optional: whether a piece stays as it is if the files have no tensor of its name.

    Returns:
        The names of all tensors in the files.

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
        # The overlap of the elements that one rank saved with those that this rank holds.
        first = max(start, piece.start)
        last = min(start + values.numel(), piece.start + piece.values.numel())
        if first < last:
            target = piece.values[first - piece.start : last - piece.start]
            target.copy_(values[first - start : last - start])
            missing[name] -= last - first
    for name, count in missing.items():
        if count and (name in names or not optional):
            what = f"{counted(count, 'element')} fewer" if name in names else "nothing"
            raise CheckpointError(f"{found.path}: {stem}: found {what} for {name}, wanted {tuple(wanted[name].shape)}")
    return names


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a model that are not trained: persistent buffers, and frozen parameters of plugins."""
    kept = model.state_dict(keep_vars=True)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return ((name, tensor.data) for name, tensor in kept.items() if id(tensor) not in trained)


def restore(checkpoint: Checkpoint, engine: Engine, fingerprint: str, *, fork: bool = False) -> TrainState:
    """Copies a checkpoint's state into the objects of a run.

    All objects must be built before, because building them draws random numbers and this restores the random states.

    Args:
        checkpoint: the checkpoint.
        engine: the objects.
        fingerprint: fingerprint of the training data.
        fork: the run is a fork: states that only its optimizer has begin at zero.

    Raises:
        DataError: the checkpoint was trained on another data set.
        CheckpointError: a tensor is missing or has another shape.
    """
    saved, optimizer = checkpoint.state, engine.optimizer
    if saved["dataset_fingerprint"] != fingerprint:
        raise DataError(
            f"{checkpoint.path}: the run was trained on data with the fingerprint {saved['dataset_fingerprint'][:12]}, "
            f"found {fingerprint[:12]}; wanted the same shards"
        )
    restore_weights(checkpoint, engine.model, engine.weights)
    wanted = {"steps": Piece("steps", optimizer.steps.shape, 0, optimizer.steps.view(1))}
    for bucket in engine.weights.buckets:
        for key, values in optimizer.states(bucket).items():
            wanted |= {f"{key}.{piece.name}": piece for piece in engine.weights.pieces_of(bucket, values)}
    other = fork and any(
        saved["config"]["optimizer"].get(key) != getattr(engine.config.optimizer, key) for key in _KIND
    )
    _fill(checkpoint, "optimizer", wanted, optional=other)
    if not isinstance(saved["scaler"], dict):
        raise TypeError(f"scaler: {saved['scaler']!r}")
    if saved["scaler"]:  # empty if the run had no loss scale, as the parent of a fork with another dtype
        engine.scaler.load_state_dict(saved["scaler"])
    if engine.float8 is not None:
        engine.float8.restore(checkpoint.tensors.get("float8", {}))
    rng = checkpoint.tensors["rng"]
    torch.set_rng_state(rng["torch"])
    if "cuda" in rng and engine.process.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"])
    version, internal, gauss = saved["rng"]["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, *position = saved["rng"]["numpy"]
    np.random.set_state((kind, rng["numpy"].numpy().astype(np.uint32), *position))
    # A checkpoint of an older version does not say how often it was started; its time is at least that of training. Its
    # sequences were one document each.
    model = engine.config.model
    sequences = saved["train_state"].get("timed_tokens", 0) // model.block_size
    older = {"wall_s": saved["train_state"].get("train_s", 0.0), "starts": 1}
    older["timed_pairs"] = sequences * flops.attended_pairs(model)
    state = TrainState(**(older | saved["train_state"]))
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
    """Copies a checkpoint's master weights, buffers and frozen parameters into a model.

    Raises:
        CheckpointError: names or shapes differ.
    """
    pieces = {piece.name: piece for piece in weights.pieces(_master, to_save=False)}
    extra = _fill(checkpoint, "model", pieces) - weights.places.keys()
    if extra:
        raise CheckpointError(
            f"{checkpoint.path}: found weights that this model does not have: {', '.join(sorted(extra)[:5])}"
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
