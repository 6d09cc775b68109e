"""Muon for the matrices of the blocks: momentum whose singular values are all moved close to 1. AdamW for the rest.

    m = mu m + (1 - mu) g',   u = mu m + (1 - mu) g'                   Nesterov momentum; g' is the clipped gradient
    O = polar(u)                                                       U V^T of the singular value decomposition of u
    w = w (1 - lr decay) - lr 0.2 sqrt(max(rows, columns)) O

The elements of O have the root mean square 1 / sqrt(max(rows, columns)), so those of the update have 0.2 lr, which is
about that of AdamW's update: one learning rate serves both (Liu et al., 2025, section 2.2). With `normuon` each row of
O is divided by the root of its mean square, averaged over steps, and O is scaled back to that root mean square (Li et
al., 2025, algorithm 1). With `cautious_weight_decay` a weight decays only if the update moves it towards zero (Chen et
al., 2025).

Polar factors are computed by `orthogonalize`, in batches of equal shapes, in float16 unless the compute dtype is
float32. Between gradient and update everything is in one scratch buffer of the bucket: the copy that the model reads,
which the update writes anyway, if that is bfloat16, else the gradient.

Sources: Jordan et al., 2024, kellerjordan.github.io/posts/muon; Amsel et al., 2025, arXiv 2505.16932 (Polar Express).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptperf.config import OptimizerConfig
from gptperf.distributed.buckets import Bucket, BucketGroup, gradient_of
from gptperf.distributed.matrices import Matrix
from gptperf.distributed.replicated import Replicated
from gptperf.kernels.linear import add_product
from gptperf.ops import Ops
from gptperf.training.optimizers.adamw import AdamW

__all__ = ["BAND", "Muon", "orthogonalize", "scaled_to_norm"]

UPDATE_RMS = 0.2
"""Root mean square of the elements of an update, in units of the learning rate."""
_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Five polynomials a s + b s^3 + c s^5 of Polar Express, with a margin of 2% for rounding. Together
they take singular values from `LEAST` to 1 into `BAND`, and smaller ones to a thousand times what they were."""
LEAST, BAND = 1e-3, (0.8588, 1.1412)
_MARGIN = 1.02
_TINY = 1e-15
"""Added to a norm: matrices whose norm is 0, or so small that its square is, get no update."""
_LARGEST_SCALE = 32
_LONG = 1.5
"""From this ratio of the sides on, steps are joined (`_joined`)."""
_CHUNK = 1 << 27
"""Most elements of a batch of matrices, unless one matrix alone has more."""
_Norms = Callable[[Tensor, float, torch.dtype], Tensor]


def orthogonalize(
    x: Tensor,
    symmetric_matmul: Callable[..., Tensor],
    dtype: torch.dtype,
    factor: float = 1.0,
    norms: _Norms | None = None,
) -> Tensor:
    """Returns approximate polar factors: the singular vectors of each matrix with singular values in `BAND`.

    Args:
        x: `(B, R, C)`, contiguous. Singular values below `LEAST` of the Frobenius norm get below `BAND`.
        symmetric_matmul: the op.
        dtype: dtype of the products: float32, or float16, whose range is wide enough for matrices of this norm. Its
            rounding error is an eighth of bfloat16's, and so is the error of the result.
        factor: multiplies the result.
        norms: `scaled_to_norm`, or that function compiled.

    Returns:
        `(B, R, C)` in `dtype`.
    """
    small, large = sorted(x.shape[1:])
    # A power of two near sqrt(M) keeps the elements of x and x x^T away from the smallest numbers of float16; the first
    # step takes it out again.
    scale = float(min(1 << small.bit_length() // 2, _LARGEST_SCALE))
    x = (norms or scaled_to_norm)(x, scale / _MARGIN, dtype)
    if large >= _LONG * small:
        # In float16 and bfloat16 the error of x x^T grows with each step in which it is not computed anew from x.
        x = _joined(x, _COEFFICIENTS[:2], symmetric_matmul, scale)
        return _joined(x, _COEFFICIENTS[2:], symmetric_matmul, factor=factor)
    for i, (a, b, c) in enumerate(_COEFFICIENTS):
        gram = symmetric_matmul(_wide(x))
        polynomial = symmetric_matmul(gram, add=gram, alpha=c / scale**4, beta=b / scale**2)
        # (a + b A + c A^2) x with A = x x^T. A product that adds a x itself would copy x first; in float16 it would be
        # half as far off (0.0013 instead of 0.0027 of the norm for normal 768 x 768).
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = _times(x, polynomial, (factor if i + 1 == len(_COEFFICIENTS) else 1.0) / scale)
        scale = 1.0
    return x


def scaled_to_norm(x: Tensor, norm: float, dtype: torch.dtype) -> Tensor:
    """Returns each matrix of a batch scaled to a Frobenius norm, in `dtype`; a matrix of zeros stays one."""
    flat = x.flatten(1)
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (flat * (norm / (norms + _TINY))).to(dtype).view(x.shape)


def _joined(
    x: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    symmetric_matmul: Callable[..., Tensor],
    scale: float = 1.0,
    factor: float = 1.0,
) -> Tensor:
    """Makes several steps at once on the smaller side: each step on A = x x^T alone, then one product with x.

    A step multiplies x by a + b A + c A^2, and A by that from both sides. All these matrices are polynomials of the
    first A, so their products are symmetric. For N = 2.75 M, as in the FFN of a LLaMA, this is two thirds of the FLOPs.
    """
    gram, total = symmetric_matmul(_wide(x)), None
    rest = scale
    for a, b, c in coefficients:
        polynomial = symmetric_matmul(gram, add=gram, alpha=c / rest**4, beta=b / rest**2)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        total = polynomial if total is None else symmetric_matmul(polynomial, total)
        if (a, b, c) != coefficients[-1]:
            gram = symmetric_matmul(symmetric_matmul(polynomial, gram), polynomial, alpha=1 / rest**2)
        rest = 1.0
    assert total is not None
    return _times(x, total, factor / scale)


def _wide(x: Tensor) -> Tensor:
    """Returns each matrix with its longer side as columns: a view."""
    return x if x.shape[1] <= x.shape[2] else x.mT


def _times(x: Tensor, symmetric: Tensor, alpha: float) -> Tensor:
    """Returns alpha times the product of x with symmetric matrices of its smaller side."""
    a, b = (symmetric, x) if x.shape[1] <= x.shape[2] else (x, symmetric)
    return add_product(x, a, b, 0.0, alpha)


class _Batch(NamedTuple):
    """Matrices of one shape."""

    rows: int
    columns: int
    members: list[tuple[Bucket, Matrix]]

    def views(self, flat_of: Callable[[Bucket], Tensor]) -> list[Tensor]:
        """Returns the part of each matrix in the flat buffers of the buckets, as views `(rows, columns)`."""
        return [
            flat_of(bucket)[x.start : x.start + x.rows * x.columns].view(x.rows, x.columns)
            for bucket, x in self.members
        ]

    def row_views(self, flat_of: Callable[[Bucket], Tensor]) -> list[Tensor]:
        """Returns the part of each matrix in states with a number for each row, as views `(rows, 1)`."""
        return [flat_of(bucket)[x.first_row : x.first_row + x.rows] for bucket, x in self.members]


def _batches(buckets: Sequence[Bucket], matrices: Callable[[Bucket], Iterator[Matrix]]) -> list[_Batch]:
    """Returns the matrices of all buckets by shape, in batches of at most `_CHUNK` elements."""
    by_shape: dict[tuple[int, int], list[tuple[Bucket, Matrix]]] = defaultdict(list)
    for bucket in buckets:
        for matrix in matrices(bucket):
            by_shape[matrix.rows, matrix.columns].append((bucket, matrix))
    found = []
    for (rows, columns), members in by_shape.items():
        most = max(_CHUNK // (rows * columns), 1)
        found += [_Batch(rows, columns, members[i : i + most]) for i in range(0, len(members), most)]
    return found


class Muon(AdamW):
    """Muon for the buckets of hidden matrices, AdamW for the others.

    Each rank orthogonalizes the matrices of its own share of each bucket, which is cut between matrices.

    Args:
        weights: the weights, laid out for an optimizer of whole matrices.
        config: hyperparameters.
        ops: implementations of AdamW's update and of the symmetric product.
    """

    def __init__(self, weights: Replicated, config: OptimizerConfig, ops: Ops):
        self._weights, self._symmetric_matmul = weights, ops.symmetric_matmul
        self._hidden = [bucket for bucket in weights.buckets if bucket.group is BucketGroup.HIDDEN]
        self._others = [bucket for bucket in weights.buckets if bucket.group is not BucketGroup.HIDDEN]
        self._own = _batches(self._hidden, lambda bucket: weights.matrices(bucket, own=True))
        self._held = _batches(self._hidden, weights.matrices)
        self._momentum, self._apply, self._norms, self._rows = _momentum, _apply, scaled_to_norm, _normalized_rows
        super().__init__(weights.buckets, config, ops.adamw, weights.pieces_of)

    def _new_states(self, bucket: Bucket) -> dict[str, Tensor]:
        if bucket.group is not BucketGroup.HIDDEN:
            return super()._new_states(bucket)
        states = {"momentum_buffer": torch.zeros_like(bucket.master.data)}
        if self.config.normuon:
            rows = sum(matrix.rows for matrix in self._weights.matrices(bucket))
            states["row_exp_avg_sq"] = bucket.master.data.new_zeros(rows, 1)
        return states

    def compile(self) -> None:
        super().compile()
        self._momentum, self._apply = torch.compile(_momentum), torch.compile(_apply)
        # There are a few shapes; with symbolic ones, the kernels take three times as long.
        self._norms = torch.compile(scaled_to_norm, dynamic=False)
        self._rows = torch.compile(_normalized_rows, dynamic=False)

    @torch.no_grad()
    def step(self) -> None:
        keep, config = self.found_inf == 0, self.config
        self.steps += keep
        self._step_adamw(self._others)
        for bucket in self._hidden:
            buffer = self._states[bucket]["momentum_buffer"]
            self._momentum(_scratch(bucket), gradient_of(bucket), buffer, self.grad_scale, keep, config.muon_momentum)
        for batch in self._own:
            self._orthogonalize(batch)
        self._weights.gather_updates([_scratch(bucket) for bucket in self._hidden])
        if config.normuon:
            for batch in self._held:
                self._normalize_rows(batch, keep)
        rate = self.learning_rate * ((config.muon_lr or config.learning_rate) / config.learning_rate)
        for bucket in self._hidden:
            before = None if self.observe is None else bucket.master.data.clone()
            decay, cautious = config.weight_decay, config.cautious_weight_decay
            self._apply(bucket.master.data, bucket.copy, _scratch(bucket), rate, keep, decay, cautious)
            if self.observe is not None and before is not None:
                self.observe(bucket, before)

    def _orthogonalize(self, batch: _Batch) -> None:
        """Replaces the momentum of each matrix by its update, for a learning rate of 1."""
        views, factor = batch.views(_scratch), UPDATE_RMS * max(batch.rows, batch.columns) ** 0.5
        wide = batch.members[0][0].compute.dtype == torch.float32
        dtype = torch.float32 if wide else torch.float16
        x = orthogonalize(torch.stack(views), self._symmetric_matmul, dtype, factor, self._norms)
        torch._foreach_copy_(views, list(x.unbind()))

    def _normalize_rows(self, batch: _Batch, keep: Tensor) -> None:
        """Divides the rows of each update by the root of their averaged mean squares, and scales it to `UPDATE_RMS`."""
        views, averages = batch.views(_scratch), batch.row_views(lambda bucket: self._states[bucket]["row_exp_avg_sq"])
        x, new = self._rows(torch.stack(views), torch.stack(averages), keep, self.config.beta2)
        torch._foreach_copy_(averages, list(new.unbind()))
        torch._foreach_copy_(views, list(x.unbind()))


def _normalized_rows(x: Tensor, average: Tensor, keep: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """Returns the normalized updates in x's dtype and the averaged mean squares of their rows.

    Args:
        x: `(B, rows, columns)`.
        average: `(B, rows, 1)` float32, the averages before this step.
        keep: whether this step counts, a scalar.
        beta2: weight of the averages before this step.
    """
    squares = x.float().square().mean(-1, keepdim=True)
    new = average.lerp(squares, 1 - beta2)
    factors = 1 / (new.sqrt() + _TINY)
    factors = factors * (UPDATE_RMS / ((squares * factors.square()).mean(-2, keepdim=True).sqrt() + _TINY))
    return (x * factors).to(x.dtype), torch.where(keep, new, average)


def _scratch(bucket: Bucket) -> Tensor:
    """Returns the buffer of a bucket that holds momentum and update; float16 lacks the range of gradients."""
    copy = bucket.copy
    return copy if copy is not None and copy.dtype == torch.bfloat16 else gradient_of(bucket)


def _momentum(out: Tensor, grad: Tensor, buffer: Tensor, divisor: Tensor, keep: Tensor, momentum: float) -> None:
    """Updates the momentum, and writes the Nesterov momentum to `out`, which may be `grad`."""
    g = grad.float() / divisor
    m = torch.lerp(g, buffer, momentum)
    out.copy_(torch.lerp(g, m, momentum))
    buffer.copy_(torch.where(keep, m, buffer))


def _apply(
    master: Tensor,
    copy: Tensor | None,
    update: Tensor,
    rate: Tensor,
    keep: Tensor,
    weight_decay: float,
    cautious: bool,
) -> None:
    """Updates the master weights, and writes the copy that the model reads, which may be `update`."""
    step = update.float()
    decay = master * weight_decay
    if cautious:
        decay = torch.where(step * master > 0, decay, 0.0)
    master.copy_(torch.where(keep, master - rate * (decay + step), master))
    if copy is not None:
        copy.copy_(master)
