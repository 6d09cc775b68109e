"""Machines whose compiler or whose cache folders are broken, and runs that never need the compiler."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_helpers import run, run_command, run_log

from gptperf import registry
from gptperf.config import command_line
from gptperf.errors import DeviceError
from gptperf.hardware.compiler import compiler_problem
from gptperf.ops import ALL_TRITON
from gptperf.training import build, engine
from gptperf.training.build import compiler_errors

BROKEN = {
    "CXX": shutil.which("false") or "/bin/false",  # a compiler that is there and does not compile
    "TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache",
    "TRITON_CACHE_DIR": "/dev/null/cache",
    "TMPDIR": "",
}


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Breaks one thing, and returns what a message must name."""
    if request.param == "TMPDIR":  # the cache folder in it belongs to nobody who could write it
        import tempfile

        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr("getpass.getuser", lambda: "me")
        (tmp_path / "tmp" / "torchinductor_me").write_text("not a folder")
    else:
        monkeypatch.setenv(request.param, BROKEN[request.param])
    return BROKEN[request.param] if request.param == "CXX" else request.param


def test_a_run_says_why_it_does_not_compile(broken: str, corpus: Path, tmp_path: Path) -> None:
    """Exit code 0 where a file or the default asks for the compiler."""
    (tmp_path / "compiled.toml").write_text("[system]\ncompile = true\n")
    assert run(corpus, tmp_path / "run", str(tmp_path / "compiled.toml"), "--max_iters=1", "--warmup_iters=0") == 0
    said = run_log(tmp_path / "run")["startup_info"]["compile"]
    assert said.startswith("off: ")
    assert broken in said


def test_a_flag_that_cannot_be_honoured_is_refused(broken: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"compile = True: .*--compile=False runs without it") as error:
        run(corpus, tmp_path / "run", "--max_iters=1", "--warmup_iters=0", "--compile=True")
    assert broken in str(error.value)
    assert error.value.exit_code == 6


@pytest.mark.parametrize(
    ("flags", "compiles"),
    [
        ([], False),
        (["--compile=True"], True),
        (["--compile=False", "--kernels=eager"], False),
        (["--kernels=eager"], True),
        (["--device=cpu"], True),
        (["--compile_scope=model"], True),
        (["--recompute=selective"], True),
        (["--matmul_dtype=fp8"], False),
    ],
)
def test_by_default_what_gains_is_compiled(flags: list[str], compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model unless each op is one Triton kernel, which the self-test may change; the update in any case."""
    config = command_line.resolve(flags).config
    assert config.system.compiles is compiles
    called: list[str] = []
    monkeypatch.setattr(build, "compile_model", lambda model, system: called.append("model") or system.compile_scope)
    monkeypatch.setattr(engine, "compiler_problem", lambda device_type: None)
    process = SimpleNamespace(device=torch.device("cuda"), merged=lambda found: found)
    optimizer = SimpleNamespace(compile=lambda: called.append("update"))
    for rope, whole in (("triton", compiles), ("eager", config.system.compile is not False)):
        ops = SimpleNamespace(chosen={"swiglu": "triton", "rope": rope})
        given: Any = SimpleNamespace(config=config, process=process, optimizer=optimizer, ops=ops, model=None)
        called.clear()
        said = engine.compile_engine(given)
        if config.system.compile is False:
            assert (said, called) == ("off", [])
        elif whole:
            assert (said, called) == (config.system.compile_scope, ["update", "model"])
        else:
            assert (said, called) == (ALL_TRITON, ["update"])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("attention_backend", "manual"), ("activation", "cube"), ("ffn_type", "gated"), ("normalization", "centred")],
)
def test_components_in_several_ops_of_pytorch_are_compiled_by_default(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of plugins, which have no Triton kernel in gptperf, and manual attention."""
    monkeypatch.setattr(registry, "_components", dict(registry._components))
    if name not in registry.KINDS[kind]:
        registry.register(kind, name, torch.nn.Identity)
    monkeypatch.setattr(build, "compile_model", lambda model, system: system.compile_scope)
    monkeypatch.setattr(engine, "compiler_problem", lambda device_type: None)
    process = SimpleNamespace(device=torch.device("cuda"), merged=lambda found: found)
    ops = SimpleNamespace(chosen={"swiglu": "triton"})
    said = []
    for flags in ([f"--{kind}={name}"], [f"--{kind}={name}", "--compile=False"], []):
        config, optimizer = command_line.resolve(flags).config, SimpleNamespace(compile=lambda: None)
        given: Any = SimpleNamespace(config=config, process=process, optimizer=optimizer, ops=ops, model=None)
        said.append(engine.compile_engine(given))
    assert said == ["block", "off", ALL_TRITON]


def test_a_compiler_without_python_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    assert compiler_problem("cpu") is None
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in (compiler_problem("cpu") or "")


@pytest.mark.slow
def test_errors_of_the_compiler_are_one_line_and_others_pass() -> None:
    """At the first step, which calls the compiler."""

    def no_backend(graph: object, inputs: object) -> None:
        raise OSError("no space left in the cache\nand many more lines")

    failed = pytest.raises(DeviceError, match=r"torch\.compile failed \(BackendCompilerFailed: .*--compile=False")
    with failed as error, compiler_errors():
        torch.compile(lambda x: x + 1, backend=no_backend)(torch.ones(2))
    assert "\n" not in str(error.value)

    def wrong(x: torch.Tensor) -> torch.Tensor:
        raise FileNotFoundError("of the model's own code")

    for given in (wrong, torch.compiler.disable(wrong)):
        with pytest.raises(FileNotFoundError), compiler_errors():
            given(torch.ones(2))
    with pytest.raises(RuntimeError, match="CUDA error"), compiler_errors():
        raise RuntimeError("CUDA error")


@pytest.mark.slow
def test_an_eager_run_never_loads_the_compiler(corpus: Path, tmp_path: Path) -> None:
    """Its import takes seconds, and fails where its cache folder cannot be made."""
    command = run_command(corpus, tmp_path / "run", "--max_iters=2", "--warmup_iters=0")
    code = f"""
import os, sys
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = os.environ["HOME"] = "/dev/null/none"
from gptperf.train import main
assert main({command[3:]}) == 0
from gptperf import api
api.generate(api.load_model({str(tmp_path / "run")!r}, device="cpu"), "ab", tokens=2)
sys.exit(", ".join(name for name in sys.modules if name in ("torch._dynamo", "torch._inductor")) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
