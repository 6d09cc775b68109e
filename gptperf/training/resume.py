"""Finds the checkpoint that a run continues from, and restores it."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from gptperf import checkpoint as checkpoints
from gptperf.checkpoint import Checkpoint
from gptperf.config import Config
from gptperf.config.fork import fork_of
from gptperf.data.format import TokenizerInfo
from gptperf.data.mixture import MixedTokens
from gptperf.data.shards import TokenSource
from gptperf.distributed.process import Process
from gptperf.errors import CheckpointError, DataError, GptperfError
from gptperf.monitor.console import Console
from gptperf.training.dataset import compare_data
from gptperf.training.engine import Engine
from gptperf.training.matching import changed_keys, changed_versions
from gptperf.training.saved_state import LARGE, TrainState, restore, restore_weights

__all__ = ["find_checkpoint", "take_up"]


def find_checkpoint(config: Config, folder: Path, process: Process, console: Console) -> Checkpoint | None:
    """Returns the checkpoint that `init_from` selects, or None. Collective: every rank must call it.

    Rank 0 chooses the checkpoint for all ranks and verifies every file; the other ranks read only what they need.

    Args:
        config: configuration of the run.
        folder: folder of the run's checkpoints.
        process: this rank.
        console: gets the messages about checkpoints that are skipped or moved.

    Raises:
        CheckpointError: there is no checkpoint to resume, or a new run would start in a folder with checkpoints.
    """
    chosen: Checkpoint | None = None
    path = ""
    if process.is_main:
        checkpoints.clean(folder)
        how = config.train.init_from
        if how in ("resume", "auto"):
            chosen = checkpoints.load_latest(folder, warn=console.warning, later=LARGE)
            path = "" if chosen is None else str(chosen.path)
            if chosen is None and how == "resume":
                raise CheckpointError(
                    f"{folder}: found no checkpoint to resume; wanted --init_from=scratch or --init_from=auto"
                )
        else:
            lies = bool(checkpoints.checkpoints(folder, strict=True)) or any(folder.glob("step-*"))
            if lies and not config.train.overwrite:
                raise CheckpointError(
                    f"{folder}: found checkpoints of another run; wanted --init_from=resume, another --out_dir, or "
                    "--overwrite=True, which moves them aside"
                )
            chosen = None if how == "scratch" else _load_path(how)
            path = "" if chosen is None else str(chosen.path.resolve())
            if lies:
                folder = folder.resolve()
                aside = folder.with_name(f"checkpoints.{time.strftime('%Y%m%d_%H%M%S', time.gmtime())}.{os.getpid()}")
                folder.rename(aside)
                path = path.replace(f"{folder}{os.sep}", f"{aside}{os.sep}")  # the chosen one may have been moved too
                chosen = chosen and dataclasses.replace(chosen, path=Path(path))
                console.message(f"moved the checkpoints of an earlier run to {aside}")
    path = process.from_main(path)
    if not process.is_main and path:
        return checkpoints.load(Path(path), only=("rng", "buffers", "float8"))
    return chosen


def take_up(
    found: Checkpoint,
    engine: Engine,
    tokens: TokenSource | MixedTokens,
    tokenizer: TokenizerInfo,
    console: Console,
) -> TrainState:
    """Restores a checkpoint: the whole state for a run that resumes or forks, else only the weights.

    Args:
        found: the checkpoint.
        engine: the objects to restore.
        tokens: the training data.
        tokenizer: tokenizer of the data set.
        console: gets the warnings about differences.

    Returns:
        The position of the run: the one in the checkpoint, or a new one.

    Raises:
        CheckpointError: the checkpoint was made with another configuration, or by a version that saved another state.
        DataError: the checkpoint was made with another data set or another tokenizer.
    """
    try:
        return _taken_up(found, engine, tokens, tokenizer, console)
    except GptperfError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{found.path}: its state does not fit this version of gptperf: {error!r}") from error


def _taken_up(
    found: Checkpoint,
    engine: Engine,
    tokens: TokenSource | MixedTokens,
    tokenizer: TokenizerInfo,
    console: Console,
) -> TrainState:
    fork = fork_of(engine.config.train.init_from) is not None
    resuming = fork or engine.config.train.init_from in ("resume", "auto")
    if resuming and "train_state" not in found.state:
        raise CheckpointError(
            f"{found.path} has weights but no optimizer state, so it cannot be resumed; wanted --init_from=PATH and "
            "another --out_dir, which start a new run from the weights"
        )
    changed = changed_keys(found.state, engine.config, weights_only=not resuming, fork=fork)
    for line in () if fork else changed:
        console.warning(f"{found.path} was made with another value (saved -> now): {line}")
    saved = found.state["tokenizer"]
    other_ids = saved["fingerprint"] != tokenizer.fingerprint
    if not resuming:
        if other_ids:
            console.warning(
                f"{found.path} was made with the tokenizer {saved['name']}, the data with {tokenizer.name}: the "
                "same ids have another meaning"
            )
        restore_weights(found, engine.model, engine.weights)
        console.message(f"weights from {found.path}")
        return TrainState()
    if other_ids:
        raise DataError(
            f"{found.path}: found the tokenizer {saved['name']} ({saved['fingerprint'][:12]}), the data has "
            f"{tokenizer.name} ({tokenizer.fingerprint[:12]}); wanted data of the same tokenizer"
        )
    for line in changed_versions(found.state, engine):
        console.warning(f"the same numbers, but not the same bits as without the break: {line}")
    compare_data(found.state, tokens, found.path)
    state = restore(found, engine, tokens.fingerprint, fork=fork)
    if fork:
        return _forked(found, state, changed, console)
    console.message(f"resumed from {found.path} at iteration {state.step}")
    return state


def _forked(found: Checkpoint, state: TrainState, changed: Sequence[str], console: Console) -> TrainState:
    """Says what a fork changes, and returns its position: its parent's, with times and a best loss of its own."""
    lines = f"changed (parent -> fork): {'; '.join(changed)}" if changed else "nothing is changed"
    console.message(f"forked from {found.path}, iteration {state.step} of {state.run_name}; {lines}")
    return TrainState(step=state.step, tokens=state.tokens, unevaluated=state.unevaluated)


def _load_path(text: str) -> Checkpoint:
    """Returns the checkpoint of a fork or at a path; of a run or a folder of checkpoints the newest one."""
    fork, path = fork_of(text), Path(text)
    if fork is not None:
        return checkpoints.load(fork.path, later=LARGE)
    folder = path / "checkpoints" if os.path.isdir(path / "checkpoints") else path
    newest = checkpoints.latest(folder) if os.path.isdir(folder) else None
    return checkpoints.load(newest.path if newest is not None else folder, later=LARGE)
