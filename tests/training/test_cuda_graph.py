"""CUDA graphs: a run with them computes the same bits as one without them, and says why it does without."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptperf import checkpoint
from gptperf.config import command_line
from gptperf.data.prepare import prepare
from gptperf.distributed.process import Process
from gptperf.errors import ConfigError, DeviceError
from gptperf.training import cuda_graph, trainer
from gptperf.training.cuda_graph import CudaGraphs
from gptperf.training.engine import Engine, build_engine, compile_engine, open_graphs
from gptperf.training.saved_state import TrainState, restore, snapshot
from gptperf.training.step import train_step

SIZES = ["--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=128", "--vocab_size=257", "--vocab_multiple=64"]
BATCH = ["--batch_size=4", "--gradient_accumulation_steps=3", "--warmup_iters=2", "--max_iters=400"]
CASES = {
    "llama": ["--arch_preset=llama"],
    "dropout": ["--arch_preset=gpt2", "--dropout=0.2"],
    "one micro-batch": ["--arch_preset=gpt2_openai", "--gradient_accumulation_steps=1"],
    "fp16": ["--arch_preset=llama", "--dtype=float16"],
    "eager ops": ["--arch_preset=llama", "--kernels=eager", "--dropout=0.1"],
    "recompute": ["--arch_preset=llama", "--recompute=full"],
    "muon": ["--arch_preset=llama", "--optimizer=muon", "--normuon=True", "--cautious_weight_decay=True"],
    "moments in bfloat16": ["--arch_preset=llama", "--optimizer_state_dtype=bfloat16"],
    "soft-cap": ["--arch_preset=llama", "--logit_softcap=15"],
    "windows": ["--arch_preset=llama", "--window=32,full"],
    "fp8": ["--arch_preset=llama", "--matmul_dtype=fp8"],
    "fp8 in part": ["--arch_preset=gpt2", "--matmul_dtype=fp8", "--fp8_level=forward+dgrad", "--fp8_skip=first"],
}


def _engine(*flags: str, graphs: bool, device: str = "cuda") -> Engine:
    config = command_line.resolve([*SIZES, *BATCH, f"--cuda_graph={graphs}", *flags]).config
    engine = build_engine(config, Process(0, 1, torch.device(device)))
    engine.weights.share()
    compile_engine(engine)
    open_graphs(engine, None, pytest.fail)
    return engine


def _batches(count: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        batch = torch.randint(0, 257, (2, 4, 128), generator=generator)
        yield batch.pin_memory() if torch.cuda.is_available() else batch


def _known(engine: Engine) -> Any:
    return copy.deepcopy(engine.weights.bookkeeping())


def _train(engine: Engine, steps: range, between: Callable[[Engine, int], None] = lambda *_: None) -> list[Any]:
    """Trains, and returns every figure of every step, what the host knows after it, and the weights at the end."""
    found: list[Any] = []
    batches = _batches(10**6)
    for _ in range(steps.start * engine.micro_batches):
        next(batches)
    for step in steps:
        between(engine, step)
        result = train_step(engine, batches, step, watched=step % 3 == 0)
        figures = None if result.gradients is None else result.gradients.tolist()
        found.append([result.loss.item(), result.gradient_norm.item(), figures, engine.skipped.item(), _known(engine)])
        found[-1].append(engine.scaler.get_scale())
    found += [bucket.master.cpu() for bucket in engine.weights.buckets]
    found += [] if engine.float8 is None else [engine.float8.history.cpu()]
    found += [state.cpu() for b in engine.weights.buckets for state in engine.optimizer.states(b).values()]
    return found


def _assert_same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), i
        else:
            assert repr(x) == repr(y), i  # NaN equals NaN


def _both(steps: range, between: Callable[[Engine, int], None], *flags: str) -> tuple[list[Any], list[Any], Engine]:
    launched = _train(_engine(*flags, graphs=False), steps, between)
    engine = _engine(*flags, graphs=True)
    replayed = _train(engine, steps, between)
    assert engine.graphs is not None
    assert engine.graphs.enabled
    assert engine.graphs.replays > 0
    return launched, replayed, engine


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_replay_computes_the_same_bits(name: str) -> None:
    launched, replayed, engine = _both(range(12), lambda *_: None, "--compile=False", *CASES[name])
    _assert_same(launched, replayed)
    assert engine.graphs is not None
    micro_batches = {key for key in engine.graphs.recorded if isinstance(key, tuple) and key[0] == "micro-batch"}
    # Micro-batches of a step: the first, those between, and the last, or one that is the first and the last.
    assert len(micro_batches) == min(3, engine.micro_batches)


@pytest.mark.gpu
def test_200_compiled_steps_are_the_same_bits() -> None:
    torch._dynamo.reset()
    _assert_same(*_both(range(200), lambda *_: None, "--compile=True", "--arch_preset=llama", "--dropout=0.2")[:2])


@pytest.mark.gpu
def test_an_overflow_of_float16_skips_the_same_steps() -> None:
    def overflow(engine: Engine, step: int) -> None:
        if step in (2, 7):
            engine.scaler.update(2.0**40)

    launched, replayed, _ = _both(range(12), overflow, "--compile=False", *CASES["fp16"])
    _assert_same(launched, replayed)
    assert launched[11][3] > 0  # steps were skipped


@pytest.mark.gpu
def test_gradients_that_are_not_finite_skip_the_same_steps() -> None:
    def spoil(engine: Engine, step: int) -> None:
        if step == 6:  # in the copy that the model reads; the skipped update writes it anew from the master weights
            engine.model.lm_head.weight.data[3, 3] = float("inf")

    launched, replayed, _ = _both(range(12), spoil, "--compile=False", *CASES["llama"])
    _assert_same(launched, replayed)
    assert [row[3] for row in launched[:12]] == [0] * 6 + [1] * 6


@pytest.mark.gpu
def test_a_save_and_a_resume_between_replays(tmp_path: Path) -> None:
    """A checkpoint saved between two replays continues as the run that saved it, with graphs and without."""
    flags = ["--compile=False", *CASES["dropout"]]
    wanted = _train(_engine(*flags, graphs=False), range(14))[9:14]
    engine = _engine(*flags, graphs=True)
    _train(engine, range(9))
    tensors, saved = snapshot(engine, TrainState(step=9), "", {})
    path = checkpoint.save(tmp_path, step=9, tensors=tensors, state=saved)
    on = _train(engine, range(9, 14))
    again = _engine(*flags, graphs=True)
    restore(checkpoint.load(path), again, "")
    again.weights.share()
    resumed = _train(again, range(9, 14))
    _assert_same(on, resumed)
    _assert_same([row[:2] for row in wanted], [row[:2] for row in on[:5]])


@pytest.mark.gpu
def test_a_replay_uses_no_memory_that_others_may_get() -> None:
    """torch.compile's own CUDA graphs free the workspaces of cuBLAS, as `between` does here."""

    def between(engine: Engine, step: int) -> None:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

    _assert_same(*_both(range(12), between, "--compile=False", *CASES["llama"])[:2])


@pytest.mark.gpu
def test_a_model_that_cannot_be_recorded_trains_on_with_the_same_bits() -> None:
    """CUDA ends a capture in which the model waits for the GPU."""
    found, problems = [], list[str]()
    for graphs in (False, True):
        engine = _engine("--compile=False", *CASES["dropout"], graphs=False)
        if graphs:
            engine.graphs = CudaGraphs(engine.weights, must=False, warn=problems.append)
        loss = engine.model.loss

        def waits(*given: Any, loss: Callable[..., torch.Tensor] = loss, **keys: Any) -> torch.Tensor:
            result = loss(*given, **keys)
            result.item()
            return result

        engine.model.loss = waits
        found.append(_train(engine, range(6)))
        torch.cuda.empty_cache()
    assert ["cannot record this model" in problem for problem in problems] == [True]
    _assert_same(*found)


@pytest.mark.gpu
def test_a_pause_frees_the_graphs() -> None:
    def pause(engine: Engine, step: int) -> None:
        if engine.graphs is not None:
            engine.graphs.pause(6 <= step < 8)
            assert bool(engine.graphs.recorded) is (step in (3, 4, 5) or step > 10)

    _assert_same(*_both(range(14), pause, "--compile=False", *CASES["one micro-batch"])[:2])


@pytest.mark.gpu
def test_a_whole_run_is_the_same(tmp_path: Path) -> None:
    """Loader, evaluation, saves, profile and sample do not disturb the graphs, nor the graphs them."""
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(60000)))
    prepare(str(tmp_path / "text.txt"), data_dir=tmp_path, name="text", quiet=True)
    losses = []
    for graphs in (False, True):
        out = tmp_path / str(graphs)
        flags = [*SIZES, *BATCH, "--arch_preset=llama", "--dropout=0.1", "--compile=False", f"--cuda_graph={graphs}"]
        flags += [
            f"--data_dir={tmp_path}",
            "--dataset=text",
            f"--out_dir={out}",
            "--max_iters=40",
            "--eval_interval=10",
        ]
        flags += ["--eval_iters=5", "--save_interval=5", "--log_interval=1", "--profile=20:22"]
        resolved = command_line.resolve(flags)
        assert trainer.train(resolved.config, resolved.origins) == 0
        records = [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]
        records = [r for r in records if r["event"] in ("iteration", "eval")]  # a save in the background ends any time
        losses.append([(r["iter"], r.get("loss"), r.get("val_loss"), r.get("grad_norm")) for r in records])
    assert len([row for row in losses[0] if row[1] is not None]) >= 37
    assert len([row for row in losses[0] if row[2] is not None]) >= 4
    assert losses[0] == losses[1]


class HalfRecordings(CudaGraphs):
    """Stands in for CUDA graphs on a CPU: the recording of one function stops in its middle, without memory.

    Args:
        engine: has the functions.
        monkeypatch: sets what stands in.
        recorded: first word of the key of the function.
        owner, name: the method at whose call the recording stops.
    """

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, recorded: str, owner: Any, name: str):
        self.recorded_word, self.recording, self.problems = recorded, False, list[str]()
        stream = SimpleNamespace(wait_stream=lambda other: None, device=torch.device("cpu"))
        for known in ("Stream", "current_stream", "CUDAGraph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, known, lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(cuda_graph, "capturing", self._capturing)
        divide, stopped = engine.scaler._unscale_grads_, getattr(owner, name)
        found = {torch.device("cpu"): torch.zeros(())}  # a recording divides nothing
        monkeypatch.setattr(engine.scaler, "_unscale_grads_", lambda *x: found if self.recording else divide(*x))
        monkeypatch.setattr(owner, name, lambda *x: self._stop() if self.recording else stopped(*x))
        super().__init__(engine.weights, must=False, warn=self.problems.append)

    def run(self, key: Any, function: Callable[[], Any]) -> Any:
        return super().run(key, function) if key[0] == self.recorded_word else function()

    @contextmanager
    def _capturing(self, *_: object) -> Iterator[None]:
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def _stop(self) -> None:
        raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("recorded", ["update", "micro-batch"])
@pytest.mark.parametrize("flags", [["--dtype=float16"], ["--dtype=bfloat16"], ["--matmul_dtype=fp8"]], ids=" ".join)
def test_a_recording_that_stops_halfway_changes_no_bit(
    flags: list[str], recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*CASES["llama"], "--n_embd=32", "--device=cpu", "--compile=False", "--kernels=eager", *flags]
    found = []
    for graphs in (False, True):
        engine = _engine(*flags, "--gradient_accumulation_steps=1", graphs=False, device="cpu")
        if graphs:
            stops: tuple[Any, str] = engine.weights, "_collect"  # when the first gradients arrive
            if recorded == "update":  # when the gradients have been divided by the loss scale
                stops = engine.weights, "gradient_norm"
            elif engine.float8 is not None:  # when backward has left its statistics
                stops = engine.float8, "collect"
            engine.graphs = half = HalfRecordings(engine, monkeypatch, recorded, *stops)
        found.append(_train(engine, range(6)))
    assert ["no memory for CUDA graphs" in problem for problem in half.problems] == [True]
    _assert_same(*found)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "CUDA graphs need a GPU"),
        (["--use_fsdp=True"], "FSDP frees the weights"),
        (["--recompute=full", "--dropout=0.1"], "recompute with dropout"),
    ],
)
def test_a_run_that_cannot_use_them_says_why(flags: list[str], reason: str) -> None:
    device = "cpu"
    for asked in ("True", "auto"):
        config = command_line.resolve([*SIZES, *BATCH, "--device=cpu", f"--cuda_graph={asked}", *flags]).config
        engine = build_engine(config, Process(0, 1, torch.device(device)))
        if flags:  # as on a GPU
            engine.process = Process(0, 1, torch.device("cuda"))
        if asked == "True":
            with pytest.raises(DeviceError, match=reason):
                open_graphs(engine, 1.0, pytest.fail)
        else:
            assert reason in open_graphs(engine, 1.0, pytest.fail)
            assert engine.graphs is None


@pytest.mark.parametrize(("given", "wanted"), [("true", True), ("False", False), ("auto", "auto"), (None, "auto")])
def test_the_key_is_a_boolean_or_auto(given: str | None, wanted: bool | str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    quoted = f'"{given}"' if given == "auto" else str(given).lower()
    file.write_text("[system]\n" + (f"cuda_graph = {quoted}\n" if given else ""))
    assert command_line.resolve([str(file)]).config.system.cuda_graph == wanted
    flags = [f"--cuda_graph={given}"] if given else []
    assert command_line.resolve(flags).config.system.cuda_graph == wanted
    with pytest.raises(ConfigError, match="found 'maybe', wanted auto, true or false"):
        command_line.resolve(["--cuda_graph=maybe"])
