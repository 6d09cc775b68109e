"""Every command of the README runs, with small sizes, and the generated tables of the guide are up to date."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from guide_tables import GUIDE, TABLES, section
from run_helpers import ROOT

README = (ROOT / "README.md").read_text()
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--d_ff=64", "--block_size=16", "--batch_size=2", "--device=cpu"]
SMALL += ["--gradient_accumulation_steps=4", "--max_iters=2", "--warmup_iters=1", "--eval_iters=1", "--compile=False"]
SMALL += ["--dtype=float32", "--kernels=eager", "--sample_tokens=4", "--console=plain"]


def _commands() -> list[str]:
    """The lines of the README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def _small(command: str, folder: Path) -> list[str]:
    """The command as this test runs it: this Python, two processes under torchrun, small sizes."""
    words = [name for word in shlex.split(command) for name in (sorted(map(str, folder.glob(word))) or [word])]
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
        words = ["--nproc_per_node=2" if word.startswith("--nproc_per_node") else word for word in words]
    assert words[0] == "python", command
    words[0] = sys.executable
    return [*words, *SMALL] if "gptperf.train" in words else words


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    makefile = (ROOT / "Makefile").read_text()
    for number, command in enumerate(_commands()):
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
            continue
        words = _small(command, tmp_path)
        if "gptperf.train" in words and not any(word.startswith("--out_dir") for word in words):
            words.append(f"--out_dir={tmp_path / f'run{number}'}")
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert (tmp_path / "out" / "compare.html").exists()


def test_training_installs_only_what_training_needs(tmp_path: Path) -> None:
    for target, rest in (("train", False), ("test", True), ("test-quick", True), ("lint", True), ("bench", True)):
        command = ["make", "-n", target, f"VENV={tmp_path / 'venv'}"]
        recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "--editable .\n" in recipe
        assert ("[test,lint,bench]" in recipe) == rest, target


def test_the_example_of_mistakes_is_what_the_command_prints() -> None:
    (block,) = (block for block in re.findall(r"```text\n(.*?)```", README, re.DOTALL) if block.startswith("$ "))
    command, _, wanted = block.partition("\n")
    words = shlex.split(command.removeprefix("$ "))
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (2, wanted)


def test_the_readme_fits_a_first_reading() -> None:
    assert len(README.split()) <= 1400
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("heading", TABLES)
def test_the_tables_of_the_guide_are_generated(heading: str) -> None:
    """`python tests/helpers/guide_tables.py` writes them."""
    assert section(GUIDE.read_text(), heading) == TABLES[heading]()
