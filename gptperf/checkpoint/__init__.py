"""Checkpoints: written atomically, verified before use, without pickle."""

from gptperf.checkpoint.manifest import SCHEMA, CheckpointInfo
from gptperf.checkpoint.read import Checkpoint, best, checkpoints, latest, load, load_latest, stored
from gptperf.checkpoint.write import FAILPOINTS, JSON, clean, prune, save

__all__ = [
    "FAILPOINTS",
    "JSON",
    "SCHEMA",
    "Checkpoint",
    "CheckpointInfo",
    "best",
    "checkpoints",
    "clean",
    "latest",
    "load",
    "load_latest",
    "prune",
    "save",
    "stored",
]
