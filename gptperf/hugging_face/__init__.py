"""Models of Hugging Face as checkpoints, and checkpoints as models of Hugging Face."""

from gptperf.hugging_face.architecture import model_config
from gptperf.hugging_face.convert import convert, read_model
from gptperf.hugging_face.export import export
from gptperf.hugging_face.load import load_model
from gptperf.hugging_face.weights import weights

__all__ = ["convert", "export", "load_model", "model_config", "read_model", "weights"]
