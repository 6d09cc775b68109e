"""Whether the op `packed_attention` computes the attention of a run. Loads no torch."""

import dataclasses

from gptperf.config import Config
from gptperf.flops.model_cards import position_of
from gptperf.plan.memory import Recompute

__all__ = ["packing_problem"]


def packing_problem(config: Config, capability: tuple[int, int] | None, recompute: Recompute) -> str | None:
    """Returns why `gptperf.kernels.packed_attention` does not compute the attention of a run, or None if it does.

    Args:
        config: the run.
        capability: compute capability of the GPU, or None if it is not known.
        recompute: what backward recomputes.
    """
    model, system = config.model, dataclasses.replace(config.system, recompute=recompute)
    D = model.head_width
    problems = {
        "this GPU": capability is None or capability[0] not in (9, 10),
        f"attention_backend = {model.attention_backend!r}": model.attention_backend != "sdpa",
        "kernels = 'eager'": system.kernels == "eager",
        f"dtype = {system.dtype!r}": system.dtype == "float32",
        "dropout": model.dropout > 0,
        "document_mask": config.data.document_mask,
        "a window": any(window < model.block_size for window in model.windows),
        "qk_norm without rope": model.qk_norm and position_of(model).op is None,
        f"head_dim = {D}": D % 8 > 0 or D > 128,
        "deterministic": system.deterministic,
        "torch.compile": system.compiles,
        "recompute = 'selective'": recompute == "selective",
    }
    return next((problem for problem, applies in problems.items() if applies), None)
