"""Models of Hugging Face: their architectures and weights, and the checkpoint made of them."""

from gptperf.hugging_face.architecture import model_config
from gptperf.hugging_face.convert import convert, read_model
from gptperf.hugging_face.weights import weights

__all__ = ["convert", "model_config", "read_model", "weights"]
