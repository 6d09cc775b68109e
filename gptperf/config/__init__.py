"""The configuration: sections and keys, rules between keys, presets, files and flags."""

from gptperf.config.sections import (
    KEYS,
    Config,
    DataConfig,
    Key,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    SystemConfig,
    TrainConfig,
    value_problem,
)

__all__ = [
    "Config",
    "DataConfig",
    "KEYS",
    "Key",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SystemConfig",
    "TrainConfig",
    "value_problem",
]
