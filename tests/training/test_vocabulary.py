"""Whole runs whose tokenizer travels from the data set into the checkpoint, and tokenizers that do not fit."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiktoken
from run_helpers import run, run_log
from tokenizer_helpers import CORPUS, END

from gptperf import api, checkpoint
from gptperf.data.prepare import prepare
from gptperf.errors import CheckpointError, DataError, DeviceError

SHORT = ["--max_iters=2", "--eval_interval=2", "--eval_iters=1", "--vocab_multiple=1"]


@pytest.fixture(scope="module")
def own(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small corpus with data sets of a trained vocabulary and of tiktoken's in place of bytes."""
    pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    folder = tmp_path_factory.mktemp("own")
    (folder / "one.txt").write_bytes(b"\n".join(CORPUS))
    (folder / "small.toml").write_text((corpus / "small.toml").read_text())
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={END: 258})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", lambda name: encoding)
        for name, tokenizer in (("own", "train:300"), ("tik", "gpt2")):
            prepare(str(folder / "one.txt"), data_dir=folder / "data", name=name, tokenizer=tokenizer, quiet=True)
    return folder


def no_lookups(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail("looked a vocabulary up"))
    patch.setitem(sys.modules, "huggingface_hub", None)


@pytest.mark.parametrize(("name", "size"), [("own", 300), ("tik", 259)])
def test_train_resume_and_sample_with_nothing_but_the_files(
    name: str, size: int, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_lookups(monkeypatch)
    shutil.copytree(own / "data", tmp_path / "data")
    flags = [*SHORT, f"--dataset={name}", f"--vocab_size={size}", f"--data_dir={tmp_path / 'data'}"]
    run(own, tmp_path / "out", *flags)
    assert isinstance(run_log(tmp_path / "out")["summary"]["sample"], str)
    run(own, tmp_path / "out", *flags, "--init_from=resume", "--max_iters=3")
    shutil.rmtree(tmp_path / "data")
    loaded = api.load_model(tmp_path / "out", device="cpu")
    assert loaded.tokenizer.vocab_size == size
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("the tokenizer's")) == "the tokenizer's"
    assert api.generate(loaded, "the ", tokens=3)[0].startswith("the ")


def test_without_the_package_a_run_leaves_the_sample_out(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    run(own, tmp_path, *SHORT, "--dataset=own", "--vocab_size=300")
    printed = "".join(capsys.readouterr())
    assert printed.count("the run will print no sample of text") == 1
    assert "pip install 'gptperf[hf]'" in printed
    assert not run_log(tmp_path)["summary"].get("sample")
    with pytest.raises(DeviceError, match=r"needs the package tokenizers"):
        api.load_model(tmp_path, device="cpu")
    monkeypatch.undo()
    assert api.load_model(tmp_path, device="cpu").tokenizer.vocab_size == 300  # the checkpoint has the vocabulary
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    capsys.readouterr()
    run(own, tmp_path / "quiet", *SHORT, "--dataset=own", "--vocab_size=300", "--sample_tokens=0")
    assert "sample of text" not in "".join(capsys.readouterr())


def test_a_data_set_of_an_earlier_version_trains_offline(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(name: str) -> tiktoken.Encoding:
        raise OSError("no route to host")

    shutil.copytree(own / "data" / "tik", tmp_path / "data" / "tik")
    manifest = tmp_path / "data" / "tik" / "manifest.json"
    data = json.loads(manifest.read_text())
    del data["tokenizer"]["files"]
    manifest.write_text(json.dumps(data))
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    run(own, tmp_path / "out", *SHORT, "--dataset=tik", "--vocab_size=259", f"--data_dir={tmp_path / 'data'}")
    assert "the run will print no sample of text: tokenizer 'gpt2'" in "".join(capsys.readouterr())


def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer train:300 with 300 ids, and vocab_size = 257; wanted"):
        run(own, tmp_path, *SHORT, "--dataset=own", "--vocab_size=257")


def test_a_checkpoint_with_more_ids_than_its_model_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path, *SHORT, "--sample_tokens=0")
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    found = checkpoint.load(newest.path)
    found.state["config"]["model"]["vocab_size"] = 256
    checkpoint.save(tmp_path / "other", step=1, tensors=found.tensors, state=found.state)
    with pytest.raises(DataError, match="found tokenizer byte with 257 ids, and vocab_size = 256; wanted at most"):
        api.load_model(tmp_path / "other", device="cpu")


def test_a_run_does_not_go_on_with_other_ids(own: Path, tmp_path: Path) -> None:
    """The same shards with another vocabulary are other data: the manifest alone tells."""
    shutil.copytree(own / "data", tmp_path / "data")
    flags = [*SHORT, "--vocab_size=300", f"--data_dir={tmp_path / 'data'}", "--sample_tokens=0"]
    run(own, tmp_path / "out", *flags, "--dataset=own")
    with pytest.raises(DataError, match=r"found the tokenizer train:300 \(.*\), the data has gpt2"):
        run(own, tmp_path / "out", *flags, "--dataset=tik", "--init_from=resume", "--max_iters=3")
    manifest = tmp_path / "data" / "own" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["tokenizer"] |= {"fingerprint": "1" * 64, "name": "other"}
    manifest.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"found the tokenizer train:300 \(.*\), the data has other \(111111111111\)"):
        run(own, tmp_path / "out", *flags, "--dataset=own", "--init_from=resume", "--max_iters=3")


def test_a_damaged_vocabulary_in_a_checkpoint_is_found(own: Path, tmp_path: Path) -> None:
    run(own, tmp_path, *SHORT, "--dataset=own", "--vocab_size=300", "--sample_tokens=0")
    (file,) = (tmp_path / "checkpoints").glob("*/tokenizer.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors is corrupt"):
        api.load_model(tmp_path, device="cpu")
