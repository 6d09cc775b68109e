"""Small random models of transformers, and the models of gptperf that are made of them."""

from pathlib import Path
from typing import Any

import torch

from gptperf import checkpoint
from gptperf.config import ModelConfig
from gptperf.distributed.replicated import Replicated
from gptperf.model import GPT
from gptperf.training.saved_state import restore_weights

VOCABULARY = 257
BLOCK = 64
_LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": BLOCK, "rms_norm_eps": 1e-2}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": BLOCK, "n_embd": 32, "n_layer": 3, "n_head": 4}
_NAMES = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def random_model(kind: str, **changed: Any) -> Any:
    """A model of transformers in evaluation mode, with other values in every weight and bias."""
    import transformers

    sizes = _GPT2 | {"layer_norm_epsilon": 1e-2} if kind == "gpt2" else _LLAMA
    config = getattr(transformers, f"{_NAMES[kind]}Config")(**sizes | {"initializer_range": 0.15} | changed)
    torch.manual_seed(0)
    model = getattr(transformers, f"{_NAMES[kind]}{'LMHeadModel' if kind == 'gpt2' else 'ForCausalLM'}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # else every bias is 0 and every norm's weight 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def loaded(path: Path, model: ModelConfig) -> GPT:
    """The model of a checkpoint with weights alone."""
    ours = GPT(model).eval()
    restore_weights(checkpoint.load(path), ours, Replicated(ours, torch.float32))
    return ours


def tokens() -> torch.Tensor:
    """Two sequences as long as a model's context."""
    return torch.randint(0, VOCABULARY, (2, BLOCK), generator=torch.Generator().manual_seed(1))
