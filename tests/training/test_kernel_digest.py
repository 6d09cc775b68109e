"""The digest of the kernels' code changes with code that could change a bit, and with nothing else."""

import re
from pathlib import Path

import pytest

from gptperf.training.kernel_digest import digest_of, kernel_digest

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the kernels, whose digest is that of the package."""
    for path in KERNELS.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    assert digest_of(tmp_path) == kernel_digest()
    return tmp_path


def _edit(path: Path, pattern: str, replacement: str) -> None:
    """Replaces the first match; it is an error if there is none."""
    text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE | re.DOTALL)
    assert count == 1, pattern
    path.write_text(text)


def test_it_is_short_hexadecimal() -> None:
    assert re.fullmatch("[0-9a-f]{12}", kernel_digest())


def test_renamed_files_and_their_imports_keep_it(copied: Path) -> None:
    before = digest_of(copied)
    for path in sorted(copied.glob("*.py")):
        path.write_text(path.read_text().replace("gptperf.kernels.launch import", "gptperf.kernels.operator import"))
    (copied / "launch.py").rename(copied / "operator.py")
    (copied / "norm.py").rename(copied / "a_norm.py")
    assert digest_of(copied) == before


def test_docstrings_comments_blank_lines_and_spacing_keep_it(copied: Path) -> None:
    before = digest_of(copied)
    _edit(copied / "norm.py", r'\A"""', '"""Another first line.\n\n')
    _edit(copied / "norm.py", r'^SHARED_BYTES = (\d+)\n"""', r'SHARED_BYTES  =  \1  # of a program\n"""Another. ')
    _edit(copied / "activation.py", r'^(def swiglu\(.*?""").*?"""', r'\1Another docstring."""\n\n    # a comment\n')
    _edit(copied / "rms_norm.py", r"^__all__ = .*?$", '__all__ = ["other"]')
    _edit(copied / "rope.py", r"^import math$", "import math\nimport sys")
    _edit(copied / "checks.py", r"wanted", "asked for")
    assert digest_of(copied) == before


def test_definitions_in_another_order_or_file_keep_it(copied: Path) -> None:
    before = digest_of(copied)
    text = (copied / "launch.py").read_text()
    start, end = text.index("def ceil_div"), text.index("def power_of_2")
    (copied / "launch.py").write_text(text[:start] + text[end:])
    (copied / "division.py").write_text("import math\n\n\n" + text[start:end])
    assert digest_of(copied) == before


@pytest.mark.parametrize(
    ("name", "pattern", "replacement"),
    [
        ("norm.py", r"^MAX_N = 16384", "MAX_N = 8192"),
        ("norm.py", r"2048, 2, 396, 4", "2048, 2, 264, 4"),
        ("norm.py", r"dx = g - h \*", "dx = g + h *"),
        ("activation.py", r"y = x \* tl.sigmoid", "y = x / tl.sigmoid"),
        ("activation.py", r"^@triton.jit\n", ""),
        ("rope.py", r'"num_warps": 1', '"num_warps": 2'),
        ("rope.py", r"^    _store_pairs\(DQKV", "        _store_pairs(DQKV"),
        ("linear.py", r"return dy @ weight", "return dy.float() @ weight.float()"),
        ("adamw.py", r"- lr \* weight_decay", "- (lr * weight_decay)"),
    ],
)
def test_a_change_of_code_changes_it(copied: Path, name: str, pattern: str, replacement: str) -> None:
    before = digest_of(copied)
    _edit(copied / name, pattern, replacement)
    assert digest_of(copied) != before
