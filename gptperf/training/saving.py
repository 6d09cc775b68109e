"""Saves a run, and ends it instead where its gradients are not finite."""

import contextlib
import dataclasses

from gptperf import checkpoint
from gptperf.checkpoint.background import Saved
from gptperf.errors import CheckpointError, DiskError, GptperfError, NonFiniteError
from gptperf.formats import counted
from gptperf.monitor.clock import process_age_s
from gptperf.training.reporting import resume_flags
from gptperf.training.saved_state import snapshot
from gptperf.training.start import TrainingRun

__all__ = ["check_finite", "report_save", "save_run"]

_SAVE_TRIES = 3  # this many failed saves in a row end the run


def check_finite(run: TrainingRun) -> None:
    """Ends a run whose gradients are no longer finite, before its state is saved. Collective: every rank must call it.

    Raises:
        NonFiniteError: a step was skipped, or float16's loss scale has fallen below 1.
    """
    engine = run.engine
    skipped = int(engine.skipped.item())
    if engine.scaler.is_enabled():  # the scaler skips steps by design
        if engine.scaler.get_scale() >= 1:
            return
        what = f"the loss scale fell to {engine.scaler.get_scale()}"
    elif skipped == 0:
        return
    else:
        what = f"the updates of {counted(skipped, 'iteration')} were skipped, because the gradients were not finite"
    raise NonFiniteError(f"iteration {run.state.step}: {what}. {_remedy(run)}, or check the data of these iterations")


def _remedy(run: TrainingRun) -> str:
    """Returns how to go on from the last checkpoint, or without one if the run has saved none."""
    with contextlib.suppress(GptperfError):  # a further error must not hide the first one
        report_save(run, run.saver.wait(), must=False)
    found = None
    with contextlib.suppress(CheckpointError):
        found = checkpoint.latest(run.saver.directory)
    if found is None:
        return "No checkpoint is saved yet: start again with a lower learning_rate or a longer warmup_iters"
    return (
        f"The last checkpoint is {found.path}: continue with {resume_flags(run.config.train)} and a lower learning_rate"
    )


def save_run(run: TrainingRun, val_loss: float | None, *, must: bool) -> None:
    """Starts a save. With `must`, at the end of the run, waits until the checkpoint is on disk.

    Raises:
        DiskError: see `report_save`.
    """
    inputs, state = run.inputs, dataclasses.replace(run.state, wall_s=run.state.wall_s + process_age_s())
    tokenizer = {key: getattr(inputs.tokenizer_info, key) for key in ("name", "vocab_size", "fingerprint", "eot")}
    fingerprint = inputs.train_tokens.fingerprint
    tensors, saved = snapshot(run.engine, state, fingerprint, tokenizer, inputs.vocabulary, run.data)
    report_save(run, run.saver.save(state.step, tensors, saved, val_loss), must=False)
    if must:
        report_save(run, run.saver.wait(), must=True)


def report_save(run: TrainingRun, ended: Saved | None, *, must: bool) -> None:
    """Reports how a save ended. A disk that fails ends the run if `must` is set, or at the third failed save in a row.

    Raises:
        DiskError: the disk failed and the run must end.
        GptperfError: the save failed for another reason.
    """
    if ended is None:
        return
    if ended.error is None:
        run.failed_saves, run.saved_step = 0, ended.step
        run.reporter.checkpoint(ended)
        return
    run.failed_saves += 1
    if must or run.failed_saves >= _SAVE_TRIES or not isinstance(ended.error, DiskError):
        raise ended.error
    run.reporter.save_failed(ended.step, ended.error)
