"""What is to be prepared, and how: the options of `prepare`, checked."""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

from gptperf.data import sources
from gptperf.data.dedup import Copies
from gptperf.data.find_source import Source, find_source
from gptperf.data.split import HashSplit
from gptperf.data.tokenizers import Tokenizer
from gptperf.data.writer import SHARD_TOKENS, ShardWriter
from gptperf.errors import DataError

__all__ = ["DEFAULT_VAL_FRACTION", "Job"]

DEFAULT_VAL_FRACTION = {"documents": 0.05, "tail": 0.1, "hub": 0.0005}
"""Kind of source -> default fraction. 5% of a few hundred documents are several documents; the other two are nanoGPT's
fractions for Shakespeare and OpenWebText."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The options of a preparation.

    Raises:
        DataError: An option is wrong, or belongs to another source; there is no such source, or it is no text.
    """

    what: str
    """A name of `KNOWN`, "hf:REPO[:CONFIG]", or the path of a file or a folder."""
    data_dir: str | os.PathLike[str] = "data"
    """Folder of data sets."""
    name: str | None = None
    """Name of the data set; None: derived from `what`."""
    tokenizer: str = "byte"
    """"train:N" for a BPE of N ids that is trained on the training split, or a name of `load_tokenizer`."""
    eot: str | None = None
    """Token of the tokenizer that ends a document; None: the one that it names itself."""
    val_fraction: float | None = None
    """Fraction of the validation split, above 0 and below 1; None: see `DEFAULT_VAL_FRACTION`."""
    overwrite: bool = False
    """Whether an existing data set is replaced."""
    shard_tokens: int = SHARD_TOKENS
    """Number of tokens in a full shard."""
    quiet: bool = False
    """Whether nothing is printed."""
    shakespeare_url: str = sources.SHAKESPEARE_URL
    """URL of "shakespeare"."""
    split: str | None = None
    """Split of a Hugging Face data set; None: "train"."""
    text_field: str | None = None
    """Field of structured text that has the text; None: "text"."""
    group_by: str | None = None
    """What is held out as a whole for validation: "top_folder", "repo" (a folder with .git) or "field:NAME"; None:
    single documents."""
    dedup: str | None = None
    """Whether copies of documents are left out: "exact", "near" or "off"; None: the default of the source."""

    def __post_init__(self) -> None:
        found, fraction = self.source, self.fraction
        self.copies()
        if self.split is not None and found.kind != "hub":
            raise DataError(f"--split: found {self.split!r}, wanted none: {self.what} is not a Hugging Face data set")
        if self.text_field is not None and not found.has_fields:
            raise DataError(f"--text_field: found {self.text_field!r}, wanted none: {self.what} has no fields")
        name = self.source.name if self.name is None else self.name
        if not _NAME.fullmatch(name):
            raise DataError(
                f"--name: found {name!r}, wanted a letter or digit, then at most 63 letters, digits, '.', '_' or '-'"
            )
        if not 0 < fraction < 1:
            raise DataError(
                f"--val_fraction: found {fraction}, wanted 0 < val_fraction < 1, as training needs a validation split; "
                f"nearest: --val_fraction={0.999 if fraction >= 1 else 0.001}"
            )

    @functools.cached_property
    def source(self) -> Source:
        """The source of the text."""
        split, field = self.split or "train", self.text_field or "text"
        return find_source(self.what, self.data_dir, self.shakespeare_url, split, field, self.group_by)

    @functools.cached_property
    def path(self) -> Path:
        """Folder of the data set."""
        return Path(self.data_dir, self.source.name if self.name is None else self.name)

    @property
    def fraction(self) -> float:
        """Fraction of the validation split."""
        return DEFAULT_VAL_FRACTION[self.source.kind] if self.val_fraction is None else self.val_fraction

    def copies(self) -> Copies:
        """Returns what finds copies of documents."""
        return Copies(self.source.dedup if self.dedup is None else self.dedup)

    def hash_split(self) -> HashSplit:
        """Returns what chooses the split of each document."""
        return HashSplit(self.fraction, grouped=self.group_by is not None)

    def writer(self, tokenizer: Tokenizer) -> ShardWriter:
        """Returns a writer of the data set, which goes on with the work of a killed one with the same options."""
        method = "the tail of the text"
        if self.source.kind != "tail":
            what = f"groups by {self.group_by}" if self.group_by else "documents"
            method = f"{what} whose SHA-256 falls below val_fraction"
        key: list[Any] = [self.what, self.source.source, tokenizer.fingerprint, self.fraction, self.shard_tokens]
        return ShardWriter(
            self.path,
            tokenizer=tokenizer,
            source=self.source.source,
            val_fraction=self.fraction,
            split_method=method,
            shard_tokens=self.shard_tokens,
            overwrite=self.overwrite,
            key=[*key, self.split, self.text_field, self.group_by, self.dedup],
        )
