"""The models and variants whose training step is measured. No torch here."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from gptperf import cli
from gptperf.config import Config

__all__ = ["DEFAULT_VARIANT", "MODELS", "STEP_VARIANTS", "VARIANTS", "config_of", "resolve"]

MODELS = {
    "llama_1.36b": ["configs/llama_1.36b.toml", "--batch_size=16"],
    "gpt2_124m": ["configs/gpt2_124m.toml", "--norm_position=pre", "--batch_size=64"],
    "llama_124m": ["configs/llama_124m.toml", "--batch_size=64"],
}
VARIANTS = {
    "eager": ["--compile=False", "--kernels=eager"],
    "compiled": ["--compile=True", "--kernels=eager"],
    "compiled_block": ["--compile=True", "--kernels=eager", "--compile_scope=block"],
    "triton": ["--compile=False", "--kernels=triton"],
    "triton+compiled": ["--compile=True", "--kernels=triton"],
    "auto+compiled": ["--compile=True", "--kernels=auto"],
}
STEP_VARIANTS = ("eager", "compiled", "triton", "triton+compiled")
"""Those with a cell of `python -m bench`."""
DEFAULT_VARIANT = "triton+compiled"
"""What a run does on a GPU unless told otherwise."""


def resolve(model: str, variant: str) -> Config:
    """The configuration of a cell, one optimizer step a micro-batch; from the repository root.

    Raises:
        ConfigError: the file is not there.
    """
    return cli.resolve([*MODELS[model], "--gradient_accumulation_steps=1", *VARIANTS[variant]]).config


def config_of(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """A configuration from its stored sections; keys that this version does not know are left out.

    Raises:
        ConfigError: a value is wrong.
    """
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        cls = typing.cast(type, field.type)
        known = {key.name for key in dataclasses.fields(cls)}
        given = sections.get(field.name, {})
        parts[field.name] = cls(**{key: value for key, value in given.items() if key in known})
    return Config(**parts)
