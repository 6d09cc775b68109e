"""Generates text: `python -m gptperf.sample RUN --prompt="def " [--tokens=200] [--temperature=0.8] [--stop=TEXT]`.

RUN is the folder of a run, of its checkpoints, of one checkpoint, or of a Hugging Face model. The text appears while it
is generated. One sample is printed as it is, so that it can be piped. Several samples have a line such as
"---- sample 2 of 3 ----" before each. A text may contain any line, so a program that needs the texts apart calls
`gptperf.api.generate`, which returns a list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptperf import api, registry
from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.data.text import Refused, clean
from gptperf.errors import ConfigError, nearest, note, run_main
from gptperf.hardware.cpu import set_up_threads

__all__ = ["main"]

_FILE = "FILE:"
_RULE = "-" * 32


@dataclass(frozen=True, kw_only=True)
class _SampleFlags(Flags):
    """What to generate, and from which model."""

    run: Path
    """Folder of a run or of a checkpoint, or of a Hugging Face model with its tokenizer."""
    prompt: tuple[str, ...] = ("\n",)
    """Text to continue, or FILE:PATH for the content of a file. It may be given several times."""
    tokens: int = 200
    """Number of tokens to generate in each sample."""
    num_samples: int = 1
    """Number of samples of each prompt; if there are several, a numbered line stands before each."""
    temperature: float = 0.8
    """Divisor of the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Number of the likeliest tokens to draw from; 0 draws from all."""
    stop: tuple[str, ...] = ()
    """Text before which a sample ends. It may be given several times."""
    seed: int = 1337
    """Seed of the draws."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Checkpoint of the run: the newest, or the one with the lowest validation loss."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device; auto is the GPU if there is one."""
    plugins: str = ""
    """Comma-separated Python modules that register components."""

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `api.stream`."""
        return {name: getattr(self, name) for name in ("tokens", "temperature", "top_k", "stop")}

    def problems(self) -> Sequence[str]:
        """Returns what `api.generate` would refuse."""
        wrong = api.sampling_problems(num_samples=self.num_samples, **self.arguments())
        return [f"{COMMAND_LINE}: {problem}" for problem in wrong]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        GptperfError: the command line is wrong, a prompt cannot be read, or there is no such model.
    """
    about = "Generate text with a trained model."
    flags = parse(_SampleFlags, argv, "gptperf.sample", about, greedy=False)  # RUN may stand after --prompt TEXT
    prompts = [_prompt(text) for text in flags.prompt]
    set_up_threads()
    registry.load_plugins(flags.plugins)
    for piece in _output(flags, prompts):
        print(piece, end="", flush=True)
    return 0


def _prompt(text: str) -> str:
    """Returns a prompt, read from its file by the rule by which prepare reads text; the final line feed stays."""
    if not text.startswith(_FILE):
        return text
    path = Path(text.removeprefix(_FILE))
    try:
        return b"".join(clean(iter([path.read_bytes()]))).decode()
    except OSError as error:
        near = nearest(str(path), map(str, path.parent.glob("*"))) if not path.exists() else ""
        raise ConfigError(f"{COMMAND_LINE}: prompt: {path} cannot be read: {error.strerror}{near}") from error
    except Refused as error:
        raise ConfigError(f"{COMMAND_LINE}: prompt: {path}: found {error}, wanted text") from error


def _output(flags: _SampleFlags, prompts: Sequence[str]) -> Iterator[str]:
    """Yields what the command prints, in pieces of whole characters."""
    import torch

    from gptperf.hugging_face import load_model

    loaded = load_model(flags.run, checkpoint=flags.checkpoint, device=flags.device)
    number, count = 0, len(prompts) * flags.num_samples
    for prompt in prompts:
        read, most = len(loaded.tokenizer.encode(prompt)), loaded.model.config.block_size
        if read > most:
            note(f"a prompt has {read:,} tokens; the model reads the last {most:,} of them (block_size)")
        draws = torch.Generator(loaded.device).manual_seed(flags.seed)  # samples do not depend on the other prompts
        for _ in range(flags.num_samples):
            number += 1
            if count > 1:
                yield f"{_RULE} sample {number} of {count} {_RULE}\n"
            yield prompt
            yield from api.stream(loaded, prompt, **flags.arguments(), seed=draws)
            yield "\n"


if __name__ == "__main__":
    run_main(main)
