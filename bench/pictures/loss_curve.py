"""Draws the loss curve of the README. Two commands make it:

    make train ARGS="--log_interval=10 --console=plain"
    python -m bench.pictures.loss_curve out/tiny

The second one writes `loss_curve.svg` beside this file. The picture has no background, and its text has a grey that is
readable on a light and on a dark page.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptperf.config.flags import Flags, parse
from gptperf.errors import run_main
from gptperf.files import replace_text
from gptperf.monitor.run_log import find_log, finite
from gptperf.monitor.runs import read_run
from gptperf.report.figures import BLUE, GRAY, ORANGE, pyplot, svg

__all__ = ["draw", "main"]

_TEXT = "#8b949e"
_SMOOTHED = 15


def draw(run: Path) -> str:
    """Draws training and validation loss over the tokens of a run, and returns the SVG.

    Args:
        run: Folder of the run, or its log.

    Raises:
        DataError: There is no log.
        DeviceError: matplotlib is not installed.
    """
    logged = read_run(find_log(run), run.name)
    figure, axes = pyplot().subplots(figsize=(7.2, 3.0), layout="constrained")
    tokens, losses = zip(*[(s.tokens / 1e6, s.loss) for s in logged.steps if s.loss is not None], strict=True)
    means = [statistics.fmean(losses[max(0, i - _SMOOTHED + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(tokens, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, means, color=BLUE, label=f"training, mean of {_SMOOTHED} log lines")
    evals = [(e.tokens / 1e6, e.loss) for e in logged.evals]
    axes.plot(
        *zip(*evals, strict=True), color=ORANGE, marker="o", markersize=4, label=f"validation: {evals[-1][1]:.3f}"
    )
    trigram = finite(logged.summary.get("trigram_loss"))
    if trigram is not None:
        axes.axhline(trigram, color=GRAY, linewidth=1, linestyle=":", label=f"trigram model: {trigram:.3f}")
    axes.legend(loc="upper right")
    axes.set_xlim(0, tokens[-1])
    axes.set_ylim(1.0, 3.2)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats per byte")
    element = svg(figure, "loss_curve").replace("currentColor", _TEXT)
    return element.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="300"', 1) + "\n"


@dataclass(frozen=True, kw_only=True)
class _PictureFlags(Flags):
    """Which run."""

    run: Path
    """Folder of the run, out/tiny after make train."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture."""
    flags = parse(_PictureFlags, argv, "bench.pictures.loss_curve", __doc__)
    path = Path(__file__).with_name("loss_curve.svg")
    replace_text(path, draw(flags.run))
    print(path)
    return 0


if __name__ == "__main__":
    run_main(main)
