"""The predicted memory against the tensors that autograd and the optimizer keep, byte by byte, and against a peak."""

import importlib
import os
import subprocess
import sys
from itertools import accumulate, cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptperf import flops, ops
from gptperf.cards import BUCKET_NUMEL
from gptperf.config import Config, command_line
from gptperf.distributed.replicated import Replicated
from gptperf.kernels import reference
from gptperf.kernels.logit_chunks import chunk_rows
from gptperf.model import GPT
from gptperf.ops import resolve_ops
from gptperf.plan import memory
from gptperf.training.float8 import Float8Layers
from gptperf.training.optimizers.adamw import AdamW

ROOT = Path(__file__).parents[2]
SIZES = ["--n_layer=1", "--n_embd=48", "--n_head=4", "--block_size=12", "--vocab_size=96", "--batch_size=3"]
KEYS = (
    "arch_preset",
    "norm_position",
    "position_encoding",
    "n_kv_head",
    "qk_norm",
    "bias",
    "head_dim",
    "attention_bias",
)
ATTENTION = {(4, False): ("none", "none"), (4, True): (20, "qkv"), (2, False): (8, "all"), (2, True): (6, "none")}
"""Number of key heads, QK-norm -> head_dim and attention_bias."""
COMBINATIONS = [
    (
        preset,
        "pre" if heads == 4 else "post",
        position,
        heads,
        qk_norm,
        qk_norm != (heads == 4),
        *ATTENTION[heads, qk_norm],
    )
    for preset, position, heads, qk_norm in product(
        ("llama", "gpt2", "gpt2_openai"), ("rope", "learned_absolute", "none"), (4, 2), (False, True)
    )
]


def config_of(*flags: str) -> Config:
    return command_line.resolve([*SIZES, "--compile=False", *flags]).config


def kept_bytes(model: GPT, tokens: Tensor, targets: Tensor) -> int:
    """Returns the bytes that autograd keeps for backward, without parameters, tables and the loss's own gradients."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    loss = model.loss

    def apart(*arguments: Any, **options: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            return loss(*arguments, **options)

    model.loss = apart
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens, targets)
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)


def peak_bytes(model: GPT, tokens: Tensor, targets: Tensor) -> int:
    """Returns the peak of the bytes that forward and backward allocate on the CPU, as PyTorch counts them."""
    torch.autograd.backward(model(tokens, targets))
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.backward(model(tokens, targets))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def built(combination: tuple[Any, ...], *flags: str) -> tuple[Config, GPT, Tensor, Tensor]:
    """Returns a float32 model with Triton's ops, and a batch."""
    config = config_of(*flags, "--dtype=float32", *(f"--{k}={v}" for k, v in zip(KEYS, combination, strict=True)))
    chosen = resolve_ops("triton", "cuda")
    model = GPT(config.model, chosen if config.system.recompute_ffn else ops.keeping_ffn(chosen))
    V, shape = config.model.vocab_size, (config.train.batch_size, config.model.block_size)
    return config, model, torch.randint(V, shape), torch.randint(V, shape)


def check_kept(combination: tuple[Any, ...], recompute: Any, *flags: str) -> str | None:
    """Returns what is wrong, or None."""
    flags = (*flags, f"--recompute={recompute}")
    config, model, tokens, targets = built(combination, "--n_layer=2", *flags)
    model.recompute = recompute
    found = kept_bytes(model, tokens, targets)
    wanted = tokens.numel() * memory.saved_bytes(config, recompute)
    return None if found == wanted else f"{combination}, {recompute} {flags}: kept {found}, planned {wanted}"


def check_peak(combination: tuple[Any, ...], recompute: Any, *flags: str) -> str | None:
    """Returns what is wrong by more than two activations of n_embd, or None."""
    sizes = ["--n_layer=3", "--batch_size=64", "--block_size=32", "--n_embd=64", "--vocab_size=8"]
    flags = (*flags, f"--recompute={recompute}")
    config, model, tokens, targets = built(combination, *sizes, *flags)
    model.recompute = recompute
    parts = memory.footprint(config, recompute=recompute)
    planned = parts.activations_gb + parts.logits_gb + parts.buffers_gb - memory._WORKSPACE_GB
    unit = tokens.numel() * config.model.n_embd * 4
    found, wanted = peak_bytes(model, tokens, targets) / unit, 1e9 * planned / unit
    return (
        None
        if abs(found - wanted) < 2
        else f"{combination}, {recompute} {flags}: peak {found:.2f}, planned {wanted:.2f}"
    )


def check_float8(preset: str, *flags: str) -> str | None:
    """Returns what is wrong with the bytes that a token more keeps in fp8, or None; statistics are kept once."""
    kept = []
    for batch_size in (1, 3):
        sizes = ("--n_layer=2", "--n_embd=64", "--block_size=16", f"--batch_size={batch_size}")
        config = config_of(*sizes, f"--arch_preset={preset}", "--dtype=bfloat16", "--matmul_dtype=fp8", *flags)
        model = GPT(config.model, resolve_ops("triton", "cuda"))
        Replicated(model, torch.bfloat16)  # the model computes with its copies
        Float8Layers(model, config, triton=False)
        shape = (batch_size, config.model.block_size)
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(kept_bytes(model, torch.randint(96, shape), torch.randint(96, shape)))
    found, wanted = (kept[1] - kept[0]) / (2 * 16), memory.saved_bytes(config, "none")
    return None if found == wanted else f"{preset} {flags}: kept {found}, planned {wanted}"


@pytest.mark.slow
def test_activations_are_what_autograd_keeps() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("preset", ["llama", "gpt2_openai"])
def test_states_are_what_the_buckets_hold(preset: str, dtype: str, moments: str) -> None:
    """But for the gaps between parameters, which begin at multiples of 64 elements."""
    flags = (f"--dtype={dtype}", f"--optimizer_state_dtype={moments}", "--vocab_size=4096", "--n_embd=256")
    config = config_of(f"--arch_preset={preset}", *flags)
    model = GPT(config.model)
    weights = Replicated(model, getattr(torch, dtype))
    optimizer = AdamW(weights.buckets, config.optimizer, lambda *_: None, weights.pieces_of)
    tensors = [x for bucket in weights.buckets for x in (bucket.master, bucket.grad, bucket.compute)]
    tensors += [x for bucket in weights.buckets for x in optimizer.states(bucket).values()]
    held = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
    planned = memory.footprint(config)
    states = round(1e9 * (planned.weights_gb + planned.gradients_gb + planned.optimizer_gb))
    gaps = 18 * 64 * len(weights.places)
    assert states <= held <= states + gaps


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("preset", ["llama", "gpt2"])
def test_recomputation_changes_no_gradient(preset: str, recompute: str) -> None:
    config = config_of(f"--arch_preset={preset}", "--dropout=0.1")
    torch.manual_seed(0)
    model = GPT(config.model)
    tokens, targets = torch.randint(96, (2, 3, 12))
    gradients = []
    for mode in ("none", recompute):
        model.recompute = mode
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(model(tokens, targets), tuple(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_capped_logits_are_kept_by_eager_pytorch_alone() -> None:
    """The plans differ by the loss's peak memory; the Triton op caps the logits where they lie."""
    V, peaks = 4096, []
    x = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, 8, dtype=torch.bfloat16, requires_grad=True)
    for cap in (0.0, 5.0):
        loss = lambda *_, cap=cap: reference.linear_cross_entropy(x, weight, torch.arange(64), softcap=cap)  # noqa: E731
        peaks.append(peak_bytes(_Loss(loss), x, x) / 64 / V)
    flags = ["--vocab_size=4096", "--dtype=bfloat16", "--compile=False"]
    for kernels, wanted in (("eager", peaks[1] - peaks[0]), ("triton", 0.0)):
        plain, capped = (config_of(*flags, f"--kernels={kernels}", *more) for more in ([], ["--logit_softcap=5"]))
        tokens = plain.train.batch_size * plain.model.block_size
        found = memory.footprint(capped).logits_gb - memory.footprint(plain).logits_gb
        assert 1e9 * found / tokens / V == pytest.approx(wanted, abs=0.01), kernels


class _Loss(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


def test_rows_of_logits_are_padded() -> None:
    odd, even = (config_of(f"--vocab_size={V}", "--kernels=triton") for V in (97, 104))
    copy = 104 * 48 * 2  # of the weight, with rows of zeros
    assert round(1e9 * (memory.footprint(odd).logits_gb - memory.footprint(even).logits_gb)) == copy


def large(*flags: str, gpus: int = 1) -> Config:
    return command_line.resolve(["configs/llama_1.36b.toml", "--batch_size=16", *flags], world_size=gpus).config


def test_the_loss_holds_a_chunk_of_logits_and_the_gradient_of_its_weight() -> None:
    """Rows of logits in bfloat16, the input with its gradient, and the weight's gradient in float32."""
    config = large("--vocab_size=32768")
    V, C, tokens = 32768, config.model.n_embd, 16 * config.model.block_size
    rows = min(tokens, chunk_rows(V, 2))
    assert rows < tokens
    wanted = rows * V * 2 + 2 * tokens * C * 2 + V * C * 4
    assert 1e9 * memory.footprint(config).logits_gb == pytest.approx(wanted)


def test_the_gradient_of_a_tied_head_waits_for_that_of_the_embedding() -> None:
    flags = ["--vocab_size=1024", "--gradient_accumulation_steps=1"]
    tied, untied = (memory.footprint(large(*flags, f"--weight_tying={x}")) for x in (True, False))
    waits = 1024 * large().model.n_embd * 2
    assert 1e9 * (tied.buffers_gb - untied.buffers_gb) == pytest.approx(waits, rel=1e-3)


def test_dropout_keeps_a_byte_for_each_element_of_a_branch() -> None:
    config = large("--dropout=0.1")
    kept = memory.saved_bytes(config, "none") - memory.saved_bytes(large(), "none")
    assert kept == 2 * config.model.n_embd * config.model.n_layer


def test_masks_of_all_pairs_are_kept_where_flex_attention_does_not_run() -> None:
    """With documents T elements per token and layer, with windows alone one mask for all sequences of a micro-batch."""

    def kept(*flags: str) -> float:
        return memory.saved_bytes(large(*flags), "none")

    config = large()
    T, L, B = config.model.block_size, config.model.n_layer, config.train.batch_size
    documents, window, dropout = "--document_mask=True", "--window=512,full", "--dropout=0.1"
    assert kept(documents) == kept(window) == kept()
    assert kept(documents, dropout) - kept(dropout) == 2 * T * L
    assert kept(window, dropout) - kept(dropout) == pytest.approx(2 * T / B * L / 2)
    odd = f"--block_size={T - 1}"
    assert kept(documents, odd) - kept(odd) == 2 * (T - 1) * L
    assert kept(documents, odd, "--attention_backend=manual") == kept(odd, "--attention_backend=manual")


@pytest.mark.parametrize("gpus", [2, 4])
def test_copy_engines_hold_the_shares_that_they_pull(gpus: int) -> None:
    """A bucket's share of each other GPU, in float32; with one micro-batch three buckets more, all in bfloat16."""
    bucket, others = max(BUCKET_NUMEL, flops.parameters(large().model).embedding), (gpus - 1) / gpus
    for micro_batches, wanted in ((1, 2 * (3 + others) * bucket), (2, 4 * others * bucket)):
        steps = (f"--gradient_accumulation_steps={n * micro_batches}" for n in (gpus, 1))
        many, one = (memory.footprint(large(flag, gpus=n), n) for flag, n in zip(steps, (gpus, 1), strict=True))
        assert 1e9 * (many.buffers_gb - one.buffers_gb) == pytest.approx(wanted)


def test_sharding_leaves_its_share() -> None:
    config = config_of()
    alone = memory.footprint(config)
    for gpus in (2, 4):
        zero1, fsdp = (memory.footprint(config, gpus, strategy) for strategy in ("zero1", "fsdp"))
        assert zero1.optimizer_gb == pytest.approx(alone.optimizer_gb / gpus)
        assert zero1.gradients_gb == alone.gradients_gb
        assert fsdp.gradients_gb == pytest.approx(alone.gradients_gb / gpus)
        assert fsdp.weights_gb == pytest.approx(alone.weights_gb / gpus)


def test_less_is_kept_the_more_is_recomputed() -> None:
    for preset in ("llama", "gpt2"):
        config = config_of(f"--arch_preset={preset}")
        none, selective, full = (memory.saved_bytes(config, mode) for mode in ("none", "selective", "full"))
        assert full < selective < none


def main() -> int:
    ops._why_not_triton = lambda *_: None
    memory._triton = lambda config: True
    for name in ("norm", "rope", "activation", "linear_cross_entropy", "column_sum"):
        # Memory is the same without the kernels; the interpreter would hold their tensors longer than a GPU does.
        importlib.import_module(f"gptperf.kernels.{name}").launch = lambda *_: None
    found = [check_kept(combination, mode) for combination in COMBINATIONS for mode in ("none", "full")]
    # One mode for each combination, in turns: every mode meets every preset, position encoding and kind of attention.
    modes = cycle(("none", "selective", "full"))
    found += [check_peak(combination, mode) for combination, mode in zip(COMBINATIONS, modes, strict=False)]
    again = "--recompute_ffn=True"
    found += [
        check(combination, "none", again) for combination in COMBINATIONS[::5] for check in (check_kept, check_peak)
    ]
    for preset, level in product(("llama", "gpt2"), ("forward", "full")):
        for skip in ("", "0", "attention", "blocks.0.ffn.out"):
            found.append(check_float8(preset, f"--fp8_level={level}", f"--fp8_skip={skip}"))
    wrong = [text for text in found if text]
    print("\n".join(wrong), f"{len(found) - len(wrong)} of {len(found)} agree", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
