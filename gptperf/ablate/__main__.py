"""`python -m gptperf.ablate CONFIG.toml --vary key=value[,key2=value2] ... --seeds 3`: compares changes over seeds.

The baseline and every change are trained with every seed, and each run gets the tokens or the FLOPs of the baseline.
Runs are trained one after another, or N at a time with --parallel N, each on one GPU; if there are fewer GPUs than
runs, runs share them. The same command continues an interrupted ablation: it skips finished runs and resumes the
others.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gptperf.ablate import page
from gptperf.ablate.results import results
from gptperf.ablate.runner import Runner, gpus_for, run_all
from gptperf.ablate.variants import changed_runs, variants
from gptperf.errors import PREEMPTED, ConfigError, main_guard
from gptperf.files import replace_text
from gptperf.report.page import check_packages

__all__ = ["main"]

_EPILOG = """All other flags are those of gptperf.train. A result is DIR/<variant>/seed<k>; DIR/ablation.md and
DIR/ablation.json have the table. Exit codes: 0 all runs finished, 1 some failed, 75 asked to stop."""


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments of this command, and those for `gptperf.train`.

    Raises:
        ConfigError: An argument is missing or wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gptperf.ablate",
        usage="%(prog)s [CONFIG.toml ...] --vary key=value[,key2=value2 ...] [--vary ...] [options] [--key=value ...]",
        description=__doc__.split("\n\n")[1],
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--vary", action="append", default=[], metavar="key=value", help="a change; joint with commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs a variant (default 3)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--equal", choices=("tokens", "flops"), default="tokens", help="what each run gets as much of")
    parser.add_argument("--out", type=Path, default=Path("out/ablation"), metavar="DIR", help="default: out/ablation")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write a page with the curves")
    parser.add_argument("--list", action="store_true", help="print the runs with their tokens, and end")
    args, rest = parser.parse_known_args(argv)
    if not args.vary:
        raise ConfigError("command line: found no --vary, wanted one or more, such as --vary position_encoding=rope")
    for key in ("seeds", "parallel"):
        if getattr(args, key) < 1:
            raise ConfigError(f"command line: {key}: found {getattr(args, key)}, wanted 1 or more")
    return args, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ablation and reports it.

    Returns:
        0, 1 if a run failed, or `PREEMPTED` after a request to stop.
    """
    args, rest = _parse(argv)
    found = variants(rest, args.vary, args.seeds, args.equal, args.out)
    gpus = gpus_for(min(args.parallel, sum(len(variant.jobs) for variant in found)))
    changed = changed_runs(found)
    if changed:
        raise ConfigError("; ".join([*changed, "wanted another --out, or these folders moved away"]))
    if args.list:
        print(page.listing(found))
        return 0
    if len(set(gpus)) < len(gpus) and "" not in gpus:
        print(
            f"ablate: {len(gpus)} runs at a time share {len(set(gpus))} GPU(s): each run has lower tokens/s and MFU "
            "than alone, and its plan assumes the whole memory of the GPU"
        )
    if args.html is not None:
        check_packages()
    with Runner(len(gpus) or 1).listening() as runner:
        failed = run_all(found, runner, lambda so_far: page.write(results(found), args.equal, so_far, args.out), gpus)
    reached = results(found)
    paths = page.write(reached, args.equal, failed, args.out)
    print(f"\n{page.text(reached, args.equal, failed)}\nreport: {paths[0]}, {paths[1]}")
    if args.html is not None:
        replace_text(args.html, page.html(reached, args.equal, failed))
        print(f"page: {args.html}")
    if runner.asked() and not all(job.finished() for variant in found for job in variant.jobs):
        print("ablate: asked to stop; run the same command again to continue", flush=True)
        return PREEMPTED
    return 1 if failed else 0


if __name__ == "__main__":
    with main_guard():
        sys.exit(main())
