"""The list of cells, their files, and the process that measures them. Nothing is measured here."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cells, results, session
from bench.measure import serial
from bench.measure.cases import OPS
from bench.measure.models import DEFAULT_VARIANT, MODELS, SMALL, STEP_VARIANTS, VARIANTS, config_of, resolve
from bench.measure.process import Worker, WorkerEnded
from gptperf import flops
from gptperf.errors import ConfigError


def names(only: list[str], quick: bool = False) -> list[str]:
    return [cell.name for cell in cells.select(only, quick)]


def test_every_model_op_and_part_has_its_cell() -> None:
    found = names([])
    assert len(set(found)) == len(found)
    assert {f"step/{m}/{v}" for m in MODELS for v in STEP_VARIANTS if m not in SMALL} <= set(found)
    assert {f"step/{m}/{DEFAULT_VARIANT}" for m in SMALL} <= set(found)
    assert {f"ceilings/{m}" for m in MODELS} | {f"waterfall/{m}" for m in MODELS} <= set(found)
    assert "monitor/llama_1.36b" in found
    assert sum(name.startswith("ops/") for name in found) == sum(len(op.shapes) for op in OPS.values())
    for number, cell in enumerate(cells.all_cells()):
        assert set(cell.needs) <= set(found[:number]), f"{cell.name} stands before what it needs"


def test_cells_are_chosen_by_the_start_of_their_names() -> None:
    assert names(["step/llama_1.36b"]) == [
        "ceilings/llama_1.36b",  # the roofline is of the same run
        *(f"step/llama_1.36b/{variant}" for variant in STEP_VARIANTS),
    ]
    assert names(["micro/config", "loader"]) == ["micro/config", "loader"]
    assert names(["ops/rms_norm"]) == [f"ops/rms_norm/{'x'.join(map(str, s))}" for s in OPS["rms_norm"].shapes]
    with pytest.raises(ConfigError, match=r"found 'step/lama_124m'.*nearest: step/llama_124m"):
        cells.select(["step/lama_124m"], False)


def test_quick_fits_its_time() -> None:
    chosen = cells.select([], True)
    assert sum(cell.seconds(True) for cell in chosen) < session.QUICK_S < 180
    kinds = {cell.name.partition("/")[0] for cell in chosen}
    assert {"ceilings", "waterfall", "ops", "loader", "micro"} <= kinds


def _record(cell: str, **more: Any) -> results.Record:
    made_by = {"device": "cpu", "versions": {"torch": "2"}, "source": {"commit": "c", "dirty": False, "digest": "d"}}
    base = {"schema": results.SCHEMA, "cell": cell, "status": "done", "reason": None, "date": results.now()}
    return {**base, "seconds": 1.0, "quick": False, "environment": made_by, "results": {}, **more}


def test_a_result_comes_back_and_is_strict_json(tmp_path: Path) -> None:
    record = _record("step/a.b/c+d", results={"loss": float("nan"), "ms": [1.0, float("inf")]})
    path = results.write(tmp_path / "new", record)
    assert path.name == "step__a.b__c+d.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left

    def refuse(text: str) -> None:
        raise AssertionError(text)

    json.loads(path.read_text(), parse_constant=refuse)
    assert results.load_folder(path.parent)["step/a.b/c+d"]["results"] == {"loss": None, "ms": [1.0, None]}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', "\xff"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="not a result of the bench"):
        results.load_folder(tmp_path)


def test_other_versions_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no result"):
        results.load_folder(tmp_path)
    results.write(tmp_path, _record("loader", schema=results.SCHEMA + 1))
    with pytest.raises(ConfigError, match="schema"):
        results.load_folder(tmp_path)


def test_a_result_stands_for_its_own_program_only() -> None:
    def changed(**more: Any) -> tuple[Any, ...]:
        record = _record("loader")
        return results.identity({**record, "environment": {**record["environment"], **more}})

    same = changed()
    assert same == changed(gpu_state={"power_draw_w": 90.0}, source={"commit": "other", "digest": "d"})
    assert same != changed(device="NVIDIA H200")
    assert same != changed(driver="580")
    assert same != changed(versions={"torch": "3"})
    assert same != changed(source={"commit": "c", "digest": "e"})
    assert same != results.identity(_record("loader", quick=True))


def test_the_digest_sees_what_can_change_a_figure(tmp_path: Path) -> None:
    for name in (
        "gptperf/model/gpt.py",
        "kernels/rope.py",
        "configs/a.toml",
        "bench/measure/ops.py",
        "bench/report/charts.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = results.source_state(tmp_path)
    assert (first["commit"], first["dirty"]) == (None, None)  # no repository
    (tmp_path / "bench/report/charts.py").write_text("2")
    assert results.source_state(tmp_path)["digest"] == first["digest"]
    seen = {first["digest"]}
    for name in ("gptperf/model/gpt.py", "kernels/rope.py", "configs/a.toml", "bench/measure/ops.py"):
        (tmp_path / name).write_text("2")
        seen.add(results.source_state(tmp_path)["digest"])
    assert len(seen) == 5


FAKE = """
import json, os, sys, time
out = os.fdopen(int(sys.argv[1]), "w")
os.set_inheritable(out.fileno(), False)
for line in sys.stdin:
    job = json.loads(line)["job"]
    if job == "die": os.kill(os.getpid(), 11)
    if job == "leave": sys.exit(3)
    if job == "hang": time.sleep(600)
    found = {"pid": os.getpid(), "interpreter": os.environ.get("TRITON_INTERPRET")}
    status = "failed" if job == "ops/bad" else "done"
    out.write(json.dumps({"status": status, "reason": None, "results": found}) + "\\n")
    out.flush()
"""


def fake(interpreter: bool = False) -> Worker:
    return Worker(interpreter, (sys.executable, "-c", FAKE))


def test_a_worker_that_dies_or_hangs_is_a_reason_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fake() as worker:
        first = worker.ask({"job": "a"}, 60)["results"]
        assert worker.ask({"job": "b"}, 60)["results"] == first  # the same process
        assert first["interpreter"] is None
        for job, reason in (("die", "SIGSEGV"), ("leave", "exit code 3")):
            with pytest.raises(WorkerEnded, match=reason):
                worker.ask({"job": job}, 60)
        with pytest.raises(WorkerEnded, match="no answer within 1 s"):
            worker.ask({"job": "hang"}, 1)
        assert worker.ask({"job": "c"}, 60)["results"]["pid"] != first["pid"]
    with fake(interpreter=True) as worker:
        assert worker.ask({"job": "a"}, 60)["results"]["interpreter"] == "1"


def _cell(name: str, **more: Any) -> cells.Cell:
    return cells.Cell(name, 1, **more)


def test_a_failed_cell_is_a_result_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    todo = [_cell("ops/good"), _cell("die"), _cell("ops/bad"), _cell("step/x", alone=True), _cell("loader")]
    shared = {key: value for key, value in _record("").items() if key in ("schema", "quick", "environment")}
    with fake() as worker:
        failed, left_out = session._run(todo, tmp_path, shared, worker, begun=session.time.monotonic())
    assert (failed, left_out) == (2, [])
    found = results.load_folder(tmp_path)
    assert {cell: record["status"] for cell, record in found.items()} == {
        "ops/good": "done",
        "die": "failed",
        "ops/bad": "failed",
        "step/x": "done",
        "loader": "done",
    }
    assert "SIGSEGV" in found["die"]["reason"]
    pids = [found[cell.name]["results"].get("pid") for cell in todo]
    assert pids[0] != pids[2]  # after a crash
    assert pids[3] not in (pids[2], pids[4])  # alone
    assert "[5/5" in capsys.readouterr().out

    mark = results.identity({**shared})
    stands = [cell.name for cell in todo if session._stands(tmp_path, cell, mark)]
    assert stands == ["ops/good", "step/x", "loader"]  # what failed is measured again
    other = results.identity({**shared, "environment": {**shared["environment"], "driver": "1"}})
    assert not any(session._stands(tmp_path, cell, other) for cell in todo)


def test_quick_leaves_out_what_would_take_too_long(tmp_path: Path) -> None:
    shared = {"schema": results.SCHEMA, "quick": True, "environment": {"device": "cpu"}}
    todo = [_cell("long", quick_s=100.0), _cell("loader", quick_s=1.0)]
    with fake() as worker:
        begun = session.time.monotonic() - (session.QUICK_S - 50)
        assert session._run(todo, tmp_path, shared, worker, begun) == (0, ["long"])
    assert set(results.load_folder(tmp_path)) == {"loader"}


def test_the_budget_is_what_it_took_before(tmp_path: Path) -> None:
    cell = _cell("loader", quick_s=0.5)
    assert session._expected(cell, tmp_path, False) == 1
    assert session._expected(cell, tmp_path, True) == 0.5
    results.write(tmp_path, _record("loader", seconds=33.0))
    assert session._expected(cell, tmp_path, False) == 33.0
    assert session._expected(cell, tmp_path, True) == 0.5
    assert "33 s" in session._budget([cell], [], tmp_path, False)[0]
    assert "there" in session._budget([cell], ["loader"], tmp_path, False)[0]


@pytest.mark.parametrize("model", MODELS)
def test_configurations_come_back_from_a_result(model: str) -> None:
    config = resolve(model, DEFAULT_VARIANT)
    assert config.train.gradient_accumulation_steps == 1
    assert config_of(json.loads(json.dumps(config.sections()))) == config
    assert config_of({**config.sections(), "model": {**config.sections()["model"], "of_tomorrow": 1}}) == config
    assert len({resolve(model, variant).system for variant in VARIANTS}) == len(VARIANTS)


def test_the_serial_roofline_is_each_part_at_its_rate() -> None:
    config = resolve("llama_1.36b", DEFAULT_VARIANT)
    rates = {"gemm_flop_s": 7e14, "attention_forward_flop_s": 6e14, "attention_backward_flop_s": 4e14}
    parts = serial.serial_ms(config, {**rates, "copy_byte_s": 4e12})
    moved = flops.bytes_moved(config.model, recompute_ffn=False).total
    tokens = 16 * 2048
    scores = 24 * 4 * 2048 * (2049 / 2) * tokens  # forward: L x 4 C x causal pairs a token
    training = 8.396242944e9 * tokens  # of the parameter formulas
    assert parts["gemm"] == pytest.approx(1e3 * (training - 3 * scores) / 7e14)
    assert parts["attention"] == pytest.approx(1e3 * (scores / 6e14 + 2 * scores / 4e14))
    assert parts["optimizer"] == pytest.approx(1e3 * 1_364_297_728 * (2 + 2 + 12 + 12 + 2) / 4e12)
    assert parts["memory_bound"] == pytest.approx(1e3 * moved * tokens / 4e12)
    faster = serial.serial_ms(config, {**rates, "copy_byte_s": 8e12})
    assert faster["memory_bound"] == pytest.approx(parts["memory_bound"] / 2)
    assert faster["gemm"] == parts["gemm"]
