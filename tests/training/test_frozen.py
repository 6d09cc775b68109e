"""A committed checkpoint of schema 1: newer versions can continue its training, to the same losses.

`python tests/training/test_frozen.py FOLDER` wrote `tests/frozen`, with `.` and `tests` on PYTHONPATH, by the version
that its state names. A new schema gets another such checkpoint.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from checkpoint_helpers import reseal
from run_helpers import ROOT

from gptperf.config import command_line
from gptperf.data.prepare import prepare
from gptperf.training.trainer import train

FROZEN = ROOT / "tests" / "frozen"
MODEL = ["--arch_preset=llama", "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--d_ff=32"]
MODEL += ["--block_size=32", "--vocab_size=257", "--dtype=float32", "--compile=False", "--device=cpu"]
TRAIN = ["--batch_size=2", "--gradient_accumulation_steps=2", "--learning_rate=1e-2", "--min_lr=1e-3"]
TRAIN += ["--warmup_iters=2", "--lr_decay_iters=8", "--eval_interval=4", "--eval_iters=2", "--log_interval=1"]
TRAIN += ["--sample_tokens=0", "--dataset=frozen"]


def text() -> bytes:
    """Returns a text that is the same on every machine."""
    return b" ".join(hashlib.sha256(str(i).encode()).hexdigest()[:5].encode() for i in range(4000))


def run(folder: Path, *flags: str) -> dict[str, list[float]]:
    """Trains in a folder, and returns the logged losses."""
    if not (folder / "data").exists():
        (folder / "frozen.txt").write_bytes(text())
        prepare(str(folder / "frozen.txt"), data_dir=folder / "data", quiet=True)
    where = [f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out'}"]
    resolved = command_line.resolve([*MODEL, *TRAIN, *where, *flags])
    assert train(resolved.config, resolved.origins) == 0
    (log,) = (folder / "out").glob("run_*.json")
    found = json.loads(log.read_text())
    losses = [entry["loss"] for entry in found["training_iterations"]]
    return {"losses": losses, "evaluated": [entry["val_loss"] for entry in found["eval_steps"]]}


def test_what_was_trained_before_can_be_gone_on_with(tmp_path: Path) -> None:
    wanted = json.loads((FROZEN / "losses.json").read_text())
    shutil.copytree(FROZEN / "checkpoints", tmp_path / "out" / "checkpoints")
    found = run(tmp_path, "--init_from=resume", "--max_iters=8")
    for key in ("losses", "evaluated"):
        assert found[key] == pytest.approx(wanted[key][-len(found[key]) :], rel=1e-5)
    assert [len(found[key]) for key in ("losses", "evaluated")] == [4, 1]


def test_what_is_trained_now_is_what_was(tmp_path: Path) -> None:
    found, wanted = run(tmp_path, "--max_iters=8"), json.loads((FROZEN / "losses.json").read_text())
    for key in ("losses", "evaluated"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-5)


def write() -> None:
    """Writes `FROZEN` again, from a run in the working directory."""
    shutil.rmtree(FROZEN, ignore_errors=True)
    FROZEN.mkdir()
    losses = run(Path(), "--max_iters=8", "--save_interval=4")
    (FROZEN / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    kept = FROZEN / "checkpoints" / "step-00000004"
    shutil.copytree(Path("out/checkpoints/step-00000004"), kept)
    state = json.loads((kept / "state.json").read_text())
    del state["train_state"]["validation"], state["versions"]["kernel_code"]  # which came later
    (kept / "state.json").write_text(json.dumps(state))
    reseal(kept, metric=losses["evaluated"][0])


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    write()
