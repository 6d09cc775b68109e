"""Runs with document_mask: the FLOPs of a log line are those of the documents in its batches, counted pair by pair."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import ROOT, SMALL, run, run_argv, run_command, run_log

from gptperf import flops
from gptperf.config import Config, command_line
from gptperf.data.loader import Loader
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource
from gptperf.hardware import Peak
from gptperf.training import start

PEAK = 1e9
FLAGS = ["--document_mask=True", "--window=5,full", "--log_interval=3", "--max_iters=8", "--trigram_baseline=False"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of many documents, most of them shorter than a sequence of 32 tokens."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "text").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(300):
        length = int(torch.randint(1, 40, (), generator=generator))
        letters = torch.randint(97, 123, (length,), generator=generator)
        (folder / "text" / f"{i}.txt").write_bytes(bytes(letters.tolist()))
    prepare(str(folder / "text"), data_dir=folder / "data", name="text", quiet=True)
    (folder / "small.toml").write_text(SMALL)
    return folder


def counted_pairs(config: Config, corpus: Path, iterations: int) -> list[int]:
    """The pairs of each iteration by their definition, from the tokens of the whole job."""
    train, found = config.train, []
    source = TokenSource.open(corpus / "data" / "text", "train")
    sizes = {"block_size": config.model.block_size, "batch_size": train.batch_size}
    micro = train.gradient_accumulation_steps
    with Loader(source, micro_batches=micro, seed=train.seed, **sizes) as loader:
        for _ in range(iterations):
            pairs = 0
            for row in torch.cat([next(loader)[0] for _ in range(micro)]).tolist():
                begin = 0
                for query, token in enumerate(row):
                    pairs += sum(min(query - begin + 1, window) for window in config.model.windows)
                    begin = query + 1 if token == source.manifest.tokenizer.eot else begin
            found.append(pairs)
    return found


def assert_lines_count_the_documents(log: dict[str, Any], config: Config, pairs: list[int], ranks: int = 1) -> None:
    model, sequences = config.model, config.tokens_per_iter // config.model.block_size
    assert sum(pairs) < 0.8 * len(pairs) * sequences * flops.attended_pairs(model)  # the documents matter
    count = flops.flops_per_token(model)
    dense = count.training - 3 * count.scores
    previous = 1  # the time of the first iteration has no speed
    for entry in log["training_iterations"][1:]:
        wanted = sequences * (entry["iter"] - previous) * dense
        wanted += 3 * 2 * 2 * model.n_head * model.head_width * sum(pairs[previous : entry["iter"]])
        speed = entry["mfu"]
        per_token = wanted / (entry["iter"] - previous) / config.tokens_per_iter
        assert speed["flops_per_token"] == pytest.approx(per_token, rel=1e-12)
        rate = speed["flops_per_token"] * speed["tokens_per_sec"]
        assert speed["achieved_tflops"] == pytest.approx(rate / ranks / 1e12)
        previous = entry["iter"]
    assert previous == len(pairs)
    assert log["startup_info"]["flops_per_token"] == float(count.training_per_token)
    assert any(note.startswith("document_mask = true: ") for note in log["startup_info"]["notes"])


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_lines_count_the_documents(
    recompute: str, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputation counts in HFU alone."""
    monkeypatch.setattr(start, "find_peak", lambda *_: Peak(PEAK, "dense", ""))
    flags = [*FLAGS, f"--recompute={recompute}"]
    run(documents, tmp_path, *flags)
    config, log = command_line.resolve(run_argv(documents, tmp_path, *flags)).config, run_log(tmp_path)
    assert_lines_count_the_documents(log, config, counted_pairs(config, documents, 8))
    count = flops.flops_per_token(config.model)
    for entry in log["training_iterations"][1:]:
        speed = entry["mfu"]
        assert speed["mfu_percent"] == pytest.approx(100e12 * speed["achieved_tflops"] / PEAK)
        scores = (speed["flops_per_token"] - float(count.training - 3 * count.scores) / count.tokens) / 3
        again = scores + float(count.qkv + count.output + count.ffn) / count.tokens
        ratio = 1 + again / speed["flops_per_token"]
        wanted = None if recompute == "none" else pytest.approx(ratio * speed["mfu_percent"])
        assert speed.get("hfu_percent") == wanted


def test_the_summary_counts_masked_and_unmasked_iterations(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes without the mask: its MFU is that of all its timed iterations."""
    monkeypatch.setattr(start, "find_peak", lambda *_: Peak(PEAK, "dense", ""))
    run(documents, tmp_path, *FLAGS, "--save_interval=8")
    run(documents, tmp_path, *FLAGS, "--document_mask=False", "--max_iters=16", "--init_from=resume")
    config, log = command_line.resolve(run_argv(documents, tmp_path, *FLAGS)).config, run_log(tmp_path)
    flop = milliseconds = 0.0
    previous = 1
    for entry in log["training_iterations"]:
        steps, previous = entry["iter"] - previous, entry["iter"]
        if entry["mfu"]:
            flop += steps * config.tokens_per_iter * entry["mfu"]["flops_per_token"]
            milliseconds += steps * entry["time_ms"]
    assert log["summary"]["iterations"] == 16
    assert log["summary"]["mfu_percent"] == pytest.approx(100 * flop / (milliseconds / 1e3) / PEAK)


@pytest.mark.slow
def test_lines_of_two_ranks_count_the_documents(documents: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    flags = [*FLAGS, "--use_fsdp=True", "--fsdp_min_num_params=0"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = run_command(documents, tmp_path, *flags, launcher=launcher)
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    config = command_line.resolve(run_argv(documents, tmp_path, *flags)).config
    assert_lines_count_the_documents(run_log(tmp_path), config, counted_pairs(config, documents, 8), ranks=2)
