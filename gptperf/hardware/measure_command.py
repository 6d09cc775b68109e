"""`python -m gptperf.hardware --measure`: prints the ceilings of this GPU, from the cache or measured now."""

import dataclasses
import json

from gptperf import flops
from gptperf.config import Config, ModelConfig
from gptperf.hardware import ceiling_cache
from gptperf.hardware.ceilings import Ceilings, Spread, ceiling_flop_s
from gptperf.hardware.measure import current_machine, measure
from gptperf.hardware.peaks import match_gpu, peak_flop_s
from gptperf.hardware.workload import COPY_BYTES, copy_name

__all__ = ["command", "report"]


def command(config: Config, *, as_json: bool, again: bool) -> int:
    """Prints the ceilings. If the cache has none, or with `again`, it measures them and writes them to the cache.

    Raises:
        GptperfError: the GPU cannot be measured, or the cache cannot be written.
    """
    model, batch_size, dtype = config.model, config.train.batch_size, config.system.compute_dtype
    machine = current_machine()
    where = (model, batch_size, dtype, machine.device, machine.driver, machine.versions["torch"] or "")
    path = ceiling_cache.cache_path(*where)
    ceilings = None if again else ceiling_cache.load(*where, power_cap_w=machine.power_cap_w)
    kept = ceilings is not None
    if ceilings is None:
        ceilings = measure(model, batch_size, dtype)
    text = json.dumps(dataclasses.asdict(ceilings), indent=2) if as_json else "\n".join(report(ceilings, model))
    print(text, flush=True)
    if not kept:
        ceiling_cache.save(ceilings, path)
    if not as_json:
        print(f"  {'from' if kept else 'kept in'} {path}")
    return 0


def report(ceilings: Ceilings, model: ModelConfig) -> list[str]:
    """Returns the ceilings as lines of text, and what they mean for the model."""
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
    for name in map(copy_name, COPY_BYTES):
        s = spreads[name]
        p10, p90 = s.p10 / 1e12, s.p90 / 1e12
        lines.append(f"  {name:<38}{s.median / 1e12:>9.3f} TB/s   p10 {p10:.3f}, p90 {p90:.3f}")
    count = flops.flops_per_token(dataclasses.replace(model, window="full"))  # windows are not measured
    lines += [rate("the model's GEMMs, mean", ceilings.gemm_flop_s)]
    lines += [rate("measured ceiling: the model's matmuls", ceiling_flop_s(ceilings, count))]
    return [*lines, f"  protocol: {ceilings.protocol}"]
