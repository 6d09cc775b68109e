"""Compares runs or architectures: `python -m gptperf.compare out/*` or `--configs configs/*.toml`.

Runs (folders, run_*.jsonl, run_*.json) are ranked by their loss at equal tokens, with the configuration keys that
differ; --html writes a page with their curves. Configurations are compared by their components, parameters by part,
training FLOPs per token, and the prediction of `gptperf.plan` for one GPU: the one that --gpu names, or the GPU of this
machine. Rows in which all configurations agree are printed once, at the end. This module does not import torch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gptperf.compare import architectures, page, ranking
from gptperf.errors import DataError, main_guard
from gptperf.files import replace_text
from gptperf.monitor.runs import read_runs
from gptperf.plan import find_gpu, own_gpu

__all__ = ["main"]


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
    parser = argparse.ArgumentParser(prog="python -m gptperf.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, run_*.jsonl or run_*.json")
    parser.add_argument("--configs", nargs="+", metavar="CONFIG.toml", help="compare architectures instead")
    parser.add_argument("--gpu", help="with --configs: predict the speed on this GPU; default: the one of this machine")
    parser.add_argument("--html", type=Path, metavar="PATH", help="with runs: write a page with their curves")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if (args.configs is None) == (not args.runs):
        parser.error("wanted runs, or --configs with configurations, not both")
    if args.runs:
        if args.gpu is not None:
            parser.error("--gpu goes with --configs")
        print(_rank(args.runs, args.html, args.json))
        return 0
    if args.html is not None:
        parser.error("--html goes with runs")
    facts = architectures.compare(args.configs, own_gpu() if args.gpu is None else find_gpu(args.gpu))
    print(json.dumps(facts, indent=2) if args.json else architectures.table(facts))
    return 0


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
