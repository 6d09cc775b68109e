"""Whole runs on damaged data and on mixtures."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import reseal
from run_helpers import ROOT, SMALL, hashes, losses, run, run_command, run_log

from gptperf import api, sample
from gptperf.data.mixture import open_tokens, order_of
from gptperf.data.ngram import trigram_loss
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource
from gptperf.errors import CheckpointError, DataError

QUICK = ["--max_iters=4", "--eval_interval=2", "--save_interval=2", "--sample_tokens=0"]
MIXED = [*QUICK, "--dataset=web:3,code:1"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets `web`, of two shards, and `code`, and a small configuration."""
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(1)
    for name, low, words in (("web", 97, 20_000), ("code", 65, 4000)):
        text = b" ".join(bytes(row) for row in rng.integers(low, low + 10, (words, 5)).astype(np.uint8))
        (folder / f"{name}.txt").write_bytes(text)
        prepare(str(folder / f"{name}.txt"), data_dir=folder / "data", quiet=True, shard_tokens=100_000)
    (folder / "small.toml").write_text(SMALL)
    return folder


@pytest.fixture
def own(mixed: Path, tmp_path: Path) -> Path:
    """A copy of that folder, which a test may damage."""
    return Path(shutil.copytree(mixed, tmp_path / "own"))


def damage(shard: Path, offset: int = -1) -> None:
    """Flips a bit of the last token, or of the token at an offset in bytes, so that its id stays small."""
    raw = bytearray(shard.read_bytes())
    raw[offset if offset >= 0 else len(raw) - 2] ^= 1
    shard.write_bytes(raw)


@pytest.mark.parametrize("dataset", ["code", "web:3,code:1"])
@pytest.mark.parametrize("how", ["used", "full"])
def test_a_damaged_shard_ends_the_run(how: str, dataset: str, own: Path) -> None:
    damage(own / "data" / "code" / "train_00000.bin")
    with pytest.raises(DataError, match=r"code/train_00000\.bin: found wrong bytes in \[0, 4.*copy this file") as error:
        run(own, own / "out", *QUICK, f"--dataset={dataset}", f"--verify_data={how}")
    assert error.value.exit_code == 3
    if how == "full":
        assert not (own / "out" / "checkpoints").exists()


def test_full_verification_reads_what_the_run_does_not(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(own / "data" / "web" / "val_00000.bin")
    assert run(own, own / "a", *QUICK, "--dataset=web", "--eval_iters=1", "--verify_data=off") == 0
    assert run(own, own / "b", *QUICK, "--dataset=code", "--verify_data=full") == 0
    assert "verified " in capsys.readouterr().out
    with pytest.raises(DataError, match=r"web/val_00000\.bin: found wrong bytes"):
        run(own, own / "c", *QUICK, "--dataset=web", "--eval_iters=1", "--verify_data=full")


def without_checksums(folder: Path) -> None:
    """Makes a data set one of version 1."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))


def test_a_data_set_without_checksums_of_blocks(own: Path) -> None:
    without_checksums(own / "data" / "code")
    assert run(own, own / "a", *QUICK, "--dataset=code") == 0
    notes = run_log(own / "a")["startup_info"]["notes"]
    assert sum("code: an earlier version wrote no checksums" in note for note in notes) == 1
    damage(own / "data" / "code" / "train_00000.bin")
    with pytest.raises(DataError, match=r"code/train_00000\.bin: found sha256"):
        run(own, own / "b", *QUICK, "--dataset=code", "--verify_data=full")
    # The run goes on with what it read before, or not at all.
    with pytest.raises(DataError, match=r"code/train_00000\.bin: found other bytes from 0 on than the run of .* read"):
        run(own, own / "a", *QUICK, "--dataset=code", "--init_from=resume", "--max_iters=6")


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_shares_of_the_ranks_are_all_the_data(blocks: bool, world_size: int, own: Path) -> None:
    folder = own / "data" / "web"
    if not blocks:
        without_checksums(folder)
    sizes = sum(path.stat().st_size for path in folder.glob("train_0*.bin"))
    with TokenSource.open(folder, "train") as source:
        assert sum(source.verify_share(rank, world_size) for rank in range(world_size)) == sizes
    damage(folder / "train_00001.bin", 70 if blocks else 2000)
    found = []
    with TokenSource.open(folder, "train") as source:
        for rank in range(world_size):
            try:
                source.verify_share(rank, world_size)
            except DataError:
                found.append(rank)
    assert len(found) == 1


def test_a_mixture_in_a_whole_run(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(mixed, tmp_path / "a", *MIXED) == 0
    printed = capsys.readouterr().out
    log = run_log(tmp_path / "a")
    names, weights = ["web", "code"], [0.75, 0.25]
    tokens = open_tokens("web:3,code:1", mixed / "data", "train")
    order = order_of(tokens, 32, 1337)
    for entry in log["eval_steps"]:
        sources = entry["sources"]
        assert list(sources) == names
        mean = sum(w * sources[name]["val_loss"] for name, w in zip(names, weights, strict=True))
        assert entry["val_loss"] == pytest.approx(mean, rel=1e-12)
        which, _ = order.locate(np.arange(8 * entry["iter"]))  # type: ignore[union-attr]
        counts = np.bincount(which, minlength=2)
        for i, name in enumerate(names):
            assert sources[name]["share"] == counts[i] / counts.sum()
            assert sources[name]["epochs"] == counts[i] / ((len(tokens.sources[i]) - 32) // 32)  # type: ignore[union-attr]
    told = log["startup_info"]["sources"]
    assert {name: told[name]["weight"] for name in names} == dict(zip(names, weights, strict=True))
    assert {name: told[name]["epochs"] for name in names} == {
        name: source["epochs"] for name, source in log["eval_steps"][-1]["sources"].items()
    }
    assert log["startup_info"]["train_tokens"] == sum(told[name]["train_tokens"] for name in names)
    assert printed.count("of the data read") == 2 * len(log["eval_steps"])
    # The loss of a data set is that of a run on it alone, as far as the weights are equal: before the first step.
    code = tmp_path / "code"
    flags = [f"--init_from={tmp_path / 'a'}", "--learning_rate=1e-12", "--min_lr=0", "--weight_decay=0"]
    assert run(mixed, code, *QUICK, "--dataset=code", *flags, "--max_iters=1") == 0
    last = log["eval_steps"][-1]["sources"]["code"]["val_loss"]
    assert run_log(code)["eval_steps"][0]["val_loss"] == pytest.approx(last, rel=1e-5)


def test_a_resumed_mixture_is_bitwise_the_straight_run(mixed: Path, tmp_path: Path) -> None:
    assert run(mixed, tmp_path / "a", *MIXED) == 0
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-00000002", tmp_path / "b" / "checkpoints" / "step-00000002")
    assert run(mixed, tmp_path / "b", *MIXED, "--init_from=resume") == 0
    assert hashes(tmp_path / "a/checkpoints/step-00000004") == hashes(tmp_path / "b/checkpoints/step-00000004")
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[2:]


@pytest.mark.slow
def test_two_ranks_train_on_the_same_mixture(mixed: Path, tmp_path: Path) -> None:
    assert run(mixed, tmp_path / "one", *MIXED) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = run_command(mixed, tmp_path / "two", *MIXED, "--verify_data=full", launcher=launcher)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = run_log(tmp_path / "one"), run_log(tmp_path / "two")
    for a, b in zip(one["training_iterations"], two["training_iterations"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for a, b in zip(one["eval_steps"], two["eval_steps"], strict=True):
        for name in ("web", "code"):
            assert b["sources"][name] == pytest.approx(a["sources"][name], rel=1e-5)


def test_another_mixture_is_not_resumed(own: Path) -> None:
    assert run(own, own / "out", *MIXED) == 0
    prepare(str(own / "code.txt"), data_dir=own / "data", name="more", quiet=True, val_fraction=0.3)
    cases = {
        "web:1,code:1": r"web: weight 0.75 -> 0.5; code: weight 0.25 -> 0.5; wanted the same data sets, weights",
        "web:3,more:1": r"code was left out; more is new",
        "web": r"code was left out; web: weight 0.75 -> 1",
        "code:1,web:3": r"the order of the data sets",
    }
    for dataset, message in cases.items():
        with pytest.raises(DataError, match=message):
            run(own, own / "out", *QUICK, f"--dataset={dataset}", "--max_iters=6", "--init_from=resume")
    prepare(str(own / "code.txt"), data_dir=own / "data", quiet=True, overwrite=True, val_fraction=0.3)
    with pytest.raises(DataError, match=r"code: shards \w{12} -> \w{12}; wanted"):
        run(own, own / "out", *MIXED, "--max_iters=6", "--init_from=resume")


def test_a_checkpoint_whose_record_of_the_data_is_damaged(own: Path) -> None:
    assert run(own, own / "out", *QUICK, "--dataset=code") == 0
    (folder,) = (own / "out" / "checkpoints").glob("step-00000004")
    state = json.loads((folder / "state.json").read_text())
    assert [record["name"] for record in state["dataset"]] == ["code"]
    (folder / "state.json").write_text(json.dumps(state | {"dataset": [{"name": 1}]}))
    reseal(folder)
    with pytest.raises(CheckpointError, match="does not fit this version"):
        run(own, own / "out", *QUICK, "--dataset=code", "--max_iters=6", "--init_from=resume")


def test_a_run_of_many_epochs_gives_a_warning(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "tiny.txt").write_bytes(b"0123456789" * 100)
    prepare(str(own / "tiny.txt"), data_dir=own / "data", quiet=True)
    assert run(own, own / "a", *QUICK, "--dataset=tiny:1,web:9") == 0
    assert "epochs teach" not in capsys.readouterr().out
    flags = ["--max_iters=14", "--eval_interval=14", "--sample_tokens=0"]
    assert run(own, own / "b", *flags, "--dataset=tiny") == 0
    epochs = run_log(own / "b")["startup_info"]["epochs"]
    assert epochs == 14 * 8 / ((run_log(own / "b")["startup_info"]["train_tokens"] - 32) // 32)
    assert f"WARNING: the run reads tiny {epochs:.1f} times; more than 4 epochs" in capsys.readouterr().out


def test_a_folder_of_exactly_that_name_wins(own: Path) -> None:
    (own / "data" / "code").rename(own / "data" / "web:3,code:1")
    assert open_tokens("web:3,code:1", own / "data", "train").fingerprint != ""
    assert isinstance(open_tokens("web:3,code:1", own / "data", "train"), TokenSource)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("web:3,cod:1", r"found no data set 'cod'.*nearest prepared: code"),
        ("web:3,code", r"found 'code' in a mixture, wanted NAME:WEIGHT"),
        ("web:1,code:1e-6", r"found the weight"),
    ],
)
def test_a_wrong_mixture_is_refused_before_the_model_is_built(
    dataset: str, message: str, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptperf.training.start.build_engine", lambda *_: pytest.fail("built"))
    with pytest.raises(DataError, match=message):
        run(mixed, tmp_path, *QUICK, f"--dataset={dataset}")


def test_what_follows_a_run_on_a_mixture(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sample, the baseline and the API know nothing of the mixture but its tokenizer."""
    assert run(mixed, tmp_path, *MIXED, "--sample_tokens=4", "--trigram_baseline=True", "--max_iters=2") == 0
    summary = run_log(tmp_path)["summary"]
    alone = [
        trigram_loss(*(open_tokens(name, mixed / "data", split) for split in ("train", "val")))  # type: ignore[arg-type]
        for name in ("web", "code")
    ]
    assert summary["trigram_loss"] == pytest.approx(0.75 * alone[0] + 0.25 * alone[1])
    assert "sample" in summary
    assert api.load_model(tmp_path, device="cpu").tokenizer.name == "byte"
    capsys.readouterr()
    assert sample.main([str(tmp_path), "--prompt=a", "--tokens=3", "--device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("a")
