"""Rules between keys: combinations of values that cannot run, each with its reason and the nearest valid value."""

import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from gptperf import registry
from gptperf.config.fork import fork_of
from gptperf.errors import nearest
from gptperf.formats import counted

__all__ = ["RULES", "Problem", "Rule", "combination_problems"]

_Values = Mapping[str, Any]


class Problem(NamedTuple):
    """Keys whose values cannot be combined, and the reason."""

    keys: tuple[str, ...]
    text: str


class Rule(NamedTuple):
    """A check of the values of some keys."""

    keys: tuple[str, ...]
    check: Callable[[_Values], str | None]
    """Returns what is wrong, or None."""
    yields: Mapping[str, Callable[[_Values], Any]] = {}
    """Keys that may yield to a key of a higher layer, each with its nearest valid value. A key is here only if losing
    its value changes neither the model nor the data, and removes no file."""


def _divisors(number: int) -> set[int]:
    """Returns all divisors of a number, in a time that grows with its square root."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}


def _divisible(c: _Values, what: str, by: str) -> str | None:
    if c[what] % c[by] == 0:
        return None
    near = min(_divisors(c[what]), key=lambda n: (abs(n - c[by]), n))
    return f"{what} = {c[what]} is not a multiple of {by} = {c[by]}; nearest {by}: {near}"


def _heads(c: _Values) -> str | None:
    return None if c["head_dim"] is not None else _divisible(c, "n_embd", "n_head")


def _odd_head_dim(c: _Values) -> str | None:
    if c["position_encoding"] != "rope":
        return None
    if c["head_dim"] is not None:
        if c["head_dim"] % 2 == 0:
            return None
        return f"RoPE rotates pairs of elements, but head_dim = {c['head_dim']} is odd; nearest: {c['head_dim'] + 1}"
    if c["n_embd"] % c["n_head"] or c["n_embd"] // c["n_head"] % 2 == 0:
        return None
    near = f"; nearest n_embd: {c['n_embd'] + 1}"
    if c["n_embd"] % 2 == 0:
        near = f"; nearest n_head: {min(_divisors(c['n_embd'] // 2), key=lambda n: (abs(n - c['n_head']), n))}"
    head_dim = c["n_embd"] // c["n_head"]
    return f"RoPE rotates pairs of elements, but head_dim = n_embd / n_head = {head_dim} is odd{near}"


def _window(c: _Values) -> str | None:
    parts = c["window"].split(",")
    for part in parts:
        if part != "full" and not (part.isascii() and part.isdigit() and int(part) > 0):
            near = next((int(found) for found in re.findall(r"[1-9]\d*", c["window"])), "full")
            wanted = "wanted a number of tokens above 0, full, or several of these with commas"
            return f"window = {c['window']!r}: found {part!r}, {wanted}; nearest: {near}"
    if len(parts) > c["n_layer"]:
        return (
            f"window = {c['window']!r} has {counted(len(parts), 'part')} for n_layer = {c['n_layer']}; wanted at most "
            "one per layer"
        )
    return None


def _rope_scaling(c: _Values) -> str | None:
    if c["rope_scaling"] == "none" or c["position_encoding"] == "rope":
        return None
    return (
        f"rope_scaling = {c['rope_scaling']!r} needs position_encoding = 'rope', found {c['position_encoding']!r}; "
        "nearest: rope_scaling = 'none'"
    )


def _freq_factors(c: _Values) -> str | None:
    low, high = c["rope_low_freq_factor"], c["rope_high_freq_factor"]
    if c["rope_scaling"] != "llama3" or low < high:
        return None
    return f"rope_high_freq_factor = {high} is not above rope_low_freq_factor = {low}; nearest: {2 * low}"


def _kv_heads(c: _Values) -> str | None:
    return None if c["n_kv_head"] is None else _divisible(c, "n_head", "n_kv_head")


def _flash_attn(c: _Values) -> str | None:
    if c["attention_backend"] != "flash_attn" or importlib.util.find_spec("flash_attn") is not None:
        return None
    return "attention_backend = 'flash_attn' needs the package flash-attn, which is not installed; nearest: 'sdpa'"


def _flash_attn_needs(c: _Values, key: str, wanted: str, impossible: object) -> str | None:
    if c["attention_backend"] != "flash_attn" or c[key] != impossible:
        return None
    return f"attention_backend = 'flash_attn' needs {wanted}; nearest: 'sdpa'"


def _masked(c: _Values, kind: str, variant: str) -> str | None:
    """Returns why a component cannot run windows or documents, as its card says, if the configuration has them."""
    limits = [part for part in c["window"].split(",") if part.isdecimal() and int(part) < c["block_size"]]
    if not (limits if variant == "windows" else c["document_mask"]):
        return None
    able = [name for name in registry.component_names(kind) if getattr(registry.card(kind, name), variant, False)]
    if c[kind] in able:
        return None
    asked = f"window = {c['window']!r}" if variant == "windows" else "document_mask = true"
    wanted = f"wanted {' or '.join(able)}"
    if c[kind] not in registry.KINDS[kind]:
        wanted += f", or {variant}=True in its card, if it can run them"
    return f"{asked}: found {kind} = {c[kind]!r}, which does not run {variant}; {wanted}; nearest: {able[0]!r}"


def _masked_rule(kind: str, variant: str) -> Rule:
    keys = ("window", "block_size") if variant == "windows" else ("document_mask",)
    yields = _set(attention_backend="sdpa") if kind == "attention_backend" else {}
    return Rule((*keys, kind), partial(_masked, kind=kind, variant=variant), yields)


def _min_lr(c: _Values) -> str | None:
    if c["lr_schedule"] == "constant" or c["min_lr"] <= c["learning_rate"]:
        return None
    return f"min_lr = {c['min_lr']} is above learning_rate = {c['learning_rate']}; nearest min_lr: {c['learning_rate']}"


def _triton_on_cpu(c: _Values) -> str | None:
    if c["kernels"] == "triton" and c["device"] == "cpu":
        return "kernels = 'triton' needs a GPU, but device = 'cpu'; nearest: kernels = 'auto'"
    return None


def _missing_package(c: _Values, flag: str, package: str) -> str | None:
    spec = importlib.util.find_spec(package) if c[flag] else None
    # A spec without an origin is a plain folder of that name, such as the tracker's own output.
    if not c[flag] or (spec is not None and spec.origin is not None):
        return None
    return f"{flag} = true needs the package {package}: pip install 'gptperf[{package}]'"


def _both_shardings(c: _Values) -> str | None:
    if not (c["use_zero1"] and c["use_fsdp"]):
        return None
    return "ZeRO-1 and FSDP exclude each other; FSDP shards the optimizer states too; nearest: use_zero1 = false"


def _compiled_as_one_graph(c: _Values) -> bool:
    return bool(c["compile"] and c["compile_scope"] == "model")


def _fsdp_as_one_graph(c: _Values) -> str | None:
    if not (c["use_fsdp"] and _compiled_as_one_graph(c)):
        return None
    return "FSDP gathers weights block by block, which is impossible inside one graph; nearest compile_scope: 'block'"


def _full_recompute_as_one_graph(c: _Values) -> str | None:
    if not (c["recompute"] == "full" and _compiled_as_one_graph(c)):
        return None
    return "full recomputation saves little memory inside one graph; nearest compile_scope: 'block'"


def _only_fsdp(c: _Values, key: str) -> str | None:
    if not c[key] or c["use_fsdp"]:
        return None
    return f"{key} = true applies to FSDP only, but use_fsdp = false; nearest: {key} = false"


def _only_muon(c: _Values, key: str, off: object) -> str | None:
    if c[key] == off or c["optimizer"] == "muon":
        return None
    near = f"nearest: {key} = false" if off is False else f"nearest: no {key}"
    return f"{key} = {str(c[key]).lower()} applies to Muon only, but optimizer = {c['optimizer']!r}; {near}"


def _fp8_dtype(c: _Values) -> str | None:
    if c["matmul_dtype"] != "fp8" or c["dtype"] == "bfloat16":
        return None
    return f"matmul_dtype = 'fp8' needs dtype = 'bfloat16', found {c['dtype']!r}; nearest: matmul_dtype = 'dtype'"


def _only_fp8(c: _Values, key: str, default: str) -> str | None:
    if c[key] == default or c["matmul_dtype"] == "fp8":
        return None
    return f"{key} = {c[key]!r} applies to matmul_dtype = 'fp8' only; nearest: {key} = {default!r}"


def _fp8_skip(c: _Values) -> str | None:
    words = ("first", "last", "attention", "ffn")
    for part in filter(None, c["fp8_skip"].split(",")):
        block = re.fullmatch(r"(?:blocks\.)?(\d{1,6})(?:\.[\w.]+)?", part, re.ASCII)
        if part in words or (block and int(block[1]) < c["n_layer"] and (part == block[1] or part[0] == "b")):
            continue
        wanted = f"wanted first, last, a block below n_layer = {c['n_layer']}, attention, ffn, or a layer blocks.N.NAME"
        return f"fp8_skip = {c['fp8_skip']!r}: found {part!r}, {wanted}{nearest(part, words)}"
    return None


def _profile(c: _Values) -> str | None:
    if not c["profile"]:
        return None
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", c["profile"], re.ASCII)
    if found and 1 <= int(found[1]) <= int(found[2]) <= c["max_iters"] and int(found[2]) - int(found[1]) < 100:
        return None
    return (
        f"profile = {c['profile']!r}; wanted START:STOP with 1 <= START <= STOP <= max_iters = {c['max_iters']} and at "
        f"most 100 iterations; nearest: {_profiled(c)}"
    )


def _profiled(c: _Values) -> str:
    return f"{min(10, c['max_iters'])}:{min(14, c['max_iters'])}"


def _overwrite_resume(c: _Values) -> str | None:
    if not c["overwrite"] or c["init_from"] not in ("resume", "auto"):
        return None
    return (
        f"init_from = {c['init_from']!r} resumes from the checkpoints that overwrite = true would move aside; "
        "nearest: overwrite = false"
    )


def _init_from(c: _Values) -> str | None:
    words, fork = ("scratch", "resume", "auto"), fork_of(c["init_from"])
    if fork is not None:
        return fork.problem()
    if c["init_from"] in words or os.path.exists(c["init_from"]):
        return None
    near = nearest(c["init_from"], words)
    wanted = "scratch, resume, auto, the path of a run or checkpoint, or RUN@STEP"
    return f"found {c['init_from']!r}, wanted {wanted}{near}"


def _fork_length(c: _Values) -> str | None:
    fork = fork_of(c["init_from"])
    if fork is None or fork.step < c["max_iters"]:
        return None
    return (
        f"init_from = {c['init_from']!r} begins after iteration {fork.step}, so max_iters = {c['max_iters']} leaves "
        f"nothing to train; nearest max_iters: {fork.step + 1}"
    )


def _not_empty(c: _Values, key: str) -> str | None:
    return "found '', wanted a name" if c[key] == "" else None


def _set(**values: Any) -> Mapping[str, Callable[[_Values], Any]]:
    """Returns `Rule.yields` for keys that yield to one value."""
    return {key: partial(_same, value) for key, value in values.items()}


def _same(value: Any, c: _Values) -> Any:
    return value


def _flash_attn_rule(key: str, wanted: str, impossible: object) -> Rule:
    check = partial(_flash_attn_needs, key=key, wanted=wanted, impossible=impossible)
    return Rule(("attention_backend", key), check, _set(attention_backend="sdpa"))


def _muon_rule(key: str, off: object) -> Rule:
    return Rule((key, "optimizer"), partial(_only_muon, key=key, off=off), _set(**{key: off}))


RULES: tuple[Rule, ...] = (
    Rule(("n_embd", "n_head"), _heads),
    Rule(("n_kv_head", "n_head"), _kv_heads),
    Rule(("window", "n_layer"), _window),
    Rule(("position_encoding", "n_embd", "n_head"), _odd_head_dim),
    Rule(("rope_scaling", "position_encoding"), _rope_scaling),
    Rule(("rope_low_freq_factor", "rope_high_freq_factor", "rope_scaling"), _freq_factors),
    Rule(("attention_backend",), _flash_attn),
    _flash_attn_rule("dtype", "dtype = 'bfloat16' or 'float16'", "float32"),
    _flash_attn_rule("device", "a GPU, but device = 'cpu'", "cpu"),
    _flash_attn_rule("dropout", "dropout < 1", 1),
    _masked_rule("attention_backend", "windows"),
    _masked_rule("attention_backend", "documents"),
    _masked_rule("norm_position", "windows"),
    _masked_rule("norm_position", "documents"),
    _masked_rule("position_encoding", "documents"),
    Rule(("min_lr", "learning_rate", "lr_schedule"), _min_lr, {"min_lr": lambda c: c["learning_rate"]}),
    *(_muon_rule(key, off) for key, off in (("muon_lr", None), ("normuon", False), ("cautious_weight_decay", False))),
    Rule(("kernels", "device"), _triton_on_cpu, _set(kernels="auto", device="auto")),
    # The strategies compute the same numbers, so one that is asked for replaces the other.
    Rule(("use_zero1", "use_fsdp"), _both_shardings, _set(use_zero1=False, use_fsdp=False)),
    Rule(("use_fsdp", "compile", "compile_scope"), _fsdp_as_one_graph, _set(compile_scope="block")),
    Rule(("fsdp_reduce_once", "use_fsdp"), partial(_only_fsdp, key="fsdp_reduce_once"), _set(fsdp_reduce_once=False)),
    Rule(("fsdp_gather_once", "use_fsdp"), partial(_only_fsdp, key="fsdp_gather_once"), _set(fsdp_gather_once=False)),
    Rule(("matmul_dtype", "dtype"), _fp8_dtype, _set(matmul_dtype="dtype")),
    *(
        Rule((key, "matmul_dtype"), partial(_only_fp8, key=key, default=default), _set(**{key: default}))
        for key, default in (("fp8_level", "full"), ("fp8_scaling", "delayed"), ("fp8_skip", ""))
    ),
    Rule(("fp8_skip", "n_layer"), _fp8_skip),
    Rule(("recompute", "compile", "compile_scope"), _full_recompute_as_one_graph, _set(compile_scope="block")),
    Rule(("profile", "max_iters"), _profile, {"profile": _profiled}),
    Rule(("wandb_log",), partial(_missing_package, flag="wandb_log", package="wandb")),
    Rule(("tensorboard",), partial(_missing_package, flag="tensorboard", package="tensorboard")),
    # `overwrite` moves checkpoints aside, it deletes none.
    Rule(("overwrite", "init_from"), _overwrite_resume, _set(overwrite=False, init_from="scratch")),
    Rule(("init_from",), _init_from),
    Rule(("init_from", "max_iters"), _fork_length),
    *(Rule((key,), partial(_not_empty, key=key)) for key in ("out_dir", "data_dir", "dataset")),
)
"""Every rule. A rule whose value another rule may change comes after it."""


def combination_problems(values: Mapping[str, Any], ignore: frozenset[str] = frozenset()) -> list[Problem]:
    """Returns every combination in `values` (key -> value) that cannot run; rules on a key in `ignore` are skipped."""
    found = ((rule.keys, rule.check(values)) for rule in RULES if not ignore & set(rule.keys))
    return [Problem(keys, text) for keys, text in found if text is not None]
