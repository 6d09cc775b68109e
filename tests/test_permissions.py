"""The umask alone decides the permissions of every file and folder that a command makes."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_helpers import run
from safetensors.torch import save_file

from gptperf import files, hugging_face
from gptperf.compare.__main__ import main as compare
from gptperf.data.prepare import prepare
from gptperf.report.run_page import write_report

MASKS = (0o077, 0o027, 0o022, 0o002)


@pytest.fixture(params=MASKS, ids=[f"{mask:03o}" for mask in MASKS])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check(folder: Path, umask: int, *names: str) -> None:
    """Checks everything below a folder, and that files of these names are there."""
    found = list(folder.rglob("*"))
    for path in found:
        made = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.lstat().st_mode) == made & ~umask, path
    assert set(names) <= {path.name for path in found}


@pytest.mark.parametrize("umask", MASKS[::3], indirect=True, ids=["077", "002"])
def test_a_run_and_its_pages(umask: int, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "run"
    assert run(corpus, out, "--max_iters=3", "--save_interval=1", "--eval_interval=2", "--profile=2:2") == 0
    write_report(out)
    assert compare([str(out), "--html", str(tmp_path / "pages" / "compare.html")]) == 0
    check(tmp_path, umask, "run.lock", "MANIFEST.json", "state.json", "index.jsonl", "trace_2-2.json.gz", "report.html")


def test_a_data_set(umask: int, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words " * 300)
    (tmp_path / "text.txt").chmod(0o666 & ~umask)
    for overwrite in (False, True):
        prepare(str(tmp_path / "text.txt"), data_dir=tmp_path / "sets", quiet=True, overwrite=overwrite)
    check(tmp_path, umask, "manifest.json", "train_00000.bin", "val_00000.bin")


def test_a_model_of_hugging_face(umask: int, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    sizes = {"vocab_size": 257, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    (theirs / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    shapes = {"wte.weight": (257, 8), "wpe.weight": (8, 8)}
    for name, shape in (
        ("attn.c_attn", (8, 24)),
        ("attn.c_proj", (8, 8)),
        ("mlp.c_fc", (8, 32)),
        ("mlp.c_proj", (32, 8)),
    ):
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[1:]}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, theirs / "model.safetensors")
    hugging_face.convert(theirs, tmp_path / "out", "byte")
    check(tmp_path / "out", umask, "run.lock", "model.toml", "model.safetensors", "MANIFEST.json")


def test_every_way_to_make_a_file(umask: int, tmp_path: Path) -> None:
    """Where a whole command would need a GPU, a network or a tracker."""
    files.replace_text(tmp_path / "a" / "replaced", "text")
    files.append_line(tmp_path / "appended", b"line")
    files.write_file(tmp_path / "written", [b"text"], 4)
    files.make_directory(tmp_path / "b" / "c")
    for folder in (False, True):
        os.close(files.make_temporary(tmp_path / "d", folder=folder)[1])
    check(tmp_path, umask, "replaced", "appended", "written", "c")
