"""Symmetric products against float64 and eager PyTorch, for sizes that tiles do not divide."""

import pytest
import torch
from kernel_cases import DEVICE
from kernel_rule import check
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gptperf import cards
from gptperf.kernels import reference
from gptperf.kernels.symmetric_matmul import symmetric_matmul
from gptperf.training.optimizers.muon import orthogonalize

SHAPES = [(1, 1, 1), (2, 7, 5), (3, 64, 64), (1, 65, 33), (2, 130, 70), (1, 31, 200), (0, 8, 8), (2, 5, 0)]
SHAPES += [(1, 768, 768), (2, 96, 400), (1, 400, 96)]
LARGE = [(1, 1023, 1025), (2, 2048, 5632), (24, 2048, 2048), (1, 4097, 64)]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    add = torch.randn(shape[0], shape[1], shape[1], generator=generator).to(dtype)
    return x.to(DEVICE), torch.where(add > add.mT, add, add.mT).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.gpu) for shape in LARGE)])
def test_values(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, add = _inputs(shape, dtype)
    columns = x.mT.contiguous().mT  # the columns lie one after another
    for arguments in ((x,), (x, None, add, -0.5, 2.0), (x, None, None, 3.0), (columns,), (columns, columns, add)):
        exact = [y.double() if isinstance(y, Tensor) else y for y in arguments]
        truth = reference.symmetric_matmul(*exact)  # type: ignore[arg-type]
        found, eager = symmetric_matmul(*arguments), reference.symmetric_matmul(*arguments)  # type: ignore[arg-type]
        check(f"symmetric_matmul {shape}", found, eager, truth)
        assert torch.equal(found, found.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_matrices_that_commute(dtype: torch.dtype) -> None:
    """A power times a polynomial of the same matrix, as `orthogonalize` multiplies them."""
    x, _ = _inputs((2, 70, 150), torch.float32)
    gram = reference.symmetric_matmul((x / 12).double())
    power, other = (gram @ gram).to(dtype), (torch.eye(70, device=DEVICE) - 0.5 * gram).to(dtype)
    found, eager = symmetric_matmul(power, other), reference.symmetric_matmul(power, other)
    assert torch.equal(found, found.mT)
    # Rounding makes them commute only nearly, so the upper half may be off by the commutator.
    apart = (power.double() @ other.double() - other.double() @ power.double()).abs().max().item()
    truth = reference.symmetric_matmul(power.double(), other.double())
    check("symmetric_matmul", found, eager, truth, terms=2 * apart / torch.finfo(torch.float32).eps)


@pytest.mark.slow
def test_tiles_of_the_large_kind() -> None:
    """A matrix of 600 rows takes the large tiles."""
    x, add = _inputs((1, 600, 40), torch.float32)
    found, eager = symmetric_matmul(x, None, add, 2.0, 0.5), reference.symmetric_matmul(x, None, add, 2.0, 0.5)
    check("symmetric_matmul", found, eager, reference.symmetric_matmul(x.double(), None, add.double(), 2.0, 0.5))
    assert torch.equal(found, found.mT)


def test_the_number_of_a_tile_gives_its_place() -> None:
    """Many small matrices and one with many tiles: each tile is written once, in the right matrix."""
    x = torch.zeros(2, 64 * 9 + 1, 1, device=DEVICE)
    x[1] = torch.arange(64 * 9 + 1, device=DEVICE)[:, None]
    found = symmetric_matmul(x)
    assert not found[0].any()
    assert torch.equal(found[1], x[1] * x[1].T)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_matrix(value: float) -> None:
    x, add = _inputs((2, 70, 20), torch.float32)
    x[0, 3, 4] = value
    found, eager = symmetric_matmul(x, None, add), reference.symmetric_matmul(x, None, add)
    assert torch.equal(found.isnan(), eager.isnan())
    assert found[1].isfinite().all()


@pytest.mark.parametrize("function", [symmetric_matmul, reference.symmetric_matmul])
def test_bad_arguments(function: object) -> None:
    x, add = _inputs((2, 6, 4), torch.float32)
    bad = [
        (x[0],),
        (x[:, ::2],),
        (x[:, :, 1:],),
        (x, x.mT.contiguous().mT),
        (x.long(),),
        (x, None, add[0]),
        (x, None, add[:, :5]),
        (x, None, add.half()),
        (x, None, x),
    ]
    bad += [(x, add), (x, x[:1]), (x, x.half())]
    for arguments in bad:
        with pytest.raises(ValueError, match=r"symmetric_matmul: found .*, wanted \(.*(contiguous|strides)"):
            function(*arguments)  # type: ignore[operator]


def test_nothing_but_the_result_is_written() -> None:
    x, add = _inputs((2, 66, 30), torch.float32)
    before = x.clone(), add.clone()
    assert torch.equal(symmetric_matmul(x, None, add, 0.5, 2.0), symmetric_matmul(x, None, add, 0.5, 2.0))
    assert torch.equal(x, before[0])
    assert torch.equal(add, before[1])


def test_the_op_is_registered_and_traced() -> None:
    x, add = _inputs((2, 20, 30), torch.float32)
    torch.library.opcheck(torch.ops.gptperf.symmetric_matmul.default, (x, None, add, 0.5, 2.0))
    compiled = torch.compile(symmetric_matmul, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, None, add, 0.5, 2.0), symmetric_matmul(x, None, add, 0.5, 2.0))


@pytest.mark.parametrize("shape", [(2, 40, 48), (2, 40, 72)])
def test_polar_factors_are_those_of_the_reference_at_fewer_flops(shape: tuple[int, int, int]) -> None:
    x, _ = _inputs(shape, torch.float32)
    with FlopCounterMode(display=False) as counted:
        found = orthogonalize(x, symmetric_matmul, torch.float32)
    torch.testing.assert_close(found, orthogonalize(x, reference.symmetric_matmul, torch.float32), rtol=1e-3, atol=1e-4)
    assert counted.get_total_flops() == 2 * cards.OPTIMIZERS["muon"].flops(*shape[1:], True)
    assert (
        0.55
        < cards.OPTIMIZERS["muon"].flops(2048, 2048, True) / cards.OPTIMIZERS["muon"].flops(2048, 2048, False)
        < 0.67
    )
