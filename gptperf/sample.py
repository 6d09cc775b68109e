"""Generate text: `python -m gptperf.sample RUN --prompt="def " [--tokens=200] [--temperature=0.8] [--top_k=50]`.

RUN is the folder of a run, of its checkpoints, or of one checkpoint.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptperf.errors import CheckpointError, ConfigError, main_guard
from gptperf.ops import resolve_ops, without_triton

__all__ = ["main", "sample"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Generate text with a trained model."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a checkpoint."""
    prompt: str = "\n"
    """Text to go on from."""
    tokens: int = 200
    """Tokens to generate."""
    num_samples: int = 1
    """Samples, one after another."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0: among all."""
    seed: int = 1337
    """Seed of the draws."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint of a run."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    plugins: str = ""
    """Python modules, comma-separated, that register components."""
    debug: bool = False
    """Show the stack of an error."""

    def __post_init__(self) -> None:
        for name, low in (("tokens", 1), ("num_samples", 1), ("temperature", 0), ("top_k", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: found {getattr(self, name)}, wanted {low} or more; nearest: {low}")


def main() -> int:
    """Run the command; returns its exit code."""
    with main_guard(debug="--debug" in sys.argv):
        config = tyro.cli(SampleConfig, prog="python -m gptperf.sample", use_underscores=True)
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        for text in sample(config):
            print(text)
    return 0


def sample(config: SampleConfig) -> list[str]:
    """The prompt and its continuation, for each sample.

    Raises:
        CheckpointError: no usable checkpoint there.
    """
    import torch

    from gptperf import registry
    from gptperf.checkpoint import best, latest, load
    from gptperf.config import ModelConfig
    from gptperf.data.tokenizers import load_tokenizer
    from gptperf.distributed.process import start_process
    from gptperf.distributed.replicated import Replicated
    from gptperf.model import GPT
    from gptperf.model.generate import generate
    from gptperf.training import selftest
    from gptperf.training.build import DTYPES
    from gptperf.training.saved_state import restore_weights

    registry.load_plugins(config.plugins)
    folder = config.run / "checkpoints" if os.path.isdir(config.run / "checkpoints") else config.run
    if not os.path.isfile(folder / "MANIFEST.json"):
        found = (latest if config.checkpoint == "latest" else best)(folder)
        if found is None:
            raise CheckpointError(f"{config.run}: found no checkpoint, wanted the folder of a run or of a checkpoint")
        folder = found.path
    checkpoint = load(folder, only=("model", "buffers"))
    saved = checkpoint.state["config"]
    device = start_process(config.device).device
    dtype = DTYPES[saved["system"]["dtype"]] if device.type == "cuda" else torch.float32
    config_of_model = ModelConfig(**saved["model"])
    ops = resolve_ops("auto", device.type)
    ops = without_triton(ops, "auto", selftest.broken_ops(ops, config_of_model, device, dtype))
    with device:
        model = GPT(config_of_model, ops).eval()
    restore_weights(checkpoint, model, Replicated(model, dtype))
    tokenizer = load_tokenizer(checkpoint.state["tokenizer"]["name"])
    prompt = torch.tensor(tokenizer.encode(config.prompt).tolist() or [tokenizer.eot], device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    texts = []
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for _ in range(config.num_samples):
            new = generate(
                model,
                prompt,
                config.tokens,
                vocab_size=tokenizer.vocab_size,
                temperature=config.temperature,
                top_k=config.top_k,
                generator=generator,
            )
            texts.append(config.prompt + tokenizer.decode(new.tolist()))
    return texts


if __name__ == "__main__":
    sys.exit(main())
