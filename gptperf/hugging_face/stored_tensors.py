"""The tensors of a model that another program stored, read by name, one at a time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptperf.errors import CheckpointError

__all__ = ["INDEX", "WEIGHTS", "StoredTensors", "bare", "of_folder"]

INDEX, WEIGHTS = "model.safetensors.index.json", "*.safetensors"
_NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Suffixes of the names of masks and tables that some files hold and that are not weights."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class StoredTensors:
    """Reads the tensors of a model by their names without the prefix "transformer." or "model.".

    Args:
        where: The file or folder, for messages.
        read: Name -> a function that reads the tensor.
    """

    def __init__(self, where: Path, read: Mapping[str, Callable[[], Tensor]]):
        self.where, self._read, self._used = where, read, set[str]()
        self.own = False
        """Whether the names are those of gptperf; see `gptperf.hugging_face.weights.layout`."""

    def __contains__(self, name: str) -> bool:
        return name in self._read

    def find(self, name: str) -> Tensor:
        """Returns a tensor in float32.

        Raises:
            CheckpointError: There is no such tensor, or it is not in a floating-point dtype of 16 bits or more.
        """
        if name not in self._read:
            raise CheckpointError(f"{self.where}: found no tensor {name}")
        tensor = self._read[name]()
        if tensor.dtype not in _DTYPES:
            wanted = "wanted float32, float16 or bfloat16: quantized weights are not read"
            raise CheckpointError(f"{self.where}: {name}: found {tensor.dtype}, {wanted}")
        self._used.add(name)
        return tensor.float()

    def unused(self) -> list[str]:
        """Returns the names of the weights that `find` has not returned."""
        return sorted(name for name in self._read.keys() - self._used if not name.endswith(_NO_WEIGHTS))


def bare(name: str) -> str:
    """Returns the name of a tensor without the name of the module that holds all but the head."""
    return name.removeprefix("transformer.").removeprefix("model.")


def of_folder(folder: Path) -> StoredTensors:
    """Returns the tensors of the *.safetensors files of a folder.

    Raises:
        CheckpointError: There is no such file, or one is corrupt.
    """
    read: dict[str, Callable[[], Tensor]] = {}
    for path in _paths(folder):
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        for name in file.keys():  # noqa: SIM118 - the file is not a dict
            read[bare(name)] = lambda file=file, name=name: file.get_tensor(name)  # type: ignore[misc]
    return StoredTensors(folder, read)


def _paths(folder: Path) -> list[Path]:
    """Returns the files that the index names, or the only file; the folder may hold other variants too."""
    index = folder / INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            return [folder / name for name in sorted(names)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: cannot be read: {error!r}") from error
    one = folder / "model.safetensors"
    paths = [one] if one.exists() else sorted(folder.glob(WEIGHTS))
    if len(paths) != 1:
        pickled = next(iter(sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])), None)
        hint = f"; {pickled.name} is a pickle, which is not read: save the model as safetensors" if pickled else ""
        raise CheckpointError(f"{folder}: found {len(paths)} {WEIGHTS}, wanted model.safetensors or an index{hint}")
    return paths
