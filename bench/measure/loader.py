"""Measures the training loader: tokens per second and resident memory. `python -m bench.measure.loader [--json=PATH]`

Protocol. Each case is one `Loader` of rank 0 of 1 with 8 micro-batches per step and a batch of about 16,384 tokens,
consumed as fast as it delivers. Memory is not page-locked, as on a machine without a GPU. After 0.5 s of warm-up there
are 5 windows of 1 s; the figure is the median window, and the spread is (max - min) / median. The data is a temporary
set of 64 million random tokens in the page cache, so this measures gptperf and not a disk. Each case is measured with
the blocks verified before use, as in training, and without. With verification the first epoch, in which every block is
verified once, is timed before the warm-up. Its read amplification is the bytes that were read, for the tokens and for
verification, divided by the bytes of the tokens.

One case reads a data set of 100 GB to show that resident memory does not grow with the data. Its shards are sparse
files: headers and manifest are valid, and the tokens are holes that read as zeros. The RSS is read before the loader
starts and after the last window. The kernel fills new pages for the holes, so this rate is lower.
"""

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptperf.config.flags import Flags, parse
from gptperf.data.blocks import CHECKSUMS, block_sums
from gptperf.data.format import (
    DTYPES,
    HEADER_BYTES,
    MANIFEST,
    SPLITS,
    DatasetManifest,
    FileInfo,
    Header,
    Shard,
    Split,
    TokenizerInfo,
)
from gptperf.data.loader import Loader
from gptperf.data.shards import TokenSource
from gptperf.errors import run_main

__all__ = ["main", "measure", "measure_all", "rss_bytes", "write_random_dataset", "write_sparse_dataset"]

BLOCK_SIZES = (128, 256, 1024, 2048)
BATCH_TOKENS = 16_384
RANDOM_TOKENS = 64_000_000
SPARSE_BYTES = 100_000_000_000
SHARD_TOKENS = 100_000_000


def write_sparse_dataset(path: Path, *, size_bytes: int, dtype: str, shard_tokens: int = SHARD_TOKENS) -> Path:
    """Writes a data set of about `size_bytes` bytes whose tokens are holes: zeros that take no space on the disk."""
    itemsize = DTYPES[dtype].itemsize
    count = max(1, size_bytes // (itemsize * shard_tokens))
    return _write_dataset(path, dtype=dtype, sizes=[shard_tokens] * count, fill=None)


def write_random_dataset(path: Path, *, tokens: int, dtype: str, shard_tokens: int = SHARD_TOKENS) -> Path:
    """Writes a data set of uniformly random ids below 50,257 (uint16) or 200,019 (uint32)."""
    sizes = [min(shard_tokens, tokens - begin) for begin in range(0, tokens, shard_tokens)]
    return _write_dataset(path, dtype=dtype, sizes=sizes, fill=np.random.default_rng(0))


def _write_dataset(path: Path, *, dtype: str, sizes: list[int], fill: np.random.Generator | None) -> Path:
    """Writes shards; the validation split is one more shard. Only blocks of shards that are filled have checksums."""
    path.mkdir(parents=True)
    itemsize = DTYPES[dtype].itemsize
    vocab_size = 50_257 if dtype == "uint16" else 200_019
    splits = {}
    for split, split_sizes in (("train", sizes), ("val", sizes[:1])):
        shards = []
        for index, tokens in enumerate(split_sizes):
            file = path / f"{split}_{index:05d}.bin"
            header = Header(itemsize=itemsize, tokens=tokens, documents=1, max_id=vocab_size - 1)
            with file.open("wb") as out:
                out.write(header.pack())
                if fill is None:
                    out.truncate(HEADER_BYTES + tokens * itemsize)
                else:
                    fill.integers(0, vocab_size, tokens, dtype=DTYPES[dtype]).tofile(out)
            size = HEADER_BYTES + tokens * itemsize
            shards.append(
                Shard(
                    file=file.name,
                    tokens=tokens,
                    documents=1,
                    max_id=vocab_size - 1,
                    bytes=size,
                    sha256="0" * 64,
                )
            )
        splits[split] = Split(tokens=sum(split_sizes), documents=len(shards), shards=tuple(shards))
    files = {}
    if fill is not None:
        names = [shard.file for split in SPLITS for shard in splits[split].shards]
        sums = b"".join(block_sums(path / name).tobytes() for name in names)
        (path / CHECKSUMS).write_bytes(sums)
        files[CHECKSUMS] = FileInfo(bytes=len(sums), sha256=hashlib.sha256(sums).hexdigest())
    manifest = DatasetManifest(
        files=files,
        name=path.name,
        tokenizer=TokenizerInfo(name="bench", vocab_size=vocab_size, fingerprint="0" * 64, eot=0),
        dtype=dtype,
        source="synthetic",
        val_fraction=0.0,
        split_method="none",
        splits=splits,
    )
    (path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return path


def rss_bytes() -> int:
    """Returns this process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(
    path: Path, block_size: int, *, verify: bool = True, windows: int = 5, window_s: float = 1.0
) -> dict[str, Any]:
    """Measures one case by the protocol at the top of this file."""
    batch_size = max(1, BATCH_TOKENS // block_size)
    with TokenSource.open(path, "train", verify=verify) as source:
        before = rss_bytes()
        with Loader(source, block_size=block_size, batch_size=batch_size, micro_batches=8, seed=1) as loader:
            first = _first_epoch(loader, source, batch_size)
            _consume(loader, window_s / 2)
            rates = [_consume(loader, window_s) * batch_size * block_size for _ in range(windows)]
            after = rss_bytes()
        median = statistics.median(rates)
        return {
            "dataset": path.name + (", not verified" if CHECKSUMS in source.manifest.files and not verify else ""),
            "dataset_gb": len(source) * source.dtype.itemsize / 1e9,
            "dtype": source.manifest.dtype,
            "block_size": block_size,
            "batch_size": batch_size,
            "tokens_s": median,
            "windows_tokens_s": rates,
            "spread": (max(rates) - min(rates)) / median,
            **first,
            "rss_before_mb": before / 1e6,
            "rss_after_mb": after / 1e6,
        }


def _first_epoch(loader: Loader, source: TokenSource, batch_size: int) -> dict[str, Any]:
    """Reads one epoch of a data set with checksums, and returns its rate and read amplification."""
    if source.checksums is None:
        return {"verified": False}
    batches = len(source) // loader.order.block_size // batch_size
    begin = time.perf_counter()
    for _ in range(batches):
        next(loader)
    tokens = batches * batch_size * loader.order.block_size
    size = tokens * source.dtype.itemsize
    return {
        "verified": True,
        "first_tokens_s": tokens / (time.perf_counter() - begin),
        "read_amplification": 1 + source.checksums.read_bytes / size,
    }


def _consume(loader: Loader, seconds: float) -> float:
    """Returns micro-batches per second, over at least `seconds` seconds."""
    count, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        next(loader)
        count += 1
    return count / passed


def measure_all(
    folder: Path, *, tokens: int = RANDOM_TOKENS, windows: int = 5, window_s: float = 1.0, few: bool = False
) -> list[dict[str, Any]]:
    """Measures every case, or only one with `few`, and prints the table.

    Args:
        folder: Folder for the data sets.
        tokens: Number of tokens of a random data set.
        windows: Number of windows per case.
        window_s: Length of a window in seconds.
        few: Whether to measure only one data type and one block size.
    """
    columns = f"{'data set':14s} {'GB':>6s} {'dtype':7s} {'T':>5s} {'B':>4s} {'Mtok/s':>8s} {'spread':>7s}"
    print(f"{columns} {'RSS MB':>15s}  verified: Mtok/s of the first epoch, bytes read / used")
    rows = []
    for dtype in ("uint16",) if few else ("uint16", "uint32"):
        random = write_random_dataset(folder / f"random_{dtype}", tokens=tokens, dtype=dtype)
        cases = [(random, block_size) for block_size in ((1024,) if few else BLOCK_SIZES)]
        if dtype == "uint16" and not few:
            sparse = write_sparse_dataset(folder / "sparse_uint16", size_bytes=SPARSE_BYTES, dtype=dtype)
            cases.append((sparse, 1024))
        checked = [(path, block_size, verify) for path, block_size in cases for verify in (True, False)]
        for path, block_size, verify in checked:
            if verify and path.name.startswith("sparse"):
                continue
            row = measure(path, block_size, verify=verify, windows=windows, window_s=window_s)
            rows.append(row)
            print(
                f"{path.name:14s} {row['dataset_gb']:6.1f} {dtype:7s} {block_size:5d} "
                f"{row['batch_size']:4d} {row['tokens_s'] / 1e6:8.1f} {row['spread']:6.1%} "
                f"{row['rss_before_mb']:6.0f} -> {row['rss_after_mb']:5.0f}  "
                + (f"{row['first_tokens_s'] / 1e6:.1f}, {row['read_amplification']:.2f}" if verify else "no"),
                flush=True,
            )
    return rows


@dataclass(frozen=True, kw_only=True)
class _LoaderFlags(Flags):
    """Where the files go."""

    json: Path | None = None
    """Write the results to this file, too."""
    dir: Path | None = None
    """Folder of the temporary data sets; default: the temporary folder of the system."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all cases, prints the table, and writes the JSON file if the command line names one."""
    args = parse(_LoaderFlags, argv, "bench.measure.loader", __doc__)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        rows = measure_all(Path(folder))
    if args.json:
        host = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        record = {"protocol": __doc__, "host": host, "results": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
