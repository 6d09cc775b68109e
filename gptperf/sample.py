"""Generates text: `python -m gptperf.sample RUN --prompt="def " [--tokens=200] [--temperature=0.8] [--top_k=50]`.

RUN is the folder of a run, of its checkpoints, or of one checkpoint. One sample is printed as it is, so that it can be
piped. Several samples have a line such as "---- sample 2 of 3 ----" before each. A text may contain any line, so a
program that needs the texts apart calls `gptperf.api.generate`, which returns a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptperf import api, registry
from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.errors import run_main
from gptperf.hardware.cpu import set_up_threads

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _SampleFlags(Flags):
    """What to generate, and from which model."""

    run: Path
    """Folder of a run or of a checkpoint."""
    prompt: str = "\n"
    """Text to continue."""
    tokens: int = 200
    """Number of tokens to generate in each sample."""
    num_samples: int = 1
    """Number of samples; if there are several, a numbered line stands before each."""
    temperature: float = 0.8
    """Divisor of the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Number of the likeliest tokens to draw from; 0 draws from all."""
    seed: int = 1337
    """Seed of the draws."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Checkpoint of the run: the newest, or the one with the lowest validation loss."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device; auto is the GPU if there is one."""
    plugins: str = ""
    """Comma-separated Python modules that register components."""

    def numbers(self) -> dict[str, Any]:
        """Returns the numbers that `api.generate` takes."""
        return {name: getattr(self, name) for name in ("tokens", "num_samples", "temperature", "top_k")}

    def problems(self) -> Sequence[str]:
        """Returns what `api.generate` would refuse."""
        return [f"{COMMAND_LINE}: {problem}" for problem in api.sampling_problems(**self.numbers())]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        GptperfError: the command line is wrong, or there is no such model.
    """
    flags = parse(_SampleFlags, argv, "gptperf.sample", "Generate text with a trained model.")
    set_up_threads()
    registry.load_plugins(flags.plugins)
    loaded = api.load_model(flags.run, checkpoint=flags.checkpoint, device=flags.device)
    print(_separated(api.generate(loaded, flags.prompt, seed=flags.seed, **flags.numbers())))
    return 0


def _separated(texts: Sequence[str]) -> str:
    """Returns one text unchanged, and several with a numbered line before each."""
    if len(texts) == 1:
        return texts[0]
    rule = "-" * 32
    return "\n".join(f"{rule} sample {i} of {len(texts)} {rule}\n{text}" for i, text in enumerate(texts, 1))


if __name__ == "__main__":
    run_main(main)
