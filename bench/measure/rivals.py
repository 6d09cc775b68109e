"""Times training steps of gptperf and of other stacks: `python -m bench.measure.rivals [--models ...] [--rivals ...]`.

Every contender trains the same architecture with float32 weights, bfloat16 autocast, AdamW and gradient clipping, one
optimizer step per micro-batch, on new random tokens that are made on the device. Contenders take turns in one process:
in each round every contender runs one window of steps, so that clock and temperature are the same for all. Contenders
stay in memory together while they fit; otherwise, and beside reduce_overhead, each is built again for its turn. Figures
are the median over the steps of all rounds, with the 10th and 90th percentile.

Rivals:
    gptperf FLAGS       gptperf with other flags, such as "gptperf --cuda_graph=False"
    compile             the plain model of `bench.measure.plain_model` under torch.compile
    reduce_overhead     the same with mode="reduce-overhead", which captures CUDA graphs
    nanogpt             nanoGPT's model.py under torch.compile; needs --nanogpt=FOLDER
    liger               Hugging Face's LLaMA with Liger kernels, not compiled; needs transformers and liger-kernel
    torchao             the plain model with float8 linears (tensorwise) under torch.compile; needs torchao
"""

import gc
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from bench.measure.models import RIVAL_MODELS, SHAPES, rival_config
from bench.measure.plain_model import PlainGPT, unsupported
from bench.measure.step import micro_batch_ms, peak_here, planned_here, random_batches
from gptperf.config import Config
from gptperf.config.flags import COMMAND_LINE, Flags, parse
from gptperf.config.keys import Choice, Range
from gptperf.distributed.process import start_process
from gptperf.errors import nearest, run_main
from gptperf.flops.float8 import float8_flops
from gptperf.formats import number
from gptperf.monitor.step_timing import Spread, cuda_window
from gptperf.monitor.throughput import Throughput
from gptperf.training.engine import build_engine, compile_engine, open_graphs
from gptperf.training.step import train_step

__all__ = ["OURS", "RIVALS", "Turn", "lines", "main", "measure"]

OURS = "gptperf"
RIVALS = ("compile", "reduce_overhead", "nanogpt", "liger", "torchao")
_WARM_UP = 12

Step = Callable[[int], object]
Batches = Iterator[Tensor]
Windows = dict[str, Callable[[int, int], list[float]]]


@dataclass(frozen=True)
class Turn:
    """What the contenders train."""

    config: Config
    variants: Mapping[str, Config] = field(default_factory=dict)
    """Configurations of gptperf with other flags, by the name of the contender."""
    nanogpt: Path | None = None
    """Folder of nanoGPT."""


def _ours(turn: Turn) -> Step:
    engine = build_engine(turn.config, start_process("cuda"))
    engine.weights.share()
    compile_engine(engine)
    open_graphs(engine, micro_batch_ms(turn.config), print)
    batches = random_batches(engine.config, engine.process.device)
    return lambda step: train_step(engine, batches, step, watched=False)


def _trained(turn: Turn, model: nn.Module, forward: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Returns a step of a plain training loop."""
    config, optimizer = turn.config, turn.config.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (optimizer.beta1, optimizer.beta2)
    adamw = torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=betas, fused=True)
    batches = random_batches(config, torch.device("cuda"))

    def step(_: int) -> Tensor:
        tokens, targets = next(batches)
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.grad_clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss

    return step


def _plain(turn: Turn) -> PlainGPT:
    problem = unsupported(turn.config.model)
    if problem is not None:
        raise NotImplementedError(f"the plain model does not have {problem}")
    return PlainGPT(turn.config.model).cuda()


def _compile(turn: Turn) -> Step:
    model = _plain(turn)
    return _trained(turn, model, torch.compile(model))


def _reduce_overhead(turn: Turn) -> Step:
    model = _plain(turn)
    return _trained(turn, model, torch.compile(model, mode="reduce-overhead"))


def _torchao(turn: Turn) -> Step:
    float8: Any = importlib.import_module("torchao.float8")
    model = _plain(turn)

    def converts(module: nn.Module, name: str) -> bool:
        return name != "lm_head"

    float8.convert_to_float8_training(model, module_filter_fn=converts)
    return _trained(turn, model, torch.compile(model))


def _nanogpt(turn: Turn) -> Step:
    if turn.nanogpt is None:
        raise NotImplementedError("--nanogpt=FOLDER was not given")
    spec = importlib.util.spec_from_file_location("nanogpt_model", turn.nanogpt / "model.py")
    if spec is None or spec.loader is None:
        raise NotImplementedError(f"{turn.nanogpt}/model.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    model = turn.config.model
    if (model.ffn_type, model.position_encoding, model.norm_position) != ("standard", "learned_absolute", "pre"):
        raise NotImplementedError("nanoGPT has only the architecture of GPT-2")
    shape = {"n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd}
    shape |= {"block_size": model.block_size, "vocab_size": model.padded_vocab_size}
    theirs = module.GPT(module.GPTConfig(**shape, dropout=model.dropout, bias=model.bias)).cuda()
    compiled = torch.compile(theirs)
    return _trained(turn, theirs, lambda tokens, targets: compiled(tokens, targets)[1])


def _liger(turn: Turn) -> Step:
    model = turn.config.model
    if (model.ffn_type, model.position_encoding, model.normalization) != ("swiglu", "rope", "rmsnorm"):
        raise NotImplementedError("only LLaMA is measured with Liger")
    transformers: Any = importlib.import_module("transformers")
    liger: Any = importlib.import_module("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama()
    described = transformers.LlamaConfig(
        hidden_size=model.n_embd,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.n_layer,
        num_attention_heads=model.n_head,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.block_size,
        vocab_size=model.padded_vocab_size,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.weight_tying,
        use_cache=False,
        attn_implementation="sdpa",
    )
    theirs = transformers.LlamaForCausalLM(described).cuda()

    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        # Hugging Face shifts the labels itself: the target of position t is the label of position t + 1.
        loss: Tensor = theirs(input_ids=tokens, labels=torch.cat([tokens[:, :1], targets[:, :-1]], 1)).loss
        return loss

    return _trained(turn, theirs, forward)


_CONTENDERS: Mapping[str, Callable[[Turn], Step]] = types.MappingProxyType(
    {
        OURS: _ours,
        "compile": _compile,
        "reduce_overhead": _reduce_overhead,
        "nanogpt": _nanogpt,
        "liger": _liger,
        "torchao": _torchao,
    }
)


def measure(turn: Turn, names: Sequence[str], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Times contenders in turns.

    Args:
        turn: what they train.
        names: contenders, of `OURS`, `RIVALS` and the variants of the turn.
        rounds: windows of each contender.
        steps: steps in a window.

    Returns:
        Contender -> step_ms, p10_ms, p90_ms, tokens_per_sec, ratio (its time divided by gptperf's time) and
        peak_memory_gb (None if the contenders were in memory together); or reason, if it cannot train this model.
        gptperf and its variants also have mfu_percent, planned_ms and planned_gb, as far as they are known here.
    """
    # Beside the CUDA graphs of mode="reduce-overhead", a replay of ours ends in a segmentation fault (PyTorch 2.11).
    resident = "reduce_overhead" not in names
    times: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, dict[str, Any]] = {}
    peaks: dict[str, float] = {}
    windows: Windows = {}
    for begin in range(0, rounds * steps, steps):
        for name in names:
            if name in found:
                continue
            _reset_peak()
            try:
                measured = _window(turn, name, windows, begin, steps)
                if measured is None:
                    resident = False
                    _free(windows)
                    measured = _window(turn, name, windows, begin, steps)
                if measured is None:
                    raise NotImplementedError("out of memory")
                times[name] += measured
            except (NotImplementedError, ImportError) as error:
                found[name] = {"reason": str(error).partition("\n")[0]}
            if not resident:
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
                _free(windows)
    ours = Spread.of(times[OURS]).ms if times.get(OURS) else None
    for name in names:
        if name not in found:
            spread = Spread.of(times[name])
            config = turn.variants.get(name, turn.config)
            found[name] = {
                "step_ms": spread.ms,
                "p10_ms": spread.p10_ms,
                "p90_ms": spread.p90_ms,
                "tokens_per_sec": 1e3 * config.tokens_per_iter / spread.ms,
                "ratio": None if ours is None else spread.ms / ours,
                "peak_memory_gb": peaks.get(name),
            }
            if name == OURS or name in turn.variants:
                found[name] |= _known(config, spread.ms)
    return {name: found[name] for name in names}


def _known(config: Config, step_ms: float) -> dict[str, Any]:
    """Returns the MFU of a step of gptperf, and its plan, as far as this GPU is known."""
    if not torch.cuda.is_available():
        return {}
    peak, planned = peak_here(config), planned_here(config)
    throughput = Throughput(config.model, config.tokens_per_iter, 1, peak, float8_flops=float8_flops(config))
    found = {"mfu_percent": throughput.record(step_ms).get("mfu_percent")}
    if planned is not None:
        found |= {"planned_ms": planned.step_ms, "planned_gb": planned.memory.total_gb}
    return found


def _window(turn: Turn, name: str, windows: Windows, begin: int, steps: int) -> list[float] | None:
    """Returns the milliseconds of a window of steps, or None if memory runs out; builds the contender if necessary."""
    try:
        if name not in windows:
            variant = turn.variants.get(name)
            build = _CONTENDERS[name if variant is None else OURS]
            windows[name] = cuda_window(build(turn if variant is None else replace(turn, config=variant)))
            windows[name](0, _WARM_UP)
        return windows[name](_WARM_UP + begin, steps)
    except torch.OutOfMemoryError:
        return None


def _free(windows: Windows) -> None:
    windows.clear()
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True, kw_only=True)
class _RivalFlags(Flags):
    """What to time."""

    models: tuple[Annotated[str, Choice(RIVAL_MODELS)], ...] = RIVAL_MODELS
    """Models."""
    shapes: tuple[Annotated[str, Choice(SHAPES)], ...] = ("usual",)
    """small: one sequence; usual: the batch of the bench; long: sequences of 8192 tokens, as many tokens as usual."""
    rivals: tuple[str, ...] = ("compile", "reduce_overhead")
    """Rivals beside gptperf; `gptperf FLAGS` is gptperf with other flags."""
    flags: str = ""
    """More flags of gptperf's run, separated by spaces."""
    rounds: Annotated[int, Range(1)] = 3
    """Windows of each contender."""
    steps: Annotated[int, Range(1)] = 15
    """Steps in a window."""
    nanogpt: Path | None = None
    """Folder with nanoGPT's model.py."""

    def problems(self) -> Sequence[str]:
        """Returns the rivals that are not known."""
        unknown = [name for name in self.rivals if name not in RIVALS and name.split()[:1] != [OURS]]
        wanted = f"wanted {', '.join(RIVALS)}, or {OURS!r} with flags"
        return [f"{COMMAND_LINE}: rivals: found {name!r}, {wanted}{nearest(name, RIVALS)}" for name in unknown]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for every model."""
    args = parse(_RivalFlags, argv, "bench.measure.rivals", __doc__)
    turns = {(model, shape): _turn(model, shape, args) for model in args.models for shape in args.shapes}
    if not torch.cuda.is_available():
        print("bench.measure.rivals: no GPU here; a step is timed on a GPU only")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for (model, shape), turn in turns.items():
        print(f"{model}, {shape}: {turn.config.train.batch_size} x {turn.config.model.block_size}")
        print("\n".join(lines(measure(turn, (OURS, *args.rivals), args.rounds, args.steps))), flush=True)
        _free({})
    return 0


def _turn(model: str, shape: str, args: _RivalFlags) -> Turn:
    variants = {
        name: rival_config(model, shape, [*args.flags.split(), *name.split()[1:]])
        for name in (OURS, *args.rivals)
        if name not in RIVALS
    }
    return Turn(variants.pop(OURS), variants, args.nanogpt)


def lines(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields a line for each contender."""
    width = max(18, *(len(name) + 2 for name in found))
    columns = f"{'tokens/s':>12}{'/ gptperf':>11}{'MFU %':>8}{'planned':>10}{'peak GB':>9}{'planned':>9}"
    yield f"  {'':<{width}}{'ms/step':>10}{'p10':>9}{'p90':>9}{columns}"
    for name, row in found.items():
        if "reason" in row:
            yield f"  {name:<{width}}{row['reason']}"
            continue
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        figures = f"{row['step_ms']:>10.3f}{row['p10_ms']:>9.3f}{row['p90_ms']:>9.3f}{row['tokens_per_sec']:>12,.0f}"
        mfu = number(row.get("mfu_percent"), ".2f")
        plans = f"{number(row.get('planned_ms'), '.3f'):>10}{number(row['peak_memory_gb'], '.2f'):>9}"
        plans += f"{number(row.get('planned_gb'), '.2f'):>9}"
        yield f"  {name:<{width}}{figures}{ratio:>11}{mfu:>8}{plans}"


if __name__ == "__main__":
    run_main(main)
