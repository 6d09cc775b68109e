"""Checkpoints with random weights and any tokenizer, and what transformers makes of their exports."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf import checkpoint
from gptperf.config import Config, ModelConfig
from gptperf.data.tokenizers import ByteTokenizer, Tokenizer
from gptperf.model import GPT
from gptperf.model.generate import generate
from gptperf.training.saved_state import VOCABULARY, vocabulary_tensors

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 32, "vocab_size": 261, "vocab_multiple": 8}
"""A small model; its vocabulary is larger than that of bytes, and its embedding has rows of padding."""


def saved(model: ModelConfig, folder: Path, tokenizer: Tokenizer | None = None) -> tuple[GPT, Path]:
    """Returns a model in which every weight and bias has another value, and its checkpoint."""
    torch.manual_seed(0)
    ours = GPT(model).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            values = torch.randn_like(parameter)
            parameter.copy_(0.15 * values if parameter.ndim > 1 else parameter + 0.3 * values)
    named = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    known = tokenizer or ByteTokenizer()
    told = {name: getattr(known, name) for name in ("name", "fingerprint", "vocab_size", "eot")}
    tensors = {"model": named} | ({VOCABULARY: vocabulary_tensors(known.files)} if known.files else {})
    state = {"config": Config(model=model).sections(), "model": {}, "tokenizer": told}
    return ours, checkpoint.save(folder / "checkpoints", step=1, tensors=tensors, state=state)


def greedy(model: GPT, prompt: Tensor, tokens: int, vocab_size: int = 257) -> list[int]:
    """The likeliest continuation of a prompt `(P,)`."""
    chosen = {"temperature": 0, "top_k": 0, "generator": torch.Generator()}
    return generate(model, prompt, tokens, vocab_size=vocab_size, **chosen).tolist()


def loaded(folder: Path, **options: Any) -> Any:
    """The model that transformers reads from an export, in evaluation mode."""
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
