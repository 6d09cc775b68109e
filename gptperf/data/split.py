"""Chooses the split of each document.

A document belongs to the validation split if the first 64 bits of the SHA-256 of its text, or of the name of its group,
divided by 2**64, are below `val_fraction`. So the split does not depend on the order of the files or on a random state,
and copies of a document, or the documents of a group, are always in the same split. A single text is split at its tail.
"""

import hashlib
import math
from collections.abc import Iterator

from gptperf.data.text import Document
from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["HashSplit", "tail_pieces"]


class HashSplit:
    """Splits documents by the hash of their text or of their group.

    Args:
        fraction: Fraction of the validation split, above 0 and below 1.
        grouped: Whether whole groups are held out.
    """

    def __init__(self, fraction: float, *, grouped: bool) -> None:
        self._fraction = fraction
        self._grouped = grouped
        self._low, self._high = 1.0, 0.0
        self.documents = 0

    def of(self, document: Document) -> str:
        """Returns "train" or "val"."""
        group = document.origin.group.encode("utf-8", errors="replace")
        digest = hashlib.sha256(group).digest() if self._grouped else document.digest
        position = int.from_bytes(digest[:8], "big") / 2**64
        self.documents += 1
        self._low, self._high = min(self._low, position), max(self._high, position)
        return "val" if position < self._fraction else "train"

    def check(self) -> None:
        """Checks that both splits have documents.

        Raises:
            DataError: One has none.
        """
        low, high, fraction, count = self._low, self._high, self._fraction, self.documents
        if low < fraction <= high:
            return
        single = "give the text as a single .txt file, whose tail is the validation split"
        if self._grouped:
            single = "leave --group_by out"
        if low == high:
            found = "1 document" if count == 1 else f"{count:,} copies of one document"
            found = f"{counted(count, 'document')} of one group" if self._grouped else found
            raise DataError(
                f"prepare: found {found}, wanted at least two, one for training and one for validation; {single}"
            )
        empty = "training" if high < fraction else "validation"
        near = _between(low, high, nearer_low=fraction <= low)
        raise DataError(
            f"prepare: the {empty} split of {counted(count, 'document')} is empty at --val_fraction={fraction:g}, "
            f"wanted at least one {'group' if self._grouped else 'document'} in each; "
            f"--val_fraction={near} puts one there, or {single}"
        )


def _between(low: float, high: float, *, nearer_low: bool) -> str:
    """Returns a number with few digits that is above `low` and not above `high`, next to one of them."""
    for digits in range(3, 18):
        scale = 10**digits
        near = math.floor(low * scale) + 1 if nearer_low else math.floor(high * scale)
        text = f"{near / scale:.{digits}f}"
        if low < float(text) <= high:
            return text
    return repr(high)


def tail_pieces(document: Document, fraction: float) -> Iterator[tuple[str, bytes]]:
    """Yields the pieces of a single text with their split; the cut is before the character that holds its offset.

    Args:
        document: The text, of at least two characters.
        fraction: Fraction of the validation split, of the bytes.

    Raises:
        DataError: The text has one character.
    """
    # nanoGPT cuts at int(n * 0.9) characters; this is the same place for ASCII, where a character is a byte.
    cut = max(1, min(document.size - 1, int(document.size * (1 - fraction))))
    done = 0
    for piece in document.pieces:
        at = cut - done
        if 0 <= at < len(piece):
            while at and piece[at] & 0xC0 == 0x80:
                at -= 1
            if done + at == 0:  # the first character is training's
                at = next((i for i in range(1, len(piece)) if piece[i] & 0xC0 != 0x80), len(piece))
            if done + at >= document.size:
                raise DataError(
                    f"{document.origin.source}: found 1 character, wanted at least 2: a part to train on, "
                    "and a part to validate on"
                )
            if at:
                yield "train", piece[:at]
            yield "val", piece[at:]
        else:
            yield ("train" if at > 0 else "val"), piece
        done += len(piece)
