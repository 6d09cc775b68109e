"""The configuration of a run: sections and keys, rules between keys, presets, files and flags."""

from gptperf.config.sections import (
    KEYS,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    SystemConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "KEYS",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SystemConfig",
    "TrainConfig",
]
