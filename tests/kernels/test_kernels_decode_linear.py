"""A linear layer of a few rows: the kernel against eager and float64, with every norm and activation."""

from typing import Any

import pytest
import torch
from kernel_rule import check
from torch import Tensor

from gptperf.kernels import decode_linear as module
from gptperf.kernels import reference
from gptperf.kernels.checks import ACTIVATIONS, DECODE_ROWS, DECODE_WIDTH
from gptperf.kernels.decode_linear import PROGRAMS, decode_linear, program_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
OPTIONS: list[dict[str, Any]] = [
    {"sizes": (1, 40, 48)},
    {"sizes": (DECODE_ROWS, 7, 33), "bias": True, "residual": True},
    {"sizes": (2, 130, 17), "norm": True, "residual": True},
    {"sizes": (1, 24, 96), "norm": True, "center": True, "activation": "gelu"},
    {"sizes": (3, 9, 20), "norm": True, "center": True, "norm_bias": True, "bias": True, "activation": "gelu_tanh"},
    {"sizes": (2, 22, 64), "norm": True, "activation": "swiglu"},
    {"sizes": (3, 6, 16), "bias": True, "activation": "swiglu", "residual": True},
    *({"sizes": (1, 5, 16), "bias": True, "activation": name} for name in ("silu", "relu", "leaky_relu")),
    {"sizes": (1, 1, 1), "activation": "relu_squared"},
]
OF_MODELS: list[dict[str, Any]] = [
    {"sizes": (1, 2304, 768), "norm": True, "center": True},
    {"sizes": (4, 768, 3072), "residual": True},
    {"sizes": (1, 50304, 768)},
    {"sizes": (1, 11264, 2048), "norm": True, "activation": "swiglu"},
    {"sizes": (DECODE_ROWS, 2048, 5632), "residual": True},
    {"sizes": (2, 1000, 8192), "norm": True, "center": True, "norm_bias": True, "activation": "gelu"},
    {"sizes": (1, 300, DECODE_WIDTH), "norm": True, "center": True, "norm_bias": True},
]
GPU_ONLY = [pytest.param(options, marks=pytest.mark.gpu) for options in OF_MODELS]


def arguments(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    M, N, K = options["sizes"]
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(DEVICE)

    name = options.get("activation", "")
    found: dict[str, Any] = {"x": (2 * normal(M, 1, K) + 0.5).to(dtype), "weight": (normal(N, K) / K**0.5).to(dtype)}
    if options.get("bias"):
        found["bias"] = normal(N)  # vectors are float32, or have the dtype of matrices
    if options.get("norm"):
        found["norm_weight"] = 1 + normal(K) / 4
    if options.get("norm_bias"):
        found["norm_bias"] = (normal(K) / 4).to(dtype)
    if options.get("residual"):
        found["residual"] = normal(M, 1, N // 2 if name == "swiglu" else N).to(dtype)
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # the kernel just before must not write the weights
    return {**found, "center": options.get("center", False), "activation": name}


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*OPTIONS, *GPU_ONLY], ids=str)
def test_the_kernel_is_as_exact_as_eager(options: dict[str, Any], dtype: torch.dtype) -> None:
    given = arguments(options, dtype)
    exact = reference.decode_linear(**doubled(given))
    check("decode_linear", decode_linear(**given), reference.decode_linear(**given), exact)


def test_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied first is written by the kernel just before, so a launch with such weights must not be early."""
    given, early = arguments(OPTIONS[4], torch.float32), list[bool]()
    launched = module.launch

    def launch(*launched_with: Any) -> None:
        early.append(launched_with[-1]["EARLY"])
        launched(*launched_with)

    monkeypatch.setattr(module, "launch", launch)
    wanted = decode_linear(**given)
    for name in ("x", "weight", "bias", "norm_weight", "norm_bias"):
        wide = torch.full((*given[name].shape[:-1], 2 * given[name].shape[-1]), torch.nan, device=DEVICE)
        wide = wide.to(given[name].dtype)
        wide[..., ::2] = given[name]
        assert torch.equal(decode_linear(**given | {name: wide[..., ::2]}), wanted)
    assert early == [True, True, False, False, False, False]


def test_the_reference_is_the_layers_of_a_block() -> None:
    """Norm, linear layer, activation and residual, one after the other."""
    given = arguments(OPTIONS[4], torch.float64)
    norm = reference.layer_norm(given["x"], given["norm_weight"], given["norm_bias"].double())
    y = torch.nn.functional.linear(norm, given["weight"], given["bias"].double())  # type: ignore[arg-type]
    assert torch.equal(reference.decode_linear(**given), torch.nn.functional.gelu(y, approximate="tanh"))
    given = arguments(OPTIONS[2], torch.float64)
    y = reference.rms_norm(given["x"], given["norm_weight"]) @ given["weight"].T  # type: ignore[operator]
    torch.testing.assert_close(reference.decode_linear(**given), y + given["residual"])


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    """A sequence gets the same bits in every batch that the kernel takes."""
    given = arguments(OPTIONS[4] | {"sizes": (DECODE_ROWS, 9, 20)}, torch.float32)
    whole = decode_linear(**given)
    assert torch.isfinite(whole).all()
    for row in range(DECODE_ROWS):
        assert torch.equal(decode_linear(**given | {"x": given["x"][row : row + 1]}), whole[row : row + 1])


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[5]], ids=str)
def test_registration(options: dict[str, Any]) -> None:
    given = arguments(options, torch.float32)
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "eps", "center", "activation", "residual")
    values = tuple(given.get(name, 1e-5 if name == "eps" else None) for name in names)
    op = torch.ops.gptperf.decode_linear.default
    torch.library.opcheck(op, values, test_utils=("test_schema", "test_faketensor"))


def test_no_rows_and_no_outputs() -> None:
    x, weight = torch.ones(0, 1, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    for function in (reference.decode_linear, decode_linear):
        assert function(x, weight).shape == (0, 1, 3)
        assert function(torch.ones(2, 4, device=DEVICE), weight[:0]).shape == (2, 0)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("K", [1, 64, 768, 2048, 3072, 5632, 8192, 14336, DECODE_WIDTH])
def test_small_layers_have_a_program_for_every_multiprocessor(K: int, element_size: int) -> None:
    for N in (768, 2048, 50304):
        for matrices in (1, 2):
            shape = program_shape(N, K, element_size, matrices)
            assert shape["BLOCK_K"] >= K
            assert shape["BLOCK_N"] == 1 or N / shape["BLOCK_N"] > PROGRAMS - 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(DECODE_ROWS + 1, 4)}, f"at most {DECODE_ROWS} rows"),
        ({"x": torch.ones(1, DECODE_WIDTH + 1)}, f"1 to {DECODE_WIDTH} columns"),
        ({"x": torch.ones(1, 4).int()}, "floating-point"),
        ({"weight": torch.ones(6, 5)}, r"wanted \(N, 4\)"),
        ({"weight": torch.ones(6, 4).double()}, r"wanted \(N, 4\) torch.float32"),
        ({"bias": torch.ones(5)}, "bias"),
        ({"norm_weight": torch.ones(6)}, "norm_weight"),
        ({"norm_bias": torch.ones(4), "norm_weight": torch.ones(4)}, "norm_bias"),
        ({"activation": "tanh"}, f"wanted '', swiglu or one of {', '.join(ACTIVATIONS)}"),
        ({"activation": "swiglu", "weight": torch.ones(5, 4)}, "an even number for swiglu; nearest: 6"),
        ({"residual": torch.ones(1, 5)}, "residual"),
        ({"residual": torch.ones(1, 6), "activation": "swiglu"}, "residual"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_arguments_are_checked(wrong: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(1, 4), "weight": torch.ones(6, 4)} | wrong
    given = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}
    for function in (reference.decode_linear, decode_linear):
        with pytest.raises(ValueError, match=f"decode_linear: found.*{message}"):
            function(**given)
