"""A run that resumes keeps the schedule of its checkpoint, whatever the length that this start gives it."""

from pathlib import Path

import pytest
from run_helpers import run, run_log

START = ("--max_iters=20", "--learning_rate=0.01", "--min_lr=1e-3")
FILE = "[train]\nmax_iters = 900\n[optimizer]\nwarmup_iters = 500\n"


def _rates(out: Path) -> list[float]:
    return [entry["lr"] for entry in run_log(out)["training_iterations"]]


@pytest.mark.slow
def test_another_length_does_not_change_the_schedule(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.toml").write_text(FILE)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    file = str(tmp_path / "long.toml")
    run(corpus, straight, file, *START)
    log = run_log(straight)
    assert log["config"]["optimizer"]["warmup_iters"] == 2  # cut to a tenth
    assert "tenth" in log["config"]["origins"]["warmup_iters"]
    assert sum("warmup_iters" in note for note in log["startup_info"]["notes"]) == 1
    run(corpus, broken, file, *START, "--lr_decay_iters=20", "--max_iters=10", "--warmup_iters=2")
    run(corpus, broken, file, *START, "--init_from=resume", "--max_iters=24")
    assert _rates(broken)[:20] == _rates(straight)
    assert _rates(broken)[20:] == [1e-3] * 4
    told = run_log(broken)
    assert told["config"]["optimizer"]["warmup_iters"] == 2
    assert told["config"]["optimizer"]["lr_decay_iters"] == 20
    notes = [note for note in told["startup_info"]["notes"] if "--lr_decay_iters=" in note]
    assert len(notes) == 1
    assert notes[0].startswith(
        "the learning rate stays at min_lr = 0.001 in iterations 21 to 24, because the decay ends"
    )
    assert notes[0].endswith("--lr_decay_iters=24 lets it end with the run")
    assert sum("stays at min_lr" in line for line in capfd.readouterr().out.splitlines()) == 1
    run(corpus, broken, file, *START, "--init_from=resume", "--max_iters=30", "--lr_decay_iters=30", "--warmup_iters=5")
    changed = run_log(broken)["config"]["optimizer"]
    assert (changed["warmup_iters"], changed["lr_decay_iters"]) == (5, 30)
    assert _rates(broken)[24] > 1e-3
