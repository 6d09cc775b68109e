"""Runs whose gradients are no longer finite end, and say from where they can go on."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import run

from gptperf.errors import NonFiniteError
from gptperf.training import trainer
from gptperf.training.engine import Engine


def checkpoint_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def test_a_loss_scale_below_one_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.5)
    with pytest.raises(NonFiniteError, match=r"the loss scale fell to 0\.5\. No checkpoint is saved yet: start again"):
        run(corpus, tmp_path, "--dtype=float16")


def breaks_in(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the weights of a run not finite before an iteration."""
    step = trainer.train_step

    def broken(engine: Engine, loader: Any, done: int, **keys: Any) -> Any:
        if done + 1 == iteration:
            engine.weights.buckets[0].master.data.fill_(float("nan"))
        return step(engine, loader, done, **keys)

    monkeypatch.setattr(trainer, "train_step", broken)


def test_a_run_that_is_not_finite_says_how_to_go_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks_in(8, monkeypatch)
    with pytest.raises(NonFiniteError) as ended:
        run(corpus, tmp_path, "--max_iters=9", "--overwrite=True")
    text = str(ended.value)
    assert "iteration 8: the updates of 1 iteration were skipped" in text
    found = re.search(r"The last checkpoint is (\S+): continue with (--\S+) (--\S+) and a lower learning_rate", text)
    assert found, text
    assert Path(found[1]) == checkpoint_of(tmp_path, 5)
    assert checkpoint_of(tmp_path, 5).exists()
    monkeypatch.undo()
    assert run(corpus, tmp_path, "--max_iters=9", "--overwrite=True", found[2], found[3], "--learning_rate=2e-3") == 0
    assert checkpoint_of(tmp_path, 9).exists()


def test_a_run_that_is_not_finite_before_its_first_checkpoint_says_so(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks_in(2, monkeypatch)
    with pytest.raises(NonFiniteError, match="No checkpoint is saved yet: start again with a lower learning_rate"):
        run(corpus, tmp_path)
    assert not list(tmp_path.glob("checkpoints/step-*"))
