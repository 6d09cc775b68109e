"""Loads a run, a checkpoint or a Hugging Face model, to generate text or to be evaluated."""

import os
from pathlib import Path
from typing import Literal

from gptperf import api
from gptperf.hugging_face.convert import CONFIG, read

__all__ = ["load_model"]


def load_model(
    path: Path,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> api.LoadedModel:
    """Loads a trained model and its tokenizer; nothing is written.

    Args:
        path: As for `api.load_model`, or a folder with config.json, *.safetensors and tokenizer.json.
        checkpoint, device: As for `api.load_model`.

    Raises:
        CheckpointError: As for `api.load_model`; or gptperf does not support the Hugging Face model.
        ConfigError, DataError, DeviceError: As for `api.load_model`.
    """
    if os.path.isfile(path / CONFIG):
        return api.loaded_from(read(path), device)
    return api.load_model(path, checkpoint=checkpoint, device=device)
