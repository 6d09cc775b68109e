"""The training loop: steps, log lines, evaluations and saves.

The host waits for the GPU only at log lines, evaluations and saves.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

from gptperf import checkpoint
from gptperf.checkpoint.background import Saved
from gptperf.config import Config
from gptperf.data.loader import Loader
from gptperf.data.ngram import trigram_loss
from gptperf.distributed.process import start_process
from gptperf.errors import PREEMPTED, DiskError, GptperfError, NonFiniteError, OutOfMemoryError
from gptperf.monitor.clock import StepClock
from gptperf.monitor.console import Console
from gptperf.training.evaluation import evaluate, sample_text
from gptperf.training.preflight import check_device
from gptperf.training.saved_state import snapshot
from gptperf.training.signals import StopRequest
from gptperf.training.start import TrainingRun, start_run
from gptperf.training.step import StepResult, train_step

__all__ = ["train"]

_SAVE_TRIES = 3  # this many failed saves in a row end the run


def train(config: Config, origins: Mapping[str, str]) -> int:
    """Runs a training from its configuration to its last checkpoint.

    Args:
        config: configuration of the run.
        origins: where each of its values comes from.

    Returns:
        0, or `PREEMPTED` after a request to stop. In both cases a checkpoint is on disk.
    """
    with contextlib.ExitStack() as stack:
        process = start_process(config.system.device, config.system.collective_timeout_s)
        stack.callback(process.close)
        stop = stack.enter_context(StopRequest().listening())
        watchdog = stack.enter_context(process.watchdog(config.train.out_dir, debug=config.system.debug))
        check_device(config.system, process.device)
        console = stack.enter_context(
            Console(max_iters=config.train.max_iters, mode=config.log.console, enabled=process.is_main)
        )
        run = start_run(config, origins, process, console, stack)
        watchdog.last_words = run.reporter.aborted
        loader = Loader(
            run.inputs.train_tokens,
            block_size=config.model.block_size,
            batch_size=config.train.batch_size,
            micro_batches=config.train.gradient_accumulation_steps,
            seed=config.train.seed,
            rank=process.rank,
            world_size=process.world_size,
            start_step=run.state.step,
            pin_memory=process.device.type == "cuda",
            prefetch=config.data.prefetch,
            timeout_s=config.data.loader_timeout_s,
        )
        with _errors_logged(run):
            finished = _loop(run, stack.enter_context(loader), stop)
        if finished:
            with run.engine.weights.gathered():  # the main rank alone runs the model for the sample
                _finish(run)
                process.barrier()
        return 0 if finished else PREEMPTED


@contextlib.contextmanager
def _errors_logged(run: TrainingRun) -> Iterator[None]:
    """Writes an error of the body to the run's log before it passes on; adds remedies to an out-of-memory error."""
    try:
        try:
            yield
        except torch.OutOfMemoryError as error:
            snapshot_path, batch_size = run.snapshots.write("oom"), run.config.train.batch_size
            raise OutOfMemoryError(
                f"the GPU ran out of memory in iteration {run.state.step + 1}: {str(error).splitlines()[0]} Lower "
                f"batch_size = {batch_size} and raise gradient_accumulation_steps, or lower block_size. "
                f"Memory by allocation: {snapshot_path}"
            ) from error
    except (GptperfError, RuntimeError) as error:
        with contextlib.suppress(GptperfError, RuntimeError, OSError):  # a further error must not hide the first one
            run.reporter.failed(error)
        raise


def _loop(run: TrainingRun, loader: Loader, stop: StopRequest) -> bool:
    """Trains until `max_iters` (True) or until a request to stop (False); either way a checkpoint is on disk.

    Collective: every rank must call it, and every rank takes the same branches.
    """
    train, state, process = run.config.train, run.state, run.engine.process
    save_interval = train.save_interval or train.eval_interval
    clock = StepClock(process.device)
    first = state.step + 1
    if run.config.log.profile and first >= run.profiler.last:  # the first iteration of a process is never recorded
        text = f"profile = {run.config.log.profile}: nothing left to record, the run starts at iteration {first}"
        run.reporter.warning(text)
    while state.step < train.max_iters:
        iteration = state.step + 1
        last = iteration == train.max_iters
        recorded = iteration > first and run.profiler.covers(iteration)
        log_due = last or iteration == first or (iteration % run.config.log.log_interval == 0 and not recorded)
        result = _step(run, loader, clock, first=iteration == first, recorded=recorded, watched=log_due)
        _report_diagnostics(run, iteration)
        state.step = iteration
        state.tokens += run.config.tokens_per_iter
        if log_due:
            _log(run, result, clock, loader.wait_s)
        # In a job of several ranks a save may end at different times. So that every rank takes the same branches, each
        # one learns the result at the next save or at the end.
        if process.world_size == 1:
            _report_save(run, run.saver.poll(), must=False)
        request, val_loss = process.highest(stop.take()), None
        if last or iteration % train.eval_interval == 0:
            with clock.paused(), process.progress.during("evaluation"):
                val_loss = _evaluate(run)
            request = max(request, process.highest(stop.take()))  # a request that came during the evaluation
        stopping = request == stop.STOP
        if last or request or iteration % save_interval == 0:
            with clock.paused(), process.progress.during("save"):
                _check_finite(run)
                _save(run, val_loss, must=last or stopping)
        if stopping and not last:
            run.reporter.stopped()
            process.barrier()  # torchrun ends all processes of a host when the first one exits
            return False
    return True


def _step(
    run: TrainingRun, loader: Loader, clock: StepClock, *, first: bool, recorded: bool, watched: bool
) -> StepResult:
    """Runs one iteration.

    Args:
        run: the run.
        loader: source of the batches.
        clock: counts the step, unless it is the first one or the profiler records it.
        first: whether this is the first iteration of the process, which compiles and fills caches.
        recorded: whether the profiler records the iteration.
        watched: whether to measure gradients and update.
    """
    if first:
        with clock.paused():
            return train_step(run.engine, loader, run.state.step, watched=watched)
    if recorded:
        run.profiler.before(run.state.step + 1, clock)
    result = train_step(run.engine, loader, run.state.step, watched=watched)
    clock.steps += not recorded
    return result


def _report_diagnostics(run: TrainingRun, iteration: int) -> None:
    """Writes a memory snapshot if one was requested, and reports the profile if this iteration ends one."""
    if run.snapshots.asked:
        run.snapshots.asked = False
        run.reporter.message(f"memory: {run.snapshots.write(f'iter{iteration}')}")
    profile = run.profiler.after(iteration)
    if profile is not None:
        run.reporter.profile(profile)


def _log(run: TrainingRun, result: StepResult, clock: StepClock, waited_s: float) -> None:
    """Waits for the step and reports it. Collective: every rank must call it."""
    state = run.state
    loss = run.engine.process.mean(result.loss.clone()).item()  # waits for the device, so the lap ends with the step
    lap = clock.lap()
    if lap.steps > 0:
        state.train_s += lap.seconds
        state.timed_tokens += lap.steps * run.config.tokens_per_iter
    run.reporter.iteration(result, loss, lap, waited_s)
    _check_finite(run)


def _check_finite(run: TrainingRun) -> None:
    """Ends a run whose gradients are no longer finite, before its state is saved.

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
        what = f"{skipped} iterations had gradients that are not finite, and were skipped"
    raise NonFiniteError(
        f"iteration {run.state.step}: {what}; {run.saver.directory} has the last checkpoint before that. Lower "
        "learning_rate, or check the data of these iterations."
    )


def _evaluate(run: TrainingRun) -> float:
    """Evaluates the model, keeps the best loss, and reports it. Collective: every rank must call it."""
    state, start = run.state, time.perf_counter()
    val_loss = evaluate(run.engine, run.inputs.val_tokens)
    if state.best_val_loss is None or val_loss < state.best_val_loss:
        state.best_val_loss, state.best_step = val_loss, state.step
    run.reporter.evaluation(val_loss, 1e3 * (time.perf_counter() - start))
    return val_loss


def _save(run: TrainingRun, val_loss: float | None, *, must: bool) -> None:
    """Starts a save. With `must`, at the end of the run, waits until the checkpoint is on disk.

    Raises:
        DiskError: see `_report_save`.
    """
    inputs, state = run.inputs, run.state
    info = inputs.manifest.tokenizer
    tokenizer = {key: getattr(info, key) for key in ("name", "vocab_size", "fingerprint", "eot")}
    tensors, saved = snapshot(run.engine, state, inputs.train_tokens.fingerprint, tokenizer, inputs.vocabulary)
    _report_save(run, run.saver.save(state.step, tensors, saved, val_loss), must=False)
    if must:
        _report_save(run, run.saver.wait(), must=True)


def _report_save(run: TrainingRun, ended: Saved | None, *, must: bool) -> None:
    """Reports how a save ended. A disk that fails ends the run if `must` is set, or at the third failed save in a row.

    Raises:
        DiskError: the disk failed and the run must end.
        GptperfError: the save failed for another reason.
    """
    if ended is None:
        return
    if ended.error is None:
        run.failed_saves = 0
        run.reporter.checkpoint(ended)
        return
    run.failed_saves += 1
    if must or run.failed_saves >= _SAVE_TRIES or not isinstance(ended.error, DiskError):
        raise ended.error
    run.reporter.save_failed(ended.step, ended.error)


def _finish(run: TrainingRun) -> None:
    """Reports the end of the run with the last validation loss, a baseline and a sample. Only the main rank does so."""
    if not run.engine.process.is_main:
        return
    log, inputs, last = run.config.log, run.inputs, checkpoint.latest(run.saver.directory)
    summary = run.reporter.summary()
    summary["val_loss"] = last.metric if last is not None else None
    if log.trigram_baseline:
        summary["trigram_loss"] = trigram_loss(inputs.train_tokens, inputs.val_tokens)
    if inputs.tokenizer is not None:
        summary["sample"] = sample_text(run.engine, inputs.tokenizer, log.sample_tokens)
    run.reporter.finished(summary)
