"""The buckets of hidden matrices that a run will have, with their padding. Loads no torch."""

import functools

from gptperf.cards import BUCKET_NUMEL
from gptperf.config import Config
from gptperf.distributed.bucket_sizes import cut_between, join_units, least_numel
from gptperf.flops.matmuls import linears

__all__ = ["hidden_buckets"]


def hidden_buckets(config: Config, num_gpus: int, *, fsdp: bool) -> list[int]:
    """Returns the elements of each bucket of hidden matrices, as `gptperf.distributed` lays them out.

    On several GPUs, Muon's buckets are cut between whole matrices, and the rest of each share is padding. AdamW's
    buckets have only the gaps before aligned parameters, which are not counted. The components must have cards.

    Args:
        config: the run.
        num_gpus: GPUs of the run.
        fsdp: whether a bucket has whole blocks, as under FSDP.
    """
    block = [x.matmul for x in linears(config.model) if x.part != "lm_head"]
    # Backward reaches the last block, and its last matrix, first.
    units = [[f"{layer}.{i}" for i in reversed(range(len(block)))] for layer in reversed(range(config.model.n_layer))]
    sizes = {name: block[i].weight for unit in units for i, name in zip(reversed(range(len(block))), unit, strict=True)}
    between = config.optimizer.optimizer == "muon" and num_gpus > 1
    least = least_numel(sum(matmul.weight for matmul in block), num_gpus) if between else 0
    if fsdp:
        joined = join_units(units, sizes, max(config.system.fsdp_min_num_params, least))
    else:
        joined = join_units([[name] for unit in units for name in unit], sizes, max(BUCKET_NUMEL, least))
    if not between:
        return [sum(sizes[name] for name in names) for names in joined]
    matrices = [tuple(rows * matmul.into for rows in matmul.matrices) for matmul in block]
    return [num_gpus * _share(tuple(matrices[int(n.split(".")[1])] for n in names), num_gpus) for names in joined]


@functools.cache  # most buckets of a model are alike, and a plan compares many batches and strategies
def _share(matrices: tuple[tuple[int, ...], ...], shares: int) -> int:
    return cut_between(matrices, shares)[1]
