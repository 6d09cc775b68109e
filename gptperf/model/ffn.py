"""Feed-forward networks. Shapes: B batch, T tokens, C n_embd, F FFN width."""

from torch import Tensor, nn

from gptperf import registry
from gptperf.cards import Activation
from gptperf.config import ModelConfig
from gptperf.kernels.float8_linear import float8_swiglu
from gptperf.model.linear import Linear
from gptperf.ops import Ops
from gptperf.registry import built_in, component

__all__ = ["StandardFFN", "SwiGLU"]


@built_in("ffn_type", "standard")
class StandardFFN(nn.Module):
    """The FFN of GPT-2: up projection, activation, down projection. An op runs gptperf's own activations."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.up = Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.out = Linear(config.ffn_width, config.n_embd, bias=config.bias)
        self.activation, self.name = component("activation", config.activation), config.activation
        card: Activation | None = registry.card("activation", config.activation)
        self.op = None if card is None or card.op is None else getattr(ops, card.op)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output `(B, T, C)` for x `(B, T, C)`."""
        if self.op is None:  # an activation of a plugin
            return self.out(self.activation(self.up(x)))
        if self.out.float8 is not None:
            return self.out(self.op(self.up(x), self.name))
        return self.op(self.up(x), self.name, self.out.weight, self.out.bias)

    @property
    def projections(self) -> tuple[Linear, Linear]:
        """The projections into and out of the FFN width."""
        return self.up, self.out


@built_in("ffn_type", "swiglu")
class SwiGLU(nn.Module):
    """SwiGLU (Shazeer, 2020, eq. 6): silu(gate) * up and the down projection; gate and up are one projection."""

    name = "swiglu"

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        F = config.ffn_width
        self.gate_up = Linear(config.n_embd, 2 * F, bias=config.bias, packed=(F, F))
        self.out = Linear(F, config.n_embd, bias=config.bias)
        self.op = ops.swiglu

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output `(B, T, C)` for x `(B, T, C)`."""
        up, down = self.gate_up, self.out
        if up.float8 is not None and down.float8 is not None:
            return float8_swiglu(x, up.weight, up.bias, down.weight, down.bias, up.float8, down.float8)
        if down.float8 is not None:
            return down(self.op(up(x)))
        return self.op(up(x), down.weight, down.bias)

    @property
    def projections(self) -> tuple[Linear, Linear]:
        """The projections into and out of the FFN width."""
        return self.gate_up, self.out
