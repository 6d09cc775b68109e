"""Health of the gradients and of the update, computed on the device where they lie, read by the host when it likes.

Everything is a sum, a maximum or a count over elements, so that processes with a share each add up to the same figures.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gptperf.monitor.events import Gradients

__all__ = ["COMPONENTS", "GradientMonitor", "component_of", "layer_of"]

COMPONENTS = ("attention", "ffn", "norm", "embedding", "lm_head", "other")
_EXPONENTS = 256  # of float32; the last one means that an element is not finite
_BIAS = 127
_LOW, _HIGH, _WIDTH = -40, 8, 2  # of the histogram, in powers of two
_LARGE, _EVERY = (
    1 << 20,
    16,
)  # it takes every 16th element of a large parameter: counting all takes longer than the rest

Piece = tuple[str, torch.Size, int, Tensor]
"""Name of a parameter, its shape, first element, elements."""


def layer_of(name: str) -> str:
    """The layer of a parameter: "embedding", the number of its block, or "head"."""
    head, _, rest = name.partition(".")
    if head == "blocks":
        return rest.partition(".")[0]
    return "head" if head in ("norm", "lm_head") else "embedding"


def component_of(name: str) -> str:
    """The component of a parameter, one of `COMPONENTS`."""
    parts = name.split(".")
    if parts[0] in ("wte", "position"):
        return "embedding"
    for part in parts[:-1]:
        if "norm" in part and part not in ("q_norm", "k_norm"):
            return "norm"
        if part in ("attention", "ffn", "lm_head"):
            return part
    return "other"


class GradientMonitor:
    """Norms by layer and component, distribution, and the size of the update.

    Args:
        names: of all parameters, in the same order in every process.
        numel: elements of all of them.
        device: where the gradients lie.
        summed: adds a tensor up over processes that have a share each.
        largest: the same for a maximum.
    """

    def __init__(
        self,
        names: Iterable[str],
        numel: int,
        device: torch.device,
        summed: Callable[[Tensor], Tensor] = lambda value: value,
        largest: Callable[[Tensor], Tensor] = lambda value: value,
    ):
        names = list(names)
        self.numel, self.device, self.summed, self.largest = numel, device, summed, largest
        self.layers = list(dict.fromkeys(layer_of(name) for name in names))
        self.components = [c for c in COMPONENTS if c in {component_of(name) for name in names}]
        self._layer = {name: self.layers.index(layer_of(name)) for name in names}
        self._component = {name: self.components.index(component_of(name)) for name in names}
        self._rows: tuple[Tensor, ...] | None = None  # of the pieces, which are the same ones in every step
        self._updates = torch.zeros(2, len(self.components), device=device)

    @torch.no_grad()
    def measure(self, pieces: Iterable[Piece]) -> Tensor:
        """Figures of the gradients that the optimizer is about to take.

        Args:
            pieces: of the float32 gradients, as far as this process has them.

        Returns:
            A float64 vector for `record`, on the device; reading it is the caller's synchronisation.
        """
        named = [(name, values) for name, _, _, values in pieces]
        squares = torch.zeros(len(self.layers) + len(self.components), dtype=torch.float64, device=self.device)
        counts = torch.zeros(3 + _EXPONENTS, dtype=torch.float64, device=self.device)
        extremes = torch.full((2,), -math.inf, device=self.device)
        if named:
            norms = torch.stack(torch._foreach_norm([values for _, values in named])).double().square()
            if self._rows is None:
                offset = len(self.layers)
                rows = [[self._layer[name], offset + self._component[name]] for name, _ in named]
                self._rows = torch.tensor(rows, device=self.device).unbind(1)
            for row in self._rows:
                squares.index_add_(0, row, norms)
        for _, values in named:
            counts[0] += values.sum(dtype=torch.float64)
            counts[1] += (values == 0).sum()
            counts[2] += values.numel() - values.isfinite().sum()
            sampled = values[:: _EVERY if values.numel() >= _LARGE else 1]
            exponents = (sampled.contiguous().view(torch.int32) >> 23) & 0xFF
            counts[3:] += torch.bincount(exponents, minlength=_EXPONENTS)
            low, high = values.aminmax()
            extremes = torch.maximum(extremes, torch.stack([-low, high]))
        return torch.cat([self.summed(squares), self.summed(counts), self.largest(extremes).double()])

    def start_update(self) -> None:
        """Forget the last update."""
        self._updates.zero_()

    @torch.no_grad()
    def observe(self, before: Iterable[Piece], after: Iterable[Piece]) -> None:
        """Take in one bucket's master weights before and after the update."""
        for (name, _, _, old), (_, _, _, new) in zip(before, after, strict=True):
            index = self._component[name]
            self._updates[0, index] += (new - old).square().sum()
            self._updates[1, index] += new.square().sum()

    @torch.no_grad()
    def update(self) -> Tensor:
        """Ratios of the observed update, for `record`, on the device."""
        changed, weights = self.summed(self._updates.clone()).double()
        return (changed / weights).sqrt()

    def record(self, global_norm: float, measured: list[float], updated: list[float] | None) -> Gradients:
        """The figures by name.

        Args:
            global_norm: that clipping went by.
            measured: of `measure`, on the host.
            updated: of `update`, on the host.
        """
        layers, components = len(self.layers), len(self.components)
        norms = [math.sqrt(square) for square in measured[: layers + components]]
        total, zeros, non_finite, *exponents = measured[layers + components : -2]
        mean, squares = total / self.numel, sum(measured[:layers])
        found: Gradients = {
            "global_norm": global_norm,
            "grad_mean": mean,
            "grad_std": math.sqrt(max(squares / self.numel - mean * mean, 0.0)),
            "grad_min": -measured[-2],
            "grad_max": measured[-1],
            "zero_share": zeros / self.numel,
            "non_finite": round(non_finite),
            "layer_norms": dict(zip(self.layers, norms[:layers], strict=True)),
            "component_norms": dict(zip(self.components, norms[layers:], strict=True)),
            "histogram": self._histogram(exponents, zeros / self.numel),
        }
        if updated is not None:
            found["update_ratios"] = dict(zip(self.components, updated, strict=True))
        return found

    @staticmethod
    def _histogram(exponents: list[float], zero_share: float) -> Mapping[str, Any]:
        """Shares of the magnitudes below 2^_LOW, in steps, and from 2^_HIGH on; finite ones that are not zero."""
        edges = list(range(_LOW, _HIGH + 1, _WIDTH))
        bounds = [0, *(edge + _BIAS for edge in edges), _EXPONENTS - 1]
        shares = [sum(exponents[low:high]) / sum(exponents) for low, high in itertools.pairwise(bounds)]
        return {"log2_edges": edges, "shares": [max(0.0, shares[0] - zero_share), *shares[1:]]}
