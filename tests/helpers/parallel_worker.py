"""Trains small models as one of several ranks: `python tests/helpers/parallel_worker.py CASES.json OUT [cuda]`.

CASES has, by name, the flags of a case, and optionally the place to load the state from, the place to save it to, the
steps to train, the step from which gradients overflow, and the token that ends a document. The figures of a rank go to
OUT/NAME-RANK.json. All cases with the same batch size see the same tokens in the same order, whatever the number of
ranks.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peer_files import collectives_of
from torch import Tensor

from gptperf import checkpoint
from gptperf.checkpoint.background import Saver
from gptperf.config import Config, command_line
from gptperf.distributed.copy_engine import open_collectives
from gptperf.distributed.process import Process, start_process
from gptperf.distributed.replicated import Replicated
from gptperf.training import build
from gptperf.training import engine as training
from gptperf.training.engine import Engine, build_engine, compile_engine
from gptperf.training.optimizers import muon
from gptperf.training.saved_state import TrainState, restore, snapshot
from gptperf.training.step import train_step


def batches(config: Config, process: Process, first: int) -> Iterator[Tensor]:
    """Yields this rank's micro-batches of the job, from a step on."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, config.train.batch_size, config.model.block_size)
    count = config.train.gradient_accumulation_steps
    number = 0
    while True:
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        if number >= first * count and number % count % process.world_size == process.rank:
            yield tokens
        number += 1


def evaluate(engine: Engine) -> float:
    """Returns the loss on fixed tokens with the weights as they are; changes nothing."""
    size, vocabulary = engine.config.model.block_size, engine.config.model.vocab_size
    tokens = (torch.arange(2 * size, device=engine.process.device) % vocabulary).view(2, size)
    engine.model.eval()
    with torch.no_grad(), engine.autocast():
        loss = engine.model(tokens, tokens).item()
    engine.model.train()
    return loss


def _watch_what_is_held(weights: Replicated) -> list[tuple[str, int]]:
    """Returns a list that gets the number of whole matrix buckets before each micro-batch and before the update."""
    held: list[tuple[str, int]] = []

    def looking(moment: str, then: Callable[..., None]) -> Callable[..., None]:
        def look(*args: Any, **options: Any) -> None:
            whole = [b for b in weights.buckets if b.group.fsdp_shards and b.compute.untyped_storage().size() > 0]
            held.append((moment, len(whole)))
            then(*args, **options)

        return look

    weights.start_micro_batch = looking("micro-batch", weights.start_micro_batch)  # type: ignore[method-assign]
    weights.finish_gradients = looking("update", weights.finish_gradients)  # type: ignore[method-assign]
    return held


def overflowing(gradient: Tensor) -> Tensor:
    """Returns the gradient with infinities in one row, which under sharding belongs to one rank."""
    return gradient.index_fill(0, gradient.new_zeros(1, dtype=torch.int64), float("inf"))


def _counting(found: list[int]) -> Any:
    """Appends the number of matrices to a list whenever a batch of them is orthogonalized."""
    original = muon.orthogonalize

    def orthogonalize(x: Tensor, *others: Any) -> Tensor:
        found.append(len(x))
        return original(x, *others)

    return mock.patch.object(muon, "orthogonalize", orthogonalize)


def _save(engine: Engine, process: Process, folder: Path, step: int) -> None:
    """Saves a step in the background, while training changes the weights."""
    saver = Saver(folder, 3, process)
    saver.save(step, *snapshot(engine, TrainState(step=step), "", {}), None)
    for bucket in engine.weights.buckets:
        bucket.master.data.zero_()
    ended = saver.wait()
    assert ended is not None
    if ended.error is not None:
        raise ended.error


def run(case: dict[str, Any], process: Process) -> dict[str, Any]:
    """Trains one case, and returns losses, gradient norms, moments and weights."""
    config = command_line.resolve(case["flags"], world_size=process.world_size).config
    first, last = case.get("steps", (0, 4))
    if "shared" in case:
        reduce_dtype = build.DTYPES[config.system.reduce_dtype]
        training.open_collectives = lambda *_: collectives_of(process, case["shared"], reduce_dtype)
    else:
        training.open_collectives = open_collectives
    engine = build_engine(config, process)
    if "load" in case:
        restore(checkpoint.load(Path(case["load"]) / f"step-{first:08d}"), engine, "")
    if config.data.document_mask:
        engine.model.document_end = case["document_end"]
    engine.weights.share()
    compile_engine(engine)
    data, losses, norms, watched, evaluated = batches(config, process, first), [], [], [], []
    collectives, gathers, held = engine.weights.collectives, [], _watch_what_is_held(engine.weights)
    scales, pairs, orthogonalized = list[float](), list[int](), list[int]()

    for step in range(first, last):
        if step == case.get("overflow"):
            engine.model.lm_head.weight.register_hook(overflowing)
        scales.append(engine.scaler.get_scale())
        with (
            mock.patch.object(collectives, "all_gather", wraps=collectives.all_gather) as gather,
            _counting(orthogonalized),
        ):
            result = train_step(engine, data, step, watched=True)
        gathers.append(gather.call_count)
        losses.append(process.mean(result.loss.clone()).item())
        if result.pairs is not None:
            pairs.append(sum(process.gather(int(result.pairs))))
        norms.append(result.gradient_norm.item())
        assert result.gradients is not None
        figures, ratios = result.gradients.tolist(), len(engine.monitor.components)
        watched.append(engine.monitor.record(norms[-1], figures[:-ratios], figures[-ratios:]))
        evaluated.append(evaluate(engine))
    if "save" in case:
        _save(engine, process, Path(case["save"]), last)
    buckets = engine.weights.buckets
    return {
        "losses": losses,
        "norms": norms,
        "watched": watched,
        "evaluated": evaluated,
        "gathers": gathers,
        "scales": scales,
        "pairs": pairs,
        "held": held,
        "orthogonalized": sum(orthogonalized),
        "largest": {} if engine.float8 is None else {k: x.tolist() for k, x in engine.float8.tensors().items()},
        "moved_by": collectives.name,
        "reason": collectives.reason,
        "buckets": len(buckets),
        "groups": {name: bucket.group.value for bucket in buckets for name in bucket.names},
        "state_bytes": sum(x.nbytes for b in buckets for x in (b.master, *engine.optimizer.states(b).values())),
        "gradient_bytes": sum(b.grad.nbytes for b in buckets),
    }


def main() -> None:
    """Runs all cases."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    process = start_process(sys.argv[3] if len(sys.argv) > 3 else "cpu")
    for name, case in cases.items():
        if "torch._dynamo" in sys.modules:  # its import takes longer than a case
            torch._dynamo.reset()
        (out / f"{name}-{process.rank}.json").write_text(json.dumps(run(case, process)))
    process.close()


if __name__ == "__main__":
    main()
