"""Turns records of the log into the plain lines that a run prints."""

from collections.abc import Mapping
from typing import Any

from gptperf.formats import byte_text, count_text, counted, duration, mfu_scale, number, percent, with_error, with_unit

__all__ = [
    "SCORES",
    "WIDTH",
    "checkpoint_lines",
    "evaluation_lines",
    "iteration_lines",
    "printable",
    "profile_lines",
    "stability_parts",
    "startup_lines",
    "summary_lines",
]

WIDTH = 80
"""Width of a horizontal rule in columns."""
SCORES = ("acc", "acc_norm", "perplexity", "centred")
"""The scores of a task that are shown, in their order; each may have a standard error `NAME_stderr`."""
_KERNELS = 8  # number of kernels of a profile that are printed


def printable(text: str) -> str:
    """Returns the text with control characters escaped: a sample may contain some, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text.expandtabs(4))


def _row(label: str, value: Any) -> str:
    return f"  {label + ':':<22} {value}"


def _rows(info: Mapping[str, Any], fields: Mapping[str, str], form: str = "{}") -> list[str]:
    return [_row(label, form.format(info[key])) for key, label in fields.items() if info.get(key) is not None]


def _title(text: str, width: int) -> list[str]:
    return ["=" * width, f" {text}", "=" * width]


def _kernel_rows(info: Mapping[str, Any]) -> list[str]:
    """Returns one row per implementation and reason: "eager: rms_norm, rope (it has no Triton kernel yet)"."""
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
            short = f" ({info[key] / 1e6:.2f}M)" if info[key] >= 100_000 else ""
            lines.append(_row(label, f"{info[key]:,}{short}"))
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
    if info.get("parent"):
        lines.append(_row("Forked from", f"{info['parent']['run']}, iteration {info['parent']['step']:,}"))
    lines += _rows(info, {"optimizer": "Optimizer"})
    if info.get("learning_rate") is not None:
        rate = f"{info['learning_rate']:.2e}"
        if info.get("lr_schedule") != "constant" and info.get("min_lr") is not None:
            rate += f" -> {info['min_lr']:.2e}"
        details = [str(info["lr_schedule"])] if "lr_schedule" in info else []
        details += [f"warm-up {info['warmup_iters']:,}"] if "warmup_iters" in info else []
        lines.append(_row("Learning rate", rate + (f" ({', '.join(details)})" if details else "")))
    lines += _rows(info, {"weight_decay": "Weight decay", "grad_clip": "Gradient clipping", "dataset": "Data set"})
    lines += _rows(info, {"tokenizer": "Tokenizer"})
    lines += _rows(info, {"train_tokens": "Training tokens", "val_tokens": "Validation tokens"}, "{:,}")
    for name, source in (info.get("sources") or {}).items():
        figures = f"{source['weight']:.1%}, {source['epochs']:.2f} epochs of {counted(source['train_tokens'], 'token')}"
        lines.append(_row(name, figures))
    return lines + ([] if info.get("sources") else _rows(info, {"epochs": "Epochs"}, "{:.2f}"))


def _hardware(info: Mapping[str, Any]) -> list[str]:
    lines = [" HARDWARE:", *_rows(info, {"device": "Device", "num_gpus": "GPUs"})]
    if info.get("memory_gb") is not None:
        lines.append(_row("Memory per GPU", byte_text(1e9 * info["memory_gb"])))
    labels = {"dtype": "Precision", "parallelism": "Parallelism", "attention_backend": "Attention"}
    lines += _rows(info, labels | {"compile": "torch.compile", "cuda_graph": "CUDA graphs"})
    if info.get("versions"):
        lines.append(_row("Versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())))
    return lines


def _theory(info: Mapping[str, Any]) -> list[str]:
    lines = [" THEORETICAL PERFORMANCE:"]
    lines.append(
        _row("Hardware peak", info.get("peak_source") or f"unknown ({info.get('peak_hint', 'no peak given')})")
    )
    per_token = info.get("flops_per_token")
    convention = f" ({info['convention']})" if "convention" in info else ""
    lines += [] if per_token is None else [_row("FLOPs per token", with_unit(per_token, "FLOPs") + convention)]
    lines += _rows(info, {"attention_ffn_ratio": "Attention/FFN ratio"}, "{:.2f}")
    return lines + _rows(info, {"expected_tokens_per_sec": "Expected tokens/s @50% MFU"}, "{:,.0f}")


def startup_lines(info: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """Returns the blocks at the start of a run.

    Args:
        info: a `StartupInfo`.
        width: columns of the rules.
    """
    lines = _title("TRAINING INITIALIZATION", width)
    for block in (_architecture(info), _training(info), _hardware(info), _theory(info)):
        lines += ["", *block]
    notes = [f" Note: {note}" for note in info.get("notes") or ()]
    return [*lines, "", *notes, *([""] if notes else []), *_title("STARTING TRAINING", width), ""]


def iteration_lines(
    record: Mapping[str, Any],
    max_iters: int,
    eta_s: float | None,
    width: int = WIDTH,
    planned_gb: float | None = None,
    unicode: bool = False,
) -> list[str]:
    """Returns the block of one iteration.

    Args:
        record: an `Iteration`; mfu, memory, gradients, loss_scale and stability may be missing.
        max_iters: number of iterations of the run.
        eta_s: seconds until the end of the run.
        width: columns of the rules.
        planned_gb: memory that the plan predicts, if there is a plan.
        unicode: whether to draw rules and separators with box characters, for a terminal that shows them.
    """
    rule, bar = ("\u2500" * width, " \u2502 ") if unicode else ("-" * width, " | ")
    head = f" Iter {record['iter']:>6}  Loss: {number(record['loss'], '.4f', 'nan')}  "
    head += f"Time: {count_text(record['time_ms']).replace(',', '')}ms  LR: {record['lr']:.2e}"
    left = "" if eta_s is None else f"{bar}Time left: {duration(eta_s)}"
    lines = [rule, head, rule, f" Progress: {record['iter']:,}/{max_iters:,}{left}"]
    mfu = record.get("mfu") or {}
    convention = f" {mfu['convention']}" if "convention" in mfu else ""
    speeds = [f"MFU: {percent(mfu['mfu_percent'])}{convention}"] if "mfu_percent" in mfu else []
    speeds += [f"Blended: {percent(mfu['blended_mfu_percent'])}"] if "blended_mfu_percent" in mfu else []
    speeds += [f"Of ceiling: {mfu['of_ceiling_percent']:.1f}%"] if "of_ceiling_percent" in mfu else []
    speeds += [f"Achieved: {with_unit(mfu['achieved_tflops'] * 1e12, 'F')}"] if "achieved_tflops" in mfu else []
    peak = mfu_scale({**mfu, "convention": None}).removeprefix("of ").replace("TFLOP/s", "TF")
    speeds += [f"Peak: {peak}"] if "hardware_peak_tflops" in mfu else []
    rates = [f"Tokens/s: {count_text(mfu['tokens_per_sec'])}"] if "tokens_per_sec" in mfu else []
    rates += [f"FLOPs/token: {with_unit(mfu['flops_per_token'], 'F')}"] if "flops_per_token" in mfu else []
    if unicode:
        lines += [start + bar.join(parts) for start, parts in (("\u26a1 ", speeds), ("   ", rates)) if parts]
    else:
        lines += [" " + bar.join(parts) for parts in (speeds, rates) if parts]
    memory = record.get("memory") or {}
    names = {
        "allocated_gb": "alloc",
        "peak_gb": "peak",
        "reserved_gb": "reserved",
        "rss_gb": "resident",
        "peak_rss_gb": "peak resident",
    }
    sizes = [f"{byte_text(1e9 * memory[key])} {name}" for key, name in names.items() if key in memory]
    if planned_gb is not None and "peak_gb" in memory:
        sizes.append(f"{byte_text(1e9 * planned_gb)} planned")
    lines += [" Memory: " + "  ".join(sizes)] if sizes else []
    stability = stability_parts(record)
    return lines + _gradient_lines(record) + ([" Stability: " + "  ".join(stability)] if stability else [])


def stability_parts(record: Mapping[str, Any]) -> list[str]:
    """Returns short phrases about an iteration's `Stability` and the gradient elements that are not finite."""
    found = record.get("stability") or {}
    parts = []
    if found.get("loss_variance") is not None:
        parts.append(f"loss variance={found['loss_variance']:.2e} of {found['window']}")
    parts += [name for key, name in {"spike": "LOSS SPIKE", "plateau": "PLATEAU"}.items() if found.get(key)]
    parts += [f"{counted(found['non_finite'], 'step')} skipped"] if found.get("non_finite") else []
    elements = (record.get("gradients") or {}).get("non_finite")
    return parts + ([f"{counted(elements, 'gradient element')} not finite"] if elements else [])


def _gradient_lines(record: Mapping[str, Any]) -> list[str]:
    gradients = record.get("gradients") or {}
    forms = {"global_norm": "norm={:.4f}", "grad_mean": "mean={:.2e}", "grad_std": "std={:.2e}"}
    parts = [form.format(gradients[key]) for key, form in forms.items() if gradients.get(key) is not None]
    parts += [f"loss scale={record['loss_scale']:g}"] if record.get("loss_scale") is not None else []
    return [" Gradients: " + "  ".join(parts)] if parts else []


def evaluation_lines(record: Mapping[str, Any]) -> list[str]:
    """Returns the line of an evaluation, and one for each data set of a mixture and for each task.

    Args:
        record: an `Eval`.
    """
    parts = [f"loss {number(record['val_loss'], '.4f', 'nan')}"]
    parts += [f"best {record['best_val_loss']:.4f}"] if record.get("best_val_loss") is not None else []
    parts += [duration(record["time_ms"] / 1e3)] if record.get("time_ms") is not None else []
    lines = [f" Evaluation at {record['iter']:,}: " + "  ".join(parts)]
    for name, source in (record.get("sources") or {}).items():
        loss = f"loss {number(source['val_loss'], '.4f', 'nan')}"
        lines.append(_row(name, f"{loss}  {source['share']:.1%} of the data read, {source['epochs']:.2f} epochs"))
    for name, scores in (record.get("tasks") or {}).items():
        lines.append(_row(name, "  ".join(f"{key} {with_error(scores, key)}" for key in SCORES[:-1] if key in scores)))
    if len(record.get("tasks") or {}) > 1:
        lines.append(_row("core", with_error(record, "core")))
    return lines


def checkpoint_lines(record: Mapping[str, Any]) -> list[str]:
    """Returns the line that says where a checkpoint is.

    Args:
        record: a `Checkpoint`.
    """
    took = f"  {duration(record['time_ms'] / 1e3)}" if record.get("time_ms") is not None else ""
    return [f" Checkpoint at {record['iter']:,}: {record['path']}{took}"]


def profile_lines(record: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a profile: the trace, the parts of a step's time, the longest kernels.

    Args:
        record: a `Profile`.
    """
    lines = [f" profile of {counted(record['steps'], 'iteration')}: {record['trace']} (open it at ui.perfetto.dev)"]
    points_lost = record.get("waterfall")
    if "parts_ms" in record:
        parts = [f"{name} {ms:.2f} ms" for name, ms in record["parts_ms"].items() if ms > 0]
        lines.append(f"   {record['step_ms']:.2f} ms per iteration: {', '.join(parts)}")
    if points_lost is not None:
        points = [f"{name} {value:.2f}" for name, value in points_lost.items() if value]
        lines.append(
            f"   100 points of MFU ({mfu_scale(record)}): {', '.join(points)}, left {record['mfu_percent']:.2f}"
        )
    for kernel in record.get("kernels", [])[:_KERNELS]:
        lines.append(f"   {kernel['ms']:>9.3f} ms {kernel['calls']:>7.1f} x {kernel['part']:<14}{kernel['name'][:70]}")
    return lines


def summary_lines(summary: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """Returns the blocks at the end of a run.

    Args:
        summary: a `Summary`.
        width: columns of the rules.
    """
    lines = ["", *_title("TRAINING STOPPED" if summary.get("stopped") else "TRAINING FINISHED", width)]
    lines += _rows(summary, {"stopped": "Reason"})
    lines += _rows(summary, {"iterations": "Iterations", "tokens": "Tokens"}, "{:,}")
    if summary.get("train_loss") is not None:
        over = f" (mean of the last {counted(summary['train_loss_iterations'], 'iteration')})"
        lines.append(_row("Training loss", f"{number(summary['train_loss'], '.4f')}{over}"))
    lines += _rows(summary, {"val_loss": "Validation loss"}, "{:.4f}")
    if summary.get("best_val_loss") is not None:
        where = f" (iteration {summary['best_iter']:,})" if summary.get("best_iter") is not None else ""
        lines.append(_row("Best validation loss", f"{summary['best_val_loss']:.4f}{where}"))
    lines += _rows(summary, {"trigram_loss": "Trigram model's loss"}, "{:.4f}")
    if summary.get("tokens_per_sec") is not None:
        lines.append(_row("Tokens/s", count_text(summary["tokens_per_sec"])))
    if summary.get("mfu_percent") is not None:
        lines.append(_row("MFU", f"{percent(summary['mfu_percent'])}, {mfu_scale(summary)}".removesuffix(", ")))
    for key, label in {"peak_gb": "Peak memory", "planned_memory_gb": "as planned"}.items():
        if (summary.get("plan") or {}).get(key) is not None:
            lines.append(_row(label, byte_text(1e9 * summary["plan"][key])))
    if summary.get("wall_time_s") is not None:
        starts = f" in {summary['starts']} starts" if summary.get("starts", 1) > 1 else ""
        lines.append(_row("Wall time", f"{duration(summary['wall_time_s'])}{starts}"))
    added = summary.get("this_start")
    if added:
        part = f"{counted(added['iterations'], 'iteration')} from {added['first_iter']:,} on"
        part = f"{part}, {counted(added['tokens'], 'token')}"
        lines.append(_row("Added by this start", f"{part}, {duration(added['wall_time_s'])}"))
    lines += _rows(summary, {"log_path": "Log", "checkpoint_dir": "Checkpoints"})
    if summary.get("sample"):
        lines += ["", " SAMPLE:", *(f"  {line}" for line in summary["sample"].split("\n"))]
    return lines
