"""Formats numbers, durations and values as text, so that every command prints them the same way. Loads no torch."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "SHORT_DTYPES",
    "about",
    "byte_text",
    "count_text",
    "counted",
    "duration",
    "mfu_scale",
    "number",
    "one_line",
    "percent",
    "percentiles",
    "rough_duration",
    "short_count",
    "value_text",
    "with_error",
    "with_unit",
]

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32", "fp8": "fp8"}
"""Dtype -> its short name."""

_MOST_ITEMS = 50
"""Largest number of items of a list or mapping that `value_text` shows."""
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6))
_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_LETTERS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def with_error(scores: Mapping[str, Any], name: str) -> str:
    """Returns a score of a task with its standard error `NAME_stderr`, if it has one: "0.2512 +- 0.0043"."""
    form = ".4g" if name == "perplexity" else ".4f"
    error = scores.get(f"{name}_stderr")
    shown = number(scores.get(name), form)
    return shown if error is None else f"{shown} +- {number(error, form)}"


def number(value: float | None, form: str, missing: str = "-") -> str:
    """Returns `format(value, form)`, or `missing` if the value is None."""
    return missing if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """Returns a duration as "40 ms", "12.3 s", from 100 seconds on "4:05", "13:04:05", "1d 02:03:04"; "-" for None."""
    if seconds is None:
        return "-"
    if 0 < seconds < 0.1:
        return f"{1e3 * seconds:.0f} ms" if seconds >= 0.001 else "under 1 ms"
    if seconds < 100:
        return f"{max(seconds, 0):.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days}d {hour:02d}" if days else f"{hour}") + f":{minute:02d}:{second:02d}"


def rough_duration(seconds: float) -> str:
    """Returns an estimated duration with two digits, in hours from 2 hours on, in minutes from 2 minutes on."""
    unit, size = ("hours", 3600) if seconds >= 7200 else ("minutes", 60) if seconds >= 120 else ("s", 1)
    value = float(f"{seconds / size:.2g}")
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:g} {unit}"


def about(seconds: float | None) -> str:
    """Returns an estimated duration to append to a sentence, such as " (about 12 s)"; "" for None."""
    if seconds is None:
        return ""
    if seconds < 1:
        return " (less than 1 s)"
    return f" (about {f'{seconds:.0f} s' if seconds < 100 else duration(seconds)})"


def byte_text(count: float) -> str:
    """Returns a number of bytes with four digits and the unit B, kB, MB, GB or TB, powers of 1000: "12.34 GB"."""
    for unit, scale in _BYTES:
        if count >= 0.99995 * scale:  # 999,960 B are 1 MB, not 1000 kB
            return f"{count / scale:#.4g} {unit}".replace(". ", " ")
    return f"{count:.0f} B"


def count_text(value: float) -> str:
    """Returns a rate with commas and without decimals, or with two digits if it is below 10: "3,557", "0.42"."""
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def counted(count: int, noun: str, nouns: str = "") -> str:
    """Returns a number of things with commas: "1 thread", "2,048 threads".

    Args:
        count: how many.
        noun: the singular.
        nouns: the plural; "" means the singular with an "s".
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def percent(value: float) -> str:
    """Returns a percentage with two decimals, or with two digits where those would be zeros: "32.45%", "0.0012%"."""
    return f"{value:.2f}%" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}%"


def with_unit(value: float, unit: str, digits: int = 4) -> str:
    """Returns a value with its unit, such as "0.798 GFLOPs".

    The SI prefix is the largest of T, G and M that leaves at least 0.1 before it, or else k.
    """
    for prefix, scale in _PREFIXES:
        if value >= 0.1 * scale:
            return f"{value / scale:.{digits}g} {prefix}{unit}"
    return f"{value / 1e3:.{digits}g} k{unit}"


def short_count(value: float) -> str:
    """Returns a count of tokens or parameters with three digits and a letter for its size, such as "1.57B"."""
    for letter, scale in _LETTERS:
        if abs(value) >= 0.9995 * scale:  # 999,600 is 1M, not 1e+03k
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def mfu_scale(record: Mapping[str, Any]) -> str:
    """Returns what an MFU is relative to, such as "strict, of 989.4 TFLOP/s bf16 dense".

    Whatever prints an MFU prints this with it.

    Args:
        record: `convention` of the FLOP count, and `hardware_peak_tflops`, `peak_dtype` and `peak_basis` of the peak;
            what the record lacks is not named.
    """
    words = [str(record[key]) for key in ("peak_dtype", "peak_basis") if record.get(key) is not None]
    words = [SHORT_DTYPES.get(word, word) for word in words]
    peak = record.get("hardware_peak_tflops")
    if isinstance(peak, int | float) and abs(peak) < 1e9:
        words.insert(0, f"{peak:,.1f} TFLOP/s")
    parts = [str(record["convention"])] if record.get("convention") is not None else []
    return one_line(", ".join([*parts, *([f"of {' '.join(words)}"] if words else [])]))


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the 10th percentile, the median and the 90th percentile of one or more values."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return ordered[tenth], statistics.median(ordered), ordered[-1 - tenth]


def value_text(value: Any, digits: int = 5) -> str:
    """Returns the text of a value of any kind for a cell of a table.

    Args:
        value: None becomes "-", and a bool "yes" or "no". Integers have commas from 10,000 on. The items of lists and
            mappings are separated by commas.
        digits: Significant digits of a float. A float with as many digits before the point has commas and no fraction.
    """
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() if abs(value) < 10**18:
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case int():  # Python may refuse to print it
            return "a number with too many digits"
        case float():
            whole = 10 ** (digits - 1) <= abs(value) < 1e15
            return f"{value:,.0f}" if whole else f"{value:.{digits}g}"
        case list() | tuple():
            return ", ".join(value_text(item, digits) for item in value[:_MOST_ITEMS])
        case Mapping():
            pairs = list(value.items())[:_MOST_ITEMS]
            return ", ".join(f"{key} {value_text(item, digits)}" for key, item in pairs)
    return str(value)


def one_line(text: str, most: int = 60) -> str:
    """Returns a text on one line of at most `most` characters.

    Control characters become escapes, and the middle of a text that is too long is left out.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"
