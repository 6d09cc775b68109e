"""Trackers that fail, hang or are slow change nothing in a run; the data of W&B and TensorBoard is read back."""

import importlib.util
import json
import math
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_helpers import hashes, losses, run, run_log

from gptperf.config import Config, LogConfig
from gptperf.monitor import trackers
from gptperf.monitor.trackers import Trackers, flat
from gptperf.training import reporting, trainer

FLAGS = ("--max_iters=10", "--sample_tokens=0", "--dropout=0.1")
needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs the package {name}")
    for name in ("wandb", "tensorboard")
}


class Fake:
    """A tracker that fails or hangs in a given method."""

    name = "Fake"

    def __init__(self, *, hang: str = "", fail: str = "", sleep_s: float = 0.0):
        self.hang, self.fail, self.sleep_s = hang, fail, sleep_s
        self.release = threading.Event()
        self.calls: list[tuple[Any, ...]] = []
        self.abandoned = 0

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if self.hang == call[0]:
            self.release.wait(60)
        if self.fail == call[0]:
            raise ConnectionRefusedError("Connection refused\nby the server")
        if call[0] == "log" and self.sleep_s:
            self.release.wait(self.sleep_s)

    def start(self, run_name: str, config: Mapping[str, Any]) -> str:
        self._call("start", run_name, config)
        return "http://here"

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._call("log", step, scalars)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._call("finish", summary)

    def abandon(self) -> None:
        self.abandoned += 1

    @property
    def steps(self) -> list[int]:
        return [call[1] for call in self.calls if call[0] == "log"]


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_START_S", 5.0)
    monkeypatch.setattr(trackers, "_CLOSE_S", 0.5)


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without trackers."""
    out = tmp_path_factory.mktemp("plain")
    assert run(corpus, out, *FLAGS) == 0
    return out


@pytest.fixture
def told() -> list[str]:
    return []


def _same(out: Path, plain: Path) -> bool:
    """Returns whether losses, weights, moments and every random state are bitwise equal."""
    a, b = (folder / "checkpoints" / "step-00000010" for folder in (out, plain))
    states = [json.loads((folder / "state.json").read_text())["rng"] for folder in (a, b)]
    return losses(out) == losses(plain) and hashes(a) == hashes(b) and states[0] == states[1]


def _until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


# Fault of a tracker -> arguments of `Fake`, and the text of the only warning.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, ""),
    "refuses": ({"fail": "start"}, "disabled, the run continues without it: ConnectionRefusedError: Connection"),
    "hangs in start": ({"hang": "start"}, "disabled, the run continues without it: it did not"),
    "hangs in log": ({"hang": "log"}, "disabled, the run continues without it: it did not finish within 0.5 s"),
    "hangs in finish": ({"hang": "finish"}, "disabled, the run continues without it: it did not finish within 0.5 s"),
    "raises in log": ({"fail": "log"}, "disabled, the run continues without it: ConnectionRefusedError"),
    "raises in finish": ({"fail": "finish"}, "disabled, the run continues without it: ConnectionRefusedError"),
    "is slow": ({"sleep_s": 5.0}, "disabled, the run continues without it: it did not finish within 0.5 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_has_the_same_bits_whatever_a_tracker_does(
    fault: str,
    corpus: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys, warning = FAULTS[fault]
    bad, good = Fake(**keys), Fake()
    good.name = "Good"
    seconds: list[float] = []

    class Timed(Trackers):
        def log(self, event: str, record: Mapping[str, Any]) -> None:
            begin = time.perf_counter()
            super().log(event, record)
            seconds.append(time.perf_counter() - begin)

    def opened(config: Any, run_name: str, last_step: int, say: Any, warn: Any) -> Trackers:
        return Timed([bad, good], run_name, config.sections(), say=say, warn=warn)

    monkeypatch.setattr(reporting, "open_trackers", opened)
    assert run(corpus, tmp_path, *FLAGS) == 0
    bad.release.set()
    assert _same(tmp_path, plain)
    assert len(seconds) == 11
    assert statistics.median(seconds) < 0.5e-3
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING: Fake" in line]
    assert len(warnings) == bool(warning)
    assert all(warning in line for line in warnings)
    assert bad.abandoned == bool(warning)
    # The other tracker has everything.
    log = run_log(tmp_path)
    assert good.steps == [*range(1, 11), 10]
    assert good.calls[0][:2] == ("start", log["run_name"])
    assert good.calls[0][2]["model"]["n_layer"] == 2
    assert good.calls[5][2]["loss"] == log["training_iterations"][4]["loss"]
    assert good.calls[5][2]["mfu/tokens_per_sec"] == log["training_iterations"][4]["mfu"]["tokens_per_sec"]
    assert good.calls[-2][2]["eval/val_loss"] == log["eval_steps"][0]["val_loss"]
    assert good.calls[-1] == ("finish", log["summary"])


def test_only_records_numbers(told: list[str]) -> None:
    record = {
        "iter": 3,
        "loss": 1.5,
        "lr": None,
        "mfu": {"mfu_percent": 50.0, "convention": "strict"},
        "gradients": {"global_norm": math.nan, "layer_norms": {"0": 1, "1": None}, "histogram": {"shares": [0.5]}},
        "stability": {"spike": True},
    }
    expected = {"iter": 3, "loss": 1.5, "mfu/mfu_percent": 50.0, "gradients/layer_norms/0": 1, "stability/spike": 1}
    assert flat(record) == expected
    fake = Fake()
    with Trackers([fake], "r", {}, say=told.append, warn=told.append) as these:
        these.log("iteration", record)
        these.log("eval", {"iter": 3, "val_loss": 2.0})
    del expected["iter"]
    assert fake.calls[1:] == [("log", 3, expected), ("log", 3, {"eval/val_loss": 2.0}), ("finish", {})]
    assert told == ["Fake: http://here"]


def test_the_oldest_records_go_and_are_counted(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    monkeypatch.setattr(trackers, "_QUEUE", 10)
    monkeypatch.setattr(trackers, "_CLOSE_S", 10)
    fake = Fake(hang="log")
    these = Trackers([fake], "r", {}, say=print, warn=told.append)
    these.log("iteration", {"iter": 1})
    _until(lambda: fake.steps == [1])
    for step in range(2, 51):
        these.log("iteration", {"iter": step})
    fake.release.set()
    these.close()
    these.close()
    assert fake.steps == [1, *range(41, 51)]
    assert told == ["Fake: too slow for the run, which dropped 39 records"]


def test_one_that_starts_too_late_is_ended(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    monkeypatch.setattr(trackers, "_START_S", 0.2)
    fake = Fake(hang="start")
    these = Trackers([fake], "r", {}, say=told.append, warn=told.append)
    begin = time.monotonic()
    step = 0
    while not told:
        these.log("iteration", {"iter": (step := step + 1)})
        time.sleep(0.01)
    assert time.monotonic() - begin < 5
    these.log("iteration", {"iter": step + 1})
    assert told == ["Fake is disabled, the run continues without it: it did not start within 0.2 s"]
    fake.release.set()
    _until(lambda: fake.calls[-1] == ("finish", {}))
    these.close()
    assert fake.steps == []
    assert (len(told), fake.abandoned) == (1, 1)


def test_a_run_that_fails_ends_its_trackers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(reporting, "open_trackers", lambda *_: Trackers([fake], "r", {}))
    monkeypatch.setattr(trainer, "_evaluate", lambda run, points: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(corpus, tmp_path, *FLAGS)
    assert fake.steps == list(range(1, 11))
    assert fake.calls[-1] == ("finish", {})


@pytest.mark.parametrize(("flag", "module"), [("wandb_log", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_broken_package_is_a_warning(
    flag: str, module: str, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    def broken(name: str) -> Any:
        assert name == module
        raise TypeError("Descriptors cannot be created directly")

    with monkeypatch.context() as patch:  # the package is installed
        patch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
        config = Config(log=LogConfig(**{flag: True}))  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", broken)
        with trackers.open_trackers(config, "r", 0, told.append, told.append) as these:
            these.log("iteration", {"iter": 1})
    (line,) = told
    assert "cannot be loaded, the run continues without it: TypeError('Descriptors cannot" in line


@needs["tensorboard"]
def test_tensorboard_read_back_over_a_resume(
    corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(trackers, "_START_S", 60)
    monkeypatch.setattr(trackers, "_CLOSE_S", 60)
    flags = (*FLAGS, "--tensorboard=True")
    assert run(corpus, tmp_path, *flags) == 0
    assert _same(tmp_path, plain)
    last = tmp_path / "checkpoints" / "step-00000010"
    last.rename(tmp_path / "aside")
    (name,) = (path.stem for path in tmp_path.glob("run_*.jsonl"))
    assert run(corpus, tmp_path, *flags, "--init_from=resume") == 0
    files = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
    log = run_log(tmp_path)
    read = {tag: [(event.step, event.value) for event in files.Scalars(tag)] for tag in files.Tags()["scalars"]}
    expected = [(entry["iter"], pytest.approx(entry["loss"])) for entry in log["training_iterations"]]
    assert read["loss"] == expected  # 6 to 10 appear once, although two processes logged them
    assert read["eval/val_loss"] == [(10, pytest.approx(log["eval_steps"][0]["val_loss"]))]
    assert len(read["memory/rss_gb"]) == 10
    assert {"config/text_summary", "summary/text_summary"} <= set(files.Tags()["tensors"])


@needs["wandb"]
def test_wandb_offline_read_back_over_a_resume(
    corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = importlib.import_module("wandb")
    monkeypatch.setattr(trackers, "_START_S", 60)
    monkeypatch.setattr(trackers, "_CLOSE_S", 60)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    flags = (*FLAGS, "--wandb_log=True", "--wandb_project=a-project", "--wandb_run_name=a name")
    try:
        assert run(corpus, tmp_path, *flags) == 0
        assert _same(tmp_path, plain)
        assert run(corpus, tmp_path, *flags, "--init_from=resume", "--max_iters=12") == 0
    finally:
        wandb.teardown()
    assert "WARNING: W" not in capsys.readouterr().out
    first, second = (_records(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    log = run_log(tmp_path)
    for records, steps in ((first, range(1, 11)), (second, range(11, 13))):
        (started,) = (record.run for record in records if record.HasField("run"))
        assert (started.project, started.display_name) == ("a-project", "a name")
        assert started.run_id.startswith(f"{log['run_name']}-")
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        entries = log["training_iterations"][steps.start - 1 : steps.stop - 1]
        assert [(row["_step"], row["loss"]) for row in rows] == [(e["iter"], e["loss"]) for e in entries]
        assert rows[-1]["eval/val_loss"] > 0
        assert rows[-1]["memory/rss_gb"] > 0
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    assert len({record.run.run_id for record in first + second if record.HasField("run")}) == 1


def _records(path: Path) -> list[Any]:
    """Returns the records of an offline run: LevelDB's log format after a header of 7 bytes."""
    pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")
    return [pb2.Record.FromString(data) for data in _chunks(path.read_bytes())]


def _chunks(data: bytes) -> Iterator[bytes]:
    """Yields records of LevelDB's log format: blocks of 32 KiB, parts with checksum (4), length (2) and kind (1)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""
