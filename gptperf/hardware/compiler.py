"""Finds out, before torch.compile is called, whether this machine has what it needs. Loads no torch."""

import getpass
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

__all__ = ["cache_problem", "compiler_problem"]

_TRIAL = "#include <Python.h>\n#include <omp.h>\n"
"""What every kernel that torch.compile makes for a CPU includes."""
_TIMEOUT_S = 60


def compiler_problem(device_type: str) -> str | None:
    """Returns why torch.compile cannot work on a device of this type, "cuda" or "cpu", or None if nothing speaks
    against it. It does not load the compiler, whose import alone fails where its cache cannot be written."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs the package triton on a GPU"
    return cache_problem() or (_cxx_problem() if device_type == "cpu" else None)


def cache_problem() -> str | None:
    """Returns which of the compiler's cache folders cannot be written and why, or None."""
    folders = {
        name: os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR") if os.environ.get(name)
    }
    name = "TMPDIR"
    try:
        if "TORCHINDUCTOR_CACHE_DIR" not in folders:  # PyTorch's default, which another user may have made
            folders[name] = os.path.join(tempfile.gettempdir(), f"torchinductor_{_user()}")
        for name in folders:
            _try_to_write(Path(folders[name]))
    except OSError as error:
        return f"the compiler's cache cannot be written ({error}); set {name} to a folder that can be"
    return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a process whose number of user has no name
        return f"uid_{os.getuid()}"


def _try_to_write(folder: Path) -> None:
    """Makes a folder, as the compiler would, and a file in it, which is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")


def _cxx_problem() -> str | None:
    """Returns why the C++ compiler cannot make a kernel, or None."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler on a CPU, and {compiler} is not on the path"
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = ["-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_path('include')}", "-o", f"{folder}/trial.so"]
            done = subprocess.run(
                [compiler, "-x", "c++", *options, "-"],
                input=_TRIAL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C++ compiler {compiler} does not work: {error}"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        said = lines[0].strip() if lines else f"exit code {done.returncode}"
        return f"the C++ compiler {compiler} does not work: {said}"
    return None
