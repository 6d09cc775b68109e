"""Formats the rows of timed ops, of host times and of errors as text."""

from collections.abc import Sequence
from typing import Any

from bench.measure.cases import LOSS_OP, OURS, YARDSTICKS, share

__all__ = ["error_table", "host_table", "table", "verdict"]

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Returns the table of one op at one shape, with the verdict."""
    loss = rows[0]["op"] == LOSS_OP
    shape = "x".join(map(str, rows[0]["shape"]))
    lines = [f"{rows[0]['op']} {shape}"]
    if loss:
        lines.append(f"  {'':<15}{'ms':>9}{'p10 - p90':>18}{'of GEMM':>9}{'times GEMM':>12}{'extra GB':>10}")
    else:
        columns = f"{'p10 - p90':>18}{'of copy':>9}{'GB/s':>7}"
        lines.append(f"  {'':<15}{'forward ms':>11}{columns}{'backward ms':>13}{columns}")
    for row in rows:
        if "error" in row:
            lines.append(f"  {row['impl']:<15} {row['error']}")
        elif loss:
            cell = row["both"]
            extra = f"{row['extra_gb']:>10.2f}" if "extra_gb" in row else f"{'-':>10}"
            times = f"{cell['ms']:>9.2f}{_span(cell, 2):>18}{cell['of_gemm']:>9.3f}{1 / cell['of_gemm']:>12.3f}"
            lines.append(f"  {row['impl']:<15}{times}{extra}")
        else:
            text = _direction(row.get("forward"), 11) + _direction(row.get("backward"), 13)
            notes = {row[d]["method"] for d in ("forward", "backward") if d in row} - {"graph"}
            lines.append(f"  {row['impl']:<15}{text}{''.join(f'  {note}' for note in sorted(notes))}")
    return "\n".join([*lines, *verdict(rows)])


def _direction(cell: Row | None, width: int) -> str:
    if cell is None:
        return f"{'-':>{width}}{'-':>18}{'-':>9}{'-':>7}"
    return f"{cell['ms']:>{width}.4f}{_span(cell, 4):>18}{cell['of_copy']:>9.3f}{cell['gb_s']:>7.0f}"


def _span(cell: Row, digits: int) -> str:
    return f"{cell['p10_ms']:.{digits}f} - {cell['p90_ms']:.{digits}f}"


def verdict(rows: Sequence[Row]) -> list[str]:
    """Returns a line that compares our kernel with the fastest rival of the same work, or no line.

    Above 1 our kernel is faster. Norms are compared with compiled too.
    """
    op, shape = rows[0]["op"], tuple(rows[0]["shape"])
    by_impl = {row["impl"]: row for row in rows if "error" not in row and row["impl"] not in YARDSTICKS}
    ours = by_impl.pop(OURS, {})
    rivals = {impl: row for impl, row in by_impl.items() if share(impl, op, shape) == 1.0}
    parts = []
    for direction in ("forward", "backward", "both"):
        times = {impl: row[direction]["ms"] for impl, row in rivals.items() if direction in row}
        if direction not in ours or not times:
            continue
        best = min(times, key=times.__getitem__)
        label = "forward and backward" if direction == "both" else direction
        parts.append(f"{label} {times[best] / ours[direction]['ms']:.2f}x {best}")
        if "norm" in op and direction == "backward" and "compiled" in times and best != "compiled":
            parts.append(f"{label} {times['compiled'] / ours[direction]['ms']:.2f}x compiled")
    return [f"  {OURS} against the best rival: {', '.join(parts)}"] if parts else []


def host_table(rows: Sequence[Row]) -> str:
    """Returns the lines with the host times of one op at one number of rows."""
    lines = []
    for row in rows:
        text = row.get("error") or f"{row['forward']['us']:>12.1f}{row['forward_backward']['us']:>20.1f}"
        lines.append(f"{row['op']:<16}{row['rows']:>6}  {row['impl']:<13}{text}")
    return "\n".join(lines)


def error_table(rows: Sequence[Row]) -> str:
    """Returns the lines with the errors of one op at one shape and dtype."""
    lines = []
    for row in rows:
        text = row.get("error")
        if text is None:
            text = f"{row['tensor']:<11}"
            for kind in ("rms", "max"):
                ratio = row[f"ratio_{kind}"]
                text += f"{row[f'eager_{kind}']:>11.2e}{row[f'{OURS}_{kind}']:>11.2e}"
                text += f"{'-':>9}" if ratio is None else f"{ratio:>9.2f}"
        lines.append(f"{row['op']:<21}{'x'.join(map(str, row['shape'])):<19}{row['dtype']:<10}{text}")
    return "\n".join(lines)
