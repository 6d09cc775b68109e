"""Tests that need a GPU: no synchronization between log lines, cuDNN's attention, compiled runs, bitwise resume."""

import hashlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_helpers import masters

from gptperf.config import command_line
from gptperf.data.loader import Loader
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource
from gptperf.distributed.process import Process
from gptperf.ops import ALL_TRITON
from gptperf.training import engine as engine_module
from gptperf.training import trainer
from gptperf.training.engine import Engine, build_engine, compile_engine
from gptperf.training.step import train_step

pytestmark = pytest.mark.gpu
SIZES = ["--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=128", "--vocab_size=257", "--vocab_multiple=64"]
BATCH = ["--batch_size=8", "--gradient_accumulation_steps=2", "--warmup_iters=2", "--max_iters=20"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small prepared data set."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(60000)))
    prepare(str(folder / "text.txt"), data_dir=folder, name="text", quiet=True)
    return folder


def _engine(*flags: str, device: str = "cuda") -> Engine:
    config = command_line.resolve([*SIZES, *BATCH, "--arch_preset=llama", *flags]).config
    return build_engine(config, Process(0, 1, torch.device(device)))


def _batches(seed: int = 0) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, 257, (2, 8, 128), generator=generator)


def _losses(engine: Engine, steps: int) -> list[float]:
    batches = _batches()
    return [train_step(engine, batches, step).loss.item() for step in range(steps)]


def test_float32_is_the_cpus() -> None:
    gpu, cpu = (_engine("--dtype=float32", "--compile=False", device=d) for d in ("cuda", "cpu"))
    for (_, a), (_, b) in zip(masters(gpu.weights), masters(cpu.weights), strict=True):
        a.copy_(b)
    for a, b in zip(_losses(gpu, 6), _losses(cpu, 6), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(
    ("scope", "recompute"),
    [("model", "none"), ("model", "selective"), ("block", "none"), ("block", "selective"), ("block", "full")],
)
def test_compiled_is_eager(scope: str, recompute: str) -> None:
    torch._dynamo.reset()
    again = f"--recompute={recompute}"
    eager, compiled = _engine("--compile=False"), _engine("--compile=True", f"--compile_scope={scope}", again)
    assert compile_engine(eager) == "off"
    assert compile_engine(_engine()) == ALL_TRITON
    assert compile_engine(compiled) == scope
    for a, b in zip(_losses(compiled, 8), _losses(eager, 8), strict=True):
        assert a == pytest.approx(b, rel=2e-3)  # bfloat16 keeps 8 bits; fused kernels round less often


@pytest.mark.parametrize("preset", ["llama", "gpt2", "gpt2_openai"])
@pytest.mark.parametrize("compiled", [False, True])
def test_triton_trains_as_eager_does(preset: str, compiled: bool) -> None:
    torch._dynamo.reset()
    flags = [f"--arch_preset={preset}", f"--compile={compiled}"]
    ours, eager = _engine("--kernels=auto", *flags), _engine("--kernels=eager", *flags)
    assert set(ours.ops.chosen.values()) == {"triton"}
    assert set(eager.ops.chosen.values()) == {"eager"}
    for engine in (ours, eager):
        compile_engine(engine)
    for a, b in zip(_losses(ours, 8), _losses(eager, 8), strict=True):
        assert a == pytest.approx(b, rel=2e-3)  # bfloat16 keeps 8 bits; fused kernels round less often


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("preset", ["llama", "gpt2_openai"])
def test_gradients_written_to_their_place_have_the_same_bits(
    preset: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward of Triton's ops and of the linear layers writes them where a step has one micro-batch."""
    found = []
    make_weights = engine_module.make_weights
    for direct in (True, False):
        monkeypatch.setattr(
            engine_module,
            "make_weights",
            lambda model, system, process, single, packed, on=direct: make_weights(
                model, system, process, single and on, packed
            ),
        )
        engine = _engine(f"--arch_preset={preset}", f"--dtype={dtype}", "--gradient_accumulation_steps=1")
        train_step(engine, _batches(), 0)
        assert engine.weights.direct is direct
        found.append({name: engine.weights.gradient(name).float() for name in engine.weights.places})
    for name, gradient in found[1].items():
        assert torch.equal(found[0][name], gradient), name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_step_never_waits_for_the_gpu(dtype: str, dropout: float, corpus: Path) -> None:
    engine = _engine(f"--dtype={dtype}", "--compile=False", f"--dropout={dropout}")
    source = TokenSource.open(corpus / "text", "train")
    with Loader(source, block_size=128, batch_size=8, micro_batches=2, seed=0, pin_memory=True) as loader:
        for step in range(3):
            train_step(engine, loader, step, watched=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(3, 6):
                train_step(engine, loader, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
def test_all_may_be_dropped(compiled: bool) -> None:
    torch._dynamo.reset()
    engine = _engine("--dropout=1.0", f"--compile={compiled}")
    compile_engine(engine)
    rows = engine.config.model.padded_vocab_size
    assert _losses(engine, 2) == pytest.approx([math.log(rows)] * 2, rel=1e-3)  # logits of nothing


def test_attention_is_packed_where_cudnn_wins() -> None:
    """In every layer, forward and evaluation; a run says so, or why not."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("cuDNN's attention is preferred on Hopper and Blackwell data-centre GPUs")
    engine = _engine("--compile=False")
    assert engine.ops.not_packed == ""
    packed, ran = engine.model.position.packed_attention, []
    engine.model.position.packed_attention = lambda *given: ran.append(packed(*given)) or ran[-1]
    train_step(engine, _batches(), 0)
    assert len(ran) == 2 * 2  # layers, micro-batches
    assert all(y is not None for y in ran)


def test_attention_is_cudnns_where_it_wins() -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("cuDNN's attention is preferred on Hopper and Blackwell data-centre GPUs")
    engine = _engine("--compile=False")
    batches = _batches()
    train_step(engine, batches, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train_step(engine, batches, 1)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any("cudnn" in name and "fprop" in name for name in names)
    assert any("cudnn" in name and "bprop" in name for name in names)


def test_the_batches_arrive_whole(corpus: Path) -> None:
    """Pinned buffers are used again and again: what is on the GPU has to be what the loader read."""
    source = TokenSource.open(corpus / "text", "train")
    keys = {"block_size": 128, "batch_size": 8, "micro_batches": 2, "seed": 0}
    with Loader(source, **keys, pin_memory=True) as pinned, Loader(source, **keys) as plain:  # type: ignore[arg-type]
        moved = [batch.to("cuda", non_blocking=True) for batch in itertools.islice(pinned, 200)]
        assert all(torch.equal(a.cpu(), b) for a, b in zip(moved, plain, strict=False))


@pytest.mark.parametrize("compiled", [False, True])
def test_resume_is_bitwise(compiled: bool, corpus: Path, tmp_path: Path) -> None:
    def run(out: Path, *flags: str) -> None:
        torch._dynamo.reset()
        argv = [*SIZES, *BATCH, "--dataset=text", f"--data_dir={corpus}", f"--out_dir={out}", f"--compile={compiled}"]
        argv += ["--deterministic=True", "--dropout=0.1", "--eval_interval=10", "--sample_tokens=4", *flags]
        resolved = command_line.resolve(argv)
        assert trainer.train(resolved.config, resolved.origins) == 0

    run(tmp_path / "a", "--keep_checkpoints=9")
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a/checkpoints/step-00000010").rename(tmp_path / "b/checkpoints/step-00000010")
    run(tmp_path / "b", "--init_from=resume")
    torch.use_deterministic_algorithms(False)
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (hashlib.sha256((tmp_path / x / "checkpoints/step-00000020" / name).read_bytes()) for x in "ab")
        assert one.hexdigest() == two.hexdigest(), name
