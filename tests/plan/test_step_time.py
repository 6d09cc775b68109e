"""The parts of a planned step, each against the work that it does, where a measured total would hide one of them."""

import dataclasses
from typing import Any

import pytest
import torch

from gptperf import flops, plan
from gptperf.cards import causal_pairs
from gptperf.config import Config, command_line
from gptperf.model import GPT
from gptperf.plan import memory
from gptperf.plan.step_time import parts_ms, rates_of

GPU = plan.find_gpu("H200")
LLAMA = "configs/llama_1.36b.toml"


def config_of(*flags: str, gpus: int = 1) -> Config:
    return command_line.resolve([LLAMA, "--batch_size=16", *flags], world_size=gpus).config


def parts_of(*flags: str, gpus: int = 1, micro_batches: int = 1, recompute: Any = "none") -> dict[str, float]:
    config = config_of(f"--gradient_accumulation_steps={gpus * micro_batches}", *flags, gpus=gpus)
    return parts_ms(config, GPU, gpus, plan.strategy_of(config), recompute)


def parameters_of(config: Config) -> tuple[int, int, int]:
    """Returns the elements of all parameters, of the matrices in blocks, and of the head, of the built model."""
    with torch.device("meta"):
        named = dict(GPT(config.model).named_parameters())
    blocks = sum(p.numel() for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2)
    return sum(p.numel() for p in named.values()), blocks, named["lm_head.weight"].numel()


def test_work_is_in_proportion_to_the_micro_batches_of_a_gpu() -> None:
    one, three = parts_of(), parts_of(micro_batches=3)
    for name in ("gemm", "attention", "memory_bound", "other"):
        assert three[name] == pytest.approx(3 * one[name]), name
        assert parts_of(gpus=4, micro_batches=3)[name] == pytest.approx(three[name]), name


def test_matmuls_run_at_the_rate_of_the_card() -> None:
    config = config_of()
    _, blocks, head = parameters_of(config)
    rates, tokens = rates_of(GPU), 16 * config.model.block_size
    peak = GPU.dense_tflops["bfloat16"] * 1e12
    assert parts_of()["gemm"] == pytest.approx(1e3 * 6 * (blocks + head) * tokens / (rates.gemm * peak))
    compiled = "--compile=True"  # as recomputation is by default, so that attention is not packed in any case
    once = parts_of(compiled, "--recompute_ffn=True")
    full = parts_of(compiled, recompute="full")  # the forward of every block once more, but not the head's
    assert full["gemm"] / parts_of()["gemm"] == pytest.approx((8 * blocks + 6 * head) / (6 * (blocks + head)))
    assert full["attention"] / parts_of()["attention"] == pytest.approx(4 / 3)
    selective = parts_of(recompute="selective")  # norms and activations once more, but no matmul
    for name in ("gemm", "attention"):
        assert selective[name] == parts_of()[name]
    moved = flops.bytes_moved(config.model)
    again = moved.norm.forward + moved.position.forward + moved.activation.forward
    for parts in (selective, full):
        assert parts["memory_bound"] / once["memory_bound"] == pytest.approx(1 + again / moved.total)


def test_attention_is_slower_with_short_sequences_and_narrow_heads() -> None:
    def rate(*flags: str) -> float:
        model = config_of(*flags).model
        work = flops.flops_per_token(model).scores / model.block_size  # of a token, and so of a batch of equal tokens
        return work / (parts_of(*flags)["attention"] / model.block_size)

    assert rate("--block_size=865") == pytest.approx(rate("--block_size=131072") / 2, rel=1e-2)
    assert rate("--n_head=32") < 0.85 * rate("--n_head=16")


def test_dropout_takes_time_for_each_pair_of_query_and_key() -> None:
    added = []
    for T in (1024, 4096):
        sizes = f"--block_size={T}", "--n_head=32"
        with_dropout, without = parts_of("--dropout=0.1", *sizes), parts_of(*sizes)
        added.append((with_dropout["attention"] - without["attention"]) / T)  # per token
    assert added[0] > 0
    assert added[1] / added[0] == pytest.approx((4096 + 1) / (1024 + 1))


def test_windows_and_documents_run_in_flex_attention() -> None:
    """Its rate on the pairs that count: 0.44 of that of causal attention in a layer with a window, 0.66 without one."""
    full = parts_of()["attention"]
    T, n = config_of().model.block_size, config_of().model.n_layer
    share = causal_pairs(T, 512) / causal_pairs(T, T)
    assert parts_of("--window=512")["attention"] == pytest.approx(full * share / 0.44)
    assert parts_of("--window=512,full")["attention"] == pytest.approx(full * (share / 0.44 + 1) / 2)
    assert n % 2 == 0
    assert parts_of(f"--window={T}")["attention"] == full
    assert parts_of("--document_mask=True")["attention"] == pytest.approx(full / 0.66)
    both = parts_of("--document_mask=True", "--window=512,full")["attention"]
    assert both == pytest.approx(full * (share / 0.44 + 1 / 0.66) / 2)


def test_the_optimizer_moves_every_byte_that_it_reads_or_writes() -> None:
    """A gradient in bfloat16 becomes one in float32; norm; update of weight, two moments and the bfloat16 copy."""
    norm, update = 4, 4 * 4 + 3 * 4 + 2
    one = 2 + 4 + norm + update
    added = 2 + 4 + 4  # of a further micro-batch: read both gradients, write the sum
    base = parts_of(micro_batches=3)["optimizer"] / (one + 2 * added)
    assert parts_of(micro_batches=2)["optimizer"] == pytest.approx((one + added) * base)
    for strategy, share in (("--use_zero1=False", 1), ("--use_zero1=True", 4), ("--use_fsdp=True", 4)):
        assert parts_of(strategy, gpus=4)["optimizer"] == pytest.approx((2 + 4 + (norm + update) / share) * base)
    # In a step of one micro-batch backward writes the gradients of the blocks where norm and update read them.
    total, blocks, _ = parameters_of(config_of())
    copied = (total - blocks) / total
    for dtype, size, copy in (("bfloat16", 2, 2), ("float32", 4, 0)):
        moved = 2 * size * copied + size + size + 6 * 4 + copy
        assert parts_of(f"--dtype={dtype}")["optimizer"] == pytest.approx(moved * base)
    assert parts_of("--dtype=float16")["optimizer"] == pytest.approx(one * base)  # the loss scale needs float32
    compiled = 2 * 2 + 2 + 2 + 6 * 4 + 2  # every gradient is copied
    assert parts_of("--compile=True")["optimizer"] == pytest.approx(compiled * base)


NCCL = "--communication=process_group"
BFLOAT16, FLOAT32 = 2, 4


@pytest.mark.parametrize(
    ("flags", "micro_batches", "sent"),
    [  # bytes per parameter that a GPU receives: of gradients, and of sums or weights
        (["--compile_scope=model"], 1, BFLOAT16 + FLOAT32),
        (["--compile_scope=model"], 2, FLOAT32 + FLOAT32),
        (["--compile_scope=model", NCCL], 1, FLOAT32 + FLOAT32),
        (["--compile_scope=model", NCCL, "--reduce_dtype=bfloat16"], 1, BFLOAT16 + BFLOAT16),
        (["--use_zero1=True"], 1, BFLOAT16 + BFLOAT16),
        (["--use_zero1=True"], 2, FLOAT32 + BFLOAT16),
        (["--use_fsdp=True"], 1, BFLOAT16 + 2 * BFLOAT16),
        (["--use_fsdp=True"], 8, 8 * (BFLOAT16 + 2 * BFLOAT16)),
        (["--use_fsdp=True", "--fsdp_gather_once=True"], 8, 8 * BFLOAT16 + BFLOAT16),
        (["--use_fsdp=True", "--fsdp_reduce_once=True"], 8, FLOAT32 + 8 * 2 * BFLOAT16),
    ],
)
def test_communication_moves_every_byte_that_is_sent(flags: list[str], micro_batches: int, sent: float) -> None:
    """What compute covers costs less, but the same share of every transfer."""
    flags = ["--compile=True", *flags]
    covered = 1.0 if "--compile_scope=model" in flags else 0.75
    received = sent * parameters_of(config_of())[0] * 3 / 4  # of a ring of four
    assert parts_of(*flags, gpus=4, micro_batches=micro_batches)["communication"] == pytest.approx(
        1e3 * covered * received / rates_of(GPU).bus_byte_s
    )


@pytest.mark.parametrize(("flags", "share"), [([], 2 / 3), (["--use_zero1=True"], 1)])
def test_a_short_step_covers_less_communication(flags: list[str], share: float) -> None:
    """Backward covers DDP's reduction; forward and backward cover what ZeRO-1 sends."""
    flags = ["--batch_size=1", "--block_size=64", "--compile_scope=block", *flags]
    parts = parts_of(*flags, gpus=4)
    compute = parts["gemm"] + parts["attention"] + parts["memory_bound"]
    sent = (BFLOAT16 + FLOAT32) if share < 1 else 2 * BFLOAT16
    whole = 1e3 * sent * parameters_of(config_of())[0] * 3 / 4 / rates_of(GPU).bus_byte_s
    assert parts["communication"] == pytest.approx(max(whole - share * compute, 0.75 * whole))
    assert share * compute < 0.25 * whole


def test_fsdp_holds_two_units_or_all() -> None:
    """A unit is a block or the embedding, whichever is larger."""
    for vocabulary in (1024, 200_000):
        config = config_of(f"--vocab_size={vocabulary}", "--use_fsdp=True", "--fsdp_gather_once=False", gpus=4)
        system = dataclasses.replace(config.system, fsdp_gather_once=True)
        two, every = (
            memory.footprint(dataclasses.replace(config, system=s), 4, "fsdp").buffers_gb
            for s in (config.system, system)
        )
        _, blocks, head = parameters_of(config)
        unit = max(blocks / config.model.n_layer, head)
        matrices = blocks + head * (1 if config.model.weight_tying else 2)
        assert every - two == pytest.approx(BFLOAT16 * (matrices - 2 * unit) / 1e9, rel=1e-3)


@pytest.mark.parametrize(("name", "reported_gb"), [("H200", 150.1), ("H100", 85.0), ("A100 SXM 40", 42.3)])
def test_the_memory_of_a_data_sheet_is_what_cuda_reports(name: str, reported_gb: float) -> None:
    sheet_gb = plan.find_gpu(name).memory_gb
    assert memory.usable_gb(sheet_gb) == pytest.approx(memory.allocatable_gb(reported_gb), rel=0.01)
    assert memory.usable_gb(sheet_gb) < reported_gb
