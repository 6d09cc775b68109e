"""Helpers for the tests of ablations: variants of GPT-2, and the logs of runs that were not trained."""

from pathlib import Path

from gptperf.ablate import variants
from gptperf.experiment.job import Job
from gptperf.monitor.journal import Journal

GPT2 = ["configs/gpt2_124m.toml", "--max_iters=5000", "--warmup_iters=100", "--lr_decay_iters=4000"]


def made(vary: list[str], equal: str = "tokens", seeds: int = 2, out: str = "out") -> list[variants.Variant]:
    return variants.variants(GPT2, vary, seeds, equal, Path(out))


def finish(job: Job, loss: float, *, end: bool = True, name: str = "run_20260102_030405") -> None:
    """The log of a run that has come to its end."""
    last = job.config.train.max_iters
    with Journal(job.out_dir, name) as journal:
        info = {"tokens_per_iter": job.config.tokens_per_iter}
        journal.write("start", {"config": job.config.sections() | {"origins": {}}, "startup_info": info})
        mfu = {"mfu_percent": 40.0, "tokens_per_sec": 5e5, "convention": "strict"}
        for step in (1, last):
            journal.write("iteration", {"iter": step, "loss": loss, "time_ms": 1.0, "mfu": {} if step == 1 else mfu})
        journal.write("eval", {"iter": last, "val_loss": loss})
        if end:
            journal.write("summary", {"iterations": last, "val_loss": loss})
