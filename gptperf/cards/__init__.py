"""Cards: what each component and optimizer costs, stated once, in plain numbers and without torch.

A card states the parameters of its component, its matmuls, the FLOPs of its element-wise work, the elements that it
moves through GPU memory and the elements that autograd keeps for the backward pass. `gptperf.flops`, `gptperf.plan`,
the measured ceilings, the self-test and the bench add up the cards of a model; `gptperf.registry` maps the name of a
component to its card. A card's methods take sizes, never a configuration or a tensor.

A plugin passes its own card to `registry.register`: an instance of one of these classes, or of a subclass.

Sizes: T tokens, C n_embd, H query heads, K key and value heads, D head_dim, F FFN width, L n_layer. HD and KD are the
products, the widths of the queries and of the keys.
"""

from gptperf.cards.activation import Activation
from gptperf.cards.attention import AttentionBackend, causal_pairs, projections
from gptperf.cards.block import Block
from gptperf.cards.common import COMMON_COSTS
from gptperf.cards.ffn import FFN
from gptperf.cards.norm import RMSNORM, Norm
from gptperf.cards.optimizer import OPTIMIZERS, Optimizer
from gptperf.cards.position import PositionEncoding
from gptperf.cards.quantities import (
    BUCKET_NUMEL,
    FP32_BYTES,
    Cost,
    Implementation,
    Matmul,
    Moved,
    element_bytes,
)

__all__ = [
    "BUCKET_NUMEL",
    "COMMON_COSTS",
    "FFN",
    "FP32_BYTES",
    "OPTIMIZERS",
    "RMSNORM",
    "Activation",
    "AttentionBackend",
    "Block",
    "Cost",
    "Implementation",
    "Matmul",
    "Moved",
    "Norm",
    "Optimizer",
    "PositionEncoding",
    "causal_pairs",
    "element_bytes",
    "projections",
]
