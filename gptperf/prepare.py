"""Turns text into a data set: `python -m gptperf.prepare WHAT [--name=NAME] ...`; see `--help`."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from gptperf.config.flags import Flags, parse
from gptperf.errors import DataError, run_main

__all__ = ["main"]

_EXAMPLES = """\
WHAT is one of
  python_stdlib             the .py files of the running Python, about 11 MB; needs no download
  shakespeare               tiny Shakespeare, 1 MB, downloaded
  openwebtext, fineweb_edu, slimpajama_627b, hf:REPO[:CONFIG]
                            streamed from Hugging Face; needs pip install 'gptperf[hf]'
  PATH                      a file or a folder, with everything below it, in any mix of
                              text: txt, md, source code, ...; a file is a document
                              records: jsonl, ndjson, json, csv, tsv, parquet, arrow; a record is a document
                            each also as .gz, .xz or .zst; parquet, arrow and zst need pip install 'gptperf[data]'
  bin:PATH                  token files of nanoGPT (train.bin, val.bin; see --dtype), llm.c or modded-nanogpt, which are
                            converted; --tokenizer=gpt2, or ids:N for N ids without a vocabulary

A byte-order mark decides the encoding, otherwise it is UTF-8; CR LF becomes LF; text that is blank, has a zero byte or
is not valid is not read. What is not read is counted by reason.

The validation split is 5% of the documents, chosen by their hash (Hugging Face: 0.05%), or the last 10% of a single
text file. A preparation that is killed goes on where it was when the same command runs again.

examples
  python -m gptperf.prepare python_stdlib
  python -m gptperf.prepare my_notes/ --name=notes --val_fraction=0.1
  python -m gptperf.prepare openwebtext --tokenizer=gpt2
  python -m gptperf.prepare python_stdlib --tokenizer=train:8192 --name=stdlib_8k
  python -m gptperf.prepare hf:codeparrot/codeparrot-clean --text_field=content
  python -m gptperf.prepare clones/ --group_by=repo --dedup=near
  python -m gptperf.prepare python_stdlib --verify
"""


@dataclass(frozen=True, kw_only=True)
class _PrepareFlags(Flags):
    """What to prepare, and how."""

    what: str
    """What to prepare, see below."""
    name: str | None = None
    """Name of the data set; default: that of WHAT."""
    data_dir: str = "data"
    """Folder of data sets."""
    tokenizer: str = "byte"
    """byte; tiktoken's gpt2, cl100k_base, ...; a tokenizer.json or its folder; a data set, by its name in
    --data_dir or its folder, whose tokenizer it is; hf:REPO; train:N, a BPE of N ids that is trained on the text."""
    eot: str | None = None
    """Token that ends a document; default: the one that the tokenizer names."""
    val_fraction: float | None = None
    """Validation fraction, above 0 and below 1; default: see below."""
    split: str | None = None
    """Split of a Hugging Face data set; default: train."""
    text_field: str | None = None
    """Field of the records that has the text; default: text."""
    group_by: str | None = None
    """Hold out whole groups for validation: top_folder, repo (a folder with .git) or field:NAME of the records."""
    dedup: str | None = None
    """Leave out copies of documents: exact, near (MinHash) or off; default: exact, for python_stdlib off."""
    shard_tokens: int | None = None
    """Tokens per shard; default: 100000000."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Type of the ids in token files without a header; default: uint16."""
    plan: bool = False
    """Say how many tokens, how much disk and how much time it would take, and write nothing."""
    overwrite: bool = False
    """Replace an existing data set."""
    verify: bool = False
    """Compare an existing data set with its checksums instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        GptperfError: the command line is wrong, or the data set cannot be prepared.
    """
    flags = parse(_PrepareFlags, argv, "gptperf.prepare", "Turn text into a data set of token shards.", _EXAMPLES)
    if flags.verify:
        _verify(flags)
        return 0
    if flags.what.startswith("bin:"):
        _convert(flags)
        return 0
    if flags.dtype is not None:
        raise DataError(f"--dtype: found {flags.dtype!r}, wanted none: {flags.what} is text, not bin:PATH")
    from gptperf.data.estimate import estimate
    from gptperf.data.job import Job
    from gptperf.data.prepare import prepare

    # SIGTERM ends the process with an exception, so that the writer removes its incomplete data set, or keeps what it
    # has saved for the next call.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    optional: dict[str, Any] = {} if flags.shard_tokens is None else {"shard_tokens": flags.shard_tokens}
    optional |= dict(
        data_dir=flags.data_dir,
        name=flags.name,
        tokenizer=flags.tokenizer,
        eot=flags.eot,
        val_fraction=flags.val_fraction,
        overwrite=flags.overwrite,
        split=flags.split,
        text_field=flags.text_field,
        group_by=flags.group_by,
        dedup=flags.dedup,
    )
    if flags.plan:
        print(estimate(Job(what=flags.what, **optional)))
    else:
        prepare(flags.what, **optional)
    return 0


def _convert(flags: _PrepareFlags) -> None:
    """Converts token files of another trainer."""
    from gptperf.data.foreign import convert

    used = ("name", "data_dir", "tokenizer", "eot", "dtype", "val_fraction", "shard_tokens", "overwrite")
    for field in fields(flags):
        found = getattr(flags, field.name)
        if field.name not in ("what", *used) and found != field.default:
            raise DataError(f"--{field.name}: found {found!r}, wanted none: {flags.what} has ids, no text")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = {name: getattr(flags, name) for name in used}
    convert(flags.what, **{name: value for name, value in given.items() if value is not None})


def _verify(flags: _PrepareFlags) -> None:
    """Compares the tokens of an existing data set with its checksums."""
    from gptperf.data.shards import resolve_dataset, verify

    path = resolve_dataset(flags.name or flags.what, flags.data_dir)
    print(f"{path}: {verify(path):,} tokens match their checksums")


if __name__ == "__main__":
    run_main(main)
