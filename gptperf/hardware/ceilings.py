"""What this card reaches: copy, GEMM and attention, measured in the shapes of one model, and kept in a cache.

A data sheet's peak is out of reach of any program: under its power cap an H200 sustains about 0.7 of it. The ceiling of
a training step is what the same card does when it does nothing but the model's own matmuls, at the rates measured here:
`ceiling_flop_s`. An MFU beside it tells the program's loss from the card's. torch is loaded by a measurement only.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gptperf import files, flops
from gptperf.config import ModelConfig, command_line
from gptperf.errors import ConfigError, DeviceError, DiskError
from gptperf.flops import FlopCount
from gptperf.formats import percentiles
from gptperf.hardware.peaks import match_gpu, peak_flop_s

__all__ = ["Attention", "Ceilings", "Copy", "Gemm", "Machine", "Runner", "Spread", "Work"]
__all__ += ["cache_path", "ceiling_flop_s", "command", "gemm_list", "load", "measure", "report", "save", "workload"]

_VERSION = 1  # of the file and of the protocol: figures of another one are not read
_WINDOW_MS = 300.0  # shorter ones end before the power cap bites: short bursts of GEMM read 14% high on an H200
_ROUNDS = 5
_SQUARE = 8192
_COPY_BYTES = (2_000_000_000, 256_000_000)
_PROTOCOL = (
    "fresh normal random numbers; a window is launches one by one, at least 300 ms between two CUDA events; a round "
    "gives every work one window, so that kinds alternate; one round of warm-up, then 5; median, 10th and 90th "
    "percentile; a mean over GEMMs weights them by FLOPs; attention counts the causal half, backward twice forward; a "
    "copy counts bytes read and written, of the fastest of three copies"
)


@dataclass(frozen=True)
class Gemm:
    """(m, k) x (k, n), `count` times a step; `kind` says which operand is a transposed view."""

    name: str
    kind: str
    """forward (second operand transposed), dgrad (none) or wgrad (first)."""
    m: int
    n: int
    k: int
    count: int

    @property
    def amount(self) -> int:
        """FLOPs of one call."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Attention:
    """The model's causal attention, one layer of one micro-batch."""

    name: str
    batch_size: int
    tokens: int
    n_head: int
    kv_heads: int
    head_dim: int

    @property
    def amount(self) -> int:
        """FLOPs of one call: the causal half of scores and values; twice that for backward."""
        pairs = self.batch_size * self.n_head * self.tokens * (self.tokens + 1) // 2
        return 2 * 2 * pairs * self.head_dim * (2 if self.name == "attention_backward" else 1)


@dataclass(frozen=True)
class Copy:
    """A copy of `buffer_bytes` on the device."""

    name: str
    buffer_bytes: int

    @property
    def amount(self) -> int:
        """Bytes moved by one call: read and written."""
        return 2 * self.buffer_bytes


Work = Gemm | Attention | Copy
Timer = Callable[[int], float]
"""Launches -> milliseconds from the first one's start to the last one's end."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the figures belong to."""

    device: str
    driver: str | None
    versions: dict[str, str | None]
    """torch, cuda, cudnn."""
    power_cap_w: float | None = None
    power_default_w: float | None = None


class Runner(Protocol):
    """Runs works on a device."""

    def machine(self) -> Machine:
        """What it runs on."""

    def prepare(self, work: Work) -> Timer:
        """Make the operands of a work; called again and again for the next ones while the last are in use."""


@dataclass(frozen=True)
class Spread:
    """A rate over the windows, in FLOP/s or byte/s."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured rates of one card in one dtype, in the shapes of one model; medians."""

    gemm_flop_s: float
    """Mean over the model's own GEMMs."""
    gemm_square_flop_s: float
    """8192 x 8192 x 8192."""
    attention_forward_flop_s: float
    attention_backward_flop_s: float
    copy_byte_s: float
    """Read and written, 2 GB."""
    copy_small_byte_s: float
    """Read and written, 256 MB."""
    spreads: dict[str, Spread]
    """Of every work, by name."""
    device: str
    dtype: str
    key: str
    """Hash of the works."""
    driver: str | None
    versions: dict[str, str | None]
    power_cap_w: float | None
    power_default_w: float | None
    protocol: str
    date: str


def gemm_list(model: ModelConfig, batch_size: int) -> tuple[Gemm, ...]:
    """Every GEMM of a training step of one micro-batch, with its count.

    Raises:
        ConfigError: the FFN is a plugin's, whose matmuls nobody knows here.
    """
    reason = flops.uncountable_flops(model)
    if reason is not None:
        raise ConfigError(f"the GEMMs of the model are not known: {reason}")
    tokens, c, f = batch_size * model.block_size, model.n_embd, model.ffn_width
    up = ("ffn_gate_up", 2 * f) if model.ffn_type == "swiglu" else ("ffn_up", f)
    linears = [  # name, columns out, columns in, how many
        ("qkv", c + 2 * model.kv_heads * model.head_dim, c, model.n_layer),
        ("out", c, c, model.n_layer),
        (*up, c, model.n_layer),
        ("ffn_out", c, f, model.n_layer),
        ("lm_head", model.padded_vocab_size, c, 1),
    ]
    gemms = []
    for name, wide, deep, count in linears:
        gemms += [
            Gemm(f"{name}_forward", "forward", tokens, wide, deep, count),
            Gemm(f"{name}_dgrad", "dgrad", tokens, deep, wide, count),
            Gemm(f"{name}_wgrad", "wgrad", wide, deep, tokens, count),
        ]
    return tuple(gemms)


def workload(model: ModelConfig, batch_size: int) -> tuple[Work, ...]:
    """All that is measured for a model."""
    sizes = (batch_size, model.block_size, model.n_head, model.kv_heads, model.head_dim)
    attention = (Attention("attention_forward", *sizes), Attention("attention_backward", *sizes))
    copies = tuple(Copy(f"copy_{size // 1_000_000}mb", size) for size in _COPY_BYTES)
    return (
        *gemm_list(model, batch_size),
        Gemm("square", "forward", _SQUARE, _SQUARE, _SQUARE, 0),
        *attention,
        *copies,
    )


def _key(model: ModelConfig, batch_size: int) -> str:
    """Hash of what is measured and how."""
    works = [dataclasses.astuple(work) for work in workload(model, batch_size)]
    text = json.dumps([_VERSION, _PROTOCOL, model.attention_backend, works])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    model: ModelConfig, batch_size: int, dtype: str, *, runner: Runner | None = None, rounds: int = _ROUNDS
) -> Ceilings:
    """Measure the ceilings of this card for one model; about half a minute.

    Args:
        model: whose shapes.
        batch_size: sequences of a micro-batch.
        dtype: compute dtype: bfloat16, float16 or float32.
        runner: default: the current CUDA device.
        rounds: windows a work.

    Raises:
        ConfigError: the model's GEMMs are not known.
        DeviceError: there is no GPU, or it lacks the dtype.
        OutOfMemoryError: the GPU does not hold the largest operands.
    """
    works = workload(model, batch_size)
    if runner is None:
        runner = _cuda().CudaRunner(model, works, dtype)
    machine = runner.machine()
    rates = _rates(works, runner, rounds)
    spreads = {name: _spread(values) for name, values in rates.items()}
    gemms = [work for work in works if isinstance(work, Gemm) and work.count]
    seconds = sum(gemm.count * gemm.amount / spreads[gemm.name].median for gemm in gemms)
    copy, copy_small = (spreads[f"copy_{size // 1_000_000}mb"].median for size in _COPY_BYTES)
    return Ceilings(
        gemm_flop_s=sum(gemm.count * gemm.amount for gemm in gemms) / seconds,
        gemm_square_flop_s=spreads["square"].median,
        attention_forward_flop_s=spreads["attention_forward"].median,
        attention_backward_flop_s=spreads["attention_backward"].median,
        copy_byte_s=copy,
        copy_small_byte_s=copy_small,
        spreads=spreads,
        device=machine.device,
        dtype=dtype,
        key=_key(model, batch_size),
        driver=machine.driver,
        versions=machine.versions,
        power_cap_w=machine.power_cap_w,
        power_default_w=machine.power_default_w,
        protocol=_PROTOCOL,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _rates(works: Sequence[Work], runner: Runner, rounds: int) -> dict[str, list[float]]:
    """FLOP/s or byte/s of every work, one a round; the warm-up round is not among them."""
    timers = {work.name: runner.prepare(work) for work in works}
    launches = dict.fromkeys(timers, 1)
    rates: dict[str, list[float]] = {name: [] for name in timers}
    for round_ in range(rounds + 1):
        for work in works:
            call_ms, launches[work.name] = _window(timers[work.name], launches[work.name])
            if round_:
                rates[work.name].append(work.amount / (call_ms / 1e3))
    return rates


def _window(timer: Timer, launches: int) -> tuple[float, int]:
    """Milliseconds a call over a window that is long enough, and how many launches that took."""
    elapsed_ms = timer(launches)
    while elapsed_ms < _WINDOW_MS:
        missing = 1.1 * _WINDOW_MS / max(elapsed_ms, 1e-3)
        launches = math.ceil(launches * min(missing, 100))  # the first call of all may load modules and take long
        elapsed_ms = timer(launches)
    return elapsed_ms / launches, launches


def _spread(rates: Sequence[float]) -> Spread:
    p10, median, p90 = percentiles(rates)
    return Spread(median, p10, p90)


def ceiling_flop_s(ceilings: Ceilings, count: FlopCount) -> float:
    """FLOP/s of a training step made of nothing but the model's matmuls at the measured rates.

    Its time is GEMM FLOPs and attention FLOPs each over their rate: 3 x forward, attention's backward 2 x its forward.
    Achieved FLOP/s over this is the share of the measured ceiling, as MFU is that of the peak.

    Raises:
        ValueError: `count` is not of the strict convention, in which the attention rates are.
    """
    if count.convention != "strict":
        raise ValueError(f"FLOP convention: found {count.convention!r}, wanted 'strict': so are the measured rates")
    gemm = 3 * (count.qkv + count.output + count.ffn + count.lm_head)
    forward_s = count.scores / ceilings.attention_forward_flop_s
    backward_s = 2 * count.scores / ceilings.attention_backward_flop_s
    return count.training / (gemm / ceilings.gemm_flop_s + forward_s + backward_s)


def cache_path(model: ModelConfig, batch_size: int, dtype: str, device: str, driver: str | None, torch: str) -> Path:
    """The file of the ceilings of a model on a card, by its name, the driver's and torch's version."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    parts = (device, dtype, f"driver {driver}", f"torch {torch}", _key(model, batch_size))
    name = "-".join(re.sub(r"[^A-Za-z0-9.+]+", "_", part) for part in parts)
    return root / "gptperf" / "ceilings" / f"{name}.json"


def save(ceilings: Ceilings, path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    body = dataclasses.asdict(ceilings)
    data = json.dumps({"version": _VERSION, "sha256": _digest(body), "ceilings": body}, indent=1).encode() + b"\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        files.make_directory(path.parent)
        temporary.unlink(missing_ok=True)
        files.write_file(temporary, [data], len(data))
        os.replace(temporary, path)
        files.sync_directory(path.parent)
    except OSError as error:
        raise DiskError(f"{path}: the measured ceilings cannot be kept: {error}") from error


def load(
    model: ModelConfig,
    batch_size: int,
    dtype: str,
    device: str,
    driver: str | None,
    torch: str,
    *,
    power_cap_w: float | None = None,
    say: Callable[[str], object] = lambda line: print(f"gptperf: {line}", file=sys.stderr),
) -> Ceilings | None:
    """The ceilings that were measured before, or None; no torch is needed.

    Args:
        model: whose shapes.
        batch_size: sequences of a micro-batch.
        dtype: compute dtype.
        device: name of the card as CUDA gives it.
        driver: its version, `gpu_state().driver`.
        torch: its version.
        power_cap_w: of the card now; ceilings of another cap are not those of this card.
        say: takes the line that says why a file that is there is not used.
    """
    path = cache_path(model, batch_size, dtype, device, driver, torch)
    try:
        ceilings = _read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"{path}: not used, the ceilings have to be measured again: {error}")
        return None
    wanted = (_key(model, batch_size), dtype, device)
    found = (ceilings.key, ceilings.dtype, ceilings.device)
    if found != wanted:
        say(f"{path}: not used: found ceilings of {found}, wanted those of {wanted}")
        return None
    if power_cap_w is not None and ceilings.power_cap_w is not None and abs(power_cap_w - ceilings.power_cap_w) > 1:
        say(f"{path}: not used: measured at {ceilings.power_cap_w:.0f} W, and the power cap is {power_cap_w:.0f} W now")
        return None
    return ceilings


def _read(path: Path) -> Ceilings:
    """Read a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged or of another version.
    """
    with os.fdopen(files.open_regular(path), "rb") as file:
        page: Any = json.loads(file.read())
    if not isinstance(page, dict) or page.get("version") != _VERSION:
        raise ValueError(f"found version {page.get('version') if isinstance(page, dict) else None}, wanted {_VERSION}")
    body = page.get("ceilings")
    if not isinstance(body, dict) or page.get("sha256") != _digest(body):
        raise ValueError("the file is damaged: its checksum is not that of its content")
    if set(body) != {field.name for field in dataclasses.fields(Ceilings)}:
        raise ValueError("the file is damaged: its figures are not those of this version")
    return Ceilings(**body | {"spreads": {name: Spread(**spread) for name, spread in body["spreads"].items()}})


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _cuda() -> Any:
    """The module that runs on a GPU."""
    try:
        from gptperf.hardware import ceilings_cuda
    except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
        raise DeviceError(f"the ceilings are measured with torch, which cannot be imported: {error}") from error
    return ceilings_cuda


def report(ceilings: Ceilings, model: ModelConfig) -> list[str]:
    """The ceilings as text, and what they mean for the model."""
    gpu = match_gpu(ceilings.device)
    peak = peak_flop_s(gpu, ceilings.dtype)

    def rate(name: str, flop_s: float, spread: Spread | None = None) -> str:
        share = "" if peak is None else f"{flop_s / peak.flop_s:>8.1%} of peak"
        width = "" if spread is None else f"   p10 {spread.p10 / 1e12:,.1f}, p90 {spread.p90 / 1e12:,.1f}"
        return f"  {name:<38}{flop_s / 1e12:>9,.1f} TFLOP/s{share}{width}"

    cap = "unknown power cap" if ceilings.power_cap_w is None else f"power cap {ceilings.power_cap_w:.0f} W"
    versions = ", ".join(f"{name} {version}" for name, version in ceilings.versions.items())
    lines = [f"{ceilings.device}, {ceilings.dtype}, {cap}, driver {ceilings.driver}, {versions}, {ceilings.date}"]
    spreads = ceilings.spreads
    lines += [rate(name, s.median, s) for name, s in spreads.items() if not name.startswith("copy")]
    for size in _COPY_BYTES:
        name = f"copy_{size // 1_000_000}mb"
        s = spreads[name]
        p10, p90 = s.p10 / 1e12, s.p90 / 1e12
        lines.append(f"  {name:<38}{s.median / 1e12:>9.3f} TB/s   p10 {p10:.3f}, p90 {p90:.3f}")
    count = flops.flops_per_token(model)
    lines += [rate("the model's GEMMs, mean", ceilings.gemm_flop_s)]
    lines += [rate("measured ceiling: the model's matmuls", ceiling_flop_s(ceilings, count))]
    return [*lines, f"  protocol: {ceilings.protocol}"]


def command(argv: Sequence[str], *, as_json: bool, again: bool) -> int:
    """`python -m gptperf.hardware --measure`: from the cache, or measured and kept there.

    Raises:
        GptperfError: of the configuration, of `measure`, or of the disk.
    """
    config = command_line.resolve(argv).config
    model, batch_size, dtype = config.model, config.train.batch_size, config.system.compute_dtype
    machine = _cuda().current_machine()
    where = (model, batch_size, dtype, machine.device, machine.driver, machine.versions["torch"] or "")
    path = cache_path(*where)
    ceilings = None if again else load(*where, power_cap_w=machine.power_cap_w)
    kept = ceilings is not None
    if ceilings is None:
        ceilings = measure(model, batch_size, dtype)
    text = json.dumps(dataclasses.asdict(ceilings), indent=2) if as_json else "\n".join(report(ceilings, model))
    print(text, flush=True)
    if not kept:
        save(ceilings, path)
    if not as_json:
        print(f"  {'from' if kept else 'kept in'} {path}")
    return 0
