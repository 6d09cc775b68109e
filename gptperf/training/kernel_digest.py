"""The digest of the code in `gptperf.kernels` that computes, which a checkpoint records.

Two versions of a kernel may add in different orders, so a resumed run warns when this code has changed. The digest
ignores everything that cannot change a bit of a result: the name of a file, the order of its definitions, imports,
`__all__`, docstrings, comments, blank lines, spacing within a line, and `checks.py`, which only refuses arguments. It
hashes the text of the source instead of the syntax tree of one Python version, so every version of Python gives the
same digest.
"""

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

__all__ = ["digest_of", "kernel_digest"]


class _Line(NamedTuple):
    """A logical line: a simple statement, or the head of a compound statement."""

    row: int
    """Number of its first physical line, from 1."""
    text: str
    """One space for each level of indentation, then the source without white space and comments."""


@functools.cache
def kernel_digest() -> str:
    """Returns 12 hexadecimal digits for the code of `gptperf.kernels` that computes, which is read once per process."""
    return digest_of(resources.files("gptperf.kernels"))


def digest_of(folder: Traversable) -> str:
    """Returns the digest of the files of a folder."""
    found: list[str] = []
    for path in folder.iterdir():
        if path.name.endswith(".py") and path.name != "checks.py":
            found += _definitions(path.read_text(encoding="utf-8"))
    return hashlib.sha256("\n\n".join(sorted(found)).encode()).hexdigest()[:12]


def _definitions(source: str) -> Iterator[str]:
    """Yields the text of every top-level statement that computes, decorators included."""
    tree = ast.parse(source)
    left_out = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt) and _computes_nothing(node)}
    lines = [line for line in _logical_lines(source) if line.row not in left_out]
    for statement in tree.body:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        last = statement.end_lineno or first
        text = "\n".join(line.text for line in lines if first <= line.row <= last)
        if text:
            yield text


def _computes_nothing(node: ast.stmt) -> bool:
    """Returns whether a statement is an import, a docstring (of a constant too) or `__all__`."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
    return isinstance(node, ast.Import | ast.ImportFrom)


def _logical_lines(source: str) -> Iterator[_Line]:
    physical = source.splitlines()
    depth, first = 0, 0
    comments: dict[int, int] = {}  # row -> column where the comment begins
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            comments[row] = column
        elif token.type in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if token.type == tokenize.INDENT else -1
        elif token.type == tokenize.NEWLINE:
            parts = (physical[i - 1][: comments.get(i)] for i in range(first, row + 1))
            yield _Line(first, " " * depth + "".join("".join(part.split()) for part in parts))
            first = 0
        elif token.type != tokenize.NL:
            first = first or row
