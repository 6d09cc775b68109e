"""Files, modules and links that the pages name exist, and the plugin example of the overview works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "gptperf", "configs", "configs/speedrun", "bench", "tests")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))


def _anchors(text: str) -> set[str]:
    """The anchors of the headings, as Markdown viewers name them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    """A path in backticks is relative to the root, to gptperf/, or to the folder of the page."""
    text = page.read_text()
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|toml|md|sh|j2))`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "gptperf", page.parent)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_that_a_page_names_is_there(page: Path) -> None:
    for name in re.findall(r"-m (gptperf[\w.]*|bench[\w.]*)", page.read_text()):
        path = ROOT / name.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists() or name == "gptperf", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path.read_text()), target


@pytest.mark.parametrize("page", ["README.md", "gptperf/GUIDE.md"])
def test_lines_of_code_fit_on_a_page(page: str) -> None:
    """A page of 1012 pixels shows 110 columns of code; the rest of a longer line would be hidden."""
    for block in re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        assert max(map(len, block.splitlines())) <= 110, max(block.splitlines(), key=len)


def test_the_page_about_testing_names_every_test_file() -> None:
    page = (ROOT / "tests" / "TESTING.md").read_text()
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert f"`{path.relative_to(ROOT / 'tests')}`" in page, path


def test_a_rate_is_written_with_per() -> None:
    """Messages, labels and pages have one form of a rate: "ms per iteration", not "ms an iteration"."""
    units = "ms|us|[GMT]?FLOPs?|[GMk]B|nats|bits|bytes|tokens|seconds|calls"
    other = re.compile(rf"\b(?:{units}) (?:an?|each) (?:iteration|step|token|byte|run|parameter|micro-batch|GPU)\b")
    sources = [path for folder in ("gptperf", "bench", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    for path in (*PAGES, *sources):
        assert not other.findall(path.read_text()), path


def test_the_tree_of_the_overview_is_that_of_the_package() -> None:
    tree = (ROOT / "gptperf" / "OVERVIEW.md").read_text().split("```")[1]
    for path in (ROOT / "gptperf").iterdir():
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").exists():
            assert re.search(rf"^  .*\b{path.name}(/|\b)", tree, re.MULTILINE), path.name


def test_the_plugin_of_the_overview_trains_and_has_a_plan(tmp_path: Path) -> None:
    page = (ROOT / "gptperf" / "OVERVIEW.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    (tmp_path / "my_parts.py").write_text(code)
    program = """
from gptperf import flops
from gptperf.config import command_line
from gptperf.model import GPT
from gptperf.plan import find_gpu, plan

config = command_line.resolve(["tiny", "--plugins=my_parts", "--normalization=clipped"]).config
model = GPT(config.model)
assert type(model.norm).__name__ == "ClippedNorm"
assert flops.parameters(config.model).total == sum(p.numel() for p in model.parameters())
print(plan(config, find_gpu("H200")).mfu)
"""
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1
