"""Writes and reads one safetensors file of a checkpoint: in chunks from any device, and with the safetensors library.

`safetensors.torch.save_file` is not used for two reasons. It refuses overlapping views of one storage, which the
parameters of a flat bucket may be. It also writes in one call, so the bytes cannot be hashed as they are written, and
all tensors of a GPU are copied to the host at once.
Format: https://github.com/huggingface/safetensors#format

A rank that holds only a part of a tensor stores the part as a flat tensor named `NAME@START:SHAPE` (`part_name`);
`join` puts the parts of all ranks together.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptperf.errors import CheckpointError, NonFiniteError
from gptperf.files import FileRecord, open_regular, write_file

__all__ = ["Part", "check_finite", "header", "join", "part_name", "parts", "read_tensors", "tensor_bytes"]
__all__ += ["write_tensors"]

HEADER_LIMIT = 1 << 24
"""Maximum size of a header in bytes."""
CHUNK = 1 << 24
"""Bytes that are copied to the host and written at a time."""
_PART = re.compile(r"(.+)@(\d+):(\d+(?:x\d+)*)", re.ASCII)
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_bytes(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Returns the total bytes of tensors (file stem -> name -> tensor), without the headers of their files."""
    return sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())


def check_finite(stem: str, named: Mapping[str, Tensor]) -> None:
    """Checks that every element is finite, so that no checkpoint holds a NaN or an infinity.

    Raises:
        NonFiniteError: An element is not finite; the message names the tensor.
    """
    # aminmax propagates NaN; unlike isfinite, it allocates no tensor of the input's size.
    for name, tensor in named.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                raise NonFiniteError(f"tensor {name!r} of {stem!r} is not finite; the step is not saved")


def header(stem: str, named: Mapping[str, Tensor]) -> tuple[list[str], bytes]:
    """Returns the names of the tensors in file order, and the bytes before the first tensor.

    Raises:
        CheckpointError: A name, a dtype or a layout cannot be stored, or the header is longer than `HEADER_LIMIT`.
    """
    for name, tensor in named.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"tensor {name!r} of {stem!r} is {tensor.layout} {tensor.dtype} on {tensor.device}; "
                f"wanted a dense tensor of one of {', '.join(_DTYPES.values())}"
            )
    # Wide elements come first, as in files of the library: every tensor then starts at a multiple of its element size.
    names = sorted(named, key=lambda name: (-named[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        if name in entries:
            raise CheckpointError(f"tensor name {name!r} of {stem!r} is reserved by safetensors")
        end = offset + named[name].numel() * named[name].element_size()
        dtype, shape = _DTYPES[named[name].dtype], list(named[name].shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(f"header of {stem!r} is {len(text)} bytes; wanted at most {HEADER_LIMIT}")
    return names, len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path,
    named: Mapping[str, Tensor],
    head: tuple[list[str], bytes],
    *,
    half: Callable[[], None] = lambda: None,
    written: Callable[[], None] = lambda: None,
) -> FileRecord:
    """Writes and syncs one file; at most `CHUNK` bytes, or one non-contiguous tensor, are copied at a time.

    Args:
        path: Path of the new file.
        named: Tensors on any device. Views of one storage, overlapping or not, become separate tensors.
        head: What `header` returned for these tensors.
        half: Called when half of the file is written.
        written: Called when the file is written, before the sync.

    Raises:
        OSError: The file cannot be created, written or synced.
    """
    names, start = head

    def chunks() -> Iterator[bytes | memoryview]:
        yield start
        for name in names:
            flat = named[name].detach().contiguous().reshape(-1).view(torch.uint8)
            for chunk in flat.split(CHUNK):
                yield memoryview(chunk.cpu().numpy())

    total = len(start) + tensor_bytes({path.stem: named})
    return write_file(path, chunks(), total, half=half, written=written)


def part_name(name: str, shape: Sequence[int], start: int) -> str:
    """Returns the name under which a file stores a part of a tensor: consecutive elements from `start` on."""
    return f"{name}@{start}:{'x'.join(map(str, shape))}"


def join(named: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Puts parts of tensors together; whole tensors are returned unchanged.

    Args:
        named: Tensors by their names in the files of a stem: plain names, or names of `part_name`.
        where: Name of the place for the error message.

    Raises:
        CheckpointError: Parts of a tensor are missing or overlap.
    """
    whole: dict[str, Tensor] = {}
    parts_of: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for name, tensor in named.items():
        found = _PART.fullmatch(name)
        if found is None:
            whole[name] = tensor
        else:
            parts_of.setdefault((found[1], found[3]), []).append((int(found[2]), tensor))
    for (name, text), found_parts in parts_of.items():
        shape = [int(size) for size in text.split("x")]
        found_parts.sort(key=lambda part: part[0])
        end = 0  # of the elements so far
        for start, tensor in found_parts:
            if start != end or name in whole:
                raise CheckpointError(f"{where}: elements {end} to {start} of {name!r} are missing or stored twice")
            end += tensor.numel()
        if end != math.prod(shape):
            raise CheckpointError(f"{where}: found {end} elements of {name!r}, wanted {math.prod(shape)}")
        whole[name] = torch.cat([tensor for _, tensor in found_parts]).view(shape)
    return whole


class Part(NamedTuple):
    """Consecutive elements of a tensor that a file holds: all of them, or the part that one rank wrote."""

    name: str
    """Name of the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Index of the first element in the flattened tensor."""
    values: Tensor
    """The elements, flat."""


def parts(path: Path) -> Iterator[Part]:
    """Yields the tensors of a verified file one by one; `values` maps the file and is valid until the next part.

    Raises:
        CheckpointError: The file is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            for name in list(opened.keys()):
                tensor, found = opened.get_tensor(name), _PART.fullmatch(name)
                if found is None:
                    yield Part(name, tuple(tensor.shape), 0, tensor.reshape(-1))
                else:
                    yield Part(found[1], tuple(map(int, found[3].split("x"))), int(found[2]), tensor.reshape(-1))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file that gptperf wrote: {error}") from error


def read_tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """Reads a verified file into new memory on `device`.

    Raises:
        CheckpointError: The file is not a safetensors file, or its header is longer than gptperf writes.
    """
    try:
        with open(open_regular(path), "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if length > HEADER_LIMIT:
            raise CheckpointError(f"{path} states a header of {length} bytes; wanted at most {HEADER_LIMIT}")
        with safe_open(path, framework="pt") as opened:
            # The copy leaves no tensor on the mapped file, where a read would raise SIGBUS if the file is truncated.
            names = list(opened.keys())
            return {name: opened.get_tensor(name).to(device, copy=True) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a safetensors file that gptperf wrote: {error}") from error
