"""Writes a picture of the README or the guide beside this file: `python -m bench.pictures NAME [PATH]`.

PATH is what the picture is drawn from, a run or an ablation. These commands make all of them, in the root folder:

    make train ARGS="--log_interval=10 --console=plain"
    python -m gptperf.ablate tiny --n_layer=2 --max_iters=300 --vary position_encoding=learned_absolute \\
        --vary normalization=rmsnorm --vary ffn_type=swiglu
    for name in loss_curve live_panel report_page ablation step_waterfall; do python -m bench.pictures $name; done
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from bench.pictures import draw
from gptperf.config.flags import Flags, parse
from gptperf.config.keys import Choice
from gptperf.errors import run_main
from gptperf.files import replacing

__all__ = ["PICTURES", "main"]

PICTURES: dict[str, tuple[Callable[[Path], str | bytes], str, str]] = {
    "loss_curve": (draw.loss_curve, "svg", "out/tiny"),
    "live_panel": (draw.live_panel, "svg", "out/tiny"),
    "report_page": (draw.report_page, "png", "out/tiny"),
    "ablation": (draw.ablation, "svg", "out/ablation"),
    "step_waterfall": (draw.step_waterfall, "svg", "bench/NOTES.md"),
}
"""Name -> what draws it, the ending of its file, and the path that it is drawn from."""


@dataclass(frozen=True, kw_only=True)
class _PictureFlags(Flags):
    """Which picture."""

    WORDS = "path"

    name: Annotated[str, Choice(tuple(PICTURES))]
    """Name of the picture."""
    path: Path | None = None
    """Run or ablation that it is drawn from; default: out/tiny or out/ablation."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture."""
    flags = parse(_PictureFlags, argv, "bench.pictures", __doc__.partition("\n")[0])
    make, ending, source = PICTURES[flags.name]
    drawn = make(flags.path or Path(source))
    path = Path(__file__).with_name(f"{flags.name}.{ending}")
    with replacing(path) as temporary:
        temporary.write_bytes(drawn if isinstance(drawn, bytes) else drawn.encode())
    print(path)
    return 0


if __name__ == "__main__":
    run_main(main)
