"""Health of the gradients and of the update, computed on the device where they lie, read by the host when it likes.

Everything is a sum, a maximum or a count over elements, so that processes with a share each add up to the same figures.
No op here waits for the device, but in the first step, or is nondeterministic there, and no parameter is converted as a
whole: PyTorch's sum of booleans begins with an int64 copy of them, its float64 sum of float32 with a float64 one.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptperf.monitor.events import Gradients

__all__ = ["COMPONENTS", "GradientMonitor", "component_of", "layer_of"]

COMPONENTS = ("attention", "ffn", "norm", "embedding", "lm_head", "other")
_EDGES = range(-40, 8 + 1, 2)  # of the histogram, in powers of two
_SMALLEST = 2.0**-149  # of float32, above zero
_BOUNDS = (_SMALLEST, *(2.0**edge for edge in _EDGES), math.inf)
_LARGE = 1 << 20
_EVERY = 16  # so many elements of a large parameter one is in the histogram: counting all takes longer than the rest
_ROW = 1 << 14  # elements that are added up in float32, which counts to 2^24

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
        self._masks: dict[tuple[str, ...], Tensor] = {}  # by pieces, which are the same ones in every step
        self.start_update()

    @torch.no_grad()
    def measure(self, pieces: Iterable[Piece]) -> Tensor:
        """Figures of the gradients that the optimizer is about to take.

        Args:
            pieces: of the float32 gradients, as far as this process has them.

        Returns:
            A float64 vector for `record`, on the device; reading it is the caller's synchronisation.
        """
        named = [(name, values) for name, _, _, values in pieces]
        every = [values for _, values in named]
        parts = list(_matrices(every))
        counts = torch.zeros(3, dtype=torch.float64, device=self.device)
        extremes = torch.full((2,), -math.inf, device=self.device)
        if parts:
            totals = torch.cat([part.sum(1) for part in parts])
            filled = torch.cat([torch.linalg.vector_norm(part, 0, 1) for part in parts])
            # x - x is 0 or, where x is not finite, NaN; the 0-norm counts what is not 0.
            non_finite = torch.cat([torch.linalg.vector_norm(part - part, 0, 1) for part in parts])
            counts = torch.stack([totals, filled, non_finite]).double().sum(1)
            lows, highs = zip(*(part.aminmax() for part in parts), strict=True)
            extremes = torch.stack([-torch.stack(lows).amin(), torch.stack(highs).amax()])
        squares = self._squares([name for name, _ in named], torch._foreach_norm(every) if every else [])
        sums = torch.cat([squares, counts, self._distribution(every)])
        return torch.cat([self.summed(sums), self.largest(extremes).double()])

    def _squares(self, names: Sequence[str], norms: Sequence[Tensor]) -> Tensor:
        """2-norms of pieces, scalars, to sums of squares by layer, then by component: float64 on the device."""
        if not norms:
            return torch.zeros(len(self.layers) + len(self.components), dtype=torch.float64, device=self.device)
        key = tuple(names)
        if key not in self._masks:
            rows = [[layer_of(name) == layer for name in names] for layer in self.layers]
            rows += [[component_of(name) == component for name in names] for component in self.components]
            self._masks[key] = torch.tensor(rows, device=self.device)
        # Not a product with zeros and ones: what is not finite would then be in every layer.
        return torch.where(self._masks[key], torch.stack(list(norms)).double().square(), 0.0).sum(1)

    def _distribution(self, pieces: Iterable[Tensor]) -> Tensor:
        """How many elements the histogram takes, then how many of them are below each of `_BOUNDS`: float64."""
        samples = [values[:: _EVERY if values.numel() >= _LARGE else 1] for values in pieces]
        number = sum(values.numel() for values in samples)
        counts = [torch.full((), number, dtype=torch.float64, device=self.device)]
        # NaN is below nothing, so that it can fill the last row.
        samples.append(torch.full((-number % _ROW,), math.nan, device=self.device))
        magnitudes = torch.cat(samples).abs_().view(-1, _ROW)
        flags = torch.empty_like(magnitudes)  # 0 or 1
        counts += [torch.lt(magnitudes, bound, out=flags).sum(1).double().sum() for bound in _BOUNDS]
        return torch.stack(counts)

    def start_update(self) -> None:
        """Forget the last update."""
        self._observed: list[str] = []
        self._changed: list[Tensor] = []  # 2-norms of the observed pieces' changes
        self._weights: list[Tensor] = []  # and of what they are now

    @torch.no_grad()
    def observe(self, before: Iterable[Piece], after: Iterable[Piece]) -> None:
        """Take in one bucket's float32 master weights before and after the update.

        Args:
            before: is overwritten, with what has been taken from the weights.
            after: the same pieces.
        """
        before, after = list(before), list(after)
        if not after:
            return
        old, new = ([values for _, _, _, values in pieces] for pieces in (before, after))
        torch._foreach_sub_(old, new)
        self._observed += [name for name, _, _, _ in after]
        self._changed += torch._foreach_norm(old)
        self._weights += torch._foreach_norm(new)

    @torch.no_grad()
    def update(self) -> Tensor:
        """Ratios of the observed update, for `record`, on the device."""
        sums = [self._squares(self._observed, norms)[len(self.layers) :] for norms in (self._changed, self._weights)]
        changed, weights = self.summed(torch.stack(sums))
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
        total, filled, non_finite, sampled, *below = measured[layers + components : -2]
        mean, squares = total / self.numel, sum(measured[:layers])
        found: Gradients = {
            "global_norm": global_norm,
            "grad_mean": mean,
            "grad_std": math.sqrt(max(squares / self.numel - mean * mean, 0.0)),
            "grad_min": -measured[-2],
            "grad_max": measured[-1],
            "zero_share": (self.numel - filled) / self.numel,
            "non_finite": round(non_finite),
            "layer_norms": dict(zip(self.layers, norms[:layers], strict=True)),
            "component_norms": dict(zip(self.components, norms[layers:], strict=True)),
            "histogram": self._histogram(sampled, below),
        }
        if updated is not None:
            found["update_ratios"] = dict(zip(self.components, updated, strict=True))
        return found

    @staticmethod
    def _histogram(sampled: float, below: list[float]) -> Mapping[str, Any]:
        """Shares of the magnitudes below the first edge, in steps, and from the last one on; finite and not zero."""
        shares = [(high - low) / sampled for low, high in itertools.pairwise(below)]
        return {"log2_edges": list(_EDGES), "shares": shares}


def _matrices(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """All elements in matrices with rows of `_ROW`, and the last ones in a shorter row.

    A large piece is read where it lies. Small ones and remainders are copied together, which saves launches.
    """
    rest = []
    for values in pieces:
        whole = values.numel() // _ROW * _ROW if values.numel() >= _LARGE else 0
        if whole:
            yield values[:whole].view(-1, _ROW)
        rest.append(values[whole:])
    if rest:
        joined = torch.cat(rest)
        whole = joined.numel() // _ROW * _ROW
        parts = joined[:whole].view(-1, _ROW), joined[whole:].view(1, -1)
        yield from (part for part in parts if part.numel())
