"""Checkpoints, which are saved atomically, verified before use, and written without pickle."""

from gptperf.checkpoint.background import Saved, Saver
from gptperf.checkpoint.listing import CheckpointInfo
from gptperf.checkpoint.manifest import SCHEMA
from gptperf.checkpoint.read import Checkpoint, best, checkpoints, latest, load, load_latest, stored
from gptperf.checkpoint.strict_json import JSON
from gptperf.checkpoint.write import FAILPOINTS, clean, prune, save

__all__ = [
    "FAILPOINTS",
    "JSON",
    "SCHEMA",
    "Checkpoint",
    "CheckpointInfo",
    "Saved",
    "Saver",
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
