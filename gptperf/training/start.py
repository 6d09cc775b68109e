"""The start of a run: from a configuration to the objects that the training loop works with."""

import contextlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptperf.checkpoint.background import Saver
from gptperf.config import Config
from gptperf.distributed.process import Process
from gptperf.errors import DataError
from gptperf.monitor.console import Console
from gptperf.monitor.memory import MemorySnapshots
from gptperf.monitor.profiler import StepProfiler
from gptperf.training.engine import Engine, build_engine, compile_engine
from gptperf.training.preflight import Inputs, check_disk, check_inputs, find_peak, throughput_of
from gptperf.training.reporting import Reporter, startup_info
from gptperf.training.resume import take_up
from gptperf.training.saved_state import TrainState

__all__ = ["TrainingRun", "start_run"]


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
    failed_saves: int = 0
    """Number of failed saves since the last one that succeeded."""

    @property
    def config(self) -> Config:
        """Configuration of the run."""
        return self.engine.config


def start_run(
    config: Config, origins: Mapping[str, str], process: Process, console: Console, stack: contextlib.ExitStack
) -> TrainingRun:
    """Checks the inputs, builds the engine, restores a checkpoint, and reports what was built.

    Collective: every rank must call it. Objects that must be closed at the end of the run are entered into `stack`,
    which closes them in reverse order: the saver finishes first, then trackers and journal close, then the lock is
    released.
    """
    out_dir = Path(config.train.out_dir)
    inputs = check_inputs(config, process, console, stack)
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % (1 << 32))
    engine = build_engine(config, process)
    if config.data.document_mask:
        engine.model.document_end = inputs.manifest.tokenizer.eot
    state = _restore(inputs, engine, console)
    engine.weights.share()
    compiled = compile_engine(engine)
    peak = find_peak(config, process.device)
    info = startup_info(engine, inputs.manifest, peak, compiled, inputs.plan)
    if process.is_main:
        check_disk(out_dir, engine.weights.numel, config.train.keep_checkpoints, console.warning)
    notes: list[str] = []  # printed below the blocks of `reporter.start`
    reporter = Reporter(engine, state, inputs.plan, throughput_of(config, process, peak, notes.append), console)
    reporter.start(origins, info, stack)
    for note in notes:
        reporter.warning(note)
    saver = Saver(out_dir / "checkpoints", config.train.keep_checkpoints, process, config.train.async_save)
    stack.callback(saver.wait)  # after an error too, a save that has begun is completed
    profiler = StepProfiler(config, process.world_size, peak, process.is_main)
    snapshots = MemorySnapshots(out_dir, process.device, process.rank, config.log.memory_history)
    return TrainingRun(inputs, engine, state, reporter, saver, profiler, stack.enter_context(snapshots.listening()))


def _restore(inputs: Inputs, engine: Engine, console: Console) -> TrainState:
    """Restores the checkpoint that the run starts from, if there is one.

    Raises:
        DataError: the best validation loss in the checkpoint was computed on other data.
    """
    state = TrainState()
    if inputs.checkpoint is not None:
        state = take_up(inputs.checkpoint, engine, inputs.train_tokens.fingerprint, inputs.tokenizer, console)
    if state.validation not in ("", inputs.val_tokens.fingerprint):
        raise DataError(
            f"{engine.config.train.out_dir}: found validation losses of other validation data; wanted the same shards"
        )
    state.validation = inputs.val_tokens.fingerprint
    return state
