"""Statistics of the gradients and of the update. They are computed on the device, and the host reads them later.

Every figure is a sum, a maximum or a count over elements. So ranks that hold shards compute partial figures, and one
reduction over the ranks gives the figures of the whole model.

No op here waits for the device (except in the first step, which builds the masks), and all ops are deterministic. No op
converts a whole parameter: PyTorch's sum of booleans first makes an int64 copy of them, and its float64 sum of float32
values makes a float64 copy. Therefore rows are summed in float32, and 0-norms replace sums of booleans. Gradients in
bfloat16 are read as they are: a float32 copy of all of them would need twice their memory.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptperf.distributed.buckets import Piece
from gptperf.monitor.events import Gradients

__all__ = ["COMPONENTS", "GradientMonitor", "component_of", "layer_of"]

COMPONENTS = ("attention", "ffn", "norm", "embedding", "lm_head", "other")
_EDGES = range(-40, 8 + 1, 2)  # edges of the histogram, as powers of two
_SMALLEST = 2.0**-149  # the smallest positive float32
_BOUNDS = (_SMALLEST, *(2.0**edge for edge in _EDGES), math.inf)
_LARGE = 1 << 20
# The histogram samples one element in this many of a large parameter: counting all elements would take longer than all
# other figures.
_EVERY = 16
_ROW = 1 << 14  # elements of a row, which is summed in float32; float32 counts exactly to 2^24


def layer_of(name: str) -> str:
    """Returns the layer of a parameter: "embedding", the number of its block, or "head"."""
    head, _, rest = name.partition(".")
    if head == "blocks":
        return rest.partition(".")[0]
    return "head" if head in ("norm", "lm_head") else "embedding"


def component_of(name: str) -> str:
    """Returns the component of a parameter, one of `COMPONENTS`."""
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
    """Measures norms by layer and component, the distribution of the gradients, and the size of the update.

    `measure` measures the gradients before the update. Then `start_update`, `observe` for each bucket and `update`
    measure the update. When the figures are on the host, `record` gives them their names.

    Args:
        names: all parameters, in the same order on every rank.
        numel: elements of all parameters.
        device: device of the gradients.
        summed: returns the sum of a tensor over the ranks; needed if each rank holds a shard.
        largest: returns the maximum of a tensor over the ranks; needed if each rank holds a shard.
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
        self._masks: dict[tuple[str, ...], Tensor] = {}  # by the names of the pieces, which are the same in every step
        self.start_update()

    @torch.no_grad()
    def measure(self, pieces: Iterable[Piece]) -> Tensor:
        """Returns figures of the gradients that the optimizer reads next.

        Args:
            pieces: pieces of the gradients that this rank has, float32 or bfloat16.

        Returns:
            A float64 vector for `record`, on the device. The caller waits for the device when it reads it.
        """
        named = [(name, values) for name, _, _, values in pieces]
        every = [values for _, values in named]
        parts = list(_matrices(every))
        counts = torch.zeros(3, dtype=torch.float64, device=self.device)
        extremes = torch.full((2,), -math.inf, device=self.device)
        if parts:
            totals = torch.cat([part.sum(1, dtype=_wide(part)) for part in parts])
            filled = torch.cat([_filled(part) for part in parts])
            non_finite = torch.cat([_filled(part - part) for part in parts])  # x - x is 0, or NaN if x is not finite
            counts = torch.stack([totals, filled, non_finite]).double().sum(1)
            lows, highs = zip(*(part.aminmax() for part in parts), strict=True)
            extremes = torch.stack([-torch.stack(lows).amin(), torch.stack(highs).amax()])
        squares = self._squares([name for name, _ in named], _norms(every))
        sums = torch.cat([squares, counts, self._distribution(every)])
        return torch.cat([self.summed(sums), self.largest(extremes).double()])

    def _squares(self, names: Sequence[str], norms: Sequence[Tensor]) -> Tensor:
        """Returns sums of squares by layer, then by component: a float64 vector on the device.

        Args:
            names: name of the parameter of each piece.
            norms: 2-norm of each piece, scalars.
        """
        if not norms:
            return torch.zeros(len(self.layers) + len(self.components), dtype=torch.float64, device=self.device)
        key = tuple(names)
        if key not in self._masks:
            rows = [[layer_of(name) == layer for name in names] for layer in self.layers]
            rows += [[component_of(name) == component for name in names] for component in self.components]
            self._masks[key] = torch.tensor(rows, device=self.device)
        # A product with zeros and ones would not do: 0 * inf is NaN, so one bad layer would spoil all layers.
        return torch.where(self._masks[key], torch.stack(list(norms)).double().square(), 0.0).sum(1)

    def _distribution(self, pieces: Iterable[Tensor]) -> Tensor:
        """Returns the number of sampled elements, then how many are below each of `_BOUNDS`: a float64 vector."""
        samples = [values[:: _EVERY if values.numel() >= _LARGE else 1] for values in pieces]
        number = sum(values.numel() for values in samples)
        counts = [torch.full((), number, dtype=torch.float64, device=self.device)]
        # The last row is padded with NaN, which is below no bound. Beside it, `cat` widens bfloat16 to float32.
        samples.append(torch.full((-number % _ROW,), math.nan, device=self.device))
        magnitudes = torch.cat(samples).abs_().view(-1, _ROW)
        flags = torch.empty_like(magnitudes)  # 0 or 1
        counts += [torch.lt(magnitudes, bound, out=flags).sum(1).double().sum() for bound in _BOUNDS]
        return torch.stack(counts)

    def start_update(self) -> None:
        """Forgets the last update."""
        self._observed: list[str] = []
        self._changed: list[Tensor] = []  # 2-norms of the changes of the observed pieces
        self._weights: list[Tensor] = []  # 2-norms of the pieces after the update

    @torch.no_grad()
    def observe(self, before: Iterable[Piece], after: Iterable[Piece]) -> None:
        """Measures the change of one bucket's float32 master weights.

        Args:
            before: pieces before the update; overwritten with the change.
            after: the same pieces after the update.
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
        """Returns the norm of the observed change relative to the norm of the weights, by component, for `record`."""
        sums = [self._squares(self._observed, norms)[len(self.layers) :] for norms in (self._changed, self._weights)]
        changed, weights = self.summed(torch.stack(sums))
        return (changed / weights).sqrt()

    def record(self, global_norm: float, measured: list[float], updated: list[float] | None) -> Gradients:
        """Returns the figures by name.

        Args:
            global_norm: gradient norm before clipping.
            measured: the values of `measure`, on the host.
            updated: the values of `update`, on the host.
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
        """Returns the edges, and the shares of finite nonzero magnitudes below, between and above them."""
        shares = [(high - low) / sampled for low, high in itertools.pairwise(below)]
        return {"log2_edges": list(_EDGES), "shares": shares}


def _wide(values: Tensor) -> torch.dtype:
    """Returns the dtype of sums: at least float32."""
    return torch.promote_types(values.dtype, torch.float32)


def _filled(matrix: Tensor) -> Tensor:
    """Returns the number of elements of each row that are not 0: its 0-norm."""
    return torch.linalg.vector_norm(matrix, 0, 1, dtype=_wide(matrix))


def _norms(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Returns the 2-norm of each piece, in few launches, because the pieces of an op have one dtype."""
    norms: dict[int, Tensor] = {}
    for dtype in {values.dtype for values in pieces}:
        places = [i for i, values in enumerate(pieces) if values.dtype == dtype]
        same = [pieces[i] for i in places]
        norms |= zip(places, torch._foreach_norm(same, 2, _wide(same[0])), strict=True)
    return [norms[i] for i in range(len(pieces))]


def _matrices(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields all elements as matrices with rows of `_ROW` elements; the last matrix may be one shorter row.

    Large pieces are views. Small ones and remainders are copied into one matrix, which saves launches.
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
