"""Starts from a model of another program: `python -m gptperf.hugging_face hf:openai-community/gpt2 --out_dir=out/gpt2`.

The command writes a checkpoint with the weights of a GPT-2, LLaMA, Mistral or Qwen, and its architecture to
OUT_DIR/model.toml. These commands then use the checkpoint:

    python -m gptperf.train OUT_DIR/model.toml --init_from=OUT_DIR --out_dir=OTHER --dataset=...
    python -m gptperf.sample OUT_DIR --prompt="..."

The model is a folder with config.json and *.safetensors, or hf:REPO, which is downloaded (pip install 'gptperf[hf]'),
or a file *.gguf (pip install 'gptperf[gguf]'). `--nanogpt ckpt.pt` takes a checkpoint of nanoGPT instead. A
tokenizer.json in the folder goes into the checkpoint.

    python -m gptperf.hugging_face export RUN DIR [--step=1000]

writes a checkpoint as a folder for transformers: weights, config.json, tokenizer, generation config and model card.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.config.keys import Range
from gptperf.errors import run_main
from gptperf.formats import counted
from gptperf.hugging_face.convert import convert, downloaded
from gptperf.hugging_face.export_command import export_main

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class _ConvertFlags(Flags):
    """Which model, and where the checkpoint goes."""

    WORDS: ClassVar[str] = "model"

    model: str = ""
    """Folder with config.json and *.safetensors, hf:REPO, or a file *.gguf."""
    out_dir: Path
    """Folder for the checkpoint."""
    nanogpt: Path | None = None
    """Checkpoint of nanoGPT (ckpt.pt), in place of MODEL."""
    tokenizer: str = ""
    """Tokenizer of the model, a name as for prepare, or unknown; default: the folder's tokenizer.json, else gpt2 for a
    vocabulary of 50257 or 50304, else unknown."""
    eot: str = ""
    """Token that ends a document; default: the one that the tokenizer or the model names."""
    vocab_multiple: Annotated[int, Range(1, 2**20)] = 1
    """Pad the embedding and lm_head to a multiple of this number of rows."""

    def problems(self) -> Sequence[str]:
        """Returns whether there is no model, or more than one."""
        if bool(self.model) != (self.nanogpt is not None):
            return []
        found = f"{self.model!r} and --nanogpt={self.nanogpt}" if self.model else "no MODEL"
        return [f"{COMMAND_LINE}: found {found}, wanted MODEL or --nanogpt=PATH"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        GptperfError: the command line is wrong, or the model cannot be converted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["export"]:
        return export_main(argv[1:])
    about = (
        "Make a checkpoint of a model of Hugging Face, of nanoGPT, or of a GGUF file. export RUN DIR is the reverse."
    )
    flags = parse(_ConvertFlags, argv, "gptperf.hugging_face", about)
    source = downloaded(flags.model) if flags.model.startswith("hf:") else flags.nanogpt or Path(flags.model)
    path, model = convert(
        source,
        flags.out_dir,
        flags.tokenizer,
        flags.eot,
        vocab_multiple=flags.vocab_multiple,
        nanogpt=flags.nanogpt is not None,
        tell=print,
    )
    print(f"{path}: {counted(model.n_layer, 'layer')} of {model.n_embd}, vocab_size {model.vocab_size:,}")
    out = flags.out_dir
    print(f"python -m gptperf.train {out}/model.toml --init_from={out} --out_dir=... --dataset=...")
    return 0


if __name__ == "__main__":
    run_main(main)
