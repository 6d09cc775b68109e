"""Attention of one new token over a cache: the kernel and the reference against the formula, written out in float64."""

import math
from typing import Any

import pytest
import torch
from kernel_rule import check
from torch import Tensor

from gptperf.kernels import decode_attention as module
from gptperf.kernels import reference
from gptperf.kernels.decode_attention import decode_attention, splits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
OPTIONS: list[dict[str, Any]] = [
    {"heads": (4, 2, 8), "size": 40, "rope": True},
    {"heads": (3, 1, 16), "size": 600, "rope": True, "norm": True, "interleaved": True},
    {"heads": (2, 2, 7), "size": 20, "window": 5},
    {"heads": (4, 1, 64), "size": 300, "norm": True, "window": 100},
]
OF_MODELS: list[dict[str, Any]] = [
    {"heads": (12, 12, 64), "size": 1024},
    {"heads": (16, 16, 128), "size": 2048, "rope": True},
    {"heads": (32, 8, 128), "size": 8192, "rope": True, "norm": True},
    {"heads": (16, 4, 128), "size": 4096, "rope": True, "interleaved": True, "window": 512},
]
EPS = 1e-5


def arguments(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A row at the first, one at a middle and one at the last position of the cache."""
    H, K, D = options["heads"]
    S, make = options["size"], torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(DEVICE)

    found: dict[str, Any] = {"qkv": normal(3, 1, (H + 2 * K) * D).to(dtype)}
    found["positions"] = torch.tensor([0, S // 2, S - 1], device=DEVICE)
    found |= {name: normal(3, S, K, D).to(dtype) for name in ("keys", "values")}
    if options.get("rope"):
        angles = 3 * normal(S, D // 2)
        found |= {"cos": angles.cos(), "sin": angles.sin(), "interleaved": options.get("interleaved", False)}
    if options.get("norm"):
        found |= {name: (1 + normal(D) / 4).to(dtype) for name in ("q_weight", "k_weight")}
    return {**found, "eps": EPS, "window": options.get("window", 0)}


def called(function: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the cache after the call."""
    mine = {name: x.clone() if name in ("keys", "values") else x for name, x in given.items()}
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # the kernel just before must not write the cache
    return function(**mine), mine["keys"], mine["values"]


def truth(given: dict[str, Any], heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, for one head of one row after the other, in float64."""
    H, K, D = heads
    rows = given["qkv"].double().view(3, H + 2 * K, D)
    keys, values, y = given["keys"].double().clone(), given["values"].double().clone(), rows.new_zeros(3, H, D)

    def prepared(x: Tensor, name: str, position: int) -> Tensor:
        if name in given:
            x = x * (x.square().mean() + EPS).rsqrt() * given[name].double()
        if "cos" not in given:
            return x
        pairs = x.view(-1, 2) if given["interleaved"] else x.view(2, -1).T
        turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(
            given["cos"][position].double(), given["sin"][position].double()
        )
        real = torch.view_as_real(turned)
        return real.flatten() if given["interleaved"] else real.T.flatten()

    for row, position in enumerate(given["positions"].tolist()):
        begin = max(0, position + 1 - given["window"]) if given["window"] else 0
        for kv in range(K):
            keys[row, position, kv] = prepared(rows[row, H + kv], "k_weight", position)
            values[row, position, kv] = rows[row, H + K + kv]
        for head in range(H):
            kv = head // (H // K)
            q = prepared(rows[row, head], "q_weight", position)
            weights = (keys[row, begin : position + 1, kv] @ q / math.sqrt(D)).softmax(0)
            y[row, head] = weights @ values[row, begin : position + 1, kv]
    return y.view(3, 1, H * D), keys, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*OPTIONS, *(pytest.param(x, marks=pytest.mark.gpu) for x in OF_MODELS)], ids=str)
def test_kernel_and_reference_compute_the_formula(options: dict[str, Any], dtype: torch.dtype) -> None:
    given = arguments(options, dtype)
    exact = truth(given, options["heads"])
    eager, kernel = called(reference.decode_attention, given), called(decode_attention, given)
    for name, mine, theirs, wanted in zip(("y", "keys", "values"), kernel, eager, exact, strict=True):
        check(f"decode_attention: {name}", mine, theirs, wanted)
        assert (theirs.double() - wanted).abs().max() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("programs", [1, 264])
def test_keys_that_take_several_tiles(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few programs each loads a tile ahead; with many sequences a head has one, which loads none ahead."""
    given = arguments(OPTIONS[1], torch.float32)
    monkeypatch.setattr(module, "TILE", 1)  # the smallest tiles
    monkeypatch.setattr(module, "PROGRAMS", programs)
    exact = truth(given, OPTIONS[1]["heads"])
    eager, kernel = called(reference.decode_attention, given), called(decode_attention, given)
    for name, mine, theirs, wanted in zip(("y", "keys", "values"), kernel, eager, exact, strict=True):
        check(f"decode_attention: {name}", mine, theirs, wanted)


def test_only_the_new_position_of_the_cache_is_written() -> None:
    given = arguments(OPTIONS[0], torch.float32)
    for function in (reference.decode_attention, decode_attention):
        _, keys, values = called(function, given)
        for name, after in (("keys", keys), ("values", values)):
            changed = (after != given[name]).flatten(2).any(2)
            assert changed.nonzero().tolist() == [[i, p] for i, p in enumerate(given["positions"].tolist())]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [1, 2, 300])
def test_what_is_not_finite_stays_in_its_row_as_in_eager(size: int, value: float) -> None:
    """In the query or the key of a row, which may be the first token: softmax of one such score is NaN too."""
    heads = H, _, D = (3, 1, 16)
    given = arguments({"heads": heads, "size": size}, torch.float32)
    qkv = given["qkv"]
    qkv[0, 0, 0] = value * qkv[0, 0, H * D].sign()  # of the first head's query; the score is not -inf
    qkv[1, 0, H * D] = torch.nan  # of the key, so of all heads
    eager, kernel = called(reference.decode_attention, given), called(decode_attention, given)
    for mine, theirs in zip(kernel, eager, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert kernel[0][0].isnan().nonzero()[:, -1].tolist() == list(range(D))
    assert kernel[0][1].isnan().all()
    assert kernel[0][2].isfinite().all()


def test_no_sequences() -> None:
    given = arguments(OPTIONS[0], torch.float32)
    none = {name: given[name][:0] for name in ("qkv", "positions", "keys", "values")}
    for function in (reference.decode_attention, decode_attention):
        assert function(**(given | none)).shape == (0, 1, 4 * 8)


def test_what_follows_the_position_does_not_count() -> None:
    """The cache after it holds padding, or the tokens of a longer text before."""
    given = arguments(OPTIONS[1], torch.float32)
    other = dict(given)
    for name in ("keys", "values"):
        other[name] = given[name].clone()
        for row, position in enumerate(given["positions"].tolist()):
            other[name][row, position:] = 1e4
    for function in (reference.decode_attention, decode_attention):
        assert torch.equal(called(function, given)[0], called(function, other)[0])


def test_positions_in_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that are copied first are written by the kernel just before, so the launch must not be early."""
    given, early = arguments(OPTIONS[0], torch.float32), list[bool]()
    launched = module.launch

    def launch(*launched_with: Any) -> None:
        early.append(launched_with[-1]["EARLY"])
        launched(*launched_with)

    monkeypatch.setattr(module, "launch", launch)
    wanted = called(decode_attention, given)
    wide = torch.stack([given["positions"], torch.full_like(given["positions"], -1)], dim=1)
    found = called(decode_attention, given | {"positions": wide[:, 0]})
    assert all(map(torch.equal, found, wanted))
    assert early == [True, False]


def test_a_head_is_shared_when_multiprocessors_are_idle() -> None:
    assert splits(12, 528) == 5  # one sequence of GPT-2
    assert splits(12, 100) == 1
    assert splits(384, 1024) == 1  # 32 sequences
    assert splits(16, 1 << 20) == 16


def test_arguments_are_checked() -> None:
    given = arguments(OPTIONS[0], torch.float32)
    for wrong in (
        {"positions": given["positions"].int()},
        {"keys": given["keys"].double()},
        {"values": given["values"][:, 1:]},
        {"qkv": given["qkv"][..., 1:]},
        {"sin": None},
        {"keys": given["keys"][:2]},
        {"keys": given["keys"][:, :, :0], "values": given["values"][:, :, :0]},
        {"keys": given["keys"][..., :0], "values": given["values"][..., :0]},
        {"window": -1},
    ):
        for function in (reference.decode_attention, decode_attention):
            with pytest.raises(ValueError, match="decode_attention: found"):
                function(**(given | wrong))
    given = arguments(OPTIONS[3], torch.float32)
    for function in (reference.decode_attention, decode_attention):
        with pytest.raises(ValueError, match="decode_attention: found only one of q_weight and k_weight"):
            function(**(given | {"k_weight": None}))
        for name in ("q_weight", "k_weight"):  # a smaller one would be read beyond its end
            for wrong_weight in (given[name][1:], given[name].double(), given[name][None]):
                with pytest.raises(ValueError, match=f"decode_attention: found {name}"):
                    function(**(given | {name: wrong_weight}))
