"""Computes the speed of training: tokens per second, achieved FLOP/s and, if the peak is known, MFU."""

from fractions import Fraction
from typing import Any

from gptperf import flops
from gptperf.config import ModelConfig
from gptperf.hardware import Peak

__all__ = ["Throughput", "theoretical"]

_CONVENTION = "strict"
_EXPECTED_MFU = 0.5


class Throughput:
    """Turns the time of an iteration into a record of its speed for console and log."""

    def __init__(
        self,
        model: ModelConfig,
        tokens_per_iter: int,
        num_gpus: int,
        peak: Peak | None,
        ceiling_flop_s: float | None = None,
        recompute: str = "none",
        float8_flops: int = 0,
    ):
        """
        Args:
            model: the model, whose FLOPs `gptperf.flops` counts.
            tokens_per_iter: tokens of an iteration of the whole job.
            num_gpus: number of GPUs that share these tokens.
            peak: peak of one GPU; None if it is not known.
            ceiling_flop_s: measured rate of one GPU on the model's matmuls alone; None if it was not measured.
            recompute: what backward computes again; these FLOPs count in HFU alone.
            float8_flops: FLOPs per token whose matmuls run in fp8.
        """
        self.tokens_per_iter = tokens_per_iter
        self.num_gpus = num_gpus
        self.peak = peak
        self.ceiling_flop_s = ceiling_flop_s
        self.model = model
        self.recompute = recompute
        self.float8_flops = float8_flops

    def mfu(self, step_ms: float, pairs: int | Fraction | None = None) -> float | None:
        """Returns the model FLOPs utilisation (0..1): FLOP/s of the model's matmuls divided by the peak of all GPUs.

        The arguments are those of `record`. Returns None if the FLOPs or the peak are not known.
        """
        per_token = _flops_per_token(self.model, pairs=pairs)
        if per_token is None or self.peak is None:
            return None
        return per_token * self._tokens_s(step_ms) / self.num_gpus / self.peak.flop_s

    def record(self, step_ms: float, pairs: int | Fraction | None = None) -> dict[str, Any]:
        """Returns the figures of an iteration that took `step_ms`, without those that are unknown.

        Args:
            step_ms: time of the iteration.
            pairs: mean (query, key) pairs of a sequence of one head, over all layers, where attention stays inside a
                document; None: a sequence is one document.

        Returns:
            mfu_percent, achieved_tflops and hardware_peak_tflops (of one GPU), tokens_per_sec (of the job),
            flops_per_token, convention, peak_dtype, peak_basis; of_ceiling_percent, the share of the measured ceiling;
            if backward computes anything again, hfu_percent, which includes the recomputed FLOPs; with fp8,
            blended_mfu_percent, in which each matmul counts relative to the peak of its own dtype.
        """
        record: dict[str, Any] = {}
        per_token, mfu = _flops_per_token(self.model, pairs=pairs), self.mfu(step_ms, pairs)
        tokens_s = self._tokens_s(step_ms)
        if mfu is not None:
            record["mfu_percent"] = 100 * mfu
        if mfu is not None and self.recompute != "none":
            hardware = _flops_per_token(self.model, self.recompute, pairs)
            assert per_token is not None
            assert hardware is not None
            record["hfu_percent"] = 100 * mfu * hardware / per_token
        float8_peak = None if self.peak is None else self.peak.float8_flop_s
        if mfu is not None and self.float8_flops and float8_peak is not None:
            assert per_token is not None
            assert self.peak is not None
            saved = self.float8_flops / per_token * (1 - self.peak.flop_s / float8_peak)
            record["blended_mfu_percent"] = 100 * mfu * (1 - saved)
        achieved = None if per_token is None else per_token * tokens_s / self.num_gpus  # of one GPU
        if achieved is not None:
            record["achieved_tflops"] = achieved / 1e12
        record["tokens_per_sec"] = tokens_s
        if per_token is not None:
            record |= {"flops_per_token": per_token, "convention": _CONVENTION}
        if self.peak is not None:
            record |= self.peak.record()
        if achieved is not None and self.ceiling_flop_s is not None:
            record["of_ceiling_percent"] = 100 * achieved / self.ceiling_flop_s
        return record

    def _tokens_s(self, step_ms: float) -> float:
        assert step_ms > 0, f"an iteration took {step_ms} ms"
        return self.tokens_per_iter / (step_ms / 1e3)


def _flops_per_token(
    model: ModelConfig, recompute: str = "none", pairs: int | Fraction | None = None
) -> int | float | None:
    """Returns the training FLOPs per token; None if a component has no card."""
    if flops.uncountable_flops(model) is not None:
        return None
    convention = _CONVENTION if recompute == "none" else "hfu"
    per_token = flops.flops_per_token(model, convention, recompute=recompute, pairs=pairs).training_per_token
    return per_token if isinstance(per_token, int) else float(per_token)


def theoretical(model: ModelConfig, peak: Peak | None, num_gpus: int) -> dict[str, Any]:
    """Returns the figures that follow from model and hardware alone, without those that are unknown.

    Returns:
        hardware_peak_tflops (of one GPU), peak_dtype, peak_basis, peak_source, flops_per_token, convention,
        attention_ffn_ratio, expected_tokens_per_sec (of the job, at 50% MFU).
    """
    facts: dict[str, Any] = {}
    if peak is not None:
        facts |= peak.record() | {"peak_source": peak.source}
    per_token = _flops_per_token(model)
    if per_token is not None:
        ratio = flops.attention_ffn_ratio(model)
        facts |= {"flops_per_token": per_token, "convention": _CONVENTION, "attention_ffn_ratio": ratio}
    if peak is not None and per_token is not None:
        facts["expected_tokens_per_sec"] = _EXPECTED_MFU * peak.flop_s * num_gpus / per_token
    return facts
