"""Ablations: equal tokens and FLOPs, paired differences, and a small ablation that is interrupted and continued."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ablate_helpers import GPT2, finish, made
from run_helpers import ROOT

from gptperf import flops, train
from gptperf.ablate import __main__ as ablate
from gptperf.ablate import page, results, variants
from gptperf.config import command_line
from gptperf.errors import PREEMPTED, ConfigError
from gptperf.experiment import runner
from gptperf.monitor.journal import Journal, find_journal


def test_variants_and_their_commands() -> None:
    baseline, rope, joint = made(["position-encoding=rope", "normalization=rmsnorm,ffn_type=swiglu"])
    assert [v.name for v in (baseline, rope, joint)] == [
        "baseline",
        "position_encoding=rope",
        "normalization=rmsnorm,ffn_type=swiglu",
    ]
    assert joint.config.model.normalization == "rmsnorm"
    assert joint.config.model.ffn_type == "swiglu"
    assert [job.seed for job in rope.jobs] == [1337, 1338]
    job = rope.jobs[1]
    assert job.out_dir == Path("out/position_encoding=rope/seed1338")
    assert command_line.resolve(job.argv).config == job.config
    keys = job.config.train
    assert (keys.seed, keys.out_dir) == (1338, str(job.out_dir))
    assert job.command() == [*job.argv, "--init_from=auto"]
    assert (keys.max_iters, rope.tokens) == (5000, baseline.tokens)
    assert (baseline.parameters, baseline.flops_per_token) == (124_373_760, 0.798087168e9)


def test_equal_tokens_whatever_an_iteration_holds() -> None:
    baseline, larger = made(["batch_size=24"])
    assert larger.config.train.max_iters == 2500
    assert larger.tokens == baseline.tokens
    assert (larger.config.optimizer.warmup_iters, larger.config.optimizer.lr_decay_iters) == (50, 2000)


def test_equal_flops_scale_the_run_and_its_schedule() -> None:
    baseline, shallow, own = made(["n_layer=6", "n_layer=6,warmup_iters=7"], "flops")
    ratio = float(
        flops.flops_per_token(baseline.config.model).training_per_token
        / flops.flops_per_token(shallow.config.model).training_per_token
    )
    assert shallow.config.train.max_iters == round(5000 * ratio)
    assert shallow.config.optimizer.lr_decay_iters == round(4000 * ratio)
    assert shallow.config.optimizer.warmup_iters == round(100 * ratio)
    assert own.config.optimizer.warmup_iters == 7
    totals = [v.tokens * (v.flops_per_token or 0) for v in (baseline, shallow)]
    assert math.isclose(*totals, rel_tol=2e-4)


def test_every_mistake_is_found_before_the_first_run(tmp_path: Path) -> None:
    cases = {
        "ffn_type=swigl": "nearest: swiglu",
        "ffn_type": "wanted key=value",
        "seed=3": "seed is set by the ablation",
        "max_iters=3": "max_iters is set by the ablation",
        "n_layer=12": "the same configuration as baseline",
        "n_layer=6,n_layer=3": "n_layer appears twice",
        "n_head=7": "not a multiple",
    }
    for vary, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            made(["position_encoding=rope", vary])
    with pytest.raises(ConfigError, match=r"(?s)swigl.*n_head = 7"):
        made(["ffn_type=swigl", "n_head=7"])
    with pytest.raises(ConfigError, match="out_dir is set by the ablation"):
        variants.variants([*GPT2, "--out_dir=x"], ["n_layer=6"], 1, "tokens", tmp_path)
    for argv in (GPT2, [*GPT2, "--vary", "n_layer=6", "--seeds=0"]):
        with pytest.raises(ConfigError):
            ablate.main(argv)


def test_folders_have_plain_names_that_differ() -> None:
    _, first, second = made(["dataset=../a", "dataset=.._a"])
    names = {first.name, second.name}
    assert len(names) == 2
    assert all("/" not in name for name in names)


def test_a_loss_before_the_last_iteration_is_no_final_loss(tmp_path: Path) -> None:
    baseline, variant = made(["n_layer=6"], out=str(tmp_path))
    finish(baseline.jobs[0], 3.0)
    job = variant.jobs[0]
    with Journal(job.out_dir, "run_20260102_030405") as journal:
        journal.write("start", {"config": job.config.sections() | {"origins": {}}, "startup_info": {}})
        last = job.config.train.max_iters
        for iteration in (last // 2, last):
            journal.write("iteration", {"iter": iteration, "loss": 3.0, "time_ms": 1.0})
        journal.write("eval", {"iter": last // 2, "val_loss": 3.5})
        journal.write("summary", {"iterations": last})
    assert baseline.jobs[0].val_loss() == 3.0
    assert job.finished()
    assert job.val_loss() is None


def test_the_report_of_synthetic_runs(tmp_path: Path) -> None:
    found = made(["position_encoding=rope", "n_layer=6"], seeds=3, out=str(tmp_path))
    for number, variant in enumerate(found):
        for place, job in enumerate(variant.jobs[: 3 - (number == 2)]):
            finish(job, 3.0 + 0.1 * place - 0.05 * number + 0.002 * place * number)
    finish(found[2].jobs[2], 9.0, end=False)
    failed = {found[2].jobs[2].out_dir: "exit code 5"}
    reached = results.results(found)
    assert reached[0].mean == pytest.approx(3.1)
    assert reached[0].deviation == pytest.approx(0.1)
    rope = reached[1].difference
    assert rope is not None
    assert rope.mean == pytest.approx(-0.048)
    assert (reached[1].tokens_per_sec, reached[1].mfu_percent) == (5e5, 40.0)
    assert list(reached[2].losses) == [1337, 1338]
    text = page.text(reached, "tokens", failed)
    assert "-0.0480 +- 0.0012" in text
    assert "Learning rate not tuned per arm" in text
    assert "0.0006, not tuned" in text
    assert rope.p is not None
    assert rope.adjusted_p == pytest.approx(2 * rope.p)  # the smaller of two
    assert f"  {rope.adjusted_p:.4f}  " in text
    assert "2 of 3" in text
    assert "exit code 5" in text
    assert "Not finished: 1 of 9 runs." in text
    record = json.loads(json.dumps(page.record(reached, "tokens", failed), allow_nan=False))
    assert record["variants"][1]["difference"]["verdict"] == "better"
    assert record["variants"][2]["runs"][2] == {
        "seed": 1339,
        "out_dir": str(found[2].jobs[2].out_dir),
        "val_loss": None,
        "failed": "exit code 5",
    }
    assert "| position_encoding=rope | 3 of 3 | 3.0520 |" in page.markdown(reached, "tokens", failed)
    html = page.html(reached, "tokens", failed)
    assert html.count("<figure>") > 3
    assert html.count("<table") == 2  # side by side a screen does not show all columns
    assert all(f">{column}</th>" in html for column in page.table(reached).columns)
    assert "Learning rate not tuned per arm" in html
    assert "adjusted by Holm" in html
    assert "http:" not in html
    assert "https:" not in html


def test_a_folder_with_runs_of_another_configuration_is_refused(tmp_path: Path) -> None:
    (baseline, _) = made(["n_layer=6"], out=str(tmp_path))
    finish(baseline.jobs[0], 3.0)
    argv = [*GPT2, "--vary=n_layer=6", "--seeds=1", f"--out={tmp_path}", "--list"]
    assert ablate.main(argv) == 0
    assert ablate.main([*argv, "--log_interval=3"]) == 0
    with pytest.raises(ConfigError, match=r"another configuration \(learning_rate: 0.0006 there, 0.001 here\)"):
        ablate.main([*argv, "--learning_rate=1e-3"])


def command(corpus: Path, out: Path, *flags: str) -> list[str]:
    small = [str(corpus / "small.toml"), f"--data_dir={corpus / 'data'}", "--max_iters=4", "--sample_tokens=0"]
    return [*small, "--eval_interval=2", "--eval_iters=2", f"--out={out}", *flags]


@pytest.mark.slow
def test_a_small_ablation_is_taken_up_again(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other are slow on a machine that is busy
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path / "out"
    argv = command(corpus, out, "--vary", "position_encoding=none", "--seeds=2")
    assert ablate.main([*argv, "--list"]) == 0
    assert capfd.readouterr().out.count(" 1,024 ") == 4
    assert not out.exists()
    with monkeypatch.context() as patch:  # in this process, where torch is loaded already
        patch.setattr(runner.Runner, "run", lambda self, line: train.main(line[line.index("gptperf.train") + 1 :]))
        assert ablate.main(argv) == 0
    torch.set_num_threads(threads)
    first = json.loads((out / "ablation.json").read_text())
    assert all(run["val_loss"] for variant in first["variants"] for run in variant["runs"])
    assert "difference" in (out / "ablation.md").read_text()

    shutil.rmtree(out / "position_encoding=none" / "seed1338")
    journal = find_journal(out / "baseline" / "seed1337")
    assert journal is not None
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"event":"summary"' not in line))
    capfd.readouterr()
    assert ablate.main([*argv, f"--html={tmp_path / 'page.html'}"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("finished already") == 2
    assert printed.count(" TRAINING FINISHED") == 2
    again = json.loads((out / "ablation.json").read_text())
    losses = [[run["val_loss"] for v in found["variants"] for run in v["runs"]] for found in (first, again)]
    assert losses[0] == losses[1]
    assert "Differences to the baseline" in (tmp_path / "page.html").read_text()


def test_a_run_that_fails_does_not_end_the_others(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.Runner, "run", lambda self, line: seen.append(line) or (3 if len(seen) == 1 else 0))
    seen: list[list[str]] = []
    assert ablate.main(command(corpus, tmp_path, "--vary", "n_layer=1", "--seeds=1")) == 1
    assert len(seen) == 2
    captured = capfd.readouterr()
    assert "baseline, seed 1337 failed: exit code 3" in captured.err
    assert "Not finished: 2 of 2 runs." in captured.out
    record = json.loads((tmp_path / "ablation.json").read_text())
    assert record["variants"][0]["runs"][0]["failed"] == "exit code 3"


@pytest.mark.slow
def test_a_request_to_stop_reaches_the_run_and_is_kept(corpus: Path, tmp_path: Path) -> None:
    argv = command(corpus, tmp_path, "--vary", "n_layer=1", "--seeds=1", "--max_iters=100000", "--eval_interval=90000")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gptperf.ablate", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(" Iter      3"):
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    assert len(list((tmp_path / "baseline" / "seed1337" / "checkpoints").glob("step-*"))) == 1
    assert not (tmp_path / "n_layer=1").exists()
    assert "asked to stop; run the same command again to continue" in rest


def test_a_signal_before_the_command_starts_still_reaches_it() -> None:
    started = runner.Runner()
    started.stop()
    start = time.monotonic()
    assert started.run([sys.executable, "-c", "import time; time.sleep(60)"]) == -signal.SIGTERM
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("parallel", "gpus"), [(2, ["5", "7"]), (4, ["5", "5", "7", "7"])])
def test_runs_at_a_time_share_the_gpus_out(
    parallel: int,
    gpus: list[str],
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met, seen = threading.Barrier(parallel, timeout=30), []

    def run(self: runner.Runner, line: list[str], gpu: str, log: Path) -> int:
        met.wait()  # that so many are here at once
        seen.append((gpu, log))
        met.wait()
        return 3

    monkeypatch.setattr(runner.Runner, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert ablate.main(command(corpus, tmp_path, "--vary", "n_layer=1", "--seeds=2", f"--parallel={parallel}")) == 1
    times = [sorted(gpu for gpu, _ in seen[i : i + parallel]) for i in range(0, 4, parallel)]
    assert times == [gpus] * (4 // parallel)
    names = {str(log.relative_to(tmp_path)) for _, log in seen}
    assert names == {f"{variant}/seed{seed}.txt" for variant in ("baseline", "n_layer=1") for seed in (1337, 1338)}
    said = capfd.readouterr().out
    assert "Not finished: 4 of 4 runs." in said
    assert ("4 runs at a time share 2 GPUs" in said) == (parallel == 4)


def test_no_more_at_a_time_than_there_are_runs(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(runner.Runner, "run", lambda self, line, gpu, log: seen.append(gpu) or 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert ablate.main(command(corpus, tmp_path, "--vary", "n_layer=1", "--seeds=1", "--parallel=8")) == 1
    assert sorted(seen) == ["5", "7"]
    assert "share" not in capfd.readouterr().out
    with pytest.raises(ConfigError, match="parallel: found 0, wanted a whole number >= 1; nearest: 1"):
        ablate.main(command(corpus, tmp_path, "--vary", "n_layer=1", "--parallel=0"))


def test_all_that_run_hear_of_a_signal(tmp_path: Path) -> None:
    started, sleep = runner.Runner(), [sys.executable, "-c", "print('here', flush=True); import time; time.sleep(60)"]
    logs = [tmp_path / name for name in ("a.txt", "b.txt")]
    with ThreadPoolExecutor(2) as pool:
        codes = [pool.submit(started.run, sleep, "", log) for log in logs]
        while not all(log.exists() and log.read_text() for log in logs):
            time.sleep(0.05)
        started._ask(signal.SIGTERM, None)
        assert [code.result(timeout=30) for code in codes] == [-signal.SIGTERM] * 2
    assert started.asked()
