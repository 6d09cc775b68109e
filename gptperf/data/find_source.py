"""Finds the source of text that the user named, and the groups of its documents."""

import contextlib
import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gptperf.data import sources
from gptperf.data.readers import STRUCTURED, Meter, suffixes_of
from gptperf.data.sources import KNOWN
from gptperf.data.text import Document, Refused, Skipped
from gptperf.data.walk import Fields, file_documents, files_below, folder_documents
from gptperf.errors import DataError

__all__ = ["Source", "find_source"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A source of text."""

    name: str
    """Default name of the data set."""
    source: str
    """Description for the manifest."""
    documents: Callable[[Skipped, Meter], Iterator[Document]]
    """Yields the documents, counts what is not read, and the bytes on disk that are."""
    files: Callable[[], list[Path]] | None = None
    """Returns the files that are read; None: they are elsewhere."""
    kind: str = "documents"
    """"documents", "tail" for a single text, which is split at its tail, or "hub"."""
    has_fields: bool = False
    """Whether a document may be one field of a record."""
    dedup: str = "exact"
    """Default of `--dedup`."""

    @functools.cached_property
    def total_bytes(self) -> int | None:
        """Bytes on disk, or None if they are elsewhere."""
        if self.files is None:
            return None
        total = 0
        for path in self.files():
            with contextlib.suppress(OSError):  # counted as unreadable when it is read
                total += os.stat(path).st_size
        return total


def find_source(
    what: str,
    data_dir: str | os.PathLike[str],
    shakespeare_url: str = sources.SHAKESPEARE_URL,
    split: str = "train",
    field: str = "text",
    group_by: str | None = None,
) -> Source:
    """Returns the source that `what` names; the arguments are those of `prepare`.

    Raises:
        DataError: There is none, it is no text, or it has no groups of the kind `group_by`.
    """
    group = None if group_by is None or not group_by.startswith("field:") else group_by.removeprefix("field:")
    if group_by not in (None, "top_folder", "repo") and not group:
        raise DataError(f"--group_by: found {group_by!r}, wanted top_folder, repo or field:NAME")
    fields = Fields(field, group)
    if what == "python_stdlib":
        # Its copies, two small files, stay: recorded losses of this data set refer to them.
        found = Source(
            name=what,
            source=f"standard library of {sources.python_version()}",
            documents=functools.partial(sources.python_stdlib, group=_group_of(sources.stdlib_folder(), group_by)),
            files=lambda: sources.python_stdlib_files(Skipped()),
            dedup="off",
        )
    elif what == "shakespeare":
        path = functools.cache(lambda: sources.download_shakespeare(shakespeare_url, data_dir))
        found = Source(
            name=what,
            source=shakespeare_url,
            documents=lambda skipped, meter: _file_documents(path(), fields, skipped, meter),
            files=lambda: [path()],
            kind="tail",
        )
    elif what in sources.HUGGING_FACE or what.startswith("hf:"):
        found = _hub(what, split, fields)
    elif os.path.isdir(what):
        found = _folder(Path(what), Path(data_dir), fields, group_by)
    elif os.path.isfile(what):
        found = _file(Path(what), fields)
    else:
        near = difflib.get_close_matches(what, KNOWN, n=1, cutoff=0.4)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise DataError(f"prepare: found {what!r}, wanted a file, a folder, hf:REPO or one of {', '.join(KNOWN)}{hint}")
    has_folders = what == "python_stdlib" or os.path.isdir(what)
    if group_by is not None and not (found.has_fields if group else has_folders):
        wanted = "field:NAME" if found.has_fields else "top_folder" if has_folders else "none"
        raise DataError(f"--group_by: found {group_by!r}, wanted {wanted}: {what} has no such groups")
    return found


def _hub(what: str, split: str, fields: Fields) -> Source:
    repo, config = sources.HUGGING_FACE.get(what) or sources.parse_hub_name(what)
    return Source(
        name=what if what in sources.HUGGING_FACE else repo.rpartition("/")[2],
        source=", ".join(filter(None, (f"Hugging Face {repo}", config, "" if split == "train" else split))),
        documents=lambda skipped, meter: sources.hub_documents(repo, config, split, fields, skipped),
        kind="hub",
        has_fields=True,
    )


def _folder(path: Path, data_dir: Path, fields: Fields, group_by: str | None) -> Source:
    return Source(
        name=path.resolve().name,
        source=f"folder {path.name}",
        documents=lambda skipped, meter: folder_documents(
            path, fields, skipped, data_dir, meter, _group_of(path, group_by)
        ),
        files=lambda: files_below(path, Skipped(), without=data_dir),
        has_fields=True,
    )


def _file(path: Path, fields: Fields) -> Source:
    try:
        other = sources.not_text(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if other is not None:
        raise DataError(other)
    structured = suffixes_of(path)[0] in STRUCTURED
    name = path.name
    for suffix in reversed(suffixes_of(path)):
        if suffix and name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return Source(
        name=name if structured or suffixes_of(path)[1] else path.stem,
        source=f"file {path.name}",
        documents=lambda skipped, meter: _file_documents(path, fields, skipped, meter),
        files=lambda: [path],
        kind="documents" if structured else "tail",
        has_fields=structured,
    )


def _file_documents(path: Path, fields: Fields, skipped: Skipped, meter: Meter) -> Iterator[Document]:
    try:
        yield from file_documents(path, path.name, fields, skipped, meter=meter)
    except Refused as refused:
        raise sources.refusal(path, refused) from refused
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _group_of(root: Path, group_by: str | None) -> Callable[[Path], str]:
    """Returns the function from a file below `root` to its group."""

    def top_folder(path: Path) -> str:
        return path.relative_to(root).parts[0]

    @functools.cache
    def repo_of(folder: Path) -> str | None:
        if (folder / ".git").exists():
            return folder.relative_to(root).as_posix()
        return repo_of(folder.parent) if folder != root else None

    if group_by is None:
        return lambda path: ""
    if group_by == "top_folder":
        return top_folder
    if group_by == "repo":
        return lambda path: repo_of(path.parent) or top_folder(path)
    return lambda path: path.relative_to(root).as_posix()  # a text has no fields: it is a group of its own
