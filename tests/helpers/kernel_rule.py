"""The rule for the error of a kernel: the one place with tolerances.

For a result T of a kernel, the reference R in float64 from the same inputs and the result E of eager PyTorch:

    rms(T - R) <= 2 rms(E - R) + u    and    max|T - R| <= 3 max|E - R| + 2 u

so nothing is tuned: the measure is eager's own error. u is the error of one rounding:

- outputs, and gradients of a row:      u = eps(dtype) max|R| / 2
- sums over the rows (dw, db):          u = eps(float32) sqrt(rows) rms(R)
- where larger terms cancel (`terms`):  u + eps(float32) terms / 2, because statistics are kept in float32

Where eager sums in low precision, `eager_accumulated` is its result with float32 sums, and the smaller of the two
errors counts. Fewer than `FEW` values say little about eager's error, which may be 0 by chance, so eager's error counts
as at least u there; a sum over fewer than `FEW` rows is no surer, because the gradient of one row's target is nearly
all of a cross-entropy's, and eager's error counts as at least one rounding of the result there. NaN and infinities must
be where eager has them, or where the truth has them if eager overflows on the way.
"""

import math

import torch
from torch import Tensor

__all__ = ["check", "check_close", "check_loss", "check_target_gradient"]

FEW = 256
ACCUMULATOR = torch.float32
PROBABILITIES = (0.01, 0.5, 0.9, 0.99, 0.999, 1 - 1e-5)
"""Probabilities of the target class in `check_target_gradient`."""


def check(
    op: str,
    triton: Tensor,
    eager: Tensor,
    reference: Tensor,
    dtype: torch.dtype | None = None,
    kind: str = "output",
    *,
    rows: int = 1,
    terms: float = 0.0,
    eager_accumulated: Tensor | None = None,
    truncates: bool = False,
) -> None:
    """Checks one result of a kernel by the rule above.

    Args:
        op: names the result in the message.
        triton, eager, reference: T, E and R; T and E have the same dtype and shape.
        dtype: precision of T, if it is not the tensor's dtype (autocast rounds inside and returns float32).
        kind: "output", or "column" for a sum over the rows.
        rows: the number of rows of a "column".
        terms: magnitude of the terms whose difference the result is, if it is larger than the result's.
        eager_accumulated: E with sums in float32, if eager sums in a lower precision.
        truncates: allows twice the error of one rounding, because Triton's interpreter rounds float32 to bfloat16
            towards zero.

    Raises:
        AssertionError: with the figures.
    """
    assert triton.shape == eager.shape, f"{op}: found shape {tuple(triton.shape)}, eager has {tuple(eager.shape)}"
    assert triton.dtype == eager.dtype, f"{op}: found {triton.dtype}, eager has {eager.dtype}"
    assert reference.dtype == torch.float64
    dtype = dtype or triton.dtype
    T, E, R = (x.detach().double().flatten() for x in (triton, eager, reference))
    R = torch.where(R.to(triton.dtype).isfinite(), R, R.to(triton.dtype).double())  # what overflows when it is rounded
    _same_non_finite(op, T, E, R)
    errors = [E - R]
    if eager_accumulated is not None:
        errors.append(eager_accumulated.detach().double().flatten() - R)
    errors = [error[error.isfinite()] for error in errors]
    T, R = T[T.isfinite() & R.isfinite()], R[T.isfinite() & R.isfinite()]
    if not T.numel():
        return
    u = _unit(R, dtype, kind, rows) + torch.finfo(ACCUMULATOR).eps * terms / 2
    rms_eager, max_eager = min(map(_rms, errors)), min(map(_max, errors))
    if T.numel() < FEW:
        rms_eager, max_eager = max(rms_eager, u), max(max_eager, u)
    if kind == "column" and rows < FEW:
        rounding = torch.finfo(dtype).eps / 2
        rms_eager, max_eager = max(rms_eager, rounding * _rms(R)), max(max_eager, rounding * _max(R))
    extra = torch.finfo(torch.bfloat16).eps * _max(R) if truncates else 0.0
    _bounded(op, "rms", _rms(T - R), 2 * rms_eager + u + extra, rms_eager, u)
    _bounded(op, "max", _max(T - R), 3 * max_eager + 2 * u + extra, max_eager, u)


def check_loss(op: str, triton: Tensor, eager: Tensor, reference: Tensor, logits: Tensor, dtype: torch.dtype) -> None:
    """Checks the mean of a loss over the rows: one number, whose error in eager may be 0 by chance.

    Args:
        op: names the result in the message.
        triton, eager, reference: scalars.
        logits: `(rows, V)` float64 of the rows that count; each is rounded to `dtype` once, independently.
        dtype: of the logits in eager.
    """
    logits = logits[logits.isfinite().all(1)]
    rounding = torch.finfo(dtype).eps / 2 * _max(logits) / math.sqrt(max(logits.shape[0], 1))
    check(op, triton, eager, reference, terms=rounding * 2 / torch.finfo(ACCUMULATOR).eps)


def check_target_gradient(op: str, triton: Tensor, eager: Tensor, reference: Tensor) -> None:
    """Checks that the gradient p - 1 of the target's logit has at most twice eager's relative error.

    Args:
        op: names the result in the message.
        triton, eager, reference: `(len(PROBABILITIES), samples)`, the gradients of one probability in a row.
    """
    dtype = triton.dtype
    R = reference.double()
    T, E = (((x.double() - R) / R).abs() for x in (triton, eager))
    for p, t, e in zip(PROBABILITIES, T, E, strict=True):
        u = torch.finfo(dtype).eps / 2
        _bounded(f"{op}, p = {p}", "rms of the relative error", _rms(t), 2 * _rms(e) + u, _rms(e), u)


def check_close(op: str, found: Tensor, wanted: Tensor, terms: float = 0.0, roundings: float = 4.0) -> None:
    """Checks that two results of one implementation differ by a few roundings at most.

    Args:
        op: names the result in the message.
        found, wanted: the two results, of one shape and dtype.
        terms: see `check`.
        roundings: the number of roundings.
    """
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    a, b = found.detach().double(), wanted.detach().double()
    accumulator = torch.promote_types(found.dtype, ACCUMULATOR)
    u = torch.finfo(found.dtype).eps / 2 * max(_max(b), torch.finfo(found.dtype).smallest_normal)
    u += torch.finfo(accumulator).eps / 2 * terms
    _bounded(op, "max", _max(a - b), roundings * u, 0.0, u)


def _unit(R: Tensor, dtype: torch.dtype, kind: str, rows: int) -> float:
    if kind == "column":
        u = torch.finfo(ACCUMULATOR).eps * math.sqrt(rows) * _rms(R)
    else:
        assert kind == "output", kind
        u = torch.finfo(dtype).eps * _max(R) / 2
    return max(u, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)  # denormals have a spacing, no eps


def _same_non_finite(op: str, T: Tensor, E: Tensor, R: Tensor) -> None:
    """Checks that NaN and infinities are where eager, or the rounded truth where eager overflows, has them."""
    t, e, r = (torch.where(x.isfinite(), 0.0, x).nan_to_num(nan=9.0, posinf=1.0, neginf=-1.0) for x in (T, E, R))
    wrong = ((t != e) & (t != r)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise AssertionError(
            f"{op}: {len(wrong)} of {T.numel()} elements are finite where they should not be or the reverse; first "
            f"element {first}: found {T[first].item()}, eager has {E[first].item()}, the truth is {R[first].item()}"
        )


def _bounded(op: str, name: str, error: float, bound: float, eager: float, u: float) -> None:
    if not error <= bound:  # NaN is an error too
        raise AssertionError(f"{op}: {name} {error:.3e} is above {bound:.3e} (eager's {eager:.3e}, u {u:.3e})")


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.square().mean())) if x.numel() else 0.0


def _max(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
