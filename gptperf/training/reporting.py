"""Reports what happens in a run to the console, the journal and the trackers.

The trainer tells a `Reporter` what happened, and the `Reporter` builds the records. A new field of the log is declared
in `gptperf.monitor.events` and filled in one of the functions below.
"""

import contextlib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from gptperf.checkpoint.background import Saved
from gptperf.config import TrainConfig
from gptperf.errors import GptperfError
from gptperf.monitor.clock import Lap, process_age_s
from gptperf.monitor.console import Console
from gptperf.monitor.events import (
    Checkpoint,
    Eval,
    Gradients,
    Iteration,
    Message,
    Profile,
    Start,
    StartupInfo,
    Summary,
)
from gptperf.monitor.journal import Journal, new_run_name
from gptperf.monitor.memory import memory_record
from gptperf.monitor.stability import LossWindow
from gptperf.monitor.step_timing import EnergyMeter
from gptperf.monitor.throughput import Throughput
from gptperf.monitor.trackers import Trackers, open_trackers
from gptperf.plan import Plan
from gptperf.tasks import Scores, core
from gptperf.training.engine import Engine
from gptperf.training.saved_state import TrainState
from gptperf.training.step import StepResult

__all__ = ["Reporter", "resume_flags"]


def resume_flags(train: TrainConfig) -> str:
    """Returns the flags to add to the command of a run so that it continues."""
    return "--init_from=resume" + (" --overwrite=False" if train.overwrite else "")


class Reporter:
    """Tells the journal, the trackers and the console what happens in a run.

    Every rank has a reporter. Only the main rank has a journal and trackers, and only its console prints.

    Args:
        engine: model, weights and optimizer of the run.
        state: position of the run. The reporter only reads it, except that it sets the name of a new run.
        plan: plan of the run, if there is one.
        throughput: computes the speed of the run.
        console: console of this rank.
    """

    def __init__(
        self, engine: Engine, state: TrainState, plan: Plan | None, throughput: Throughput, console: Console
    ) -> None:
        self._console = console
        self._config, self._process = engine.config, engine.process
        self._engine, self._state, self._plan, self._throughput = engine, state, plan, throughput
        self._out_dir = Path(engine.config.train.out_dir)
        self._journal: Journal | None = None
        self._trackers = Trackers()
        self._first_step, self._first_tokens = state.step, state.tokens
        self._losses = LossWindow()
        self._waited_s = 0.0
        device = engine.process.device
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
        self._energy = None if uuid is None else EnergyMeter(uuid)
        self._joules = None if self._energy is None else self._energy.joules()

    def _used_joules(self) -> float | None:
        """Returns the energy that this rank's GPU has used since the last call, or None if it is unknown."""
        now = None if self._energy is None else self._energy.joules()
        used = None if now is None or self._joules is None else now - self._joules
        self._joules = now
        return used

    def _record(self, event: str, fields: Mapping[str, object]) -> None:
        if self._journal is not None:
            self._journal.write(event, fields)

    def start(self, origins: Mapping[str, str], info: StartupInfo, stack: contextlib.ExitStack) -> None:
        """Opens the journal and the trackers, then reports what was built.

        Args:
            origins: where each value of the configuration comes from.
            info: facts about the run.
            stack: closes the trackers and the journal at the end of the run.
        """
        config, state, console = self._config, self._state, self._console
        if self._process.is_main:
            resumed = state.step if state.run_name else None
            state.run_name = state.run_name or new_run_name(self._out_dir)
            journal = Journal(self._out_dir, state.run_name, resume_from=resumed, warn=console.warning)
            self._journal = stack.enter_context(journal)
            start: Start = {"config": config.sections() | {"origins": dict(origins)}, "startup_info": info}
            self._record("start", start)
            trackers = open_trackers(config, state.run_name, state.step, console.message, console.warning)
            self._trackers = stack.enter_context(trackers)
        console.startup(info)

    def message(self, text: str) -> None:
        """Prints a line."""
        self._console.message(text)

    def warning(self, text: str) -> None:
        """Prints a warning; the warning of a rank other than the main rank is printed with the next log line."""
        self._console.warning(text)

    def iteration(self, result: StepResult, loss: float, lap: Lap, waited_s: float, pairs: int) -> None:
        """Reports a logged step. Collective: every rank must call it.

        Args:
            result: figures of the step, which the device has finished.
            loss: mean loss of the step over all ranks.
            lap: time since the last log line; if it has no steps, it covers the first iteration of this process.
            waited_s: seconds that this process has waited for the loader so far.
            pairs: (query, key) pairs of the steps of the lap on all ranks, of one head and over all layers.
        """
        if lap.steps == 0 and not self._losses.losses:
            self.message(f"first iteration: {lap.paused_s:.1f} s, {process_age_s():.1f} s after the start")
        record = self._iteration(result, loss, lap, waited_s, pairs)
        ranks = self._process.gather((self._console.pending(), self._used_joules()))
        used = [joules for _, joules in ranks if joules is not None]
        if len(used) == len(ranks):
            record["joules"] = sum(used)
        self._record("iteration", record)
        for rank, (warnings, _) in enumerate(ranks):
            self._console.gathered(rank, warnings)
        self._trackers.log("iteration", record)
        self._console.iteration(record, self._process.progress.run_left_s(lap.step_ms / 1e3) if lap.steps else None)

    def _iteration(self, result: StepResult, loss: float, lap: Lap, waited_s: float, pairs: int) -> Iteration:
        engine, state = self._engine, self._state
        norm = result.gradient_norm.item()
        gradients: Gradients = {"global_norm": norm}
        if result.gradients is not None:
            figures, ratios = result.gradients.tolist(), len(engine.monitor.components)
            gradients = engine.monitor.record(norm, figures[:-ratios], figures[-ratios:])
        record: Iteration = {
            "iter": state.step,
            "loss": loss,
            "time_ms": lap.step_ms,
            "data_wait_ms": 1e3 * (waited_s - self._waited_s) / max(lap.steps, 1),
            "lr": result.learning_rate,
            "tokens": state.tokens,
            # The first iteration of a process includes compilation, so its time does not show the speed of the run.
            "mfu": self._speed(lap.step_ms, lap.steps * self._config.tokens_per_iter, pairs) if lap.steps else {},
            "memory": memory_record(engine.process.device, engine.weights.collectives.uncounted_bytes),
            "gradients": gradients,
            "stability": self._losses.add(loss, int(engine.skipped.item())),
        }
        self._waited_s = waited_s
        if engine.scaler.is_enabled():
            record["loss_scale"] = engine.scaler.get_scale()
        if engine.float8 is not None:
            record["float8"], saturates = engine.float8.record()
            if saturates is not None:
                self._console.warning(saturates)
        return record

    def _speed(self, step_ms: float, tokens: int, pairs: int) -> dict[str, Any]:
        """Returns the speed of iterations of `step_ms`, which have these tokens and (query, key) pairs together."""
        sequences = Fraction(tokens, self._config.model.block_size)
        return self._throughput.record(step_ms, pairs / sequences)

    def evaluation(
        self,
        val_loss: float,
        time_ms: float,
        sources: Mapping[str, dict[str, float]],
        tasks: Mapping[str, Scores],
        tasks_ms: float,
    ) -> None:
        """Reports an evaluation at this iteration, with the best loss so far from the state.

        Args:
            val_loss: the validation loss.
            time_ms: time of the evaluation.
            sources: figures of each data set of a mixture; empty without a mixture.
            tasks: scores of the tasks; empty if they are not due.
            tasks_ms: the part of the time that the tasks took.
        """
        record: Eval = {
            "iter": self._state.step,
            "val_loss": val_loss,
            "best_val_loss": self._state.best_val_loss,
            "time_ms": time_ms,
        }
        if sources:
            record["sources"] = dict(sources)
        if tasks:
            record |= {"tasks": dict(tasks), **core(tasks), "tasks_ms": tasks_ms}  # type: ignore[typeddict-item]
        self._record("eval", record)
        self._trackers.log("eval", record)
        self._console.evaluation(record)

    def profile(self, record: Profile) -> None:
        """Reports a profile."""
        self._console.profile(record)
        self._record("profile", record)

    def checkpoint(self, saved: Saved) -> None:
        """Reports a save that succeeded."""
        record: Checkpoint = {
            "iter": saved.step,
            "path": str(saved.path),
            "val_loss": saved.metric,
            "time_ms": saved.time_ms,
            "stall_ms": saved.stall_ms,
        }
        self._record("checkpoint", record)
        self._console.checkpoint(record)

    def save_failed(self, step: int, error: GptperfError) -> None:
        """Reports a save that failed while training continues."""
        self.warning(f"the checkpoint of iteration {step} could not be saved, training continues: {error}")
        record: Message = {"level": "warning", "text": str(error), "iter": step}
        self._record("message", record)

    def stopped(self, dropped: str, loss: tuple[float, int] | None) -> None:
        """Reports that the run ends because it was asked to stop. A checkpoint of the last iteration is on disk.

        Args:
            dropped: name of the work that was dropped, or "".
            loss: see `summary`.
        """
        text = f"asked to stop: {dropped} is dropped, " if dropped else "asked to stop: "
        if self._state.step:
            text += f"iteration {self._state.step} is saved; continue with {resume_flags(self._config.train)}"
        else:
            text += "no iteration is finished, so there is nothing to save; start the run again"
        self.message(text)
        summary = self.summary(loss) | {"stopped": "asked to"}
        self._end_log(summary)
        self._console.finish(summary)

    def failed(self, error: GptperfError | RuntimeError) -> None:
        """Writes the error that ends the run to its log. `gptperf.errors.main_guard` prints it for the user."""
        code = error.exit_code if isinstance(error, GptperfError) else 1
        self._end_log(self.summary() | {"stopped": f"E{code}: {error}"}, complete=self._process.world_size == 1)

    def aborted(self, reason: str) -> None:
        """Writes to the log why the watchdog ends this process. A thread of the watchdog calls this."""
        self._end_log({"iterations": self._state.step, "stopped": reason}, complete=False)

    def finished(self, summary: Summary) -> None:
        """Reports that the run has reached its last iteration. Only the main rank calls this."""
        self._trackers.finish(summary)
        self._end_log(summary)
        self._console.finish(summary)

    def summary(self, loss: tuple[float, int] | None = None) -> Summary:
        """Returns the summary of the run so far, over all its starts.

        Args:
            loss: mean training loss of the last iterations, and their number.
        """
        state, age_s = self._state, process_age_s()
        summary: Summary = {
            "iterations": state.step,
            "tokens": state.tokens,
            "starts": state.starts,
            "best_val_loss": state.best_val_loss,
            "best_iter": state.best_step,
            "wall_time_s": state.wall_s + age_s,
        }
        if loss is not None:
            summary["train_loss"], summary["train_loss_iterations"] = loss
        checkpoints = self._out_dir / "checkpoints"
        if checkpoints.exists():
            summary["checkpoint_dir"] = str(checkpoints)
        if self._first_step:
            summary["this_start"] = {
                "first_iter": self._first_step + 1,
                "iterations": state.step - self._first_step,
                "tokens": state.tokens - self._first_tokens,
                "wall_time_s": age_s,
            }
        if self._journal is not None:
            summary["log_path"] = str(self._journal.path.with_suffix(".json"))
        if state.timed_tokens > 0:
            step_ms = 1e3 * state.train_s * self._config.tokens_per_iter / state.timed_tokens
            speed = self._speed(step_ms, state.timed_tokens, state.timed_pairs)
            summary["tokens_per_sec"] = speed["tokens_per_sec"]
            summary["mfu_percent"] = speed.get("mfu_percent")
            named = ("blended_mfu_percent", "convention", "hardware_peak_tflops", "peak_dtype", "peak_basis")
            summary |= {key: speed[key] for key in named if key in speed}  # type: ignore[typeddict-item]
        if self._plan is not None:
            uncounted_bytes = self._engine.weights.collectives.uncounted_bytes
            peak_gb = memory_record(self._process.device, uncounted_bytes)["peak_gb"]
            summary["plan"] = _against_plan(self._plan, summary.get("tokens_per_sec"), peak_gb)
        return summary

    def _end_log(self, summary: Summary, *, complete: bool = True) -> None:
        """Writes the summary to the journal and, if `complete`, assembles the JSON file.

        After an error in a job of several ranks the JSON file is not written, because the other ranks are about to end
        this process.
        """
        if self._journal is not None:
            self._journal.reopen()  # an error may have closed the journal
            self._record("summary", summary)
            if complete:
                self._journal.write_json()


def _against_plan(planned: Plan, tokens_per_sec: float | None, peak_gb: float) -> dict[str, float]:
    """Returns the planned and the measured memory, and both speeds if the speed was measured."""
    found = {"planned_memory_gb": planned.memory.total_gb, "peak_gb": peak_gb}
    if tokens_per_sec is not None:
        found |= {"planned_tokens_per_sec": planned.tokens_per_sec, "tokens_per_sec": tokens_per_sec}
    return found
