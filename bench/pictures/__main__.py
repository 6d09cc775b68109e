"""Writes a picture of the README or the guide beside this file: `python -m bench.pictures NAME [PATH]`.

PATH is what the picture is drawn from, a run or an ablation. These commands make all of them, in the root folder:

    make train ARGS="--log_interval=10 --console=plain"
    python -m gptperf.ablate tiny --n_layer=2 --max_iters=300 --vary position_encoding=learned_absolute \\
        --vary normalization=rmsnorm --vary ffn_type=swiglu
    for name in loss_curve live_panel report_page ablation step_waterfall; do python -m bench.pictures $name; done
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from bench.pictures import draw
from gptperf.errors import main_guard
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


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=PICTURES)
    parser.add_argument("path", type=Path, nargs="?", help="run or ablation; default: out/tiny or out/ablation")
    args = parser.parse_args()
    with main_guard():
        make, ending, source = PICTURES[args.name]
        drawn = make(args.path or Path(source))
        path = Path(__file__).with_name(f"{args.name}.{ending}")
        with replacing(path) as temporary:
            temporary.write_bytes(drawn if isinstance(drawn, bytes) else drawn.encode())
        print(path)


if __name__ == "__main__":
    main()
