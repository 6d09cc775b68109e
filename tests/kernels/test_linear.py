"""The one GEMM has the bits and aten ops of PyTorch, forward and backward, and no other code multiplies matrices."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptperf.config import ModelConfig
from gptperf.config.presets import PRESETS
from gptperf.kernels.linear import bias_grad, dgrad, linear, operand_dtype, wgrad
from gptperf.model import GPT
from gptperf.model.linear import Linear

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {
    "vector": lambda x: x[0, 0],
    "matrix": lambda x: x[0],
    "batch": lambda x: x,
    "transposed batch": lambda x: x.transpose(0, 1),
    "column slice": lambda x: torch.cat([x, x], -1)[..., 3:-3],
}


class AtenOps(TorchDispatchMode):
    """Records the name of every op that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(op.name())
        return op(*args, **(kwargs or {}))


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _layers(features: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    ours, theirs = Linear(features, 12, bias=bias).to(DEVICE), nn.Linear(features, 12, bias=bias).to(DEVICE)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layer_is_pytorchs(layout: str, bias: bool, autocast: torch.dtype | None) -> None:
    """The same bits by the same ops in the same order."""
    x = LAYOUTS[layout](_normal(0, 3, 5, 20))
    results, ops = [], []
    for layer in _layers(x.shape[-1], bias):
        leaf = x.detach().requires_grad_()
        with AtenOps() as recorded:
            with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
                y = layer(leaf)
            y.backward(_normal(1, *y.shape).to(y.dtype))
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
        ops.append(recorded.found)
    assert ops[0] == ops[1]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["matrix", "batch", "transposed batch"])
def test_the_backward_products_are_pytorchs_gradients(layout: str, dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype).requires_grad_() for t in (_normal(0, 3, 5, 20), _normal(1, 12, 20), _normal(2, 12)))
    x = LAYOUTS[layout](x.detach()).requires_grad_()
    y = F.linear(x, weight, bias)
    dy = _normal(3, *y.shape).to(dtype)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], dy)
    assert torch.equal(dgrad(dy, weight), dx)
    assert torch.equal(wgrad(dy, x), dweight)
    assert torch.equal(bias_grad(dy), dbias)


def test_results_are_written_where_they_belong() -> None:
    x, weight, dy = _normal(0, 7, 20), _normal(1, 12, 20), _normal(2, 7, 12)
    out, dx, dweight = torch.empty(7, 12).to(DEVICE), torch.empty(7, 20).to(DEVICE), torch.empty(12, 20).to(DEVICE)
    assert linear(x, weight, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, linear(x, weight))
    assert dgrad(dy, weight, out=dx).data_ptr() == dx.data_ptr()
    assert torch.equal(dx, dgrad(dy, weight))
    assert wgrad(dy, x, out=dweight).data_ptr() == dweight.data_ptr()
    assert torch.equal(dweight, wgrad(dy, x))
    wgrad(dy, x, out=dweight, add=True)
    torch.testing.assert_close(dweight, 2 * wgrad(dy, x))


def test_low_precision_products_are_rounded_once_into_float32() -> None:
    x, weight, dy = (t.half() for t in (_normal(0, 7, 20), _normal(1, 12, 20), _normal(2, 7, 12)))
    dx, dweight = torch.empty(7, 20).to(DEVICE), torch.ones(12, 20).to(DEVICE)
    dgrad(dy, weight, out=dx)
    wgrad(dy, x, out=dweight, add=True)
    torch.testing.assert_close(dx, dgrad(dy.float(), weight.float()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dweight, 1 + wgrad(dy.float(), x.float()), rtol=1e-6, atol=1e-6)


def test_operands_follow_autocast() -> None:
    x = _normal(0, 2, 3)
    assert operand_dtype(x) is torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        assert operand_dtype(x) is torch.bfloat16


def test_every_linear_layer_of_a_model_is_ours() -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 20}
    for preset in PRESETS.values():
        model = GPT(ModelConfig(**(sizes | preset)))  # type: ignore[arg-type]
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        assert len(layers) == 5
        assert all(type(layer) is Linear for layer in layers)


def test_nothing_multiplies_matrices_past_it() -> None:
    """No kernel file and no model file has a product of its own."""
    products = {"linear", "mm", "addmm", "matmul", "bmm", "baddbmm", "Linear"}
    for path in (*(ROOT / "kernels").glob("*.py"), *(ROOT / "gptperf" / "model").glob("*.py")):
        if path.name == "linear.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in products, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
