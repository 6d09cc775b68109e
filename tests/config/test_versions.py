"""The versions of torch and triton with which GPU figures were measured are pinned, and a run with others says so."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from run_helpers import run, run_log

from gptperf import doctor
from gptperf.ops import MEASURED_WITH, unmeasured_versions
from gptperf.training import startup_info

ROOT = Path(__file__).parents[2]


def _pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))


def _install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """Pretends that exactly these packages are installed."""

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_measured_pair_is_the_pinned_one() -> None:
    assert _pins("constraints-gpu.txt") == MEASURED_WITH
    assert _pins("constraints.txt").keys() == MEASURED_WITH.keys()


def test_the_measured_pair_needs_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, MEASURED_WITH | {"torch": MEASURED_WITH["torch"] + "+cu130"})
    assert unmeasured_versions("cuda") is None


@pytest.mark.parametrize(
    ("changed", "here"),
    [
        ({"torch": "2.13.0+cu130", "triton": "3.7.1"}, "torch 2.13.0 with triton 3.7.1"),
        ({"triton": "3.7.1"}, f"torch {MEASURED_WITH['torch']} with triton 3.7.1"),
        ({"torch": "2.11.1"}, f"torch 2.11.1 with triton {MEASURED_WITH['triton']}"),
    ],
)
def test_another_pair_is_not_measured(changed: dict[str, str], here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, MEASURED_WITH | changed)
    measured = f"torch {MEASURED_WITH['torch']} with triton {MEASURED_WITH['triton']}"
    assert unmeasured_versions("cuda") == f"{here} is not measured: every GPU figure was measured on {measured}"
    assert unmeasured_versions("cpu") is None  # no figure of a GPU is expected there


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, {"torch": MEASURED_WITH["torch"]})
    assert "triton (not installed) is not measured" in str(unmeasured_versions("cuda"))


def test_a_run_and_the_doctor_show_the_note(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (startup_info, doctor):
        monkeypatch.setattr(module, "unmeasured_versions", lambda device_type: f"on {device_type}: not measured")
    assert run(corpus, tmp_path, "--max_iters=1") == 0
    assert " Note: on cpu: not measured" in capsys.readouterr().out
    assert "on cpu: not measured" in run_log(tmp_path)["startup_info"]["notes"]
    doctor.main([])
    assert "  note                   on cpu: not measured\n" in capsys.readouterr().out
