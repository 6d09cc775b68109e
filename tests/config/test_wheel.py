"""The wheel that a user installs, built from the source tree and from the sdist, and used in another folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("gptperf", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")
PIP = ["-m", "pip", "--disable-pip-version-check", "--no-input"]
WITHOUT_TRITON = ("gptperf.kernels.reference", "gptperf.kernels.checks")

pytestmark = pytest.mark.slow


def _run(folder: Path, *arguments: str, path: Path | None = None) -> str:
    """Returns the output of a Python command that runs in `folder`, with only `path` added to the import path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wheel(source: Path, folder: Path) -> Path:
    folder.mkdir()
    _run(folder, *PIP, "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder), str(source))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that the build neither leaves a folder in the checkout nor reads one there."""
    folder = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the checkout."""
    return _wheel(tree, tmp_path_factory.mktemp("direct") / "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    _run(folder, *PIP, "install", "-q", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel))
    return folder / "site"


def _contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    """Modules, kernels, configurations, templates and py.typed: whatever lies in the folders, but for pages."""
    files = [path for path in (ROOT / "gptperf").rglob("*") if path.is_file()]
    files += [path for link in ("kernels", "configs") for path in (ROOT / "gptperf" / link).rglob("*")]
    expected = {str(path.relative_to(ROOT)) for path in files if path.is_file() and "__pycache__" not in path.parts}
    expected -= {"gptperf/OVERVIEW.md", "gptperf/GUIDE.md"}
    assert _contents(wheel) == expected
    for name in ("configs/tiny.toml", "kernels/rope.py", "report/templates/page.html.j2", "py.typed"):
        assert f"gptperf/{name}" in expected


def test_the_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    build = "import sys\nfrom setuptools import build_meta\nbuild_meta.build_sdist(sys.argv[1])"
    _run(tree, "-c", build, str(tmp_path))
    from_sdist = _wheel(next(tmp_path.glob("*.tar.gz")), tmp_path / "wheel")
    assert _contents(from_sdist) == _contents(wheel)


def test_a_shipped_configuration_is_found_by_the_installed_command(installed: Path, tmp_path: Path) -> None:
    shown = _run(tmp_path, "-m", "gptperf.train", "llama_124m", "--show_config", path=installed)
    assert 'arch_preset = "llama"' in shown
    assert "# preset llama (llama_124m)" in shown


def test_the_console_script_lists_the_commands(installed: Path, tmp_path: Path) -> None:
    assert "hugging_face" in _run(tmp_path, str(installed / "bin" / "gptperf"), path=installed)


def test_every_installed_module_can_be_imported(installed: Path, tmp_path: Path) -> None:
    names = [
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((installed / "gptperf").rglob("*.py"))
    ]
    if importlib.util.find_spec("transformers") is None:
        names.remove("gptperf.hugging_face.modeling_gptperf")  # the class of exported models
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if not name.startswith("gptperf.kernels.") or name in WITHOUT_TRITON]
    code = (
        f"import importlib\nfor name in {names}:\n    file = importlib.import_module(name).__file__\n"
        f"    assert file.startswith({str(installed)!r}), file"
    )
    _run(tmp_path, "-c", code, path=installed)


@pytest.mark.parametrize("name", ["kernels", "configs"])
def test_a_checkout_finds_the_folders_of_the_root_by_relative_links(name: str) -> None:
    assert (ROOT / "gptperf" / name).readlink() == Path("..") / name
