"""The draw of a token: the kernel draws what the reference draws, whose distribution `model/test_formula.py` holds."""

import pytest
import torch
from torch import Tensor

from gptperf.kernels import draw as module
from gptperf.kernels import reference
from gptperf.kernels.draw import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorts fewer numbers at once, which takes the interpreter seconds; a row still has several chunks."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "CHUNK", 32)
        monkeypatch.setattr(module, "KEYS", 32)


def logits(rows: int, V: int) -> Tensor:
    """Many equal ones, as bfloat16 has."""
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(V)).mul(12).round().div(4).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.8, 5, 1.0), (1.5, 20, 0.6), (0.0, 0, 1.0), (1e-320, 7, 1.0), (1e300, 3, 0.5)]
)
def test_the_draw_of_the_reference(dtype: torch.dtype, temperature: float, top_k: int, top_p: float) -> None:
    rows = 4 if DEVICE == "cpu" else 200
    x = logits(rows, 91).to(dtype)
    uniform = torch.linspace(0, 1 - 2**-24, rows, device=DEVICE)
    wanted = reference.draw(x, uniform, 83, temperature, top_k, top_p)
    assert torch.equal(draw(x, uniform, 83, temperature, top_k, top_p), wanted)
    assert len(wanted.unique()) > 1


@pytest.mark.gpu
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.8, 50, 1.0), (1.0, 64, 0.9), (0.0, 0, 1.0)])
@pytest.mark.parametrize("V", [65, 50257, 128256])
def test_the_draw_of_the_reference_from_a_models_logits(V: int, temperature: float, top_k: int, top_p: float) -> None:
    """Some numbers may lie between the kernel's sum in float32 and the reference's in float64."""
    rows = 256
    generator = torch.Generator(DEVICE).manual_seed(V)
    x = torch.randn(rows, (V + 63) // 64 * 64, generator=generator, device=DEVICE).mul(3).bfloat16()
    uniform = torch.rand(rows, generator=generator, device=DEVICE)
    found = draw(x, uniform, V, temperature, top_k, top_p)
    wanted = reference.draw(x, uniform, V, temperature, top_k, top_p)
    assert found.max() < V
    assert (found != wanted).sum() <= 2


def test_of_equal_logits_the_lowest_ids_are_drawn() -> None:
    x = torch.zeros(5, 70, device=DEVICE)
    x[:, 3] = -1
    uniform = torch.tensor([0.0, 0.3, 0.5, 0.8, 0.99], device=DEVICE)
    for function in (reference.draw, draw):
        assert function(x, uniform, 64, 1.0, 4, 1.0).tolist() == [0, 1, 2, 4, 4]


def test_few_tokens_that_are_possible_at_all() -> None:
    x = torch.full((3, 40), -torch.inf, device=DEVICE)
    x[:, 17], x[:, 39] = 1.0, 9.0
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24], device=DEVICE)
    for function in (reference.draw, draw):
        assert function(x, uniform, 39, 1.0, 5, 1.0).tolist() == [17] * 3


@pytest.mark.parametrize("top_k", [0, 30, 40])
def test_all_of_a_small_vocabulary(top_k: int) -> None:
    """The reference takes the tokens in the order of their ids then, so the kernel must not take them by their size."""
    x, uniform = logits(16, 30), torch.linspace(0, 1 - 2**-24, 16, device=DEVICE)
    for top_p in (1.0, 0.7):
        wanted = reference.draw(x, uniform, 30, 1.0, top_k, top_p)
        assert torch.equal(draw(x, uniform, 30, 1.0, top_k, top_p), wanted)
        assert len(wanted.unique()) > 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeros_of_both_signs_are_equal(dtype: torch.dtype, temperature: float) -> None:
    x = torch.full((1, 70), -9.0, device=DEVICE, dtype=dtype)
    x[0, 20], x[0, 30] = -0.0, 0.0
    uniform = torch.zeros(1, device=DEVICE)
    for function in (reference.draw, draw):
        assert function(x, uniform, 70, temperature, 2).tolist() == [20]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_that_are_infinitely_likely(dtype: torch.dtype) -> None:
    """Infinity, as from an overflow in float16, and NaN of either sign; no other token of the row has a chance."""
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x[:, 50:] = -torch.inf
    x[:, 7] = x[0, 40] = x[1, 40] = torch.inf
    x[2, 40], x[3, 40] = torch.nan, torch.tensor(torch.nan).copysign(torch.tensor(-1.0))
    uniform = torch.tensor([0.0, 0.51, 0.51, 0.51], device=DEVICE)
    for function in (reference.draw, draw):
        for top_k, top_p in ((0, 1.0), (5, 0.9)):
            assert function(x, uniform, 70, 0.7, top_k, top_p).tolist() == [7, 40, 40, 40]
        assert function(x, uniform, 70, 0.0).tolist() == [7] * 4


def test_more_tokens_than_the_kernel_sorts_are_left_to_the_reference() -> None:
    x, uniform = logits(3, 91), torch.tensor([0.1, 0.5, 0.9], device=DEVICE)
    for top_k, top_p in ((0, 1.0), (65, 0.9), (0, 0.5)):
        wanted = reference.draw(x, uniform, 91, 1.0, top_k, top_p)
        assert torch.equal(draw(x, uniform, 91, 1.0, top_k, top_p), wanted)


def test_arguments_are_checked() -> None:
    x, uniform = logits(3, 91), torch.zeros(3, device=DEVICE)
    for wrong in (
        (x[0], uniform, 91),
        (x, uniform.double(), 91),
        (x, uniform[:2], 91),
        (x, uniform, 92),
        (x, uniform, 0),
        (x, uniform, 91, -1.0),
        (x, uniform, 91, float("nan")),
        (x, uniform, 91, float("inf")),
        (x, uniform, 91, 1.0, -1),
        (x, uniform, 91, 1.0, 5, 0.0),
    ):
        for function in (reference.draw, draw):
            with pytest.raises(ValueError, match="draw: found"):
                function(*wrong)
