"""`python -m gptperf.hardware`: prints the table of GPUs, in which those of this machine are marked, and their state.

With `--measure [CONFIG.toml ...] [--key=value ...]` it measures what this GPU reaches (`gptperf.hardware.measure`).
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from gptperf.config import command_line
from gptperf.config.flags import COMMAND_LINE, Flags, take
from gptperf.errors import mistakes, run_main
from gptperf.hardware import measure_command
from gptperf.hardware.gpu_table import DOCUMENTS, GPUS
from gptperf.hardware.peaks import match_gpu, no_peak_hint
from gptperf.hardware.state import GpuState, gpu_states

__all__ = ["main"]

_ABOUT = """Print the GPU table and the state of this machine's GPUs, or measure what this GPU reaches.

With --measure, CONFIG and keys name the model, batch_size and dtype."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HardwareFlags(Flags):
    """What to print."""

    json: bool = False
    """Print JSON."""
    measure: bool = False
    """Print the ceilings of copies, GEMMs and attention on this GPU; they are measured once and kept in a cache."""
    again: bool = False
    """With --measure: measure even where the cache has them."""

    def problems(self) -> Sequence[str]:
        """Returns which flags do not go together."""
        wrong = self.again and not self.measure
        return [f"{COMMAND_LINE}: --again goes with --measure; nearest: --measure --again"] if wrong else []


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or measures the ceilings of this GPU.

    Returns:
        The exit code.

    Raises:
        GptperfError: the command line is wrong, or the measurement failed.
    """
    taken = take(_HardwareFlags, argv, "gptperf.hardware", _ABOUT)
    arguments = taken.flags
    config = command_line.resolve(taken.rest, taken=taken).config
    if arguments.measure:
        return measure_command.command(config, as_json=arguments.json, again=arguments.again)
    unused = [text for text in taken.rest if not text.startswith("--debug")]
    if unused:
        found = " ".join(unused)
        raise mistakes([f"{COMMAND_LINE}: found {found!r} without --measure; nearest: --measure {found}"])
    states, reason = gpu_states()
    report = _report(states, reason)
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(_lines(report, states)), flush=True)
    return 0


def _report(states: Sequence[GpuState], reason: str | None) -> dict[str, Any]:
    rows = [match_gpu(state.name or "", state.memory_gb) for state in states]
    here = [state.as_dict() | {"row": row and row.name} for state, row in zip(states, rows, strict=True)]
    table = [dataclasses.asdict(gpu) | {"here": gpu in rows} for gpu in GPUS]
    return {"table": table, "documents": DOCUMENTS, "this_machine": here, "reason": reason}


def _lines(report: dict[str, Any], states: Sequence[GpuState]) -> Iterator[str]:
    yield f"{'':<24}{'dense TFLOP/s':^40}{'sparse':>8}{'memory':>8}{'bandwidth':>11}"
    dtypes = "".join(f"{dtype:>8}" for dtype in ("bf16", "fp16", "tf32", "fp32", "fp8", "bf16"))
    yield f"  {'GPU':<22}{dtypes}{'GB':>8}{'TB/s':>11}  source"
    for gpu, row in zip(GPUS, report["table"], strict=True):
        rates = [gpu.dense_tflops.get(dtype) for dtype in ("bfloat16", "float16", "tf32", "float32", "fp8")]
        rates.append(gpu.sparse_tflops.get("bfloat16"))
        figures = "".join(f"{'-' if rate is None else f'{rate:g}':>8}" for rate in rates)
        mark = "*" if row["here"] else " "
        yield f"{mark} {gpu.name:<22}{figures}{gpu.memory_gb:>8g}{gpu.hbm_byte_s / 1e12:>11.3f}  {gpu.source}"
    yield ""
    for index, (state, here) in enumerate(zip(states, report["this_machine"], strict=True)):
        yield f"{'*' if here['row'] else ' '} GPU {index}: {state.name}; {state}"
        if here["row"] is None:
            yield f"    {no_peak_hint(state.name or 'this GPU', 'bfloat16')}"
        note = state.note()
        if note is not None:
            yield f"    {note}"
    if not states:
        yield f"No GPU was found: {report['reason']}."


if __name__ == "__main__":
    run_main(main)
