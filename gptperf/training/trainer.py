"""The training loop, and what it needs round about: one step, evaluation, saving, reporting.

The GPU is synchronised at log lines, evaluations and saves, and nowhere between them.
"""

import contextlib
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gptperf import checkpoint
from gptperf.checkpoint.background import Saved, Saver
from gptperf.config import Config
from gptperf.data.loader import Loader, validation_batches
from gptperf.data.ngram import trigram_loss
from gptperf.data.shards import TokenSource
from gptperf.data.tokenizers import Tokenizer, load_tokenizer
from gptperf.distributed.process import Process, start_process
from gptperf.errors import PREEMPTED, DataError, DiskError, GptperfError, NonFiniteError, OutOfMemoryError
from gptperf.files import RunLock, check_space
from gptperf.monitor.clock import StepClock, process_age_s
from gptperf.monitor.console import Console, Summary
from gptperf.monitor.events import Eval, Gradients, Iteration
from gptperf.monitor.journal import Journal, new_run_name
from gptperf.monitor.memory import MemorySnapshots, memory_record
from gptperf.monitor.profiler import StepProfiler
from gptperf.monitor.stability import LossWindow
from gptperf.monitor.throughput import Throughput
from gptperf.monitor.trackers import Trackers, open_trackers
from gptperf.plan import Plan
from gptperf.training.build import check_device, open_dataset
from gptperf.training.evaluation import evaluate, sample_text, validation_keys
from gptperf.training.resume import TrainState, find_checkpoint, snapshot, take_up
from gptperf.training.signals import StopRequest
from gptperf.training.startup import against_plan, check_plan, find_peak, startup_info, throughput_of
from gptperf.training.step import Engine, StepResult, build_engine, compile_engine, train_step

__all__ = ["train"]

_SAVE_TRIES = 3  # failed saves in a row after which the run ends


@dataclass
class Run:
    """A training engine, its data, its position, and who is told."""

    engine: Engine
    train_tokens: TokenSource
    val_tokens: TokenSource
    tokenizer: Tokenizer
    state: TrainState
    throughput: Throughput
    console: Console
    journal: Journal | None
    """In the main process."""
    plan: Plan | None
    saver: Saver
    trackers: Trackers
    profiler: StepProfiler
    snapshots: MemorySnapshots
    losses: LossWindow = field(default_factory=LossWindow)
    failed_saves: int = 0
    waited_s: float = 0.0
    """Seconds that the loop had waited for the loader at the last log line."""

    @property
    def config(self) -> Config:
        """What the run was told."""
        return self.engine.config

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return Path(self.config.train.out_dir) / "checkpoints"


def train(config: Config, origins: Mapping[str, str]) -> int:
    """Train as configured, from the configuration to the last checkpoint.

    Args:
        config: of the run.
        origins: where each of its values comes from.

    Returns:
        0, or `PREEMPTED` after a request to stop, with a checkpoint committed.
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
        run = _start(config, origins, process, console, stack)
        watchdog.last_words = lambda text: _end_log(run, {"iterations": run.state.step, "stopped": text}, alone=False)
        loader = Loader(
            run.train_tokens,
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
        with _told(run):
            finished = _loop(run, stack.enter_context(loader), stop)
        if finished:
            with run.engine.weights.gathered():
                _finish(run)
                process.barrier()
        return 0 if finished else PREEMPTED


def _start(
    config: Config,
    origins: Mapping[str, str],
    process: Process,
    console: Console,
    stack: contextlib.ExitStack,
) -> Run:
    """Check memory, data and folder, build the engine, take up a checkpoint, say what was built."""
    planned = check_plan(config, process)
    manifest, train_tokens, val_tokens = open_dataset(config.data, config.model, process)
    tokenizer = load_tokenizer(manifest.tokenizer.name)
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise DataError(f"{config.data.dataset}: its tokenizer {tokenizer.name} is not the one installed here")
    out_dir = Path(config.train.out_dir)
    if process.is_main:
        stack.enter_context(RunLock(out_dir))
    keys = validation_keys(config, process)
    validation_batches(val_tokens, **keys)  # too short a split is found now, not at the first evaluation
    found = find_checkpoint(config, out_dir / "checkpoints", process, console)
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % (1 << 32))
    engine = build_engine(config, process)
    state = TrainState()
    if found is not None:
        state = take_up(found, engine, train_tokens.fingerprint, tokenizer, console)
    if state.validation not in ("", val_tokens.fingerprint):
        raise DataError(f"{out_dir}: its losses are of other validation data; wanted the same shards")
    state.validation = val_tokens.fingerprint
    engine.weights.share()
    compiled = compile_engine(engine)
    peak = find_peak(config, process.device)
    info = startup_info(engine, manifest, peak, compiled, planned)
    journal, trackers = None, Trackers()
    if process.is_main:
        fit = check_space(out_dir, 12 * engine.weights.numel)
        if fit < config.train.keep_checkpoints + 2:  # those kept, the best one, and the one being written
            console.warning(
                f"{out_dir}: room for {fit} checkpoints, keep_checkpoints = {config.train.keep_checkpoints}"
            )
        resumed = state.step if state.run_name else None
        state.run_name = state.run_name or new_run_name(out_dir)
        journal = stack.enter_context(Journal(out_dir, state.run_name, resume_from=resumed, warn=console.warning))
        journal.write("start", {"config": config.sections() | {"origins": dict(origins)}, "startup_info": info})
        opened = open_trackers(config, state.run_name, state.step, console.message, console.warning)
        trackers = stack.enter_context(opened)
    console.startup(info)
    throughput = throughput_of(config, process, peak, console.warning)
    saver = Saver(out_dir / "checkpoints", config.train.keep_checkpoints, process, config.train.async_save)
    stack.callback(saver.wait)  # after an error too: what has begun is written
    profiler = StepProfiler(config, process.world_size, peak, process.is_main)
    snapshots = MemorySnapshots(out_dir, process.device, process.rank, config.log.memory_history)
    return Run(
        engine,
        train_tokens,
        val_tokens,
        tokenizer,
        state,
        throughput,
        console,
        journal,
        planned,
        saver,
        trackers,
        profiler,
        stack.enter_context(snapshots.listening()),
    )


@contextlib.contextmanager
def _told(run: Run) -> Iterator[None]:
    """Leave an error in the run's log too; that of PyTorch's allocator with what helps."""
    try:
        try:
            yield
        except torch.OutOfMemoryError as error:
            snapshot_path, batch_size = run.snapshots.write("oom"), run.config.train.batch_size
            raise OutOfMemoryError(
                f"the GPU's memory does not hold iteration {run.state.step + 1}: {str(error).splitlines()[0]} Lower "
                f"batch_size = {batch_size} and raise gradient_accumulation_steps, or lower block_size. "
                f"Who held it: {snapshot_path}"
            ) from error
    except (GptperfError, RuntimeError) as error:
        code = error.exit_code if isinstance(error, GptperfError) else 1
        with contextlib.suppress(GptperfError, RuntimeError, OSError):  # the first error is the one to tell
            _end_log(run, _summary(run) | {"stopped": f"E{code}: {error}"}, alone=run.engine.process.world_size == 1)
        raise


def _loop(run: Run, loader: Loader, stop: StopRequest) -> bool:
    """Train until `max_iters` (true) or until asked to stop (false); a checkpoint is committed either way."""
    train, state, process = run.config.train, run.state, run.engine.process
    save_interval = train.save_interval or train.eval_interval
    clock = StepClock(process.device)
    first = state.step + 1
    if run.config.log.profile and first >= run.profiler.last:  # the first iteration of a process is never recorded
        run.console.warning(f"profile = {run.config.log.profile}: nothing left to record, iteration {first} comes next")
    while state.step < train.max_iters:
        iteration = state.step + 1
        last = iteration == train.max_iters
        recorded = run.profiler.covers(iteration) and iteration > first
        log_due = last or iteration == first or (iteration % run.config.log.log_interval == 0 and not recorded)
        if iteration == first:  # it compiles and fills caches: not a step like the others
            with clock.paused():
                result = train_step(run.engine, loader, state.step, watched=log_due)
        else:
            if recorded:
                run.profiler.before(iteration, clock)
            result = train_step(run.engine, loader, state.step, watched=log_due)
            clock.steps += not recorded
        _profiled(run, iteration)
        state.step = iteration
        state.tokens += run.config.tokens_per_iter
        if log_due:
            _log(run, result, clock, loader.wait_s)
        if process.world_size == 1:  # several processes hear of a save together: before the next one, and at the end
            _saved(run, run.saver.poll(), must=False)
        wish, val_loss = process.highest(stop.take()), None
        if last or iteration % train.eval_interval == 0:
            with clock.paused(), process.progress.during("evaluation"):
                val_loss = _evaluate(run)
            wish = max(wish, process.highest(stop.take()))
        asked = wish == stop.STOP
        if last or wish or iteration % save_interval == 0:
            with clock.paused(), process.progress.during("save"):
                _check_finite(run)
                _save(run, val_loss, must=last or asked)
        if asked and not last:
            again = " --overwrite=False" if train.overwrite else ""
            run.console.message(f"asked to stop: iteration {iteration} is saved, --init_from=resume{again} goes on")
            summary = _summary(run) | {"stopped": "asked to"}
            _end_log(run, summary)
            run.console.finish(summary)
            process.barrier()  # torchrun ends all processes of a host when the first one leaves
            return False
    return True


def _profiled(run: Run, iteration: int) -> None:
    """Report the profile that ends with an iteration, if one does, and write a snapshot of memory if asked to."""
    if run.snapshots.asked:
        run.snapshots.asked = False
        run.console.message(f"memory: {run.snapshots.write(f'iter{iteration}')}")
    found = run.profiler.after(iteration)
    if found is not None:
        run.console.profile(found)
        if run.journal is not None:
            run.journal.write("profile", found)


def _log(run: Run, result: StepResult, clock: StepClock, waited_s: float) -> None:
    """Read the step's results, for which the host waits here, and report them."""
    engine, state = run.engine, run.state
    loss = engine.process.mean(result.loss.clone()).item()
    skipped = int(engine.skipped.item())
    norm = result.gradient_norm.item()
    seconds, steps = clock.lap()
    step_ms = 1e3 * (seconds / steps if steps else clock.paused_s)
    if steps == 0:  # the process's first iteration, with compilation: its time says nothing of the speed
        if not run.losses.losses:
            run.console.message(f"first iteration: {clock.paused_s:.1f} s, {process_age_s():.1f} s after the start")
    else:
        state.train_s += seconds
        state.timed_tokens += steps * run.config.tokens_per_iter
    gradients: Gradients = {"global_norm": norm}
    if result.gradients is not None:
        figures, ratios = result.gradients.tolist(), len(engine.monitor.components)
        gradients = engine.monitor.record(norm, figures[:-ratios], figures[-ratios:])
    record: Iteration = {
        "iter": state.step,
        "loss": loss,
        "time_ms": step_ms,
        "data_wait_ms": 1e3 * (waited_s - run.waited_s) / max(steps, 1),
        "lr": engine.optimizer.param_groups[0]["lr"],
        "tokens": state.tokens,
        "mfu": run.throughput.record(step_ms) if steps else {},
        "memory": memory_record(engine.process.device, engine.weights.collectives.uncounted_bytes),
        "gradients": gradients,
        "stability": run.losses.add(loss, skipped),
    }
    run.waited_s = waited_s
    if engine.scaler.is_enabled():
        record["loss_scale"] = engine.scaler.get_scale()
    if run.journal is not None:
        run.journal.write("iteration", record)
    for rank, warnings in enumerate(engine.process.gather(run.console.pending())):
        run.console.gathered(rank, warnings)
    run.trackers.log("iteration", record)
    left = run.config.train.max_iters - state.step
    run.console.iteration(record, left * step_ms / 1e3 if steps else None)
    _check_finite(run)


def _check_finite(run: Run) -> None:
    """End a run whose gradients stopped being finite, before anything of it is saved.

    Raises:
        NonFiniteError: a step was left out, or float16's scale has fallen below 1.
    """
    engine = run.engine
    skipped = int(engine.skipped.item())
    if engine.scaler.is_enabled():  # it leaves steps out by design
        if engine.scaler.get_scale() >= 1:
            return
        what = f"the loss scale fell to {engine.scaler.get_scale()}"
    elif skipped == 0:
        return
    else:
        what = f"{skipped} iterations had gradients that are not finite, and were left out"
    raise NonFiniteError(
        f"iteration {run.state.step}: {what}; {run.checkpoints} has what was saved before. Lower learning_rate, or "
        "look at the data of these iterations."
    )


def _evaluate(run: Run) -> float:
    """Evaluate, report, remember the best."""
    state, start = run.state, time.perf_counter()
    val_loss = evaluate(run.engine, run.val_tokens)
    if state.best_val_loss is None or val_loss < state.best_val_loss:
        state.best_val_loss, state.best_step = val_loss, state.step
    record: Eval = {
        "iter": state.step,
        "val_loss": val_loss,
        "best_val_loss": state.best_val_loss,
        "time_ms": 1e3 * (time.perf_counter() - start),
    }
    if run.journal is not None:
        run.journal.write("eval", record)
    run.trackers.log("eval", record)
    run.console.evaluation(record)
    return val_loss


def _save(run: Run, val_loss: float | None, *, must: bool) -> None:
    """Save; where the run ends, wait until the checkpoint is committed.

    Raises:
        DiskError: see `_saved`.
    """
    state = run.state
    tokenizer = {"name": run.tokenizer.name, "fingerprint": run.tokenizer.fingerprint}
    tensors, saved = snapshot(run.engine, state, run.train_tokens.fingerprint, tokenizer)
    _saved(run, run.saver.save(state.step, tensors, saved, val_loss), must=False)
    if must:
        _saved(run, run.saver.wait(), must=True)


def _saved(run: Run, ended: Saved | None, *, must: bool) -> None:
    """Report how a save ended. A disk that fails ends the run the third time, or where the run ends anyway.

    Raises:
        DiskError: then.
        GptperfError: what else was wrong.
    """
    if ended is None:
        return
    error = ended.error
    if error is not None:
        run.failed_saves += 1
        if must or run.failed_saves >= _SAVE_TRIES or not isinstance(error, DiskError):
            raise error
        run.console.warning(f"no checkpoint of iteration {ended.step}, training goes on: {error}")
        if run.journal is not None:
            run.journal.write("message", {"level": "warning", "text": str(error), "iter": ended.step})
        return
    run.failed_saves = 0
    record = {
        "iter": ended.step,
        "path": str(ended.path),
        "val_loss": ended.metric,
        "time_ms": ended.time_ms,
        "stall_ms": ended.stall_ms,
    }
    if run.journal is not None:
        run.journal.write("checkpoint", record)
    run.console.checkpoint(record)


def _summary(run: Run) -> Summary:
    """Of what was done, whether or not that is all."""
    state = run.state
    summary: Summary = {
        "iterations": state.step,
        "best_val_loss": state.best_val_loss,
        "best_iter": state.best_step,
        "wall_time_s": process_age_s(),
        "checkpoint_dir": str(run.checkpoints),
    }
    if run.journal is not None:
        summary["log_path"] = str(run.journal.path.with_suffix(".json"))
    if state.timed_tokens > 0:
        speed = run.throughput.record(1e3 * state.train_s * run.config.tokens_per_iter / state.timed_tokens)
        summary["tokens_per_sec"] = speed["tokens_per_sec"]
        summary["mfu_percent"] = speed.get("mfu_percent")
    if run.plan is not None:
        uncounted_bytes = run.engine.weights.collectives.uncounted_bytes
        peak_gb = memory_record(run.engine.process.device, uncounted_bytes)["peak_gb"]
        summary["plan"] = against_plan(run.plan, summary.get("tokens_per_sec"), peak_gb)
    return summary


def _end_log(run: Run, summary: Summary, *, alone: bool = True) -> None:
    """Write how the run ended, and unless others wait the log in one file; only the main process has one."""
    if run.journal is not None:
        run.journal.reopen()  # an error may have closed it
        run.journal.write("summary", summary)
        if alone:
            run.journal.write_json()


def _finish(run: Run) -> None:
    """Say how the run ended, with a sample of what the model writes."""
    if run.journal is None:
        return
    log, last, summary = run.config.log, checkpoint.latest(run.checkpoints), _summary(run)
    summary["val_loss"] = last.metric if last is not None else None
    if log.trigram_baseline:
        summary["trigram_loss"] = trigram_loss(run.train_tokens, run.val_tokens)
    if log.sample_tokens:
        summary["sample"] = sample_text(run.engine, run.tokenizer, log.sample_tokens)
    run.trackers.finish(summary)
    _end_log(run, summary)
    run.console.finish(summary)
