"""The bytes that bench.measure.ops counts and the tables that it prints; to time ops it needs a GPU."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.measure import cases, muon, op_errors, ops, timing
from bench.measure import op_tables as tables
from gptperf.errors import ConfigError
from gptperf.kernels import reference

SMALL = st.integers(1, 5)
COUNTED = [op for op in cases.OPS if op != "linear_cross_entropy" and not op.endswith("_recompute")]


@given(op=st.sampled_from(COUNTED), sizes=st.tuples(SMALL, SMALL, SMALL, SMALL, SMALL))
@settings(max_examples=60, deadline=None)
def test_least_bytes_are_those_of_the_tensors(op: str, sizes: tuple[int, ...]) -> None:
    """Counted again from the tensors that the reference takes and gives."""
    B, H, T, D, K = sizes
    shape = (B, H * K, T, 2 * D, K) if op == "rope" else (B * H, T * D)
    inputs = cases.make_inputs(op, shape, device="cpu")
    outputs = cases.call(cases.eager(op), op, shape, inputs)
    stats = 0 if "norm" not in op else 4 * shape[0] * (1 if op.startswith("rms") else 2)
    forward = sum(x.nbytes for x in (*inputs.values(), *outputs)) + stats

    gradients = {name: x.nbytes for name, x in cases.leaves(inputs).items() if name != "residual"}  # one for both
    saved = {name: inputs[name].nbytes for name in ("x", "weight", "cos", "sin", "gate_up") if name in inputs}
    backward = sum(y.nbytes for y in outputs) + sum(saved.values()) + stats + sum(gradients.values())
    assert cases.least_bytes(op, shape) == {"forward": forward, "backward": backward}


def test_a_copy_can_move_the_least_bytes_exactly() -> None:
    for name, op in cases.OPS.items():
        for shape in op.shapes:
            assert all(moved % 32 == 0 for moved in cases.least_bytes(name, shape).values())


@pytest.mark.parametrize("op", ["gelu", "swiglu"])
def test_recomputing_the_product_writes_it_once_more(op: str) -> None:
    M, d_ff = shape = (24, 40)
    plain, again = (cases.least_bytes(name, shape)["backward"] for name in (op, f"{op}_recompute"))
    assert again - plain == 2 * M * d_ff


def _row(impl: str, forward: float, backward: float, op: str = "rms_norm", **more: Any) -> dict[str, Any]:
    shape = (2, 4, 8, 16, 2) if op == "rope" else (64, 32)
    cells = {
        direction: {"ms": ms, "p10_ms": ms, "p90_ms": ms, "of_copy": 0.5, "gb_s": 2000.0, "method": "graph"}
        for direction, ms in (("forward", forward), ("backward", backward))
    }
    return {"op": op, "shape": list(shape), "impl": impl, **cells, **more}


def test_the_verdict_names_the_fastest_rival() -> None:
    failed = {"op": "rms_norm", "shape": [64, 32], "impl": "cudnn", "error": "ImportError: no cudnn"}
    rows = [
        _row("copy", 0.1, 0.1),
        _row("compiled", 1.0, 4.0),
        _row("triton", 2.0, 2.0),
        _row("liger", 3.0, 3.0),
        failed,
    ]
    assert tables.verdict(rows) == [
        "  triton against the best rival: forward 0.50x compiled, backward 1.50x liger, backward 2.00x compiled"
    ]
    text = tables.table(rows)
    assert "ImportError: no cudnn" in text
    assert text.count("1.0000") == 3  # compiled's median and percentiles
    assert tables.verdict([row for row in rows if row["impl"] != "triton"]) == []


def test_a_rival_with_less_to_do_is_none() -> None:
    rows = [
        _row(impl, ms, ms, "rope") for impl, ms in (("copy", 1), ("liger", 4), ("liger_separate", 1), ("triton", 2))
    ]
    assert cases.share("liger_separate", "rope", (2, 4, 8, 16, 2)) == 6 / 8
    assert tables.verdict(rows) == ["  triton against the best rival: forward 2.00x liger, backward 2.00x liger"]


def test_the_loss_is_compared_with_its_products() -> None:
    rows: list[dict[str, Any]] = []
    for impl, ms in (("gemm", 10.0), ("eager", 20.0), ("triton", 12.5)):
        cell = {"ms": ms, "p10_ms": ms, "p90_ms": ms, "of_gemm": 10 / ms, "method": "loop"}
        rows.append({"op": "linear_cross_entropy", "shape": [8, 4, 16], "impl": impl, "both": cell, "extra_gb": 0.5})
    text = tables.table(rows)
    assert "1.250" in text
    assert text.endswith("triton against the best rival: forward and backward 1.60x eager")


def test_errors_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_errors, "kernel", lambda op: reference.rms_norm)
    rows = op_errors.error_rows("rms_norm_add", (5, 16), "mixed", "cpu")
    assert [row["tensor"] for row in rows] == ["output 0", "output 1", "dx", "dweight", "dresidual"]
    assert all(row["ratio_rms"] in (1.0, None) and row["eager_rms"] < 2**-7 for row in rows)

    def doubled(*args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(2 * y for y in reference.rms_norm(*args, **kwargs))  # type: ignore[arg-type]

    monkeypatch.setattr(op_errors, "kernel", lambda op: doubled)
    assert all(
        row["triton_rms"] == pytest.approx(1, rel=0.02)
        for row in op_errors.error_rows("rms_norm_add", (5, 16), "float32", "cpu")
    )

    def broken(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setattr(op_errors, "kernel", lambda op: broken)
    (row,) = op_errors.error_rows("rms_norm_add", (5, 16), "float16", "cpu")
    assert row["error"] == "RuntimeError: no such kernel"
    assert "no such kernel" in tables.error_table([row])


def test_outputs_are_looked_at_before_their_time_is_taken() -> None:
    x = torch.randn(64)
    ops.compare([x.bfloat16()], x)
    for wrong in (x.flip(0), torch.full_like(x, math.nan)):
        with pytest.raises(ValueError, match="off eager's"):
            ops.compare([wrong], x)


def test_percentiles_of_rounds() -> None:
    assert timing.Spread.of([3.0, 1.0, 2.0]) == timing.Spread(2.0, 1.0, 3.0)
    assert timing.Spread.of([1.0]) == timing.Spread(1.0, 1.0, 1.0)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = ops.parse_flags(["--ops", "rope", "--shapes", "0", "3", "--impls", "triton", "--rounds", "2"])
    assert (args.ops, args.shapes, args.impls, args.rounds) == (("rope",), (0, 3), ("triton",), 2)
    for wrong in (["--ops", "softmax"], ["--shapes", "9"], ["--rounds", "0"], ["--host", "--errors"]):
        with pytest.raises(ConfigError):
            ops.parse_flags(wrong)
    if not torch.cuda.is_available():
        assert ops.main(["--host"]) == 0
        assert "no GPU here" in capsys.readouterr().out


def test_symmetric_products_are_timed_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test: a kernel that takes half the time has 2x; the FLOPs are those of the full product."""
    monkeypatch.setattr(muon, "resolve_ops", lambda *_: SimpleNamespace(symmetric_matmul=reference.symmetric_matmul))
    monkeypatch.setattr(timing, "alternate", lambda works, *_: {name: [2.0 - i] for i, name in enumerate(works)})
    rows = muon.measure_products((2, 64, 32), 1, "cpu")
    assert [(row["impl"], row["times_torch"]) for row in rows] == 2 * [("torch", 1.0), ("triton", 2.0)]
    assert rows[1]["full_tflop_s"] == pytest.approx(2 * 2 * 64 * 64 * 32 / 1e-3 / 1e12)
    assert [row["shape"] for row in rows] == 2 * [[2, 64, 32]] + 2 * [[2, 64, 64]]
    assert torch.cuda.is_available() or muon.main([]) == 0
