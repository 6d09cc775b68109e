"""Reads the *.safetensors files of a folder, one tensor at a time."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptperf.errors import CheckpointError

__all__ = ["INDEX", "WEIGHTS", "StoredTensors"]

INDEX, WEIGHTS = "model.safetensors.index.json", "*.safetensors"
_NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Suffixes of the names of masks and tables that some files hold and that are not weights."""


class StoredTensors:
    """Reads tensors of the *.safetensors files of a folder by name, one at a time."""

    def __init__(self, folder: Path):
        self.folder, self.used = folder, set[str]()
        self.places: dict[str, tuple[Any, str]] = {}
        for path in self._paths():
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
            for name in file.keys():  # noqa: SIM118 - the file is not a dict
                self.places[name.removeprefix("transformer.").removeprefix("model.")] = (file, name)

    def _paths(self) -> list[Path]:
        """Returns the files that the index names, or the only file; the folder may hold other variants too."""
        index = self.folder / INDEX
        if index.exists():
            try:
                names = set(json.loads(index.read_bytes())["weight_map"].values())
                return [self.folder / name for name in sorted(names)]
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: cannot be read: {error!r}") from error
        one = self.folder / "model.safetensors"
        paths = [one] if one.exists() else sorted(self.folder.glob(WEIGHTS))
        if len(paths) != 1:
            raise CheckpointError(f"{self.folder}: found {len(paths)} {WEIGHTS}, wanted model.safetensors or an index")
        return paths

    def find(self, name: str) -> Tensor:
        """Returns a tensor in float32."""
        if name not in self.places:
            raise CheckpointError(f"{self.folder}: found no tensor {name}")
        self.used.add(name)
        file, stored = self.places[name]
        tensor: Tensor = file.get_tensor(stored)
        return tensor.float()

    def unused(self) -> list[str]:
        """Returns the names of the tensors that `find` has not returned, except a tied lm_head."""
        left = self.places.keys() - self.used - {"lm_head.weight"}
        return sorted(name for name in left if not name.endswith(_NO_WEIGHTS))
