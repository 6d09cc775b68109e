"""Who may import whom, and what no module does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("gptperf/**/*.py"), *ROOT.glob("bench/*.py")])
FILES = [f for f in FILES if "kernels" not in f.relative_to(ROOT).parts]

# Modules whose import must not load torch: they run before a configuration is known to be good.
WITHOUT_TORCH = [
    "cli",
    "config",
    "presets",
    "registry",
    "flops",
    "hardware",
    "profiling",
    "sizes",
    "vector",
    "flops_report",
    "gpus",
    "ceilings",
    "footprint",
    "roofline",
    "plan",
    "compare",
    "ranking",
    "runs",
    "overlay",
    "comparison_page",
    "ablate",
    "ablation",
    "ablation_report",
    "errors",
    "train",
    "sample",
    "prepare",
    "doctor",
    "monitor.schema",
    "monitor.trackers",
    "page",
    "report",
    "report_charts",
    "report_log",
    "report_sections",
]
# Module -> the gptperf modules that it may import, at any depth of the file.
ALLOWED = {
    "errors": set(),
    "presets": set(),
    "registry": {"errors"},
    "combinations": set(),
    "config": {"combinations", "errors", "presets", "registry"},
    "cli": {"combinations", "config", "errors", "presets", "registry"},
    "profiling": {"config", "flops"},
    "sizes": {"config"},
    "vector": {"config", "sizes"},
    "flops": {"config", "flops_report", "sizes", "vector"},
    "flops_report": {"cli", "config", "errors", "flops", "vector"},
    "gpus": set(),
    "hardware": {"ceilings", "errors", "gpus"},
    "ceilings": {"ceilings_cuda", "cli", "config", "disk", "errors", "flops", "hardware"},
    "ceilings_cuda": {"ceilings", "config", "errors", "hardware", "registry"},
    "footprint": {"config", "flops", "kernels.chunking"},
    "roofline": {"config", "flops", "footprint", "hardware"},
    "plan": {"cli", "config", "errors", "flops", "footprint", "hardware", "roofline"},
    "page": {"errors"},
    "report_log": {"errors", "monitor.events", "monitor.journal"},
    "report_charts": {"monitor.events", "page", "profiling", "report_log"},
    "report_sections": {"monitor.events", "page", "report_log"},
    "report": {"disk", "errors", "monitor.events", "page", "report_charts", "report_log", "report_sections"},
    "compare": {
        "cli",
        "config",
        "disk",
        "errors",
        "flops",
        "hardware",
        "comparison_page",
        "plan",
        "ranking",
        "registry",
        "runs",
    },
    "runs": {"errors", "monitor.journal"},
    "comparison_page": {"errors", "page"},
    "overlay": {"comparison_page", "page", "runs"},
    "ranking": {"overlay", "comparison_page", "runs"},
    "ablation": {"cli", "config", "errors", "flops", "monitor.journal", "runs"},
    "ablation_report": {"ablation", "overlay", "comparison_page", "page", "runs"},
    "ablate": {"ablation", "ablation_report", "comparison_page", "disk", "errors"},
    "model": {"config", "registry"},
    "parallel": {"errors", "watchdog"},
    "watchdog": {"errors"},
    "collectives": set(),
    "copy_engine": {"collectives", "errors", "parallel", "peer_memory"},
    "peer_memory": {"parallel"},
    "weights": {"collectives"},
    "sharded": {"collectives", "weights"},
    "peers": {"errors"},
    "saving": {"checkpoint", "errors", "peers"},
    "optim": {"config", "weights"},
    "build": {"config", "data", "errors", "model", "parallel", "registry"},
    "step": {
        "build",
        "config",
        "copy_engine",
        "model",
        "monitor.gradients",
        "optim",
        "parallel",
        "registry",
        "selftest",
        "sharded",
        "weights",
    },
    "selftest": {"config", "kernels", "registry"},
    "resume": {
        "checkpoint",
        "config",
        "data",
        "errors",
        "monitor.console",
        "optim",
        "parallel",
        "step",
        "tensorfile",
        "weights",
    },
    "checkpoint": {"disk", "errors", "manifest", "peers", "tensorfile"},
    "runtime": set(),
    "monitor.gradients": {"monitor.events"},
    "monitor.stability": {"monitor.events"},
    "monitor.blocks": set(),
    "monitor.console": {"monitor.blocks", "monitor.live"},
    "monitor.live": {"monitor.blocks"},
    "monitor.memory": set(),
    "monitor.events": set(),
    "monitor.trackers": {"config"},
    "monitor.schema": {"errors", "monitor.events"},
    "data.loader": {"data", "errors"},
}


def _imports(path: Path) -> set[str]:
    """gptperf modules that a file imports, without the leading name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "gptperf" else [f"gptperf.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.removeprefix("gptperf.") for name in names if name.startswith(("gptperf.", "bench"))}
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("gptperf.")


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_are_those_of_the_table(module: str) -> None:
    extra = {
        name
        for name in _imports(ROOT / "gptperf" / (module.replace(".", "/") + ".py"))
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED[module])
    }
    assert not extra


def test_nobody_imports_the_commands_or_the_bench() -> None:
    for path in FILES:
        importers = _imports(path)
        assert not {name for name in importers if name.startswith("bench")} or path.parent.name == "bench"
        if path.name not in ("train.py",):
            assert "trainer" not in importers
        assert "train" not in importers


def test_modules_before_the_configuration_load_no_torch() -> None:
    code = f"import sys\nfor m in {WITHOUT_TORCH}: __import__('gptperf.' + m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_kernels_import_torch_and_triton_only() -> None:
    """And one another; the reference and the checks of arguments do without Triton, which is not everywhere."""
    standard = {"math", "collections", "functools", "typing", "warnings"}
    for path in ROOT.glob("kernels/*.py"):
        everywhere = path.name in ("reference.py", "arguments.py")
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
    for path in FILES:
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
        inside = {id(n) for f in functions for n in ast.walk(f)}
        for node in ast.walk(tree):
            if id(node) in inside or not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node)
            assert not text.startswith(("os.environ", "os.getenv", "torch.cuda")), f"{path.name}:{node.lineno}: {text}"


def test_files_and_functions_stay_short() -> None:
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"


def test_source_is_ascii() -> None:
    for path in [*FILES, *ROOT.glob("kernels/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("configs/*.toml")]:
        assert path.read_bytes().isascii(), path.name
