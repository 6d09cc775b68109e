"""The command line of exports: `python -m gptperf.hugging_face export RUN DIR`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptperf.config.flags import Flags, parse
from gptperf.hugging_face.export import export

__all__ = ["export_main"]


@dataclass(frozen=True, kw_only=True)
class _ExportFlags(Flags):
    """Which checkpoint, and where the model goes."""

    run: Path
    """Folder of a run or of a checkpoint."""
    dir: Path
    """Folder to make; it may exist and be empty."""
    step: int | None = None
    """Iteration of the checkpoint of a run; default: checkpoint decides."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Checkpoint of the run: the newest, or the one with the lowest validation loss."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored weights: float32, that of the master weights, loses nothing; bfloat16 halves the files."""
    tokenizer: str = ""
    """Tokenizer of the model, a name as for prepare, or unknown to leave it out; default: the checkpoint's."""


def export_main(argv: Sequence[str]) -> int:
    """Runs `python -m gptperf.hugging_face export` and returns its exit code.

    Args:
        argv: The command line after the word export.

    Raises:
        GptperfError: The command line is wrong, or the model cannot be exported.
    """
    about = "Make a folder of a trained model that from_pretrained of transformers reads."
    flags = parse(_ExportFlags, argv, "gptperf.hugging_face export", about)
    done = export(
        flags.run,
        flags.dir,
        checkpoint=flags.checkpoint,
        step=flags.step,
        dtype=flags.dtype,
        tokenizer=flags.tokenizer,
    )
    reason = f", because {done.kind.reason}" if done.kind.reason else ""
    print(f"{flags.dir}: {done.kind.name} of {done.checkpoint}{reason}")
    if not done.tokenizer:
        print("without a tokenizer, as --tokenizer=unknown says")
    remote = ", trust_remote_code=True" if done.kind.reason else ""
    print(f'transformers.AutoModelForCausalLM.from_pretrained("{flags.dir}"{remote})')
    return 0
