"""Loads a run, a checkpoint or a model of Hugging Face, to generate text."""

from pathlib import Path
from typing import Literal

from gptperf import api
from gptperf.checkpoint import Checkpoint
from gptperf.config import Config
from gptperf.errors import note
from gptperf.hugging_face.convert import CONFIG, read_model
from gptperf.hugging_face.vocabulary import find_tokenizer
from gptperf.training.saved_state import VOCABULARY, vocabulary_tensors

__all__ = ["load_model"]


def load_model(
    path: Path,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> api.LoadedModel:
    """Loads a trained model and its tokenizer; nothing is written.

    Args:
        path: As for `api.load_model`; or the folder of a Hugging Face model with its tokenizer, or a GGUF file.
        checkpoint, device: As for `api.load_model`.

    Raises:
        CheckpointError: As for `api.load_model`; or gptperf does not support the model.
        ConfigError, DataError, DeviceError: As for `api.load_model`.
    """
    if path.suffix == ".gguf" or ((path / CONFIG).is_file() and not (path / "checkpoints").is_dir()):
        return api.loaded_from(_read(path), device)
    return api.load_model(path, checkpoint=checkpoint, device=device)


def _read(source: Path) -> Checkpoint:
    """Returns the checkpoint that a model would have as a run, in memory."""
    model, weights = read_model(source, tell=note)
    tokenizer, files = find_tokenizer(source, model, "", "", lambda line: None)
    tensors = {"model": weights} | ({VOCABULARY: vocabulary_tensors(files)} if files else {})
    state = {"config": Config(model=model).sections(), "tokenizer": tokenizer}
    return Checkpoint(path=source, step=0, tensors=tensors, state=state, metric=None)
