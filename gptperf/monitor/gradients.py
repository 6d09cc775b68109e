"""Distribution of the gradients, computed on the device."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["gradient_moments"]


@torch.no_grad()
def gradient_moments(
    gradients: Iterable[Tensor], numel: int, summed: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """Mean and standard deviation over all elements of all gradients.

    Args:
        gradients: float32 buffers, which may have zeros between parameters.
        numel: elements that are parameters.
        summed: adds up over processes that have a share each.

    Returns:
        `(2,)` float32 on their device; reading it is the caller's synchronisation.
    """
    parts = [torch.stack([g.sum(), g.square().sum()]) for g in gradients]
    total, squares = (summed(torch.stack(parts).sum(0)) / numel).unbind()
    return torch.stack([total, (squares - total.square()).clamp(min=0).sqrt()])
