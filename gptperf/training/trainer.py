"""The training loop: steps, log lines, evaluations and saves.

The host waits for the GPU only at log lines, evaluations and saves.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from gptperf import checkpoint, flops
from gptperf.config import Config
from gptperf.data.loader import Loader
from gptperf.data.mixture import parts_of
from gptperf.data.ngram import trigram_loss
from gptperf.distributed.process import start_process
from gptperf.errors import PREEMPTED, GptperfError, OutOfMemoryError
from gptperf.monitor.clock import StepClock
from gptperf.monitor.console import Console
from gptperf.monitor.slow_step import SlowSteps
from gptperf.tasks import Scores
from gptperf.training.build import compiler_errors
from gptperf.training.dataset import source_facts
from gptperf.training.estimate import check_sizes_given, tasks_interval
from gptperf.training.evaluation import evaluate, sample_text, score_tasks
from gptperf.training.matching import Told
from gptperf.training.preflight import check_device
from gptperf.training.saved_state import changed_by_forward
from gptperf.training.saving import check_finite, report_save, save_run
from gptperf.training.signals import StopRequest
from gptperf.training.start import TrainingRun, start_run
from gptperf.training.step import StepResult, train_step
from gptperf.training.stopping import Dropped, StopPoints, answer

__all__ = ["train"]


def train(config: Config, origins: Mapping[str, str], changes: Mapping[str, str] | None = None) -> int:
    """Runs a training from its configuration to its last checkpoint.

    Args:
        config: configuration of the run.
        origins: where each of its values comes from.
        changes: lines about values that `gptperf.config` changed because of a value of a higher layer, by key.

    Returns:
        0, or `PREEMPTED` after a request to stop. In both cases a checkpoint of the last finished iteration is on disk.
    """
    with contextlib.ExitStack() as stack:
        process = start_process(config.system.device, config.system.collective_timeout_s)
        stack.callback(process.close)
        watchdog = stack.enter_context(process.watchdog(config.train.out_dir, debug=config.system.debug))
        check_sizes_given(origins, process.device)
        progress, max_iters = process.progress, config.train.max_iters
        console = stack.enter_context(
            Console(max_iters=max_iters, mode=config.log.console, enabled=process.is_main, progress=progress)
        )
        stop = StopRequest(lambda request: console.message(answer(request, progress, stop.same_s)))
        stack.enter_context(stop.listening())
        check_device(config.system, process.device)
        run = start_run(Told(config, origins, changes or {}), process, console, stack)
        if run is None:
            return 0
        watchdog.last_words = run.reporter.aborted
        progress.max_iters, progress.eval_interval = max_iters, config.train.eval_interval
        progress.finished = run.state.step
        loader = _loader(run)
        with _errors_logged(run):
            finished = _loop(run, stack.enter_context(loader), stop)
            loss = _mean_loss(run) if finished else None
        if finished:
            with progress.during("end"), run.engine.weights.gathered():  # the main rank alone runs the model
                _finish(run, loss, stop)
                process.barrier()
        return 0 if finished else PREEMPTED


def _loader(run: TrainingRun) -> Loader:
    """Returns the source of this rank's batches, from the position of the run on."""
    config, process = run.config, run.engine.process
    return Loader(
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


@contextlib.contextmanager
def _errors_logged(run: TrainingRun) -> Iterator[None]:
    """Writes an error of the body to the run's log before it passes on; adds remedies to an out-of-memory error."""
    try:
        try:
            with compiler_errors():
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
    points, clock = StopPoints(stop, process), StepClock(process.device)
    slow = SlowSteps(run.reporter.warning, _gpu_uuid(process.device))
    first = state.step + 1
    if run.config.log.profile and first >= run.profiler.last:  # the first iteration of a process is never recorded
        text = f"profile = {run.config.log.profile}: nothing left to record, the run starts at iteration {first}"
        run.reporter.warning(text)
    task = dropped = ""
    try:
        if state.unevaluated:
            task = f"the evaluation of iteration {state.step}"
            _evaluate_and_save(run, clock, points, evaluation=True, save=True)
        stopping = points.request() == stop.STOP
        while state.step < train.max_iters and not stopping:
            iteration, task = state.step + 1, f"iteration {state.step + 1}"
            _iterate(run, loader, clock, points, slow, first=iteration == first)
            # In a job of several ranks a save may end at different times. So that every rank takes the same branches,
            # each one learns the result at the next save or at the end.
            if process.world_size == 1:
                report_save(run, run.saver.poll(), must=False)
            request = points.after_iteration(run.engine.micro_batches)
            task = f"the evaluation of iteration {iteration}"
            last, due = iteration == train.max_iters, iteration % train.eval_interval == 0 or _tasks_due(run)
            save_due = last or request > stop.NOTHING or iteration % (train.save_interval or train.eval_interval) == 0
            request = max(request, _evaluate_and_save(run, clock, points, evaluation=last or due, save=save_due))
            stopping = request == stop.STOP
    except Dropped:
        stopping, dropped = True, task
    if not stopping or (state.step == train.max_iters and not state.unevaluated):
        return True
    _stop(run, clock, dropped)
    return False


def _gpu_uuid(device: torch.device) -> str | None:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def _iterate(
    run: TrainingRun, loader: Loader, clock: StepClock, points: StopPoints, slow: SlowSteps, *, first: bool
) -> None:
    """Runs an iteration, and reports it if it is due.

    Args:
        run: the run.
        loader: source of the batches.
        clock: counts the step, unless it is the first one or the profiler records it.
        points: decides whether the iteration is dropped.
        slow: warns of an iteration that takes much longer than the others.
        first: whether this is the first iteration of the process, which compiles and fills caches.

    Raises:
        Dropped: the iteration was dropped, and the state is as before it.
    """
    state, config, progress = run.state, run.config, run.engine.process.progress
    iteration = state.step + 1
    recorded = not first and run.profiler.covers(iteration)
    log_due = iteration == config.train.max_iters or first
    log_due = log_due or (iteration % config.log.log_interval == 0 and not recorded)
    if run.engine.graphs is not None:
        run.engine.graphs.pause(recorded)  # the profile of a replay does not tell which op launched a kernel
    if recorded:
        run.profiler.before(iteration, clock)
    progress.may_drop = points.may_drop and not recorded and run.engine.micro_batches > 1
    restore = changed_by_forward(run.engine) if progress.may_drop else None
    try:
        watched = contextlib.nullcontext() if recorded else slow.watching(iteration, lambda: loader.wait_s)
        with clock.paused() if first else contextlib.nullcontext(), watched:
            drops = points.drops if progress.may_drop else None
            result = train_step(run.engine, loader, state.step, watched=log_due, drops=drops)
    except Dropped:
        assert restore is not None
        restore()
        raise
    if not (first or recorded):
        clock.steps += 1
        if result.pairs is not None:
            run.pairs = result.pairs if run.pairs is None else run.pairs + result.pairs
    _report_diagnostics(run, iteration, result)
    state.step = progress.finished = iteration
    state.tokens += config.tokens_per_iter
    run.losses.append(result.loss)
    if log_due:
        _log(run, result, clock, loader.wait_s, slow)


def _evaluate_and_save(run: TrainingRun, clock: StepClock, points: StopPoints, *, evaluation: bool, save: bool) -> int:
    """Evaluates and saves after an iteration, where they are due, and returns a request that came meanwhile.

    Raises:
        Dropped: the evaluation was dropped.
    """
    state, progress, last = run.state, run.engine.process.progress, run.state.step == run.config.train.max_iters
    val_loss, request = None, StopRequest.NOTHING
    if evaluation:
        state.unevaluated = True
        with clock.paused(), progress.during("evaluation"):
            val_loss = _evaluate(run, points)
        state.unevaluated = False
        request = points.request()
    if save or request:
        with clock.paused(), progress.during("save"):
            check_finite(run)
            save_run(run, val_loss, must=last)
    return request


def _stop(run: TrainingRun, clock: StepClock, dropped: str) -> None:
    """Saves the last finished iteration unless it is saved, and reports that the run stops.

    Args:
        run: the run.
        clock: clock of the steps.
        dropped: name of the work that was dropped, if the run is in the middle of it.
    """
    process = run.engine.process
    with clock.paused(), process.progress.during("save"):
        check_finite(run)
        report_save(run, run.saver.wait(), must=False)
        if run.saved_step != run.state.step:
            save_run(run, None, must=True)
    run.reporter.stopped(dropped, _mean_loss(run))
    process.barrier()  # torchrun ends all processes of a host when the first one exits


def _report_diagnostics(run: TrainingRun, iteration: int, result: StepResult) -> None:
    """Writes a memory snapshot if one was requested, and reports the profile if this iteration ends one."""
    if run.snapshots.asked:
        run.snapshots.asked = False
        run.reporter.message(f"memory: {run.snapshots.write(f'iter{iteration}')}")
    profile = run.profiler.after(iteration, result.pairs)
    if profile is not None:
        run.reporter.profile(profile)


def _log(run: TrainingRun, result: StepResult, clock: StepClock, waited_s: float, slow: SlowSteps) -> None:
    """Waits for the step and reports it. Collective: every rank must call it."""
    state = run.state
    loss = run.engine.process.mean(result.loss.clone()).item()  # waits for the device, so the lap ends with the step
    lap, pairs = clock.lap(), 0
    if lap.steps > 0:
        state.train_s += lap.seconds
        state.timed_tokens += lap.steps * run.config.tokens_per_iter
        pairs = _timed_pairs(run, lap.steps)
        state.timed_pairs += pairs
        if run.engine.process.device.type == "cuda":
            slow.add(state.step, lap.step_ms)
    run.reporter.iteration(result, loss, lap, waited_s, pairs)
    check_finite(run)


def _timed_pairs(run: TrainingRun, steps: int) -> int:
    """Returns the (query, key) pairs of the steps since the last log line. Collective: every rank must call it."""
    counted, run.pairs = run.pairs, None
    if counted is None:  # a sequence is one document
        model = run.config.model
        return steps * run.config.tokens_per_iter // model.block_size * flops.attended_pairs(model)
    return sum(run.engine.process.gather(int(counted.item())))


def _evaluate(run: TrainingRun, points: StopPoints) -> float:
    """Evaluates the model, keeps the best loss, and reports it. Collective: every rank must call it.

    Raises:
        Dropped: the evaluation was dropped.
    """
    state, start = run.state, time.perf_counter()
    parts = parts_of(run.inputs.val_tokens)
    losses = {part.name: evaluate(run.engine, part.source, points.drops) for part in parts}
    val_loss = sum(part.weight * losses[part.name] for part in parts)
    if state.best_val_loss is None or val_loss < state.best_val_loss:
        state.best_val_loss, state.best_step = val_loss, state.step
    mixed, scores, tasks_start = len(parts) > 1, dict[str, Scores](), time.perf_counter()
    if _tasks_due(run):
        scores = score_tasks(run.engine, run.inputs.tasks, points.drops)
    sources = source_facts(run.config, run.inputs.train_tokens, losses, state.step) if mixed else {}
    now = time.perf_counter()
    run.reporter.evaluation(val_loss, 1e3 * (now - start), sources, scores, 1e3 * (now - tasks_start))
    return val_loss


def _tasks_due(run: TrainingRun) -> bool:
    """Returns whether the evaluation of this iteration has the tasks of `eval_tasks`."""
    step, last = run.state.step, run.config.train.max_iters
    return bool(run.inputs.tasks) and (step == last or step % tasks_interval(run.config) == 0)


def _mean_loss(run: TrainingRun) -> tuple[float, int] | None:
    """Returns the mean training loss of the last iterations, and their number. Collective: every rank must call it.

    They are the last tenth of the run, but at least 5 and at most `LOSSES`, and no iterations of an earlier process.
    """
    last = list(run.losses)[-max(run.state.step // 10, 5) :]
    if not last:
        return None
    return run.engine.process.mean(torch.stack(last).mean()).item(), len(last)


def _finish(run: TrainingRun, loss: tuple[float, int] | None, stop: StopRequest) -> None:
    """Reports the end of the run with the last validation loss, a baseline and a sample. Only the main rank does so.

    Args:
        run: the run.
        loss: the result of `_mean_loss`.
        stop: a request to stop leaves out the baseline and the sample.
    """
    if not run.engine.process.is_main:
        return
    log, inputs, last = run.config.log, run.inputs, checkpoint.latest(run.saver.directory)
    summary = run.reporter.summary(loss)
    summary["val_loss"] = last.metric if last is not None else None
    if log.trigram_baseline and not stop.requested:
        pairs = zip(parts_of(inputs.train_tokens), parts_of(inputs.val_tokens), strict=True)
        summary["trigram_loss"] = sum(train.weight * trigram_loss(train.source, val.source) for train, val in pairs)
    if inputs.tokenizer is not None:
        with contextlib.suppress(Dropped):
            drops = partial(getattr, stop, "requested")
            summary["sample"] = sample_text(run.engine, inputs.tokenizer, log.sample_tokens, drops)
    run.reporter.finished(summary)
