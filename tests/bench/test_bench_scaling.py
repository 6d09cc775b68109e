"""The cases of the scaling bench, and the table that it computes from results; the measurement needs GPUs."""

from dataclasses import asdict
from typing import Any

import pytest

from bench.measure.scaling import ALONE, STRATEGIES, Case, cases, report, to_measure


def record(case: Case, *ms: float) -> dict[str, Any]:
    ranks = [{"ms": x, "state_gb": 1.0, "peak_gb": 2.0} for x in ms]
    return {"case": asdict(case), "ranks": ranks, "environment": {"device": "NVIDIA H200"}}


def test_the_cards_alone_come_before_and_after() -> None:
    found = cases(["gpt2_124m"], 2, ["ddp", "fsdp"], [1, 8])
    assert [case.strategy for case in found] == ["alone", "ddp", "fsdp", "alone_after"] * 2
    assert [case.steps for case in found] == [21] * 4 + [3] * 4
    assert [case.strategy for case in cases(["gpt2_124m"], 1, ["ddp"], [1])] == ["alone"]
    assert [case.micro_batches for case in cases(["gpt2_124m"], 4, [], [2, 8], strong=True)] == [2, 2]
    assert len({case.name for case in found}) == len(found)


@pytest.mark.parametrize(("after", "slowest"), [((), "80.0%"), ((110.0, 90.0), "84.0%")])
def test_efficiency_is_against_the_mean_of_both(after: tuple[float, ...], slowest: str) -> None:
    first, job, last = (Case("gpt2_124m", name, 2, 1, 21) for name in ("alone", "ddp", "alone_after"))
    records = [record(first, 100.0, 80.0), record(job, 125.0, 124.0), *([record(last, *after)] if after else [])]
    (line,) = (line.split() for line in report(records) if " ddp " in line)
    assert float(line[4]) == 125.0
    assert line[5] == f"{2 * 64 * 1024 / 0.125:,.0f}"
    cards = [100.0, 80.0] if not after else [105.0, 85.0]
    assert line[6] == slowest == f"{cards[0] / 125:.1%}"
    assert float(line[7].rstrip("%")) == pytest.approx(2 / 125 / (1 / cards[0] + 1 / cards[1]) * 100, abs=0.06)


def test_what_is_measured_stands_between_the_cards_alone() -> None:
    wanted = cases(["gpt2_124m"], 2, ["ddp", "fsdp"], [1, 8])
    names = [case.name for case in wanted]
    assert to_measure(wanted, names) == []
    assert to_measure(wanted, ()) == wanted
    for missing in (1, 3):  # a strategy, the cards alone afterwards
        found = [case.name for case in to_measure(wanted, {*names} - {names[missing]})]
        assert found == sorted({names[0], names[missing], names[3]}, key=names.index)


def test_every_name_has_its_column() -> None:
    records = [record(Case("llama_1.36b", name, 8, 8, 3), 1000.0) for name in (*ALONE, *STRATEGIES)]
    head, *lines = report(records)
    assert {len(line) for line in (head, *lines)} == {len(head)}
    assert {len(line.split()) for line in lines} == {15}


def test_without_the_cards_alone_there_is_no_efficiency() -> None:
    (line,) = (line.split() for line in report([record(Case("gpt2_124m", "ddp", 2, 1, 21), 125.0)]) if " ddp " in line)
    assert line[6:8] == ["-", "-"]
