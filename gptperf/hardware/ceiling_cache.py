"""The cache of measured ceilings: one JSON file for each model, GPU, driver and torch version. Loads no torch."""

import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptperf import files
from gptperf.config import ModelConfig
from gptperf.hardware.ceilings import Ceilings, Spread
from gptperf.hardware.workload import VERSION, workload_key

__all__ = ["cache_path", "load", "save"]


def cache_path(model: ModelConfig, batch_size: int, dtype: str, device: str, driver: str | None, torch: str) -> Path:
    """Returns the path of the file with a model's ceilings on a GPU. See `load` for the arguments."""
    parts = (device, dtype, f"driver {driver}", f"torch {torch}", workload_key(model, batch_size))
    name = "-".join(re.sub(r"[^A-Za-z0-9.+]+", "_", part) for part in parts)
    return _root() / "gptperf" / "ceilings" / f"{name}.json"


def _root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a process without HOME whose number of user has no name
        return Path(tempfile.gettempdir(), f"cache-{os.getuid()}")


def save(ceilings: Ceilings, path: Path) -> None:
    """Writes the ceilings to a file; a reader sees the whole file or none.

    Raises:
        DiskError: the file cannot be written.
    """
    body = dataclasses.asdict(ceilings)
    page = {"version": VERSION, "sha256": _digest(body), "ceilings": body}
    files.replace_text(path, json.dumps(page, indent=1) + "\n")


def load(
    model: ModelConfig,
    batch_size: int,
    dtype: str,
    device: str,
    driver: str | None,
    torch: str,
    *,
    power_cap_w: float | None = None,
    say: Callable[[str], object] = lambda line: print(f"gptperf: {line}", file=sys.stderr),
) -> Ceilings | None:
    """Returns the ceilings that were measured before, or None if the cache has none that hold.

    Args:
        model: the model whose shapes were measured.
        batch_size: sequences of a micro-batch.
        dtype: compute dtype.
        device: name of the GPU as CUDA reports it.
        driver: version of the driver, as `gpu_state().driver` has it.
        torch: version of torch.
        power_cap_w: current power cap of the GPU. Ceilings that were measured under another cap do not hold.
        say: receives the line that says why an existing file is not used.
    """
    path = cache_path(model, batch_size, dtype, device, driver, torch)
    try:
        ceilings = _read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"{path}: not used, the ceilings must be measured again: {error}")
        return None
    wanted = (workload_key(model, batch_size), dtype, device)
    found = (ceilings.key, ceilings.dtype, ceilings.device)
    if found != wanted:
        say(f"{path}: not used: found ceilings of {found}, wanted those of {wanted}")
        return None
    if power_cap_w is not None and ceilings.power_cap_w is not None and abs(power_cap_w - ceilings.power_cap_w) > 1:
        say(f"{path}: not used: measured at {ceilings.power_cap_w:.0f} W, and the power cap is {power_cap_w:.0f} W now")
        return None
    return ceilings


def _read(path: Path) -> Ceilings:
    """Reads the ceilings from a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is corrupt or has another version.
    """
    with os.fdopen(files.open_regular(path), "rb") as file:
        page: Any = json.loads(file.read())
    if not isinstance(page, dict) or page.get("version") != VERSION:
        raise ValueError(f"found version {page.get('version') if isinstance(page, dict) else None}, wanted {VERSION}")
    body = page.get("ceilings")
    if not isinstance(body, dict) or page.get("sha256") != _digest(body):
        raise ValueError("the file is corrupt: its checksum does not match its content")
    if set(body) != {field.name for field in dataclasses.fields(Ceilings)}:
        raise ValueError("the file is corrupt: its fields are not those of this version")
    return Ceilings(**body | {"spreads": {name: Spread(**spread) for name, spread in body["spreads"].items()}})


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
