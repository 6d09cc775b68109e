"""Text generation: batches of prompts, a static key-value cache, and a decode step that a CUDA graph replays.

A prompt but its last token fills the cache (prefill). Then every decode step feeds the last token of each sequence and
draws the next one. A step reads positions, tokens and random numbers from static memory on the device and leaves the
drawn tokens there, so that a GPU replays it as one CUDA graph, and computes the next step while the host reads the
tokens of an earlier one.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from gptperf.config import ModelConfig
from gptperf.errors import note
from gptperf.model.attention import SDPA, Attention, FlashAttention, KVCache, ManualAttention
from gptperf.model.capture import capturing
from gptperf.model.gpt import GPT
from gptperf.model.position import LearnedAbsolute, NoPosition, RoPE

__all__ = ["Sampling", "generate"]

_AHEAD = 4
"""Steps that a GPU may compute before the host has read the tokens of the first of them."""
_NUMBERS = 256
"""Steps whose random numbers are drawn at once."""
_SIZE = 256
"""The capacity of a cache is a multiple of this, so that the next prompt can use the same memory."""
_BUILT_IN = {NoPosition, LearnedAbsolute, RoPE}, {SDPA, ManualAttention, FlashAttention}
"""Position encodings and attention backends that sequences of different lengths can share a step with."""


class Sampling(NamedTuple):
    """How a token is drawn; `gptperf.kernels.reference.draw` has the definitions."""

    vocab_size: int
    """Size of the tokenizer's vocabulary; ids of the model's padding are never drawn."""
    temperature: float
    top_k: int
    top_p: float = 1.0


class _Decoder:
    """The static memory of a batch of sequences, and the decode step on it.

    It holds no reference to the model, which each method gets anew.
    """

    def __init__(self, model: GPT, rows: int, size: int, sampling: Sampling, capture: bool, dtype: torch.dtype | None):
        device = model.wte.weight.device
        self.size, self.sampling, self.device, self.dtype = size, sampling, device, dtype
        # The positions of the sequences' next tokens, and the row of `numbers` for the next step, advance together.
        self.counters = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.positions = self.counters[:rows]
        self.last = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(_NUMBERS, rows, device=device)
        # A plugin's attention or positions may need the number of tokens on the host: then each sequence has caches of
        # its own, and each step a forward pass for each sequence.
        positions, backends = _BUILT_IN
        layers = [module for module in model.modules() if type(module) is Attention]
        known = {type(model.position)} <= positions and {type(layer.backend) for layer in layers} <= backends
        self.together = known and len(layers) == len(model.blocks)
        self.alone: list[list[KVCache]] = [[] for _ in range(rows)]
        weights = [layer.qkv.weight for layer in layers] if self.together else []
        self.caches = [self._cache(model.config, rows, dtype or weight.dtype) for weight in weights]
        self.capture = capture and self.together and device.type == "cuda"
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.read = [torch.empty(rows, dtype=torch.int64, pin_memory=True) for _ in range(_AHEAD + 1)]
            self.events = [torch.cuda.Event() for _ in self.read]

    def _cache(self, config: ModelConfig, rows: int, dtype: torch.dtype) -> KVCache:
        # Zeros, because what a sequence does not attend to must still be finite.
        shape = rows, self.size, config.kv_heads, config.head_width
        keys, values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        return KVCache(self.size, (keys, values), self.positions)

    def fill(self, model: GPT, contexts: dict[int, Sequence[int]]) -> None:
        """Restarts sequences: fills their caches with all tokens but the last, which the next step feeds."""
        if self.together and len(contexts) == len(self.last):  # padded on the right, where no token attends to it
            longest = max(map(len, contexts.values()))
            padded = [[*contexts[row], *[0] * (longest - len(contexts[row]))] for row in range(len(contexts))]
            self._prefill(model, padded, [KVCache(self.size, cache.buffers) for cache in self.caches])
        else:
            for row, ids in contexts.items():
                self.alone[row] = [self._row(i, row) for i in range(len(model.blocks))]
                self._prefill(model, [ids], self.alone[row])
        for row, ids in contexts.items():
            self.last[row], self.positions[row] = ids[-1], len(ids) - 1

    def _row(self, layer: int, row: int) -> KVCache:
        if not self.together:
            return KVCache(self.size)
        buffers = self.caches[layer].buffers
        assert buffers is not None
        return KVCache(self.size, (buffers[0][row : row + 1], buffers[1][row : row + 1]))

    def _prefill(self, model: GPT, ids: Sequence[Sequence[int]], caches: list[KVCache]) -> None:
        if len(ids[0]) > 1:
            with self._autocast():
                model.hidden(torch.tensor(ids, device=self.device)[:, :-1], caches)

    def _autocast(self) -> torch.autocast:
        # Without a cache, because weights that autocast has cast in a graph must not be read outside of it.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False)

    def provide(self, generators: Sequence[torch.Generator], steps: int) -> None:
        """Draws the random numbers of the next steps, at most `_NUMBERS`; each sequence has its own source."""
        found = [torch.rand(steps, generator=source, device=source.device).cpu() for source in generators]
        self.numbers[:steps] = torch.stack(found, dim=1).to(self.device)
        self.counters[-1] = 0

    def step(self, model: GPT) -> None:
        """Draws the next token of each sequence into `last`."""
        if self.graph is None and self.capture and self.calls > 0:
            self._record(model)
        if self.graph is not None:
            self.graph.replay()
        elif self.capture:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):  # compiles, and makes the workspaces of the stream that records
                self._step(model)
            current.wait_stream(self.stream)
        else:
            self._step(model)
        self.calls += 1

    def _record(self, model: GPT) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # The capture makes the device of its stream the current one.
            with torch.cuda.device(self.device), capturing(graph, self.stream, torch.cuda.graph_pool_handle()):
                self._step(model)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            note(f"generation runs without a CUDA graph, which cannot record this model: {str(error).splitlines()[0]}")
            self.capture = False
        else:
            self.graph = graph

    def _step(self, model: GPT) -> None:
        with self._autocast():
            if self.together:
                logits = model(self.last, caches=self.caches, last_only=True)[:, -1]
            else:
                rows = (self.last[i : i + 1] for i in range(len(self.last)))
                found = [model(x, caches=own, last_only=True) for x, own in zip(rows, self.alone, strict=True)]
                logits = torch.cat(found)[:, -1]
        uniform = self.numbers.index_select(0, self.counters[-1:])[0]
        self.last.copy_(model.draw(logits, uniform, *self.sampling)[:, None])
        self.counters += 1

    def fetch(self) -> Callable[[], list[int]]:
        """Returns a function that waits for the tokens that the last step has drawn, and returns them."""
        if self.device.type != "cuda":
            ids = self.last[:, 0].tolist()
            return lambda: ids
        slot = self.calls % len(self.read)
        host, event = self.read[slot], self.events[slot]
        host.copy_(self.last[:, 0], non_blocking=True)
        event.record(torch.cuda.current_stream(self.device))  # the default is the current device's stream

        def arrived() -> list[int]:
            event.synchronize()
            return host.tolist()

        return arrived


_kept: "weakref.WeakKeyDictionary[GPT, tuple[Any, _Decoder]]" = weakref.WeakKeyDictionary()
"""The last decoder of each model that captures, so that the next call finds its graph and its memory."""


def _decoder(model: GPT, *arguments: Any) -> tuple[Any, _Decoder]:
    """Returns a decoder and what it is valid for: its arguments, the memory of the weights, and inference mode.

    PyTorch refuses to write memory that was allocated in inference mode outside of it.
    """
    *others, dtype = arguments
    kind = model.wte.weight.device.type
    if dtype is None and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    arguments = *others, None if dtype == torch.float32 else dtype
    key = arguments, tuple(x.data_ptr() for x in model.parameters()), torch.is_inference_mode_enabled()
    found, decoder = _kept.pop(model, (None, None))  # taken out while it is in use
    if decoder is None or found != key:
        decoder = None  # frees the memory of the old one first
        decoder = _Decoder(model, *arguments)
    return key, decoder


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    *,
    dtype: torch.dtype | None = None,
    capture: bool = True,
) -> Iterator[list[int]]:
    """Yields the tokens that continue prompts, one of each prompt at a time.

    Tokens are yielded as soon as they are drawn; with a CUDA graph the GPU is up to `_AHEAD` steps ahead. A sequence
    gets the same tokens in any batch, up to the rounding of matrix products.

    Only the last `block_size` tokens of a prompt are read. When the cache of a sequence holds `block_size` tokens, it
    is built anew from the last half of them, so every token but the first ones sees at least half a context.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids, at least one in each prompt.
        tokens: the number of tokens to generate for each prompt.
        sampling: how tokens are drawn.
        generators: the source of random numbers of each prompt, on any device.
        dtype: the dtype of autocast; None: as the caller has set autocast. With float32 there is no autocast.
        capture: record the decode step as a CUDA graph, if the model is on a GPU. The weights must stay in place.
    """
    block, half = model.config.block_size, model.config.block_size // 2 or 1
    contexts = [list(ids[-block:]) for ids in prompts]
    lengths = [len(ids) for ids in contexts]
    size = min(block, -(-(max(lengths) + tokens) // _SIZE) * _SIZE)
    key, decoder = _decoder(model, len(prompts), size, sampling, capture, dtype)
    decoder.fill(model, dict(enumerate(contexts)))
    waiting: deque[Callable[[], list[int]]] = deque()

    def read() -> list[int]:
        ids = waiting.popleft()()
        for context, token in zip(contexts, ids, strict=True):
            context.append(token)
        return ids

    try:
        for step in range(tokens):
            if step % _NUMBERS == 0:
                decoder.provide(generators, min(_NUMBERS, tokens - step))
            full = [row for row, length in enumerate(lengths) if length > block]
            if full:
                while waiting:
                    yield read()
                decoder.fill(model, {row: contexts[row][-half:] for row in full})
                lengths = [half if length > block else length for length in lengths]
            decoder.step(model)
            lengths = [length + 1 for length in lengths]
            waiting.append(decoder.fetch())
            ahead = _AHEAD if decoder.graph is not None and 0 < step < tokens - 1 else 0
            while len(waiting) > ahead:
                yield read()
    finally:
        if decoder.graph is not None:
            _kept[model] = key, decoder
