"""Loads the model that is evaluated: that of a run, or a folder of Hugging Face."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gptperf import api
from gptperf.data.format import TokenizerInfo
from gptperf.data.json_tokenizer import TOKENIZER_JSON
from gptperf.data.tokenizers import Tokenizer, load_tokenizer
from gptperf.distributed.replicated import Replicated
from gptperf.errors import CheckpointError, DataError, DeviceError
from gptperf.hugging_face import read_model
from gptperf.hugging_face.convert import CONFIG, downloaded
from gptperf.model import GPT
from gptperf.ops import resolve_ops, without_triton
from gptperf.training import selftest

__all__ = ["EvaluatedModel", "is_hugging_face", "load"]


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


def is_hugging_face(path: Path) -> bool:
    """Returns whether a path is hf:REPO or the folder of a Hugging Face model, not of a run."""
    return str(path).startswith("hf:") or ((path / CONFIG).is_file() and not (path / "checkpoints").is_dir())


def load(path: Path, which: Literal["latest", "best"], device: torch.device) -> EvaluatedModel:
    """Loads the model of a run or a checkpoint, or a folder of Hugging Face.

    Args:
        path: The folder, or hf:REPO.
        which: Checkpoint of a run.
        device: Device of this rank.

    Raises:
        CheckpointError: There is no model, it is corrupt, or gptperf does not support it.
        ConfigError: The model has a component that is not registered.
    """
    if is_hugging_face(path):
        return _hugging_face(downloaded(str(path)) if str(path).startswith("hf:") else path, device)
    found = api.read_checkpoint(path, which)
    model, dtype = api.build_model(found, device)
    tokenizer, reason = None, ""
    try:
        tokenizer = api.saved_tokenizer(found)
    except (DataError, DeviceError) as error:  # the loss on a data set needs none
        reason = str(error)
    saved = found.state["config"]
    if saved["data"].get("document_mask"):
        model.document_end = TokenizerInfo(**({"vocab_size": 0, "eot": 0} | found.state["tokenizer"])).eot
    return EvaluatedModel(
        model=model,
        path=found.path,
        step=found.step,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        no_tokenizer=reason,
        config=saved if "train_state" in found.state else {},
    )


def _hugging_face(path: Path, device: torch.device) -> EvaluatedModel:
    config, weights = read_model(path)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ops = resolve_ops("auto", device.type)
    ops = without_triton(ops, "auto", selftest.broken_ops(ops, config, device, dtype))
    with device:
        model = GPT(config, ops).eval()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    unset = [name for name in missing if name in dict(model.named_parameters())]
    if unset:
        raise CheckpointError(f"{path}: found no weights for {', '.join(unset[:5])}")
    if dtype != torch.float32:
        Replicated(model, dtype)  # replaces the matrices by copies in the compute dtype, as in training
    tokenizer, reason = None, ""
    try:
        tokenizer = load_tokenizer(str(path / TOKENIZER_JSON))
    except (DataError, DeviceError) as error:
        reason = str(error)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{path}: found {tokenizer.vocab_size:,} ids in {TOKENIZER_JSON}, and vocab_size = {config.vocab_size:,} "
            f"in {CONFIG}; wanted the model's own tokenizer"
        )
    return EvaluatedModel(
        model=model,
        path=path,
        step=None,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        no_tokenizer=reason,
        config={},
    )
