"""Finds the GPU that a plan is for: a row of the GPU table, or a GPU that the user describes."""

from collections.abc import Mapping
from typing import NamedTuple

from gptperf import hardware
from gptperf.errors import ConfigError, mistakes
from gptperf.hardware import Gpu

__all__ = ["FIGURES", "described_gpu", "find_gpu", "own_gpu"]


class Figure(NamedTuple):
    """A figure of a GPU that the user gives."""

    unit: str
    low: float
    high: float
    factors: tuple[float, ...]
    """Units in which the figure is often written by mistake, as multiples of `unit`."""


FIGURES = {
    "gpu_tflops": Figure("TFLOP/s", 0.1, 100_000, (1e-12, 1e-9, 1e-3, 1e3)),
    "gpu_memory_gb": Figure("GB", 1, 2_000, (1 / 1024, 1e-9)),
    "gpu_bandwidth_gb_s": Figure("GB/s", 10, 100_000, (1e3, 1e-9, 1e-3)),
}
"""Flag -> the figure that it gives: dense peak in the dtype of the run, memory as a data sheet prints it, and memory
bandwidth of a GPU."""


def own_gpu() -> Gpu | None:
    """Returns the row of this machine's first GPU, or None if there is no GPU or the table does not have it."""
    states, _ = hardware.gpu_states()
    return hardware.match_gpu(states[0].name, states[0].memory_gb) if states and states[0].name else None


def described_gpu(name: str | None, texts: Mapping[str, str | None], dtype: str) -> Gpu | None:
    """Returns the GPU that a user describes by its figures, or None if no figure is given.

    Args:
        name: its name; it need not be in the table.
        texts: flag of `FIGURES` -> what the user wrote, or None.
        dtype: dtype of the peak.

    Raises:
        ConfigError: a figure is missing or wrong; the message has one line for each mistake.
    """
    if all(text is None for text in texts.values()):
        return None
    row = _row(name) if name else None
    problems, values = [], {}
    for flag, figure in FIGURES.items():
        text = texts[flag]
        problem, values[flag] = _checked(figure, text)
        if problem is not None:
            near = _nearest(figure, values[flag]) if text is not None else _of_row(row, flag, dtype)
            problems.append(f"command line: {flag}: {problem}{f'; nearest: --{flag}={near:g}' if near else ''}")
    if problems:
        raise mistakes(problems)
    given = "given on the command line"
    return Gpu(
        name=name or "given GPU",
        cuda_names=(),
        capability=None,
        dense_tflops={dtype: values["gpu_tflops"]},
        sparse_tflops={},
        memory_gb=values["gpu_memory_gb"],
        hbm_byte_s=1e9 * values["gpu_bandwidth_gb_s"],
        sources={"dense": given, "memory": given, "bandwidth": given},
    )


def _checked(figure: Figure, text: str | None) -> tuple[str | None, float]:
    """Returns what is wrong with a figure, or None, and its value (NaN if it is not a number)."""
    limits = f"wanted a number of {figure.unit} from {figure.low:g} to {figure.high:,.0f}"
    if text is None:
        return f"found none, {limits}: a GPU is described by {', '.join(f'--{flag}' for flag in FIGURES)}", float("nan")
    try:
        value = float(text)
    except ValueError:
        return f"found {text!r}, {limits}", float("nan")
    return (None if figure.low <= value <= figure.high else f"found {text}, {limits}"), value


def _nearest(figure: Figure, value: float) -> float | None:
    """Returns the value in the unit that was probably meant, or else the closest valid one; None for NaN."""
    for factor in figure.factors:
        if figure.low <= value * factor <= figure.high:
            return value * factor
    return None if value != value else min(max(value, figure.low), figure.high)


def _of_row(row: Gpu | None, flag: str, dtype: str) -> float | None:
    """Returns the table's value for a figure that is missing, if the user named a GPU of the table."""
    if row is None:
        return None
    known = {"gpu_tflops": row.dense_tflops.get(dtype), "gpu_memory_gb": row.memory_gb}
    return known.get(flag, row.hbm_byte_s / 1e9)


def find_gpu(name: str | None) -> Gpu:
    """Returns the row of the table that a user names.

    Args:
        name: a row's name or words of it ("H200", "a100 sxm 80"), or a device's own name; None: this machine's GPU.

    Raises:
        ConfigError: no row matches, or several rows match; the message lists the candidates.
    """
    figures = " ".join(f"--{flag}=X" for flag in FIGURES)
    if name is None:
        own = own_gpu()
        if own is None:
            raise ConfigError(
                "command line: gpu: found no --gpu and no known GPU in this machine; wanted --gpu=NAME, such as "
                f"--gpu=H100, or the figures of any other GPU: {figures}"
            )
        return own
    row = _row(name)
    if row is not None:
        return row
    rows = _rows(name)
    known = ", ".join(gpu.name for gpu in rows or hardware.GPUS)
    # The list of all rows is long: what helps with a GPU that has none comes before it.
    missing = "" if rows else f"which is not in the table; python -m gptperf.plan takes its figures: {figures}; "
    raise ConfigError(f"command line: gpu: found {name!r}, {missing}wanted one of {known}")


def _rows(name: str) -> list[Gpu]:
    """Returns the rows whose names begin with these words, or else those that contain all of them."""
    words = name.lower().replace("-", " ").split()
    rows = [gpu for gpu in hardware.GPUS if gpu.name.lower().split()[: len(words)] == words]
    return rows or [gpu for gpu in hardware.GPUS if all(word in gpu.name.lower().split() for word in words)]


def _row(name: str) -> Gpu | None:
    """Returns the only row that a name can mean, or None."""
    exact = hardware.match_gpu(name)
    if exact is not None:
        return exact
    rows = _rows(name)
    same = [gpu for gpu in rows if gpu.name.lower().split() == name.lower().replace("-", " ").split()]
    return (same or rows)[0] if len(same or rows) == 1 else None
