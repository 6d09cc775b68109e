"""Measures training on several GPUs of a host: `python -m bench.measure.scaling [--gpus 1 2 4] [--strategies ...]`.

For every model and number of micro-batches, each card first trains alone, then all cards train together under each
strategy, then each card trains alone again, in the same processes. Cards that train alone do so at the same time; with
`--one_by_one` the others idle. Each measurement uses new random tokens and at least 3 micro-batches of warm-up. Its
time is the mean over the timed steps of the slowest rank, between CUDA events. It is not the median, because at its
power cap a card is slower and faster by turns. The time of a card alone is the mean of the measurements before and
after, because cards slow down as they warm up. Weak scaling keeps the micro-batches of each GPU, and strong scaling
(`--strong`) those of the job. Efficiency is the tokens/s of the job divided by n times those of the slowest card alone,
and divided by the sum of those of the cards alone.

State is the memory allocated between two steps, without the buffers that only communication needs. Peak is the largest
memory allocated during the steps, with these buffers. Both are those of the rank that uses most, and the table shows
the plan beside them. Exposed communication is the time in which a card does nothing but communicate, from a profile of
two steps of rank 0. With `--save`, the stall is the time for which training waits in the second of two saves.

Every case writes its own file under --out. A case that has a file is measured again only with `--fresh`. The cards
alone are an exception: they are measured before and after every group of strategies that is measured.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist

from bench.measure import timing
from bench.measure.models import MODELS
from bench.measure.step import random_batches
from gptperf import plan
from gptperf.checkpoint.background import Saver
from gptperf.config import Config, command_line
from gptperf.config.flags import Flags, parse
from gptperf.config.keys import Choice, Range
from gptperf.distributed.process import Process, start_process
from gptperf.errors import DeviceError, run_main
from gptperf.hardware import match_gpu
from gptperf.monitor import step_timing, trace, waterfall
from gptperf.plan.memory import strategy_of
from gptperf.training.engine import Engine, build_engine, compile_engine
from gptperf.training.saved_state import TrainState, snapshot
from gptperf.training.step import StepResult, train_step

__all__ = ["Case", "cases", "main", "report", "to_measure"]

STRATEGIES: dict[str, list[str]] = {
    "ddp": [],
    "zero1": ["--use_zero1=True"],
    "fsdp": ["--use_fsdp=True"],
    "fsdp_once": ["--use_fsdp=True", "--fsdp_reduce_once=True"],
    "fsdp_gathered": ["--use_fsdp=True", "--fsdp_gather_once=True"],
    "fsdp_both": ["--use_fsdp=True", "--fsdp_gather_once=True", "--fsdp_reduce_once=True"],
    "ddp_nccl_bf16": ["--communication=process_group", "--reduce_dtype=bfloat16"],
    "ddp_nccl": ["--communication=process_group"],
    "zero1_nccl": ["--use_zero1=True", "--communication=process_group"],
    "fsdp_nccl": ["--use_fsdp=True", "--communication=process_group"],
}
ALONE = ("alone", "alone_after")
"""Cases in which each card trains alone, before and after the strategies."""
_WARM_UP, _PROFILED = 3, 2


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    strategy: str
    """One of `STRATEGIES` or of `ALONE`."""
    gpus: int
    micro_batches: int
    """Number of micro-batches of a step on one GPU."""
    steps: int

    @property
    def name(self) -> str:
        """Name of the file of the case."""
        return f"{self.model}-{self.gpus}gpus-{self.strategy}-{self.micro_batches}x"

    def config(self) -> Config:
        """Returns the configuration of the job. A card alone runs the configuration of a job on one card."""
        world_size = 1 if self.strategy in ALONE else self.gpus
        flags = [f"--gradient_accumulation_steps={self.micro_batches * world_size}", *STRATEGIES.get(self.strategy, [])]
        return command_line.resolve([*MODELS[self.model], *flags], world_size=world_size).config


def cases(
    models: Sequence[str],
    gpus: int,
    strategies: Sequence[str],
    micro_batches: Sequence[int],
    strong: bool = False,
    most_steps: int = 21,
) -> list[Case]:
    """Returns the cases for a number of GPUs: the strategies, with the cards alone before and after them."""
    found = []
    for model in models:
        for count in micro_batches:
            if strong and count % gpus:
                continue
            mine = count // gpus if strong else count
            steps = max(3, most_steps // mine)
            names = [ALONE[0], *strategies, ALONE[1]] if gpus > 1 else [ALONE[0]]
            found += [Case(model, name, gpus, mine, steps) for name in names]
    return found


def to_measure(wanted: Sequence[Case], there: Collection[str]) -> list[Case]:
    """Returns the cases that have no result, with the cards alone around them."""
    missing = {(case.model, case.gpus, case.micro_batches) for case in wanted if case.name not in there}
    return [
        case
        for case in wanted
        if case.name not in there or (case.strategy in ALONE and (case.model, case.gpus, case.micro_batches) in missing)
    ]


def _measure(case: Case, process: Process, save: bool, start_together: Callable[[], object]) -> dict[str, Any]:
    """Returns the figures of this rank; `start_together` is called before the timed steps."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = case.config()
    engine = build_engine(config, process)
    engine.weights.share()
    compile_engine(engine)
    seed = 1000 + dist.get_rank()  # every rank reads other tokens
    batches = random_batches(config, process.device, torch.Generator(process.device).manual_seed(seed))
    moved = engine.weights.collectives

    def run(step: int) -> StepResult:
        return train_step(engine, batches, step)

    window = step_timing.cuda_window(run)
    warm_up = max(1, _WARM_UP // case.micro_batches)
    window(0, warm_up)
    start_together()
    times = window(warm_up, case.steps)
    torch.cuda.synchronize()
    figures: dict[str, Any] = {
        "ms": statistics.mean(times),
        "all_ms": times,
        "peak_gb": (torch.cuda.max_memory_allocated() + moved.uncounted_bytes) / 1e9,
    }
    gc.collect()
    figures["state_gb"] = (torch.cuda.memory_allocated() + moved.uncounted_bytes - moved.buffer_bytes) / 1e9
    figures |= {"moved_by": moved.name, "reason": moved.reason, "buffer_gb": moved.buffer_bytes / 1e9}
    if process.world_size > 1:
        figures |= _communication(run, warm_up + case.steps, process)
    figures["loss"] = run(warm_up + case.steps + _PROFILED).loss.item()
    if save:
        figures["save"] = _stall(engine, process)
    return figures


def _communication(run: Any, first: int, process: Process) -> dict[str, float]:
    """Returns exposed and hidden milliseconds of communication in a step; only rank 0 profiles."""
    if not process.is_main:
        for step in range(first, first + _PROFILED):
            run(step)
        torch.cuda.synchronize()
        return {}
    found = waterfall.breakdown(trace.kernels_of(trace.trace_steps(run, first, _PROFILED)), _PROFILED)
    return {"exposed_ms": found.parts_ms["communication"], "hidden_ms": found.hidden_communication_ms}


def _stall(engine: Engine, process: Process) -> dict[str, float]:
    """Returns, for the second of two saves, the milliseconds for which training waits and those until it is written."""
    box = [tempfile.mkdtemp(dir=".") if process.is_main else ""]
    dist.broadcast_object_list(box, 0, group=process.host_group)
    saver = Saver(Path(box[0]), 1, process)
    for step in (1, 2):
        tensors, state = snapshot(engine, TrainState(step), "", {})
        saver.save(step, tensors, state, None)
        ended = saver.wait()
        if ended is None or ended.error is not None:
            raise RuntimeError(f"the save failed: {ended and ended.error}")
        found = {"stall_ms": ended.stall_ms, "time_ms": ended.time_ms}
    process.barrier()
    if process.is_main:
        subprocess.run(["rm", "-rf", box[0]], check=True)
    return found


def _worker(jobs: Path, out: Path) -> None:
    """Measures the cases of a file, in the processes that torchrun has started."""
    process = start_process("cuda")
    for entry in json.loads(jobs.read_text()):
        case = Case(**entry["case"])
        mine: dict[str, Any] = {}
        if case.strategy in ALONE:
            for rank in range(process.world_size if entry["one_by_one"] else 1):
                if rank == process.rank or not entry["one_by_one"]:
                    together = (lambda: None) if entry["one_by_one"] else process.barrier
                    mine = _measure(case, Process(0, 1, process.device), False, together)
                    gc.collect()
                    torch.cuda.empty_cache()
                dist.barrier(group=process.host_group)
        else:
            mine = _measure(case, process, entry["save"], process.barrier)
        every: list[Any] = [None] * process.world_size
        dist.all_gather_object(every, mine, group=process.host_group)
        if process.is_main:
            record = {"case": asdict(case), "ranks": every, "environment": timing.environment(), "protocol": __doc__}
            (out / f"{case.name}.json").write_text(json.dumps(record, indent=1) + "\n")
            moved_by = " ".join(filter(None, (mine["moved_by"], mine["reason"])))
            print(f"{case.name}: {max(rank['ms'] for rank in every):.1f} ms, {moved_by}", flush=True)
    process.close()


def report(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines of the table."""
    alone = defaultdict(list)  # model, GPUs, micro-batches -> milliseconds of each card, before and after
    for record in records:
        case = Case(**record["case"])
        if case.strategy in ALONE:
            alone[case.model, case.gpus, case.micro_batches].append([rank["ms"] for rank in record["ranks"]])
    head = f"{'model':<14}{'GPUs':>5}{'strategy':>15}{'micro':>6}{'ms/step':>10}{'tokens/s':>12}{'of slowest':>11}"
    head += f"{'of sum':>8}{'exposed ms':>11}{'hidden':>8}{'state GB':>9}{'plan':>7}{'peak GB':>9}{'plan':>7}"
    lines = [head + f"{'stall ms':>9}"]
    for record in records:
        case, ranks = Case(**record["case"]), record["ranks"]
        config, ms = case.config(), max(rank["ms"] for rank in ranks)
        tokens = config.tokens_per_iter * (case.gpus if case.strategy in ALONE else 1)
        line = f"{case.model:<14}{case.gpus:>5}{case.strategy:>15}{case.micro_batches:>6}{ms:>10.1f}"
        line += f"{tokens / ms * 1e3:>12,.0f}"
        times = alone[case.model, case.gpus, case.micro_batches]
        cards = [statistics.mean(card) for card in zip(*times, strict=True)]
        if not cards or case.strategy in ALONE:
            line += f"{'-':>11}{'-':>8}"
        else:
            of_sum = len(cards) / ms / sum(1 / card for card in cards)
            line += f"{max(cards) / ms:>11.1%}{of_sum:>8.1%}"
        first = ranks[0]
        line += "".join(
            f"{first[key]:>{width}.2f}" if key in first else f"{'-':>{width}}"
            for key, width in (("exposed_ms", 11), ("hidden_ms", 8))
        )
        state, peak = (max(rank[key] for rank in ranks) for key in ("state_gb", "peak_gb"))
        planned = _planned(case, config, record["environment"])
        line += f"{state:>9.2f}{planned[0]:>7.2f}{peak:>9.2f}{planned[1]:>7.2f}"
        line += f"{max(rank['save']['stall_ms'] for rank in ranks):>9.0f}" if "save" in first else f"{'-':>9}"
        lines.append(line)
    return lines


def _planned(case: Case, config: Config, environment: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the planned GB of the model state and of the peak."""
    gpu = match_gpu(environment["device"], environment.get("memory_gb"))
    if gpu is None:
        return float("nan"), float("nan")
    count = 1 if case.strategy in ALONE else case.gpus
    given = plan.plan(config, gpu, num_gpus=count, strategy=strategy_of(config))
    memory = given.memory
    return memory.weights_gb + memory.gradients_gb + memory.optimizer_gb, memory.total_gb


@dataclass(frozen=True, kw_only=True)
class _ScalingFlags(Flags):
    """What to measure."""

    gpus: tuple[Annotated[int, Range(1)], ...] = ()
    """Numbers of GPUs; default: 1, 2, 4, 8, as far as there are so many."""
    models: tuple[Annotated[str, Choice(tuple(MODELS))], ...] = ("llama_1.36b", "gpt2_124m")
    """Models."""
    strategies: tuple[Annotated[str, Choice(tuple(STRATEGIES))], ...] = ("ddp", "zero1", "fsdp")
    """Strategies."""
    micro_batches: tuple[Annotated[int, Range(1)], ...] = (1, 8)
    """Micro-batches of a GPU in an iteration."""
    strong: bool = False
    """micro_batches are those of the job."""
    steps: Annotated[int, Range(1)] = 21
    """Micro-batches that are timed, in 3 steps at least."""
    one_by_one: bool = False
    """The other cards idle while one trains alone."""
    save: bool = False
    """Time a save, too."""
    out: Path = Path("out/scaling")
    """Folder of the results."""
    fresh: bool = False
    """Measure cases again that have a result."""
    worker: Path | None = None
    """Measure the jobs of this file, in a process of a job; this command itself uses it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the cases that have no result, and prints the table."""
    args = parse(_ScalingFlags, argv, "bench.measure.scaling", __doc__)
    if args.worker:
        _worker(args.worker, args.out)
        return 0
    there = torch.cuda.device_count()
    if there == 0:
        print("bench.measure.scaling: no GPU here")
        return 0
    wanted = args.gpus or [n for n in (1, 2, 4, 8) if n <= there]
    if max(wanted) > there:
        raise DeviceError(f"--gpus: found {max(wanted)}, wanted at most {there}, as many as there are here")
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = []
    for gpus in wanted:
        mine = cases(args.models, gpus, args.strategies, args.micro_batches, args.strong, args.steps)
        chosen += mine
        missing = to_measure(mine, () if args.fresh else {path.stem for path in args.out.glob("*.json")})
        if not missing:
            continue
        jobs = args.out / f"jobs-{gpus}.json"
        flags = {"one_by_one": args.one_by_one}
        entries = [{"case": asdict(c), "save": args.save and c.micro_batches == 1, **flags} for c in missing]
        jobs.write_text(json.dumps(entries))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        subprocess.run(
            [*command, "-m", "bench.measure.scaling", "--worker", str(jobs), "--out", str(args.out)], check=False
        )
        jobs.unlink()
    paths = [args.out / f"{case.name}.json" for case in chosen]
    print("\n".join(report([json.loads(path.read_text()) for path in paths if path.exists()])))
    failed = [path.stem for path in paths if not path.exists()]
    if failed:
        print(f"not measured: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    run_main(main)
