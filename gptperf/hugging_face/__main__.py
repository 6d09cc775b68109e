"""Starts from a Hugging Face model: `python -m gptperf.hugging_face hf:openai-community/gpt2 --out_dir=out/gpt2`.

The command writes a checkpoint with the weights of a GPT-2 or LLaMA, and its architecture to OUT_DIR/model.toml. These
commands then use the checkpoint:

    python -m gptperf.train OUT_DIR/model.toml --init_from=OUT_DIR --out_dir=OTHER --dataset=...
    python -m gptperf.sample OUT_DIR --prompt="..."

The model is a folder with config.json and *.safetensors, or hf:REPO, which is downloaded (pip install 'gptperf[hf]').
A tokenizer.json in the folder goes into the checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptperf.config.flags import Flags, parse
from gptperf.errors import run_main
from gptperf.hugging_face.convert import convert, downloaded

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _ConvertFlags(Flags):
    """Which model, and where the checkpoint goes."""

    model: str
    """Folder with config.json and *.safetensors, or hf:REPO."""
    out_dir: Path
    """Folder for the checkpoint."""
    tokenizer: str = ""
    """Tokenizer of the model, a name as for prepare, or unknown; default: the folder's tokenizer.json, else gpt2 for a
    vocabulary of 50257, else unknown."""
    eot: str = ""
    """Token that ends a document; default: the one that the tokenizer names."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        GptperfError: the command line is wrong, or the model cannot be converted.
    """
    about = "Make a checkpoint of the weights of a Hugging Face GPT-2 or LLaMA."
    flags = parse(_ConvertFlags, argv, "gptperf.hugging_face", about)
    folder = downloaded(flags.model) if flags.model.startswith("hf:") else Path(flags.model)
    path, model = convert(folder, flags.out_dir, flags.tokenizer, flags.eot)
    print(f"{path}: {model.n_layer} layers of {model.n_embd}, vocab_size {model.vocab_size:,}")
    out = flags.out_dir
    print(f"python -m gptperf.train {out}/model.toml --init_from={out} --out_dir=... --dataset=...")
    return 0


if __name__ == "__main__":
    run_main(main)
