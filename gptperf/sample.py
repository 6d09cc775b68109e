"""Generates text: `python -m gptperf.sample RUN --prompt="def " [--tokens=200] [--temperature=0.8] [--top_k=50]`.

RUN is the folder of a run, of its checkpoints, or of one checkpoint. `gptperf.api.generate` does the same in Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptperf import api, registry
from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.errors import run_main

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
    """Number of samples, printed one after another."""
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
    registry.load_plugins(flags.plugins)
    loaded = api.load_model(flags.run, checkpoint=flags.checkpoint, device=flags.device)
    for text in api.generate(loaded, flags.prompt, seed=flags.seed, **flags.numbers()):
        print(text)
    return 0


if __name__ == "__main__":
    run_main(main)
