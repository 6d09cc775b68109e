"""The kernels that write 8-bit floats have the bits of eager PyTorch: every value, both layouts, scales, statistics."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptperf.kernels import float8_reference
from gptperf.kernels.float8 import E4M3, E5M2, FACTORS, Float8, scale_of
from gptperf.kernels.quantize import quantize
from gptperf.kernels.quantize_swiglu import quantize_swiglu, quantize_swiglu_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
SHAPES = [(1, 1), (7, 300), (130, 65), (0, 16)]
FORMATS = {False: E4M3, True: E5M2}


def _spread(*shape: int) -> Tensor:
    """Values over the whole range of float32's exponents, many of them beyond both ends of an 8-bit format."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(9).exp()
    return x.to(DEVICE)


def _grid(form: Float8) -> Tensor:
    """Every number of a format, the middles between neighbours, and what lies just beside the middles."""
    numbers = torch.arange(256, dtype=torch.uint8).view(form.dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    inf = torch.tensor(math.inf)
    beside = torch.cat([torch.nextafter(middles, inf), torch.nextafter(middles, -inf)])
    x = torch.cat([numbers, middles, beside])
    return torch.cat([x, x.new_zeros(-x.numel() % 16)]).view(-1, 16).to(DEVICE)


def _same(ours: Tensor, wanted: Tensor) -> None:
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(ours.float().nan_to_num(1e30), wanted.float().nan_to_num(1e30))


def _same_results(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours[:-1], wanted[:-1], strict=True):
        _same(a, b)
    assert ours[-1].shape == wanted[-1].shape
    if wanted[-1].numel():
        _same(ours[-1][0].amax(), wanted[-1][0].amax())
        _same(ours[-1][1:].sum(1), wanted[-1][1:].sum(1))


def _scale(value: float) -> Tensor:
    return torch.tensor([value, 5.0, 5.0, 5.0], device=DEVICE)


@pytest.mark.parametrize("e5m2", [False, True])
def test_rounding_is_to_the_nearest_even(e5m2: bool) -> None:
    """As PyTorch rounds: all numbers, all ties, and the numbers beside the ties."""
    x = _grid(FORMATS[e5m2])
    q = quantize(x, _scale(1.0), e5m2=e5m2)[0]
    _same(q, x.to(FORMATS[e5m2].dtype))


@pytest.mark.parametrize("scale", [0.0, 4.0, 2.0**20])
@pytest.mark.parametrize("e5m2", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_is_the_reference(shape: tuple[int, int], e5m2: bool, scale: float) -> None:
    x = _spread(*shape)
    for rows, columns, after in ((True, True, None), (False, True, None if scale == 0 else x)):
        options = {"e5m2": e5m2, "rows": rows, "columns": columns, "after": after}
        _same_results(quantize(x, _scale(scale), **options), float8_reference.quantize(x, _scale(scale), **options))


@pytest.mark.parametrize("op", [quantize, float8_reference.quantize])
@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_clamped_finite_and_not_a_number(op: Callable[..., tuple[Tensor, ...]], form: Float8) -> None:
    """A number beyond the largest is clamped; infinities and NaN become NaN; all are counted as what they are."""
    values = [1e30, -1e30, math.inf, -math.inf, math.nan, form.smallest / 4, form.smallest / 2, form.smallest, 0.0]
    x = torch.tensor([values + [1.0] * 7], device=DEVICE)
    q, qt, factors, parts = op(x, _scale(1.0), e5m2=form is E5M2, columns=True)
    found = q.float()[0].tolist()
    assert found[:2] == [form.largest, -form.largest]
    assert all(map(math.isnan, found[2:5]))
    assert found[5:9] == [0.0, 0.0, form.smallest, 0.0]
    _same(qt, q.t().contiguous())
    assert factors.tolist() == [1.0] * FACTORS
    assert math.isnan(parts[0].amax().item())
    assert parts[1:].sum(1).tolist() == [2.0, 2.0, 16.0]


@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("amax", [1e-38, 3e-5, 0.99, 1.0, 448.0, 1e38])
def test_a_scale_leaves_room(form: Float8, amax: float) -> None:
    """It is a power of two, and the largest value comes to lie below the largest number by a factor of 1.75 to 3.5."""
    scale = scale_of(torch.tensor(amax), form.top).item()
    assert math.frexp(scale)[0] == 0.5
    if 2.0**-100 < scale < 2.0**100:
        assert 1.75 <= form.largest / (amax * scale) <= 3.5


def test_a_scale_of_values_that_are_not_finite() -> None:
    assert scale_of(torch.tensor([math.inf, math.nan, -math.nan]), 8).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("layout", ["transposed", "column slice", "offset"])
def test_layouts(layout: str) -> None:
    x = _spread(48, 80)
    other = {"transposed": x.t().contiguous().t(), "column slice": torch.cat([x, x], 1)[:, 3:83]}
    x = other.get(layout, x.flatten()[1:].view(-1, 11))
    _same_results(quantize(x, _scale(2.0), columns=True), float8_reference.quantize(x, _scale(2.0), columns=True))


@pytest.mark.parametrize("scale", [0.0, 16.0])
@pytest.mark.parametrize("shape", [(5, 70), (130, 33), (0, 16)])
def test_swiglu_is_the_reference(shape: tuple[int, int], scale: float) -> None:
    """In the same arithmetic the bits are the same, but for the exponential function of another library."""
    M, F = shape
    gate_up, dy = torch.randn(M, 2 * F, device=DEVICE), torch.randn(M, F, device=DEVICE)
    ours, wanted = quantize_swiglu(gate_up, _scale(scale)), float8_reference.quantize_swiglu(gate_up, _scale(scale))
    _close(ours, wanted)
    for e5m2 in (False, True):
        arguments = (dy, gate_up, _scale(scale), wanted[1])
        ours = quantize_swiglu_backward(*arguments, e5m2=e5m2)
        _close(ours, float8_reference.quantize_swiglu_backward(*arguments, e5m2=e5m2))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.0, 16.0])
@pytest.mark.parametrize("e5m2", [False, True])
@pytest.mark.parametrize("shape", [(32768, 2048), (6144, 2048), (65536, 768), (4112, 5632)])
def test_matrices_of_a_model_in_bfloat16(shape: tuple[int, int], e5m2: bool, scale: float) -> None:
    """All but the counts, which are of a sample of so many elements."""
    x = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).mul(20).bfloat16()
    options = {"e5m2": e5m2, "columns": True}
    ours, wanted = (op(x, _scale(scale), **options) for op in (quantize, float8_reference.quantize))
    for a, b in zip(ours[:3], wanted[:3], strict=True):
        _same(a, b)
    _same(ours[3][0].amax(), wanted[3][0].amax())
    assert wanted[3][3].sum() == x.numel()
    _same_shares(ours[3], wanted[3])


@pytest.mark.gpu
@pytest.mark.parametrize("e5m2", [False, True])
@pytest.mark.parametrize("shape", [(512, 512), (4096, 768), (2064, 5632)])
def test_rows_and_columns_hold_the_same_bits(shape: tuple[int, int], e5m2: bool) -> None:
    """Sizes of a model, compiled: a compiler once stored other bytes for the columns than for the rows."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    M, F = shape
    dy, gate_up = (torch.randn(M, n, generator=generator, device=DEVICE).bfloat16() for n in (F, 2 * F))
    for scale in (0.0, 16.0):
        q, columns, *_ = quantize(gate_up, _scale(scale), e5m2=e5m2, columns=True)
        assert torch.equal(q.view(torch.uint8).T, columns.view(torch.uint8))
        arguments = (dy, gate_up, _scale(scale), _scale(8.0))
        ours = quantize_swiglu_backward(*arguments, e5m2=e5m2)
        assert torch.equal(ours[0].view(torch.uint8).T, ours[1].view(torch.uint8))
        _close(ours, float8_reference.quantize_swiglu_backward(*arguments, e5m2=e5m2))


def _place(x: Tensor) -> Tensor:
    """Returns the places of 8-bit numbers in their order."""
    bits = x.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def _close(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """All but a few elements, at ties, are equal; those few are one number of the format off."""
    for a, b in zip(ours[:-2], wanted[:-2], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        off = (_place(a) - _place(b)).abs()
        assert (off > 0).sum() <= 1 + a.numel() // 1000
        assert a.numel() == 0 or off.max() <= 1
    _same(ours[-2], wanted[-2])
    # A rounding to 16 bits of a value that differs by a rounding of float32 may go to the other neighbour.
    torch.testing.assert_close(ours[-1][0].amax(), wanted[-1][0].amax(), rtol=0.01, atol=0.0)
    _same_shares(ours[-1], wanted[-1])


def _same_shares(ours: Tensor, wanted: Tensor) -> None:
    """Of the elements that are counted, which are a sample of a large matrix, as many are clamped or become 0."""
    (*some, sample), (*every, numel) = (parts[1:].sum(1).tolist() for parts in (ours, wanted))
    assert numel / 32 <= sample <= numel
    for a, b in zip(some, every, strict=True):
        assert a / max(sample, 1) == pytest.approx(b / max(numel, 1), rel=0.1, abs=1e-4 + 1 / max(sample, 1))


def test_the_registered_ops() -> None:
    """Schema, fake implementation and dispatch, as torch.compile relies on them."""
    x, scale = torch.randn(16, 32, device=DEVICE), _scale(0.0)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.gptperf
    torch.library.opcheck(ops.quantize, (x, scale, True, True, True, None), test_utils=tests)
    torch.library.opcheck(ops.quantize, (x, _scale(2.0), False, False, True, x), test_utils=tests)
    torch.library.opcheck(ops.quantize_swiglu, (x, scale), test_utils=tests)
    arguments = (x[:, :16].contiguous(), x, scale, _scale(1.0), True)
    torch.library.opcheck(ops.quantize_swiglu_backward, arguments, test_utils=tests)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"quantize: found x \(4,\).*wanted \(M, N\)"):
        quantize(torch.ones(4, device=DEVICE), _scale(1.0))
    with pytest.raises(ValueError, match=r"quantize: found scale .*wanted at least one torch.float32"):
        quantize(torch.ones(4, 4, device=DEVICE), torch.ones(1, dtype=torch.float64, device=DEVICE))
