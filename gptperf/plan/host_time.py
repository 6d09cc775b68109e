"""What the host adds to a step: the launches of kernels, one by one or as CUDA graphs. Loads no torch.

The GPU needs a few microseconds to start and end each kernel, however small. The host needs far longer to launch one
from Python, so the GPU waits if its kernels are short, as those of small models are. A CUDA graph launches all kernels
of a micro-batch at once, so that only the first of these times remains.

Measured on an H200 with PyTorch 2.11, 64 x 256 tokens of shakespeare_char (6 layers, dropout) and 8 x 128 of tiny (4
layers), on 2026-11-30: 22.1 and 14.8 ms per step without graphs, all of which the host needs. With graphs, on
2026-12-01: 4.35 ms for shakespeare_char, and 3.98 and 4.30 ms for one sequence of gpt2_124m and llama_124m.
"""

from gptperf.config import Config

__all__ = ["gaps_ms", "graph_problem", "graphs_pay", "host_ms"]

_KERNEL_MS = 0.0032
_KERNELS_A_LAYER, _KERNELS_OF_DROPOUT, _OTHER_KERNELS = 33, 6, 40
"""Kernels of a micro-batch, forward and backward. These numbers and the time of a kernel were not counted or measured
one by one. They were chosen so that the plan gives the steps above with graphs. A step has .5 us between two kernels;
most of the time is what a small kernel takes more than its bytes and FLOPs say."""
_HOST_MS_A_LAYER = {"block": 3.7, "model": 1.4}
"""Time that the host takes to launch forward and backward of a layer, by `compile_scope`. It was fitted to the steps
above without graphs, and for "model" to the 8 to 9 ms of shakespeare_char with eager ops. No other host was
measured."""
_MARGIN = 1.5
"""Graphs are used up to this multiple of the host's time, because a host may be slower: an assumption. Longer
micro-batches hide the launches, and graphs would hold the memory of their activations for the whole run."""


def gaps_ms(config: Config) -> float:
    """Returns the milliseconds that starting and ending the kernels of a micro-batch takes on the GPU."""
    model = config.model
    a_layer = _KERNELS_A_LAYER + (_KERNELS_OF_DROPOUT if model.dropout > 0 else 0)
    return _KERNEL_MS * (a_layer * model.n_layer + _OTHER_KERNELS)


def host_ms(config: Config) -> float:
    """Returns the milliseconds that the host takes to launch a micro-batch without CUDA graphs."""
    return _HOST_MS_A_LAYER["model" if config.system.one_graph else "block"] * config.model.n_layer


def graph_problem(config: Config, device_type: str) -> str | None:
    """Returns why no part of this run's step can be recorded as a CUDA graph, or None.

    Args:
        config: configuration of the run.
        device_type: "cuda" or "cpu".
    """
    if device_type != "cuda":
        return "CUDA graphs need a GPU"
    if config.system.use_fsdp:
        return "FSDP frees the weights of a block and gathers them again, which a CUDA graph cannot record"
    if config.system.recompute != "none" and config.model.dropout > 0:
        return "recompute with dropout saves and restores the random state, which a CUDA graph cannot record"
    return None


def graphs_pay(config: Config, micro_batch_ms: float) -> bool:
    """Returns whether CUDA graphs make a run faster whose micro-batch takes the GPU this long."""
    return micro_batch_ms <= _MARGIN * host_ms(config)
