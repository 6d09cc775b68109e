"""Which keys a query attends to: causal, within a window, within a document.

Shapes: B batch, T query tokens, S key tokens. The queries are the last T of the S tokens.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

__all__ = ["Mask", "document_pairs", "document_starts", "flex", "make_masks"]

_compiled: Any = None
_BLOCK = 128
"""Tokens in a block of FlexAttention's block masks."""


class Mask(NamedTuple):
    """What the queries of one layer attend to, beyond the causal order; a layer without limits has None instead."""

    window: int | None
    """Number of tokens that a query attends to, itself included; None: all before it."""
    starts: Tensor | None
    """First token of the document of each token, `(B, T)` int32; None: a sequence is one document."""
    blocks: BlockMask | None
    """The same mask for FlexAttention, or None where FlexAttention does not run."""

    def dense(self, T: int, S: int, device: torch.device) -> Tensor:
        """Returns a mask `(T, S)`, or `(B, 1, T, S)` with documents, that is true where a query attends to a key."""
        query = torch.arange(S - T, S, device=device)[:, None]
        key = torch.arange(S, device=device)
        seen = key <= query
        if self.window is not None:
            seen &= key > query - self.window
        if self.starts is not None:
            return seen & (key >= self.starts[:, None, :, None])
        return seen


def make_masks(
    windows: tuple[int, ...], T: int, starts: Tensor | None, device: torch.device | None
) -> list[Mask | None]:
    """Returns the mask of each layer; layers with equal windows share one.

    Args:
        windows: window of each layer; a window of T or more is none.
        T: tokens of the sequence.
        starts: see `Mask.starts`.
        device: where to build block masks for FlexAttention, whose T is a multiple of 128; None: it does not run.
    """
    made: dict[int, Mask | None] = {}
    for window in windows:
        if window not in made:
            limited = window < T or starts is not None
            blocks = _block_mask(min(window, T), T, starts, device) if limited and device is not None else None
            made[window] = Mask(window if window < T else None, starts, blocks) if limited else None
    return [made[window] for window in windows]


def document_starts(tokens: Tensor, end: int) -> Tensor:
    """Returns the position of the first token of each token's document, `(B, T)` int32.

    Args:
        tokens: `(B, T)` int64.
        end: id of the token that ends a document, and belongs to it.
    """
    T = tokens.shape[1]
    first = torch.zeros_like(tokens, dtype=torch.int32)
    first[:, 1:] = (tokens[:, :-1] == end) * torch.arange(1, T, device=tokens.device, dtype=torch.int32)
    return first.cummax(dim=1).values


def document_pairs(tokens: Tensor, end: int, windows: tuple[int, ...]) -> Tensor:
    """Returns the number of (query, key) pairs of one head, over all layers and sequences, an int64 scalar.

    Args:
        tokens: `(B, T)` int64.
        end: id of the token that ends a document.
        windows: window of each layer.
    """
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) - document_starts(tokens, end)
    counts = [layers * place.clamp(max=window).sum() for window, layers in Counter(windows).items()]
    return torch.stack(counts).sum()


def _block_mask(window: int, T: int, starts: Tensor | None, device: torch.device) -> BlockMask:
    """Returns FlexAttention's mask: for each block of queries the blocks of keys that it reads, whole or in part.

    It is built from the first and the last query of each block, without a mask of T x T elements.
    """
    n = T // _BLOCK
    query = torch.arange(T, device=device, dtype=torch.int32)
    lowest = query[None] - (window - 1)  # first key of each query; it never falls from one query to the next
    lowest = lowest if starts is None else torch.maximum(starts, lowest)
    of_block = lowest.view(-1, n, _BLOCK)
    first_low, last_low = of_block[:, :, 0, None], of_block[:, :, -1, None]
    block = torch.arange(n, device=device, dtype=torch.int32)
    key_begin, query_block = block[None, None, :] * _BLOCK, block[None, :, None]
    read = (key_begin + _BLOCK > first_low) & (block[None, None, :] <= query_block)
    whole = (key_begin >= last_low) & (block[None, None, :] < query_block)
    return BlockMask.from_kv_blocks(
        *_listed(read & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=_mask_mod(window, None if starts is None else lowest),
        seq_lengths=(T, T),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of true blocks of each row, `(B, 1, n)`, and their indices first, `(B, 1, n, n)`."""
    order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def _mask_mod(window: int, lowest: Tensor | None) -> Callable[..., Tensor]:
    """Returns FlexAttention's mask of a pair. With documents, layers of all windows share a graph."""
    if lowest is None:
        return lambda b, h, query, key: (key <= query) & (key > query - window)
    return lambda b, h, query, key: (key <= query) & (key >= lowest[b, query])


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, grouped: bool) -> Tensor:
    """Returns attention `(B, H, T, D)` for q `(B, H, T, D)`, k and v `(B, K, T, D)` under a block mask."""
    if torch.compiler.is_compiling():  # FlexAttention is then a part of the caller's graph
        return flex_attention(q, k, v, block_mask=blocks, enable_gqa=grouped)
    global _compiled
    if _compiled is None:  # not compiled, FlexAttention would keep the matrix of scores
        _compiled = torch.compile(flex_attention, dynamic=False)
    return _compiled(q, k, v, block_mask=blocks, enable_gqa=grouped)
