"""Forks: `--init_from=RUN@STEP` continues a run from one of its checkpoints. This module loads no torch."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Fork", "fork_of", "parent_config"]

_STEP = re.compile(r"step-(\d{8,18})", re.ASCII)
_MOST_BYTES = 1 << 26


class Fork(NamedTuple):
    """The place where a fork leaves its parent."""

    checkpoints: Path
    """Folder of the parent's checkpoints."""
    step: int

    @property
    def path(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoints / f"step-{self.step:08d}"

    def problem(self) -> str | None:
        """Returns why the checkpoint is not there, with the nearest one that is, or None if it is."""
        if (self.path / "state.json").is_file():
            return None
        names = (_STEP.fullmatch(path.name) for path in self.checkpoints.glob("step-*"))
        steps = sorted(int(match[1]) for match in names if match)
        if not steps:
            return f"found no checkpoint in {self.checkpoints}, wanted RUN@STEP with a checkpoint of RUN"
        near = min(steps, key=lambda step: abs(step - self.step))
        return (
            f"found no checkpoint of step {self.step} in {self.checkpoints}, wanted one of the steps "
            f"{', '.join(map(str, steps))}; nearest: {near}"
        )


def fork_of(init_from: str) -> Fork | None:
    """Returns the checkpoint that `RUN@STEP` means, or None if the value has another form or is itself a path."""
    run, _, step = init_from.rpartition("@")
    if not run or not (step.isascii() and step.isdigit() and len(step) <= 18) or Path(init_from).exists():
        return None
    folder = Path(run) / "checkpoints"
    return Fork(folder if folder.is_dir() else Path(run), int(step))


def parent_config(fork: Fork) -> dict[str, Any]:
    """Returns key -> value of the parent's configuration.

    The bytes are verified later, when the checkpoint is loaded.

    Raises:
        ValueError: the checkpoint does not hold a configuration.
        OSError: it cannot be read.
    """
    path = fork.path / "state.json"
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"found more than {_MOST_BYTES} bytes in {path}")
    state = json.loads(path.read_bytes())
    sections = state.get("config") if isinstance(state, dict) else None
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ValueError(f"found no configuration in {path}")
    return {key: value for section in sections.values() for key, value in section.items()}
