"""Generates text: `python -m gptperf.sample RUN --prompt="def " [--tokens=200] [--temperature=0.8] [--stop=TEXT]`.

RUN is the folder of a run, of its checkpoints, of one checkpoint, or of a Hugging Face model. The text appears while it
is generated. One sample is printed as it is, so that it can be piped. Several samples are generated together, and
printed one after the other with a line such as "---- sample 2 of 3 ----" before each. A text may contain any line, so a
program that needs the texts apart calls `gptperf.api.generate`, which returns a list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptperf import api, registry
from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.data.text import Refused, clean
from gptperf.errors import ConfigError, nearest, note, run_main
from gptperf.formats import counted
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
    """Most tokens to generate in each sample."""
    num_samples: int = 1
    """Number of samples of each prompt; if there are several, a numbered line stands before each."""
    temperature: float = 0.8
    """Divisor of the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Number of the likeliest tokens to draw from; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest of the likeliest tokens whose probabilities add up to this; 1 draws from all."""
    stop: tuple[str, ...] = ()
    """Text before which a sample ends. It may be given several times."""
    stop_at_eot: bool = True
    """End a sample before the token that ends a document."""
    seed: int = 1337
    """Seed of the draws of the first sample of each prompt; the next samples have the next seeds."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Checkpoint of the run: the newest, or the one with the lowest validation loss."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device; auto is the GPU if there is one."""
    plugins: str = ""
    """Comma-separated Python modules that register components."""

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments that `api.streams` and `api.sampling_problems` share."""
        names = ("tokens", "num_samples", "temperature", "top_k", "top_p", "seed", "stop")
        return {name: getattr(self, name) for name in names}

    def problems(self) -> Sequence[str]:
        """Returns what `api.generate` would refuse."""
        return [f"{COMMAND_LINE}: {problem}" for problem in api.sampling_problems(**self.arguments())]


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
        absent = isinstance(error, FileNotFoundError)
        near = nearest(str(path), map(str, path.parent.glob("*"))) if absent else ""
        raise ConfigError(f"{COMMAND_LINE}: prompt: {path} cannot be read: {error.strerror}{near}") from error
    except Refused as error:
        raise ConfigError(f"{COMMAND_LINE}: prompt: {path}: found {error}, wanted text") from error


def _output(flags: _SampleFlags, prompts: Sequence[str]) -> Iterator[str]:
    """Yields what the command prints, in pieces of whole characters."""
    from gptperf.hugging_face import load_model

    loaded = load_model(flags.run, checkpoint=flags.checkpoint, device=flags.device)
    for prompt in prompts:
        read, most = len(loaded.tokenizer.encode(prompt)), loaded.model.config.block_size
        if read > most:
            note(f"a prompt has {counted(read, 'token')}; the model reads the last {most:,} (block_size)")
    samples = api.streams(loaded, prompts, **flags.arguments(), stop_at_eot=flags.stop_at_eot)
    for number, pieces in enumerate(samples, 1):
        if len(samples) > 1:
            yield f"{_RULE} sample {number} of {len(samples)} {_RULE}\n"
        yield prompts[(number - 1) // flags.num_samples]
        yield from pieces
        yield "\n"


if __name__ == "__main__":
    run_main(main)
