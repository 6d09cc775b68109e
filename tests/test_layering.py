"""Rules for the whole project: which package may import which, and things that no module may do."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for path in sorted((ROOT / "gptperf").rglob("*.py")) if "kernels" not in path.relative_to(ROOT).parts]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
BENCH = sorted((ROOT / "bench").rglob("*.py"))

LAYERS = """
errors cards formats
files registry kernels
config ops
flops data model distributed
hardware checkpoint tasks
plan monitor
report
compare
experiment
ablate
training
api
prepare hugging_face doctor seen race
sample evaluate
train
__main__
"""
"""Packages, the lowest first. A module imports its own package and packages on the lines before it, nothing else."""

WITHOUT_TORCH = [
    "__main__ errors cards files formats registry ops config config.command_line api train sample prepare doctor",
    "flops flops.__main__ hardware hardware.__main__ hardware.ceiling_cache hardware.measure plan plan.__main__",
    "monitor.waterfall monitor.step_timing monitor.trace monitor.schema monitor.trackers monitor.runs monitor.run_log",
    "report.__main__ compare.__main__ ablate.__main__ experiment.runner race.__main__ seen.__main__",
    "evaluate.__main__ tasks",
]
"""Modules whose import loads no torch: they run before a configuration is known to be good, or without a GPU."""


def _module(path: Path) -> str:
    """Returns the dotted name under which a file is imported; `kernels/` is `gptperf.kernels`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("gptperf", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in (*FILES, *KERNELS, *BENCH)}


def _named(path: Path) -> Iterator[str]:
    """Yields every module that a file imports at any depth: by a statement, by `import_module` or from a table."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from _texts(node.args[:1])
        elif isinstance(node, ast.Dict):  # a table of modules that are imported by name
            yield from (text for text in _texts(node.values) if text in MODULES)


def _texts(nodes: Iterable[ast.expr | None]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _ours(path: Path) -> set[str]:
    return {name for name in _named(path) if name in MODULES and name != _module(path)}


def _package(module: str) -> str:
    return module.removeprefix("gptperf").removeprefix(".").partition(".")[0]


def test_imports_go_down_the_layers() -> None:
    lines = LAYERS.split("\n")[1:-1]
    floor = {package: number for number, line in enumerate(lines) for package in line.split()}
    for path in FILES:
        own = _package(_module(path))
        if not own:
            continue
        for name in _ours(path) - {"gptperf"}:
            other = _package(name)
            assert other == own or floor[other] < floor[own], f"{_module(path)} imports {name}"
    assert {_package(_module(path)) for path in (*FILES, *KERNELS)} - {""} == set(floor)


def test_no_imports_run_in_a_circle() -> None:
    graph = {_module(path): _ours(path) for path in (*FILES, *KERNELS, *BENCH)}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_nobody_imports_the_bench_or_a_command() -> None:
    """A `__main__.py` parses and prints; what it prints comes from modules that others can import."""
    for path in (*FILES, *BENCH):
        if path in FILES:
            assert not [name for name in _named(path) if name.partition(".")[0] == "bench"], path
        assert not [name for name in _named(path) if name.endswith("__main__")], path


def test_modules_before_the_configuration_load_no_torch() -> None:
    modules = [f"gptperf.{name}" for line in WITHOUT_TORCH for name in line.split()]
    code = f"import sys\nfor m in {modules}: __import__(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_kernels_import_torch_and_triton_only() -> None:
    """And one another; the reference, its products and the checks run without Triton, which is not everywhere."""
    standard = {"collections", "concurrent", "contextlib", "contextvars", "functools", "importlib", "math", "typing"}
    standard |= {"warnings"}
    for path in KERNELS:
        everywhere = path.name in ("reference.py", "attention_reference.py", "checks.py", "linear.py")
        tree = ast.parse(path.read_text())
        for node in tree.body if everywhere else ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.startswith("gptperf.kernels") or name.partition(".")[0] in standard | {"torch", "triton"}
                assert not everywhere or not name.startswith("triton"), f"{path.name}: {name}"


def test_kernels_have_one_import_name() -> None:
    link = ROOT / "gptperf" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_looks_at_the_machine_at_import() -> None:
    """No module reads the environment or touches CUDA outside a function."""
    for path in (*FILES, *BENCH):
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
        inside = {id(n) for f in functions for n in ast.walk(f)}
        for node in ast.walk(tree):
            if id(node) in inside or not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node)
            assert not text.startswith(("os.environ", "os.getenv", "torch.cuda")), f"{path.name}:{node.lineno}: {text}"


def test_files_and_functions_stay_short() -> None:
    for path in (*FILES, *KERNELS, *BENCH, *sorted((ROOT / "tests").rglob("*.py"))):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_the_root_of_the_package_has_few_files() -> None:
    assert len(list((ROOT / "gptperf").glob("*.py"))) <= 13


@pytest.mark.parametrize(
    "pattern", ["gptperf/**/*.py", "kernels/*.py", "bench/**/*.py", "tests/**/*.py", "configs/*.toml"]
)
def test_source_is_ascii(pattern: str) -> None:
    for path in ROOT.glob(pattern):
        assert path.read_bytes().isascii(), path.name
