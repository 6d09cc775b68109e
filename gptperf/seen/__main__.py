"""Lists the documents that a run read: `python -m gptperf.seen RUN A:B [--json]`.

They are those of the iterations after A, up to and including B, in the order in which they were first read, each with
the number of its tokens that were read. The list is exact. It follows from the log of the run and the document index of
its data set; no tokens are read.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.errors import ConfigError, DataError, run_main
from gptperf.formats import counted
from gptperf.monitor.blocks import printable
from gptperf.monitor.events import RunLog
from gptperf.monitor.run_log import find_log, load, value_at
from gptperf.report.tables import Table, aligned

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _SeenFlags(Flags):
    """Which run, and which part of it."""

    run: Path
    """Folder of a run, or its log."""
    iterations: str
    """A:B, the iterations after A, up to and including B; 0:B from the first one on."""
    data_dir: str | None = None
    """Folder of data sets; default: the run's."""
    json: bool = False
    """Print JSON: an object with a list of documents."""

    def problems(self) -> Sequence[str]:
        """Returns what is wrong with `iterations`."""
        if self.iterations is None or _range(self.iterations) is not None:
            return []
        numbers = sorted(map(int, re.findall(r"[0-9]{1,12}", self.iterations)))
        near = (
            f"; nearest: {numbers[-2] if numbers[1:] else max(numbers[0] - 1, 0)}:{max(numbers[-1], 1)}"
            if numbers
            else ""
        )
        return [f"{COMMAND_LINE}: iterations: found {self.iterations!r}, wanted A:B with A below B{near}"]


def _range(text: str) -> tuple[int, int] | None:
    """Returns the numbers of A:B, or None if the text is not of this form or A is not below B."""
    match = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", text)
    if match is None or int(match[1]) >= int(match[2]):
        return None
    return int(match[1]), int(match[2])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        ConfigError: the command line is wrong, or the run did not reach the iterations.
        DataError: the log or the data set of the run cannot be read, or the data set was changed.
    """
    flags = parse(_SeenFlags, argv, "gptperf.seen", "List the documents that a run read between two iterations.")
    asked = _range(flags.iterations)
    assert asked is not None, "`problems` refuses it"
    path = find_log(flags.run)
    log = load(path)
    found = _read(log, path, asked, flags.data_dir)
    print(json.dumps(found, indent=1) if flags.json else _text(found))
    return 0


def _read(log: RunLog, path: Path, asked: tuple[int, int], data_dir: str | None) -> dict[str, Any]:
    """Returns the documents of some iterations, and the counts of what was read."""
    from gptperf.data.mixture import open_tokens
    from gptperf.data.read_documents import documents_read

    reached = _reached(log)
    if asked[1] > reached:
        near = f"; nearest: {min(asked[0], reached - 1)}:{reached}" if reached else ""
        raise ConfigError(f"{path}: found {counted(reached, 'iteration')}, wanted {asked[0]}:{asked[1]}{near}")
    block_size, seed = (_number(log, path, *keys) for keys in (("model", "block_size"), ("train", "seed")))
    rows = _number(log, path, "train", "batch_size") * _number(log, path, "train", "gradient_accumulation_steps")
    dataset = value_at(log["config"], "data", "dataset")
    data_dir = data_dir or value_at(log["config"], "data", "data_dir")
    if not isinstance(dataset, str) or not isinstance(data_dir, str):
        raise DataError(f"{path}: found no dataset and data_dir in the configuration, wanted the log of a run")
    tokens = open_tokens(dataset, data_dir, "train", verify=False)
    wanted = log["startup_info"].get("dataset_fingerprint", tokens.fingerprint)
    if wanted != tokens.fingerprint:
        raise DataError(
            f"{tokens.path}: found the fingerprint {tokens.fingerprint[:12]}, wanted {str(wanted)[:12]} of the "
            "data that the run read; give its data sets with --data_dir"
        )
    first, last = (iteration * rows for iteration in asked)
    documents = documents_read(tokens, block_size=block_size, seed=seed, first=first, last=last)
    return {
        "run": log["run_name"],
        "dataset": dataset,
        "iterations": list(asked),
        "samples": last - first,
        "tokens": (last - first) * (block_size + 1),
        "documents": [
            {"dataset": found.dataset, **found.origin._asdict(), "tokens": found.tokens} for found in documents
        ],
    }


def _reached(log: RunLog) -> int:
    """Returns the last iteration that a log knows to be done."""
    entries = [*log["training_iterations"], *log["eval_steps"], *log["checkpoints"]]
    ended = log["summary"].get("iterations")
    return max([entry["iter"] for entry in entries] + ([ended] if type(ended) is int else []), default=0)


def _number(log: RunLog, path: Path, *keys: str) -> int:
    value = value_at(log["config"], *keys)
    if type(value) is not int:
        raise DataError(f"{path}: {keys[-1]}: found {value!r} in the configuration, wanted a whole number")
    return value


def _text(found: dict[str, Any]) -> str:
    """Returns a line about the whole, and a table of the documents."""
    first, last = found["iterations"]
    head = (
        f"{found['run']}, iterations {first + 1:,} to {last:,}: {counted(len(found['documents']), 'document')} in "
        f"{counted(found['samples'], 'sample')} of {counted(found['tokens'] // found['samples'], 'token')}"
    )
    columns = ("data set", "source", "offset", "group", "tokens read")
    keys = ("dataset", "source", "offset", "group", "tokens")
    rows = [[printable(str(document[key])).replace("\n", "\\n") for key in keys] for document in found["documents"]]
    return f"{head}\n\n{aligned(Table(columns, rows, frozenset({0, 1, 3})))}"


if __name__ == "__main__":
    run_main(main)
