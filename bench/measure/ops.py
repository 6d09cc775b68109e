"""Times every op and its rivals: `python -m bench.measure.ops [--ops OP ...] [--shapes N ...] [--impls IMPL ...]`.

The ops run in bfloat16 on one GPU in one process, by the protocol of `bench.measure.timing`; ops, shapes and rivals are
in `bench.measure.cases`. Forward is that of training, which keeps the tensors that backward needs. Backward is
`torch.autograd.grad` on a graph that is kept, with a gradient for every input that gets one. If an implementation
cannot keep its graph, the time of its backward is that of forward and backward together minus that of forward, and a
note says so. `compiled` is torch.compile of the reference (fullgraph, static shapes); it must not reuse saved buffers,
because they are read again.

`of copy` is the time of a copy that reads and writes as many bytes as the op must, timed in the same rounds, divided by
the time of the op. `GB/s` is the number of these bytes divided by the time of the op. linear_cross_entropy is timed
forward and backward together, in windows of 300 ms, in which the power cap shows, with its three matrix products in the
same rounds. Its extra memory is the peak of a call minus the memory allocated before it and the two gradients.

The first output of every implementation, and the gradients of the loss, are compared with those of eager before it is
timed. If an implementation fails, its row has the reason; the exit code is 1 if it is our own.

`--host` measures the host time of a call at small shapes. `--errors` compares eager and our kernels with float64; it
also runs on a CPU in Triton's interpreter (TRITON_INTERPRET=1), which truncates to bfloat16 instead of rounding.
`--json PATH` writes the rows to a file after every shape.
"""

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from bench.measure import timing
from bench.measure.cases import (
    HOST_ROWS,
    HOST_SHAPES,
    IMPLS,
    LOSS_OP,
    OPS,
    OURS,
    Implementation,
    Shape,
    call,
    eager,
    implementation,
    least_bytes,
    leaves,
    make_inputs,
    share,
)
from bench.measure.op_errors import dtypes_of, error_rows
from bench.measure.op_tables import error_table, host_table, table
from bench.measure.timing import Spread, Work
from bench.results import guarded
from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.config.keys import Choice, Range
from gptperf.errors import run_main

__all__ = ["HOST_IMPLS", "PROTOCOL", "RIVALS", "main", "measure", "measure_host", "measure_loss", "setting"]
__all__ += ["setting"]

Row = dict[str, Any]
LOSS_WINDOW_MS = 300.0
TOLERANCE = 0.02  # bfloat16 rounds to 0.004; a wrong op is off by about 1
RIVALS = ("liger_kernel", "nvidia-cudnn-frontend")
PROTOCOL = f"{__doc__}\n{timing.__doc__}"
HOST_IMPLS = ("eager", "triton", "torch_native")


@contextmanager
def setting() -> Iterator[None]:
    """Runs the body with saved buffers that stay unchanged and, on a GPU, on a stream that can be captured."""
    with functorch_config.patch(donated_buffer=False):
        if torch.cuda.is_available():
            with timing.side_stream():
                yield
        else:
            yield


def compare(outputs: Sequence[Tensor], expected: Tensor) -> None:
    """Checks the first output of an implementation before it is timed.

    Raises:
        ValueError: The output is too far from the expected one.
    """
    off = (outputs[0].detach().float() - expected.float()).norm() / expected.float().norm()
    if not off <= TOLERANCE:  # NaN too
        raise ValueError(f"the output is off eager's by {off:.2g} of its norm, wanted at most {TOLERANCE}")


def works(way: Implementation, op: str, shape: Shape, sets: int, expected: Tensor | None) -> dict[str, Work]:
    """Captures forward and backward of one implementation over its own input sets.

    Returns:
        Direction -> work, with "both" instead of "backward" if the graph cannot be kept.
    """
    inputs = [way.own(make_inputs(op, shape, seed)) for seed in range(sets)]
    forward = [partial(way.run, one) for one in inputs]
    if expected is None:  # a backward that is an op of its own
        return {"backward": timing.capture(forward)}
    wanted = [tuple(leaves(one).values()) for one in inputs]
    outputs = [run() for run in forward]
    compare(outputs[0], expected)
    gradients = [[torch.randn_like(y) for y in ys] for ys in outputs]
    prepare = partial(renew, [*chain(*wanted, *gradients)]) if way.overwrites else None
    backward = [
        partial(torch.autograd.grad, ys, xs, dys, retain_graph=True)
        for ys, xs, dys in zip(outputs, wanted, gradients, strict=True)
    ]
    found = {"forward": timing.capture(forward, prepare)}
    try:
        return found | {"backward": timing.capture(backward, prepare)}
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # "Trying to backward through the graph a second time"
        both = [partial(forward_backward, *each) for each in zip(forward, wanted, gradients, strict=True)]
        return found | {"both": timing.capture(both, prepare)}


def forward_backward(run: Callable[[], Sequence[Tensor]], xs: Sequence[Tensor], dys: Sequence[Tensor] | None) -> Any:
    """Returns the gradients of xs."""
    return torch.autograd.grad(run(), xs, dys)


def renew(tensors: Sequence[Tensor]) -> None:
    """Fills the matrices with new random numbers. `.data` hides this from autograd, as the writes of a kernel are."""
    for x in tensors:
        if x.dim() > 1:
            x.data.normal_()


def measure(op: str, shape: Shape, impls: Sequence[str], rounds: int) -> list[Row]:
    """Returns the rows of one op at one shape, the first for the copy."""
    least = least_bytes(op, shape)
    reference_inputs = make_inputs(op, shape)
    sets = timing.input_sets(sum(x.nbytes for x in reference_inputs.values()))
    expected = call(eager(op), op, shape, reference_inputs)[0].contiguous() if "forward" in least else None
    rows: list[Row] = [{"op": op, "shape": list(shape), "impl": impl} for impl in ("copy", *impls)]
    prepared = {("copy", direction): timing.copies(moved) for direction, moved in least.items()}
    for row in rows[1:]:

        def prepare(impl: str = row["impl"]) -> dict[tuple[str, str], Work]:
            found = works(implementation(impl, op, shape), op, shape, sets, expected)
            return {(impl, direction): work for direction, work in found.items()}

        prepared |= guarded(row, prepare) or {}
    times = timing.alternate(prepared, rounds)
    for row in rows:
        impl = row["impl"]
        part = share(impl, op, shape)
        for direction, moved in () if "error" in row else least.items():
            if (impl, direction) in times:
                taken, method = times[impl, direction], prepared[impl, direction].method
            else:
                taken = [
                    both - forward for both, forward in zip(times[impl, "both"], times[impl, "forward"], strict=True)
                ]
                method = "forward and backward less forward"
            spread = Spread.of(taken)
            of_copy = part * Spread.of(times["copy", direction]).ms / spread.ms
            row[direction] = {**asdict(spread), "of_copy": of_copy, "gb_s": part * moved / spread.ms / 1e6}
            row[direction]["method"] = method
    return rows


def measure_loss(op: str, shape: Shape, impls: Sequence[str], rounds: int) -> list[Row]:
    """Returns the rows of the loss at one shape, the first for its matrix products."""
    inputs = make_inputs(op, shape)  # no implementation writes into them
    expected = call(eager(op), op, shape, inputs)[0]
    x, weight = inputs["x"].detach(), inputs["weight"].detach()
    dlogits = torch.mm(x, weight.T)

    def products() -> None:
        torch.mm(x, weight.T)
        torch.mm(dlogits, weight)
        torch.mm(dlogits.T, x)

    wanted = tuple(leaves(inputs).values())
    gradients = forward_backward(partial(call, eager(op), op, shape, inputs), wanted, None)
    rows: list[Row] = [{"op": op, "shape": list(shape), "impl": impl} for impl in ("gemm", *impls)]
    prepared = {"gemm": Work(products)}
    for row in rows[1:]:

        def prepare(impl: str = row["impl"]) -> tuple[Work, float]:
            run = partial(implementation(impl, op, shape).run, inputs)
            compare(run(), expected)
            step = partial(forward_backward, run, wanted, None)
            for found, gradient in zip(step(), gradients, strict=True):  # a gradient shows errors that the loss hides
                compare([found], gradient)
            return Work(step), timing.extra_bytes(step) / 1e9

        if (found := guarded(row, prepare)) is not None:
            prepared[row["impl"]], row["extra_gb"] = found
    times = timing.alternate(prepared, rounds, LOSS_WINDOW_MS)
    for row in rows:
        if row["impl"] in times:
            spread = Spread.of(times[row["impl"]])
            row["both"] = {**asdict(spread), "of_gemm": Spread.of(times["gemm"]).ms / spread.ms, "method": "loop"}
    return rows


def measure_host(op: str, rows: int, impls: Sequence[str]) -> list[Row]:
    """Returns the host time of one op on a few rows, a row for each implementation."""
    shape = HOST_SHAPES[op](rows)
    found: list[Row] = [{"op": op, "rows": rows, "shape": list(shape), "impl": impl} for impl in impls]
    for row in found:

        def prepare(impl: str = row["impl"]) -> tuple[dict[str, float], dict[str, float]]:
            way = implementation(impl, op, shape)
            inputs = way.own(make_inputs(op, shape))
            wanted = tuple(leaves(inputs).values())
            run = partial(way.run, inputs)
            gradients = [torch.randn_like(y) for y in run()]
            return timing.host_us(run), timing.host_us(partial(forward_backward, run, wanted, gradients))

        if (times := guarded(row, prepare)) is not None:
            row["forward"], row["forward_backward"] = times
    return found


_MOST_SHAPES = max(len(op.shapes) for op in OPS.values())


@dataclass(frozen=True, kw_only=True)
class OpsFlags(Flags):
    """What to time."""

    ops: tuple[Annotated[str, Choice(tuple(OPS))], ...] = tuple(OPS)
    """Ops."""
    shapes: tuple[Annotated[int, Range(0, _MOST_SHAPES - 1)], ...] = tuple(range(_MOST_SHAPES))
    """Positions in an op's list of shapes."""
    impls: tuple[Annotated[str, Choice(tuple(IMPLS))], ...] = tuple(IMPLS)
    """Implementations."""
    rounds: Annotated[int, Range(1)] = 11
    """Rounds over all implementations."""
    json: Path | None = None
    """Write the rows to this file, too."""
    host: bool = False
    """Host time a call instead."""
    errors: bool = False
    """Errors against float64 instead."""

    def problems(self) -> Sequence[str]:
        """Returns which flags exclude each other."""
        return [f"{COMMAND_LINE}: --host and --errors exclude each other"] if self.host and self.errors else []


def run_times(args: OpsFlags, add: Callable[[list[Row], str], None]) -> None:
    """Times the chosen ops at the chosen shapes."""
    for op in args.ops:
        for shape in [OPS[op].shapes[i] for i in args.shapes if i < len(OPS[op].shapes)]:
            impls = [impl for impl in OPS[op].impls if impl in args.impls]
            if impls:
                rows = (measure_loss if op == LOSS_OP else measure)(op, shape, impls, args.rounds)
                add(rows, table(rows) + "\n")
            gc.collect()
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def run_host(args: OpsFlags, add: Callable[[list[Row], str], None]) -> None:
    """Measures the host time of every op that has a small shape."""
    print(f"{'op':<16}{'rows':>6}  {'':<13}{'forward us':>12}{'forward+backward us':>20}")
    for op in (op for op in args.ops if op in HOST_SHAPES):
        impls = [impl for impl in HOST_IMPLS if impl in args.impls and impl in OPS[op].impls]
        for count in HOST_ROWS if impls else ():
            rows = measure_host(op, count, impls)
            add(rows, host_table(rows))


def run_errors(args: OpsFlags, add: Callable[[list[Row], str], None]) -> None:
    """Measures the errors of every op; on a CPU, at the small shape only."""
    on_gpu = torch.cuda.is_available()
    columns = f"{'eager':>11}{'triton':>11}{'ratio':>9}"
    print(f"{'':<61}{'root mean square':>31}{'largest':>31}\n{'':<61}{columns}{columns}")
    for op in (op for op in args.ops if not op.endswith("_recompute")):
        for shape in (OPS[op].small, OPS[op].real) if on_gpu else (OPS[op].small,):
            for dtype in dtypes_of(op):
                rows = error_rows(op, shape, dtype, "cuda" if on_gpu else "cpu")
                add(rows, error_table(rows))


def parse_flags(argv: Sequence[str] | None = None) -> OpsFlags:
    """Parses the command line."""
    return parse(OpsFlags, argv, "bench.measure.ops", __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables that the command line asks for.

    Returns:
        1 if an op of ours failed, else 0.
    """
    args = parse_flags(argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not (args.errors and os.environ.get("TRITON_INTERPRET") == "1"):
        print(
            "bench.measure.ops: no GPU here; only --errors runs on a CPU, in Triton's interpreter (TRITON_INTERPRET=1)"
        )
        return 0
    made_by = timing.environment(RIVALS)
    print(f"{made_by['device']}, {', '.join(f'{k} {v}' for k, v in made_by['versions'].items())}\n", flush=True)
    kind = "errors" if args.errors else "host" if args.host else "times"
    record: Row = {"protocol": PROTOCOL, "environment": made_by, kind: []}

    def add(rows: list[Row], text: str) -> None:
        print(text, flush=True)
        record[kind] += rows
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    run = {"errors": run_errors, "host": run_host, "times": run_times}[kind]
    with setting():
        run(args, add)
    return int(any("error" in row and row.get("impl", OURS) == OURS for row in record[kind]))


if __name__ == "__main__":
    run_main(main)
