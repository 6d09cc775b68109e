"""The models and variants whose training step is measured. This module does not import torch."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from gptperf.config import Config, command_line

__all__ = ["DEFAULT_VARIANT", "MODELS", "PLANNED", "RIVAL_MODELS", "SHAPES", "SMALL", "STARTED"]
__all__ += ["STEP_VARIANTS", "VARIANTS", "config_of", "planned", "resolve", "rival_config"]

MODELS = {
    "llama_1.36b": ["configs/llama_1.36b.toml", "--batch_size=16"],
    "gpt2_124m": ["configs/gpt2_124m.toml", "--norm_position=pre", "--batch_size=64"],
    "llama_124m": ["configs/llama_124m.toml", "--batch_size=64"],
    "shakespeare_char": ["configs/shakespeare_char.toml"],
    "tiny": ["configs/tiny.toml", "--dtype=bfloat16"],
}
SMALL = ("shakespeare_char", "tiny")
"""Models whose step would wait for the host without CUDA graphs."""
RIVAL_MODELS = ("shakespeare_char", "gpt2_124m", "llama_124m", "llama_1.36b")
"""Models that are timed beside rivals."""
STARTED = ("tiny", "llama_1.36b")
"""Models whose start and saves are timed."""
SHAPES = ("small", "usual", "long")
_LONG = 8192
_LLAMA, _GPT2 = MODELS["llama_1.36b"], MODELS["gpt2_124m"]
_GROUPED = ["configs/llama_124m.toml", "--n_layer=20", "--n_embd=1280", "--n_head=20", "--n_kv_head=4"]
PLANNED = {
    "llama_1.36b/batch_16": _LLAMA,
    "llama_1.36b/batch_8": [*_LLAMA, "--batch_size=8"],
    "llama_1.36b/selective": [*_LLAMA, "--recompute=selective"],
    "llama_1.36b/full": [*_LLAMA, "--recompute=full"],
    "llama_1.36b/accumulated": [*_LLAMA, "--batch_size=8", "--gradient_accumulation_steps=4"],
    "gpt2_124m/batch_64": _GPT2,
    "gpt2_124m/selective": [*_GPT2, "--recompute=selective"],
    "gpt2_124m/full": [*_GPT2, "--recompute=full"],
    "llama_0.48b_grouped/batch_16": [*_GROUPED, "--block_size=2048", "--batch_size=16"],
    "gpt2_openai_124m/batch_32": ["configs/gpt2_openai_124m.toml", "--batch_size=32"],
    "gpt2_774m/batch_12": [*_GPT2, "--n_layer=36", "--n_embd=1280", "--n_head=20", "--batch_size=12"],
}
"""Runs whose plan is compared with a measurement. The rates of the plan are fitted to the first and the sixth run; no
formula of the plan is fitted to the last run."""
_FP8 = ["--compile=False", "--kernels=triton", "--matmul_dtype=fp8"]
VARIANTS = {
    "eager": ["--compile=False", "--kernels=eager"],
    "compiled": ["--compile=True", "--kernels=eager", "--compile_scope=model"],
    "triton": ["--compile=False", "--kernels=triton"],
    "triton+compiled": ["--compile=True", "--kernels=triton"],
    "auto+compiled": ["--compile=True", "--kernels=auto"],
    "fp8": _FP8,
    "fp8_forward": [*_FP8, "--fp8_level=forward"],
    "fp8_dgrad": [*_FP8, "--fp8_level=forward+dgrad"],
    "fp8_current": [*_FP8, "--fp8_scaling=current"],
}
STEP_VARIANTS = ("eager", "compiled", "triton", "triton+compiled", "fp8")
"""Variants with a cell of `python -m bench`; small models have the first and the default."""
DEFAULT_VARIANT = "triton"
"""The variant that a run on a GPU uses by default."""


def resolve(model: str, variant: str) -> Config:
    """Returns the configuration of a cell, with one micro-batch per step. Call it in the root folder of the repository.

    Raises:
        ConfigError: The configuration file is missing.
    """
    return command_line.resolve([*MODELS[model], "--gradient_accumulation_steps=1", *VARIANTS[variant]]).config


def rival_config(model: str, shape: str, flags: Sequence[str] = ()) -> Config:
    """Returns the configuration of a model that is timed beside rivals, with everything else at its default.

    Args:
        model: One of `RIVAL_MODELS`.
        shape: One of `SHAPES`. small: one sequence; usual: the batch of the bench; long: sequences of 8192 tokens, as
            many tokens as usual.
        flags: More flags.

    Raises:
        ConfigError: The configuration file is missing, or a flag is wrong.
    """
    given = [*MODELS[model], "--gradient_accumulation_steps=1", *flags]
    usual = command_line.resolve(given).config
    if shape == "small":
        given.append("--batch_size=1")
    if shape == "long":
        batch = max(1, usual.train.batch_size * usual.model.block_size // _LONG)
        given += [f"--block_size={_LONG}", f"--batch_size={batch}"]
    return command_line.resolve(given).config


def planned(name: str) -> Config:
    """Returns the configuration of one of `PLANNED` with Triton's ops, with one micro-batch per step by default.

    Raises:
        ConfigError: The configuration file is missing.
    """
    path, *flags = PLANNED[name]
    return command_line.resolve([path, "--gradient_accumulation_steps=1", "--kernels=triton", *flags]).config


def config_of(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Builds a configuration from its stored sections; keys that this version does not know are ignored.

    Raises:
        ConfigError: A value is wrong.
    """
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        cls = typing.cast(type, field.type)
        known = {key.name for key in dataclasses.fields(cls)}
        given = sections.get(field.name, {})
        parts[field.name] = cls(**{key: value for key, value in given.items() if key in known})
    return Config(**parts)
