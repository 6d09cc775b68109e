"""Evaluates a model: `python -m gptperf.evaluate MODEL [--tasks=FILE,FILE] [--dataset=NAME]`, alone or under torchrun.

MODEL is the folder of a run, of a checkpoint or of a Hugging Face model. Without --tasks, the command prints loss,
perplexity and bits per byte on the validation split of the run's data set, or of --dataset. With --tasks it scores the
items of files by likelihood: HellaSwag, ARC, PIQA, Winogrande, LAMBADA, or a format of your own (the user's guide has
it). --contains also looks for the items in the training data.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from gptperf import registry
from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.config.keys import Range
from gptperf.distributed.agreement import told_once
from gptperf.errors import asks_for_debug, run_main
from gptperf.evaluate.text import text
from gptperf.hardware.cpu import set_up_threads
from gptperf.tasks import load_tasks

__all__ = ["main"]

_Count = Annotated[int, Range(1, 10**9)]


@dataclass(frozen=True, kw_only=True)
class _EvaluateFlags(Flags):
    """What to evaluate, and on what."""

    model: Path
    """Folder of a run, of a checkpoint, or of a Hugging Face model."""
    tasks: tuple[str, ...] = ()
    """Task files, with commas or spaces between them."""
    shots: Annotated[int, Range(0, 1000)] = 0
    """Number of other items of a task that stand before each item, with their answers."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1337
    """Seed by which these are drawn."""
    limit: _Count | None = None
    """Most items of each task, taken evenly over its file; default: all."""
    dataset: str | None = None
    """Data set or mixture for the loss; default: the run's, if there are no tasks."""
    split: Literal["val", "train"] = "val"
    """Split of the data set."""
    data_dir: str | None = None
    """Folder of data sets; default: the run's, or data."""
    eval_iters: _Count | None = None
    """Most batches of the data set; default: as many as the run evaluates, or all for a Hugging Face model."""
    block_size: _Count | None = None
    """Most tokens of a sequence; default: the model's block_size, but at most 2048 for a Hugging Face model."""
    batch_size: _Count | None = None
    """Sequences of block_size tokens in a batch, or more sequences if they are shorter; default: the run's, or 8."""
    contains: bool = False
    """Look for the items of the tasks in the training data of the run, or in --dataset."""
    ngram: Annotated[int, Range(1, 10_000)] | None = None
    """Consecutive tokens of an item that occur in contained text; default: what 13 words have in the mean."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Checkpoint of the run: the newest, or the one with the lowest validation loss."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device; auto is the GPU if there is one."""
    plugins: str = ""
    """Comma-separated Python modules that register components."""
    json: bool = False
    """Print JSON."""

    def files(self) -> list[str]:
        """Returns the task files."""
        return [name.strip() for names in self.tasks for name in names.split(",") if name.strip()]

    def problems(self) -> Sequence[str]:
        """Returns which flags do not go together."""
        found = []
        if not self.files():
            given = {"shots": self.shots, "limit": self.limit, "contains": self.contains}
            found += [f"--{name} goes with --tasks" for name, value in given.items() if value]
        if self.ngram is not None and not self.contains:
            found.append("--ngram goes with --contains")
        if self.split != "val" and self.files() and self.dataset is None:
            found.append("--split goes with --dataset, or without --tasks")
        return [f"{COMMAND_LINE}: {line}" for line in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        GptperfError: the command line is wrong, or the model, the data or a task cannot be evaluated.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = parse(_EvaluateFlags, argv, "gptperf.evaluate", __doc__.partition("\n\n")[2])
    with told_once():
        set_up_threads()
        if os.environ.get("WORLD_SIZE", "1") != "1" and not asks_for_debug(argv):
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the watchdog reports a lost connection in one line
        tasks = load_tasks(flags.files(), flags.limit)
        registry.load_plugins(flags.plugins)
        from gptperf.evaluate.run import Asked, evaluate

        found = evaluate(
            Asked(
                model=flags.model,
                checkpoint=flags.checkpoint,
                device=flags.device,
                tasks=tasks,
                shots=flags.shots,
                seed=flags.seed,
                dataset=flags.dataset,
                split=flags.split,
                data_dir=flags.data_dir,
                block_size=flags.block_size,
                batch_size=flags.batch_size,
                eval_iters=flags.eval_iters,
                contains=flags.contains,
                ngram=flags.ngram,
            ),
            debug=asks_for_debug(argv),
        )
    if found is not None:
        print(json.dumps(found, indent=1) if flags.json else text(found))
    return 0


if __name__ == "__main__":
    run_main(main)
