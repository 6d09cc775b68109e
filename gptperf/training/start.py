"""The start of a run: from a configuration to the objects that the training loop works with."""

import contextlib
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gptperf.checkpoint import Checkpoint
from gptperf.checkpoint.background import Saver
from gptperf.config import Config
from gptperf.config.fork import fork_of
from gptperf.data.mixture import parts_of
from gptperf.distributed.process import Process
from gptperf.errors import CheckpointError, DataError
from gptperf.monitor.console import Console
from gptperf.monitor.events import StartupInfo
from gptperf.monitor.journal import assemble
from gptperf.monitor.memory import MemorySnapshots
from gptperf.monitor.profiler import StepProfiler
from gptperf.plan import Plan
from gptperf.training.dataset import data_facts, data_record, repeated
from gptperf.training.engine import Engine, build_engine, compile_engine, open_graphs
from gptperf.training.estimate import estimate, slow_warning
from gptperf.training.matching import Told, keep_schedule
from gptperf.training.preflight import Inputs, check_disk, check_inputs, find_peak, throughput_of
from gptperf.training.reporting import Reporter
from gptperf.training.resume import take_up
from gptperf.training.saved_state import TrainState
from gptperf.training.startup_info import startup_info

__all__ = ["LOSSES", "TrainingRun", "start_run"]

LOSSES = 50
"""Largest number of iterations whose mean is the training loss of the summary."""


@dataclass
class TrainingRun:
    """The objects that the training loop works with."""

    inputs: Inputs
    engine: Engine
    state: TrainState
    reporter: Reporter
    saver: Saver
    profiler: StepProfiler
    snapshots: MemorySnapshots
    losses: deque[Tensor] = field(default_factory=lambda: deque(maxlen=LOSSES))
    """Losses of the last iterations on this rank, scalars on the device."""
    pairs: Tensor | None = None
    """`StepResult.pairs` of the timed iterations since the last log line, added up."""
    failed_saves: int = 0
    """Number of failed saves since the last one that succeeded."""
    data: Sequence[Mapping[str, Any]] = ()
    """What every checkpoint records of the training data."""
    saved_step: int = 0
    """Iteration of the last checkpoint on disk, or 0 before the first one."""

    @property
    def config(self) -> Config:
        """Configuration of the run."""
        return self.engine.config


def start_run(told: Told, process: Process, console: Console, stack: contextlib.ExitStack) -> TrainingRun | None:
    """Checks the inputs, builds the engine, restores a checkpoint, and reports what was built.

    Returns None if the run has finished already: its checkpoint is of the last iteration or a later one.

    Collective: every rank must call it. Objects that must be closed at the end of the run are entered into `stack`,
    which closes them in reverse order: the saver finishes first, then trackers and journal close, then the lock is
    released.
    """
    inputs = check_inputs(told.config, process, console, stack)
    told = _resumed(told, inputs)
    config, out_dir = told.config, Path(told.config.train.out_dir)
    if _has_finished(config, inputs):
        assert inputs.checkpoint is not None
        console.message(
            f"nothing was left to do: {inputs.checkpoint.path} is at iteration {inputs.checkpoint.step:,} of max_iters "
            f"= {config.train.max_iters:,}; to train on, give a larger --max_iters"
        )
        return None
    validation = [len(part.source) for part in parts_of(inputs.val_tokens)]
    task_tokens = sum(task.tokens for task in inputs.tasks)
    expected = estimate(config, process.world_size, process.device, inputs.plan, validation, task_tokens)
    slow = None if expected is None else slow_warning(expected, config, process.device)
    if slow is not None and process.is_main:  # before anything large is built
        console.warning(slow)
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % (1 << 32))
    engine = build_engine(config, process)
    if config.data.document_mask:
        engine.model.document_end = inputs.tokenizer_info.eot
    state = _restore(inputs, engine, console)
    engine.weights.share()
    must = config.system.compile is True and told.origins.get("compile") == "command line"
    compiled = compile_engine(engine, must=must)
    graphs = open_graphs(engine, _micro_batch_ms(inputs.plan, config, process.world_size), console.warning)
    peak = find_peak(config, process.device)
    facts = data_facts(config, inputs.train_tokens, inputs.val_tokens)
    info = startup_info(engine, inputs.tokenizer_info, facts, peak, compiled, inputs.plan) | {"cuda_graph": graphs}
    info |= {**_parent(config, inputs.checkpoint), "notes": [*told.changes.values(), *info["notes"]]}
    if expected is not None:
        info["expected_iteration_s"] = expected.iteration_s
        info["expected_total_s"] = expected.total_s(config, state.step)
        info["notes"].append(expected.line(config, state.step))
    if process.is_main:
        check_disk(out_dir, engine.weights.numel, config.train.keep_checkpoints, console.warning)
    notes = repeated(facts, config.data.dataset)  # printed below the blocks of `reporter.start`
    reporter = Reporter(engine, state, inputs.plan, throughput_of(config, process, peak, notes.append), console)
    reporter.start(told.origins, info, stack)
    for note in notes:
        reporter.warning(note)
    saver = Saver(out_dir / "checkpoints", config.train.keep_checkpoints, process, config.train.async_save)
    stack.callback(saver.wait)  # after an error too, a save that has begun is completed
    profiler = StepProfiler(config, process.world_size, peak, process.is_main)
    snapshots = MemorySnapshots(out_dir, process.device, process.rank, config.log.memory_history)
    snapshots = stack.enter_context(snapshots.listening())
    data = data_record(inputs.train_tokens)
    return TrainingRun(inputs, engine, state, reporter, saver, profiler, snapshots, data=data, saved_step=state.step)


def _parent(config: Config, found: Checkpoint | None) -> StartupInfo:
    """Returns what the log says about the parent of a fork; nothing for another run."""
    if found is None or fork_of(config.train.init_from) is None:
        return {}
    run = str(found.state["train_state"].get("run_name", ""))
    return {"parent": {"run": run, "path": str(found.path), "step": found.step}}


def _micro_batch_ms(plan: Plan | None, config: Config, world_size: int) -> float | None:
    return None if plan is None else plan.step_ms * world_size / config.train.gradient_accumulation_steps


def _has_finished(config: Config, inputs: Inputs) -> bool:
    """Returns whether a run that resumes has nothing left to do, not even an evaluation or its summary."""
    found = inputs.checkpoint
    if found is None or config.train.init_from not in ("resume", "auto") or found.step < config.train.max_iters:
        return False
    state = found.state.get("train_state")
    if not isinstance(state, dict):
        return False  # `take_up` refuses it
    if found.step > config.train.max_iters:
        return True
    # A process that was killed after its last save may have left these out.
    journal = Path(config.train.out_dir) / f"{state.get('run_name')}.jsonl"
    return not state.get("unevaluated") and (not journal.exists() or bool(assemble(journal)["summary"]))


def _resumed(told: Told, inputs: Inputs) -> Told:
    """Returns the configuration of a run, with the schedule of the checkpoint that it resumes from, if there is one.

    Raises:
        CheckpointError: the checkpoint does not hold a configuration that this version of gptperf can read.
    """
    found = inputs.checkpoint
    if found is None or told.config.train.init_from not in ("resume", "auto") or "train_state" not in found.state:
        return told
    try:
        return keep_schedule(told, found.state, found.path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{found.path}: its state does not fit this version of gptperf: {error!r}") from error


def _restore(inputs: Inputs, engine: Engine, console: Console) -> TrainState:
    """Restores the checkpoint that the run starts from, if there is one.

    Raises:
        DataError: the best validation loss in the checkpoint was computed on other data.
    """
    state = TrainState()
    if inputs.checkpoint is not None:
        state = take_up(inputs.checkpoint, engine, inputs.train_tokens, inputs.tokenizer_info, console)
    if state.validation not in ("", inputs.val_tokens.fingerprint):
        raise DataError(
            f"{engine.config.train.out_dir}: found losses on other validation data than now; wanted the same "
            "validation shards"
        )
    state.validation = inputs.val_tokens.fingerprint
    state.starts += 1
    return state
