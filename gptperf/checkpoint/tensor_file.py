"""One safetensors file: streamed out of tensors wherever they lie, read through the library's own parser.

Written here and not by `safetensors.torch.save_file`, which refuses overlapping views of one storage and
writes in one call: no hash on the way, and all of a GPU's tensors copied to the host at once.
Format: https://github.com/huggingface/safetensors#format
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
CHUNK = 1 << 24
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
    """Bytes of these tensors, by file stem and name; the files are longer by their headers."""
    return sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())


def check_finite(stem: str, named: Mapping[str, Tensor]) -> None:
    """The final gate of a save. `aminmax` propagates NaN and allocates nothing.

    Raises:
        NonFiniteError: Names the tensor.
    """
    for name, tensor in named.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                raise NonFiniteError(f"tensor {name!r} of {stem!r} is not finite; the step is not saved")


def header(stem: str, named: Mapping[str, Tensor]) -> tuple[list[str], bytes]:
    """Order of the tensors in the file, and the bytes before the first of them.

    Raises:
        CheckpointError: A name, a dtype or a layout that cannot be stored.
    """
    for name, tensor in named.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"tensor {name!r} of {stem!r} is {tensor.layout} {tensor.dtype} on {tensor.device}; "
                f"wanted a dense one of {', '.join(_DTYPES.values())}"
            )
    # Wide elements first, as safetensors itself writes: each tensor then starts aligned to its elements.
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
    """Write and sync one file; at most 16 MiB, or one tensor that is not contiguous, are copied at a time.

    Args:
        path: The new file.
        named: Tensors on any device; views of one storage, overlapping or not, become tensors of their own.
        head: What `header` returned for them.
        half: Called when half of the file is written.
        written: Called before the sync.

    Raises:
        OSError: The disk refuses.
    """
    names, start = head

    def chunks() -> Iterator[bytes | memoryview]:
        yield start
        for name in names:
            flat = named[name].detach().contiguous().reshape(-1).view(torch.uint8)
            for piece in flat.split(CHUNK):
                yield memoryview(piece.cpu().numpy())

    total = len(start) + tensor_bytes({path.stem: named})
    return write_file(path, chunks(), total, half=half, written=written)


def part_name(name: str, shape: Sequence[int], start: int) -> str:
    """Under which elements of a tensor are stored, flat, when a file has not all of them."""
    return f"{name}@{start}:{'x'.join(map(str, shape))}"


def join(named: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Whole tensors, of tensors and parts of them.

    Raises:
        CheckpointError: parts are missing, or overlap.
    """
    whole: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for name, tensor in named.items():
        found = _PART.fullmatch(name)
        if found is None:
            whole[name] = tensor
        else:
            parts.setdefault((found[1], found[3]), []).append((int(found[2]), tensor))
    for (name, text), pieces in parts.items():
        shape = [int(size) for size in text.split("x")]
        pieces.sort(key=lambda piece: piece[0])
        at = 0
        for start, tensor in pieces:
            if start != at or name in whole:
                raise CheckpointError(f"{where}: elements {at} to {start} of {name!r} are missing or there twice")
            at += tensor.numel()
        if at != math.prod(shape):
            raise CheckpointError(f"{where}: found {at} elements of {name!r}, wanted {math.prod(shape)}")
        whole[name] = torch.cat([tensor for _, tensor in pieces]).view(shape)
    return whole


class Part(NamedTuple):
    """Elements of a tensor that a file holds."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """First element."""
    values: Tensor
    """Flat."""


def parts(path: Path) -> Iterator[Part]:
    """The tensors of a file that was verified, one after another; each is part of the file until the next one.

    Raises:
        CheckpointError: It is no safetensors file.
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
        raise CheckpointError(f"{path} is no safetensors file that gptperf wrote: {error}") from error


def read_tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """Read a file that was verified, into memory of its own.

    Raises:
        CheckpointError: It is no safetensors file, or its header is longer than gptperf writes.
    """
    try:
        with open(open_regular(path), "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if length > HEADER_LIMIT:
            raise CheckpointError(f"{path} announces a header of {length} bytes; wanted at most {HEADER_LIMIT}")
        with safe_open(path, framework="pt") as opened:
            # `copy` ends the mapping of the file: a file cut short later would be a SIGBUS.
            names = list(opened.keys())
            return {name: opened.get_tensor(name).to(device, copy=True) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no safetensors file that gptperf wrote: {error}") from error
