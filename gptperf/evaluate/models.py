"""Loads the model that is evaluated, from a run or from Hugging Face."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gptperf import api
from gptperf.data.format import TokenizerInfo
from gptperf.data.tokenizers import Tokenizer
from gptperf.errors import DataError, DeviceError
from gptperf.hugging_face.load import read_checkpoint
from gptperf.model import GPT

__all__ = ["EvaluatedModel", "load"]


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model in evaluation mode, and what is known of it."""

    model: GPT
    path: Path
    """Folder of the checkpoint or of the Hugging Face model."""
    step: int | None
    """Iterations of training; None for a model of Hugging Face."""
    dtype: torch.dtype
    device: torch.device
    tokenizer: Tokenizer | None
    no_tokenizer: str
    """The reason why there is no tokenizer, or ""."""
    config: Mapping[str, Mapping[str, Any]]
    """Configuration of the run: section -> key -> value; empty for a model of Hugging Face, imported or not."""

    def autocast(self) -> AbstractContextManager[object]:
        """Returns a context that computes in the model's dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def asked(self, section: str, key: str, otherwise: Any) -> Any:
        """Returns a value of the run's configuration, or another value for a model without one."""
        return self.config.get(section, {}).get(key, otherwise)


def load(path: Path, which: Literal["latest", "best"], device: torch.device) -> EvaluatedModel:
    """Loads the model of a run or a checkpoint, or a model of Hugging Face.

    Args:
        path: The folder.
        which: Checkpoint of a run.
        device: Device of this rank.

    Raises:
        CheckpointError: There is no model, it is corrupt, or gptperf does not support it.
        ConfigError: The model has a component that is not registered.
    """
    found = read_checkpoint(path, which)
    model, dtype = api.build_model(found, device)
    tokenizer, reason = None, ""
    try:
        tokenizer = api.saved_tokenizer(found)
    except (DataError, DeviceError) as error:  # the loss on a data set needs none
        reason = str(error)
    is_run = "train_state" in found.state
    if is_run and found.state["config"]["data"].get("document_mask"):
        model.document_end = TokenizerInfo(**({"vocab_size": 0, "eot": 0} | found.state["tokenizer"])).eot
    return EvaluatedModel(
        model=model,
        path=found.path,
        step=found.step if is_run else None,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        no_tokenizer=reason,
        config=found.state["config"] if is_run else {},
    )
