"""What a user sees of a run: plain lines, and on a terminal a progress bar below them.

Plain text goes to the stream as it is, without escape codes or wrapping, so that it can be piped and
searched; on a terminal rich draws. The blocks are functions from a record to lines; `Console` decides where
these go.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TextIO, TypedDict

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

__all__ = [
    "Console",
    "StartupInfo",
    "Summary",
    "evaluation_lines",
    "iteration_lines",
    "startup_lines",
    "summary_lines",
]

_WIDTH = 80


class StartupInfo(TypedDict, total=False):
    """Facts of a run, printed at its start and stored in its log. What is unknown is left out or None."""

    total_parameters: int
    trainable_parameters: int
    non_embedding_parameters: int
    """All but the position table."""
    n_layer: int
    n_embd: int
    n_head: int
    kv_heads: int
    block_size: int
    vocab_size: int
    components: dict[str, str | bool | float]
    """Component kind -> what was built: normalization, position_encoding, ffn_type, bias, ..."""
    kernels: dict[str, str]
    """Op -> eager or triton."""
    kernel_reasons: dict[str, str]
    """Op -> why it is not triton."""
    batch_size: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    """Sequences an iteration: batch_size * gradient_accumulation_steps."""
    tokens_per_iter: int
    max_iters: int
    learning_rate: float
    min_lr: float
    lr_schedule: str
    warmup_iters: int
    weight_decay: float
    grad_clip: float
    dataset: str
    tokenizer: str
    train_tokens: int
    val_tokens: int
    device: str
    """Name of the GPU or CPU."""
    num_gpus: int
    """0 on a CPU."""
    memory_gb: float | None
    """Of one GPU."""
    dtype: str
    parallelism: str
    """single process, DDP, ..."""
    attention_backend: str
    """With the reason."""
    compile: str
    """model, block, or off and why."""
    versions: dict[str, str]
    """python, gptperf, torch, triton, cuda, ..."""
    hardware_peak_tflops: float
    """This and the following: `gptperf.monitor.throughput.theoretical`."""
    peak_basis: str
    peak_source: str
    peak_hint: str
    """In place of a peak: `gptperf.hardware.no_peak_hint`."""
    flops_per_token: float
    convention: str
    attention_ffn_ratio: float
    expected_tokens_per_sec: float
    plan: dict[str, Any]  # `gptperf.plan.plan_record`
    notes: list[str]
    """What is legal but may surprise, a line each."""


class Summary(TypedDict, total=False):
    """The end of a run."""

    iterations: int
    val_loss: float | None
    best_val_loss: float | None
    best_iter: int | None
    trigram_loss: float
    """Of a trigram model of the same data: what a language model has to beat."""
    tokens_per_sec: float | None
    mfu_percent: float | None
    wall_time_s: float
    sample: str
    """Generated text."""
    log_path: str
    checkpoint_dir: str
    plan: dict[str, float]  # beside what was measured
    stopped: str
    """Why the run ended before max_iters."""


def _with_unit(value: float, unit: str, digits: int = 4) -> str:
    """ "0.798 GFLOPs": the largest prefix that leaves at least 0.1 before it."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= 0.1 * scale:
            return f"{value / scale:.{digits}g} {prefix}{unit}"
    return f"{value / 1e3:.{digits}g} k{unit}"


def _duration(seconds: float) -> str:
    """ "1d 02:03:04", "0:42"."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days}d {hour:02d}" if days else f"{hour}") + f":{minute:02d}:{second:02d}"


def _printable(text: str) -> str:
    """Control characters (generated text may hold any) as escapes, so that no text drives the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text.expandtabs(4))


def _row(label: str, value: Any) -> str:
    return f"  {label + ':':<22} {value}"


def _rows(info: Mapping[str, Any], fields: Mapping[str, str], form: str = "{}") -> list[str]:
    return [_row(label, form.format(info[key])) for key, label in fields.items() if info.get(key) is not None]


def _title(text: str, width: int) -> list[str]:
    return ["=" * width, f" {text}", "=" * width]


def _kernel_rows(info: Mapping[str, Any]) -> list[str]:
    """One row an implementation and reason: "eager: rms_norm, rope (it has no Triton kernel yet)"."""
    groups: dict[tuple[str, str], list[str]] = {}
    for op, implementation in info.get("kernels", {}).items():
        groups.setdefault((implementation, info.get("kernel_reasons", {}).get(op, "")), []).append(op)
    lines = []
    for (implementation, reason), ops in groups.items():
        lines.append(_row("Kernels", f"{implementation}: {', '.join(ops)}" + (f" ({reason})" if reason else "")))
    return lines


def _architecture(info: Mapping[str, Any]) -> list[str]:
    lines = [" MODEL ARCHITECTURE:"]
    labels = {
        "total_parameters": "Total parameters",
        "trainable_parameters": "Trainable parameters",
        "non_embedding_parameters": "Non-embedding params",
    }
    for key, label in labels.items():
        if info.get(key) is not None:
            lines.append(_row(label, f"{info[key]:,} ({info[key] / 1e6:.2f}M)"))
    lines += _rows(info, {"n_layer": "Layers", "n_embd": "Hidden size", "n_head": "Attention heads"})
    if info.get("kv_heads") != info.get("n_head"):
        lines += _rows(info, {"kv_heads": "Key/value heads"})
    lines += _rows(info, {"block_size": "Sequence length", "vocab_size": "Vocabulary size"})
    for kind, value in info.get("components", {}).items():
        label = kind.replace("_", " ").capitalize()
        lines.append(_row(label.replace("Ffn", "FFN").replace("Qk", "QK"), value))
    return lines + _kernel_rows(info)


def _training(info: Mapping[str, Any]) -> list[str]:
    lines = [" TRAINING CONFIGURATION:"]
    lines += _rows(info, {"batch_size": "Batch size (micro)", "gradient_accumulation_steps": "Gradient accum steps"})
    counts = {"effective_batch_size": "Effective batch size", "tokens_per_iter": "Tokens per iteration"}
    lines += _rows(info, counts | {"max_iters": "Iterations"}, "{:,}")
    if info.get("learning_rate") is not None:
        rate = f"{info['learning_rate']:.2e}"
        if info.get("lr_schedule") != "constant" and info.get("min_lr") is not None:
            rate += f" -> {info['min_lr']:.2e}"
        details = [str(info["lr_schedule"])] if "lr_schedule" in info else []
        details += [f"warm-up {info['warmup_iters']:,}"] if "warmup_iters" in info else []
        lines.append(_row("Learning rate", rate + (f" ({', '.join(details)})" if details else "")))
    lines += _rows(info, {"weight_decay": "Weight decay", "grad_clip": "Gradient clipping", "dataset": "Data set"})
    lines += _rows(info, {"tokenizer": "Tokenizer"})
    return lines + _rows(info, {"train_tokens": "Training tokens", "val_tokens": "Validation tokens"}, "{:,}")


def _hardware(info: Mapping[str, Any]) -> list[str]:
    lines = [" HARDWARE:", *_rows(info, {"device": "Device", "num_gpus": "GPUs"})]
    lines += _rows(info, {"memory_gb": "Memory per GPU"}, "{:.1f} GB")
    labels = {"dtype": "Precision", "parallelism": "Parallelism", "attention_backend": "Attention"}
    lines += _rows(info, labels | {"compile": "torch.compile"})
    if info.get("versions"):
        lines.append(_row("Versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())))
    return lines


def _theory(info: Mapping[str, Any]) -> list[str]:
    lines = [" THEORETICAL PERFORMANCE:"]
    lines.append(
        _row("Hardware peak", info.get("peak_source") or f"unknown ({info.get('peak_hint', 'no peak given')})")
    )
    per_token = info.get("flops_per_token")
    lines += [] if per_token is None else [_row("FLOPs per token", _with_unit(per_token, "FLOPs"))]
    lines += _rows(info, {"attention_ffn_ratio": "Attention/FFN ratio"}, "{:.2f}")
    return lines + _rows(info, {"expected_tokens_per_sec": "Expected tokens/s @50% MFU"}, "{:,.0f}")


def startup_lines(info: Mapping[str, Any], width: int = _WIDTH) -> list[str]:
    """The blocks at the start of a run.

    Args:
        info: a `StartupInfo`; `width` is that of the rules.
    """
    lines = _title("TRAINING INITIALIZATION", width)
    for block in (_architecture(info), _training(info), _hardware(info), _theory(info)):
        lines += ["", *block]
    notes = [f" Note: {note}" for note in info.get("notes") or ()]
    return [*lines, "", *notes, *([""] if notes else []), *_title("STARTING TRAINING", width), ""]


def iteration_lines(record: Mapping[str, Any], max_iters: int, eta_s: float | None, width: int = _WIDTH) -> list[str]:
    """The block of one iteration.

    Args:
        record: iter, loss, time_ms, lr, and mfu, memory, gradients, loss_scale as far as they are known.
        max_iters: of the run.
        eta_s: seconds left.
        width: of the rules.
    """
    rule = "-" * width
    head = f" Iter {record['iter']:>6}  Loss: {record['loss']:.4f}  "
    head += f"Time: {record['time_ms']:.0f}ms  LR: {record['lr']:.2e}"
    left = "" if eta_s is None else f" | Time left: {_duration(eta_s)}"
    lines = [rule, head, rule, f" Progress: {record['iter']:,}/{max_iters:,}{left}"]
    mfu = record.get("mfu") or {}
    speeds = [f"MFU: {mfu['mfu_percent']:.2f}%"] if "mfu_percent" in mfu else []
    speeds += [f"Of ceiling: {mfu['of_ceiling_percent']:.1f}%"] if "of_ceiling_percent" in mfu else []
    speeds += [f"Achieved: {_with_unit(mfu['achieved_tflops'] * 1e12, 'F')}"] if "achieved_tflops" in mfu else []
    speeds += [f"Peak: {mfu['hardware_peak_tflops']:,.1f} TF"] if "hardware_peak_tflops" in mfu else []
    rates = [f"Tokens/s: {mfu['tokens_per_sec']:,.0f}"] if "tokens_per_sec" in mfu else []
    rates += [f"FLOPs/token: {_with_unit(mfu['flops_per_token'], 'F')}"] if "flops_per_token" in mfu else []
    lines += [" " + " | ".join(parts) for parts in (speeds, rates) if parts]
    memory = record.get("memory") or {}
    names = {
        "allocated_gb": "alloc",
        "peak_gb": "peak",
        "reserved_gb": "reserved",
        "rss_gb": "resident",
        "peak_rss_gb": "peak resident",
    }
    sizes = [f"{memory[key]:.2f} GB {name}" for key, name in names.items() if key in memory]
    lines += [" Memory: " + "  ".join(sizes)] if sizes else []
    return lines + _gradient_lines(record)


def _gradient_lines(record: Mapping[str, Any]) -> list[str]:
    gradients = record.get("gradients") or {}
    forms = {"global_norm": "norm={:.4f}", "grad_mean": "mean={:.2e}", "grad_std": "std={:.2e}"}
    parts = [form.format(gradients[key]) for key, form in forms.items() if gradients.get(key) is not None]
    parts += [f"loss scale={record['loss_scale']:g}"] if record.get("loss_scale") is not None else []
    return [" Gradients: " + "  ".join(parts)] if parts else []


def evaluation_lines(record: Mapping[str, Any]) -> list[str]:
    """One line for an evaluation: iter, val_loss, and where known best_val_loss, time_ms."""
    parts = [f"validation loss {record['val_loss']:.4f}"]
    parts += [f"best {record['best_val_loss']:.4f}"] if record.get("best_val_loss") is not None else []
    parts += [f"{record['time_ms'] / 1e3:.1f} s"] if record.get("time_ms") is not None else []
    return [f" Evaluation at {record['iter']:,}: " + "  ".join(parts)]


def summary_lines(summary: Mapping[str, Any], width: int = _WIDTH) -> list[str]:
    """The end of a run, from a `Summary`."""
    lines = ["", *_title("TRAINING STOPPED" if summary.get("stopped") else "TRAINING FINISHED", width)]
    lines += _rows(summary, {"stopped": "Reason"})
    lines += _rows(summary, {"iterations": "Iterations"}, "{:,}")
    lines += _rows(summary, {"val_loss": "Validation loss"}, "{:.4f}")
    if summary.get("best_val_loss") is not None:
        where = f" (iteration {summary['best_iter']:,})" if summary.get("best_iter") is not None else ""
        lines.append(_row("Best validation loss", f"{summary['best_val_loss']:.4f}{where}"))
    lines += _rows(summary, {"trigram_loss": "Trigram model's loss"}, "{:.4f}")
    lines += _rows(summary, {"tokens_per_sec": "Tokens/s"}, "{:,.0f}")
    lines += _rows(summary, {"mfu_percent": "MFU"}, "{:.2f}%")
    lines += _rows(
        summary.get("plan") or {}, {"peak_gb": "Peak memory", "planned_memory_gb": "as planned"}, "{:.1f} GB"
    )
    if summary.get("wall_time_s") is not None:
        lines.append(_row("Wall time", _duration(summary["wall_time_s"])))
    lines += _rows(summary, {"log_path": "Log", "checkpoint_dir": "Checkpoints"})
    if summary.get("sample"):
        lines += ["", " SAMPLE:", *(f"  {line}" for line in summary["sample"].split("\n"))]
    return lines


class _RichConsole(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process here; `gptperf.errors.main_guard` decides instead."""
        raise BrokenPipeError


class Console:
    """Prints a run, in the one process that may. A context manager: leaving it removes the progress bar."""

    def __init__(self, *, max_iters: int, enabled: bool = True, stream: TextIO | None = None):
        """
        Args:
            max_iters: iterations of the run.
            enabled: false in every process but rank 0.
            stream: default stdout.
        """
        self.max_iters = max_iters
        self.enabled = enabled
        self.stream = sys.stdout if stream is None else stream
        if self.stream is None:  # stdout was closed before the start
            self.enabled = enabled = False
        self._rich: _RichConsole | None = None
        if enabled and self.stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            # rich obeys NO_COLOR itself.
            self._rich = _RichConsole(file=self.stream, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def startup(self, info: Mapping[str, Any]) -> None:
        """Print the blocks of a `StartupInfo`."""
        self._print(startup_lines(info, self._width))

    def iteration(self, record: Mapping[str, Any], eta_s: float | None = None) -> None:
        """Print an iteration (see `iteration_lines`) and move the progress bar."""
        self._print(iteration_lines(record, self.max_iters, eta_s, self._width))
        if self._rich is None or not self.enabled:
            return
        with self._while_read():
            if self._progress is None:
                self._progress = _progress_bar(self._rich)
                self._task = self._progress.add_task("", total=self.max_iters, facts="")
            tokens_s = (record.get("mfu") or {}).get("tokens_per_sec")
            parts = [f"loss {record['loss']:.4f}"]
            parts += [] if tokens_s is None else [f"{tokens_s:,.0f} tok/s"]
            parts += [] if eta_s is None else [f"{_duration(eta_s)} left"]
            self._progress.update(self._task, completed=record["iter"], facts="  ".join(parts))
            self._progress.start()  # only the first time
            self._progress.refresh()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Print an evaluation (see `evaluation_lines`)."""
        self._print(evaluation_lines(record))

    def checkpoint(self, record: Mapping[str, Any]) -> None:
        """Print where a checkpoint lies: iter, path, and time_ms where known."""
        took = f"  {record['time_ms'] / 1e3:.1f} s" if record.get("time_ms") is not None else ""
        self._print([f" Checkpoint at {record['iter']:,}: {record['path']}{took}"])

    def message(self, text: str) -> None:
        """Print a line."""
        self._print([f" {text}"])

    def warning(self, text: str) -> None:
        """Print a line that must be seen."""
        self._print([f" WARNING: {text}"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take the progress bar away and print the end of the run (a `Summary`)."""
        self._stop()
        self._print(summary_lines(summary, self._width))

    @property
    def _width(self) -> int:
        return _WIDTH if self._rich is None else max(1, min(_WIDTH, self._rich.width))

    def _stop(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            with self._while_read():
                progress.stop()

    def _print(self, lines: Iterable[str]) -> None:
        if not self.enabled:
            return
        encoding = self.stream.encoding or "utf-8"
        text = _printable("\n".join(lines)).encode(encoding, "replace").decode(encoding)
        with self._while_read():
            if self._rich is not None:
                self._rich.print(Text("\n").join(_styled(text)))
            else:
                self.stream.write(text + "\n")
                self.stream.flush()

    @contextlib.contextmanager
    def _while_read(self) -> Iterator[None]:
        """Fall silent when the reader has gone (`| head`): the run goes on, and its log has everything."""
        try:
            yield
        except BrokenPipeError:
            self.enabled = False
            self._progress = None
            if self.stream is sys.stdout:  # Python flushes it once more at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def _progress_bar(console: _RichConsole) -> Progress:
    """A bar without a refresh thread: it moves with the iterations. A stderr that is a file stays one."""
    cropped = Column(no_wrap=True, overflow="crop")
    return Progress(
        TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=cropped),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[facts]}", table_column=cropped.copy()),
        console=console,
        auto_refresh=False,
        transient=True,
        expand=True,
        redirect_stderr=sys.stderr.isatty(),
    )


def _styled(text: str) -> Iterator[Text]:
    """Terminal colours by the shape of a line."""
    for line in text.split("\n"):
        if line.startswith(("===", "---")):
            yield Text(line, "dim")
        elif line.startswith(" WARNING:"):
            yield Text(line, "bold yellow")
        elif line.startswith((" Iter ", " Evaluation ")) or (
            line.isupper() and line.startswith(" ") and line[1] != " "
        ):
            yield Text(line, "bold")
        else:
            yield Text(line)
