"""Compares runs or architectures: `python -m gptperf.compare out/*` or `--configs configs/*.toml`.

Runs (folders, run_*.jsonl, run_*.json) are ranked by their loss at equal tokens, with the configuration keys that
differ; --html writes a page with their curves. Configurations are compared by their components, parameters by part,
training FLOPs per token, and the prediction of `gptperf.plan` for one GPU: the one that --gpu names, or the GPU of this
machine. Rows in which all configurations agree are printed once, at the end. This module does not import torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gptperf.compare import architectures, page, ranking
from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.errors import DataError, run_main
from gptperf.files import replace_text
from gptperf.monitor.runs import read_runs
from gptperf.plan import find_gpu, own_gpu

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _CompareFlags(Flags):
    """What to compare, and how to show it."""

    WORDS: ClassVar[str] = "runs"
    runs: tuple[str, ...] = ()
    """Folders of runs, run_*.jsonl or run_*.json. The flag may be left out."""
    configs: tuple[str, ...] = ()
    """Configurations: compare architectures instead."""
    gpu: str | None = None
    """With --configs: predict the speed on this GPU; default: the one of this machine."""
    html: Path | None = None
    """With runs: write a page with their curves."""
    json: bool = False
    """Print JSON."""

    def problems(self) -> Sequence[str]:
        """Returns which flags do not go together."""
        found = []
        if bool(self.runs) == bool(self.configs):
            found.append("wanted runs, or --configs with configurations, not both")
        if self.runs and self.gpu is not None:
            found.append("--gpu goes with --configs, not with runs")
        if self.configs and self.html is not None:
            found.append("--html goes with runs, not with --configs")
        return [f"{COMMAND_LINE}: {text}" for text in found]


def _rank(paths: Sequence[str], html: Path | None, as_json: bool) -> str:
    """Ranks runs, writes the page if `html` is given, and returns the text to print.

    Raises:
        DataError: No run can be read.
        DeviceError: A package that the page needs is not installed.
        DiskError: The page cannot be written.
    """
    runs, left_out = read_runs(paths)
    if not runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in left_out)
        raise DataError(f"found no run, wanted folders of runs, run_*.jsonl or run_*.json: {reasons}")
    ranked = ranking.rank(runs, left_out)
    if html is not None:
        replace_text(html, page.html(ranked))
    if as_json:
        return json.dumps(ranking.record(ranked, left_out), indent=2, allow_nan=False)
    return page.text(ranked, html)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison."""
    args = parse(_CompareFlags, argv, "gptperf.compare", __doc__.partition("\n\n")[2])
    if args.runs:
        print(_rank(args.runs, args.html, args.json))
        return 0
    facts = architectures.compare(args.configs, own_gpu() if args.gpu is None else find_gpu(args.gpu))
    print(json.dumps(facts, indent=2) if args.json else architectures.table(facts))
    return 0


if __name__ == "__main__":
    run_main(main)
