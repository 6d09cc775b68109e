"""The public Python API, from a configuration to generated text, and the sample command on top of it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_helpers import SMALL, run_argv, run_log

from gptperf import api, checkpoint, sample
from gptperf.config import KEYS, Config, DataConfig, LogConfig, ModelConfig, SystemConfig, TrainConfig
from gptperf.errors import CheckpointError, ConfigError, run_main
from gptperf.model import generate as generation


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 iterations with a learning rate so high that its checkpoint of iteration 2 is the best."""
    out = tmp_path_factory.mktemp("api") / "out"
    flags = ["--max_iters=6", "--save_interval=2", "--eval_interval=2", "--sample_tokens=0"]
    flags += ["--learning_rate=0.3", "--lr_schedule=constant", "--warmup_iters=1"]
    assert api.train(api.load_config(*run_argv(corpus, out, *flags))) == 0
    return out


def sample_command(*arguments: object) -> object:
    with pytest.raises(SystemExit) as ended:
        run_main(sample.main, [*map(str, arguments)])
    return ended.value.code


def test_generate_gives_the_text_of_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = api.generate(
        api.load_model(run, device="cpu"), "abc", tokens=40, num_samples=2, temperature=0.9, top_k=9, seed=3
    )
    assert [text[:3] for text in texts] == ["abc", "abc"]
    assert len(set(texts)) == 2
    flags = ["--prompt=abc", "--tokens=40", "--num_samples=2", "--temperature=0.9", "--top_k=9", "--seed=3"]
    capsys.readouterr()
    assert sample_command(run, "--device=cpu", *flags) == 0
    rule = "-" * 32
    parts = re.split(rf"{rule} sample \d of 2 {rule}\n", capsys.readouterr().out)
    assert parts == ["", *(text.encode(errors="backslashreplace").decode() + "\n" for text in texts)]


def test_defaults_are_those_of_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = api.generate(api.load_model(run, device="cpu"), "\n")
    capsys.readouterr()
    assert sample_command(run, "--device=cpu") == 0
    assert capsys.readouterr().out == text + "\n"  # a single sample has no line around it, so that it can be piped


def test_generation_is_a_function_of_the_seed(run: Path) -> None:
    loaded = api.load_model(run, device="cpu")
    torch.manual_seed(1)
    first = api.generate(loaded, "", tokens=30, seed=1)
    torch.manual_seed(2)
    assert api.generate(loaded, "", tokens=30, seed=1) == first
    assert api.generate(loaded, "", tokens=30, seed=2) != first
    likeliest = {api.generate(loaded, "a", tokens=30, temperature=0, seed=seed)[0] for seed in range(3)}
    assert len(likeliest) == 1


def test_samples_have_seeds_of_their_own_and_may_be_read_in_any_order(run: Path) -> None:
    """A sample is the same alone, among others, and beside another prompt."""
    loaded = api.load_model(run, device="cpu")
    several = api.generate(loaded, "abc", tokens=40, num_samples=3, seed=5)
    assert several == [api.generate(loaded, "abc", tokens=40, seed=5 + i)[0] for i in range(3)]
    mixed = api.streams(loaded, ["a", "abc"], tokens=40, num_samples=3, seed=5)
    assert ["abc" + "".join(pieces) for pieces in reversed(mixed[3:])] == several[::-1]
    assert len(api.generate(loaded, "", tokens=2, num_samples=api.ROWS + 1)) == api.ROWS + 1


def test_a_sample_ends_at_the_end_of_its_document(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, eot = api.load_model(run, device="cpu"), 256
    steps = [[97, 98], [eot, 99], [100, eot], [97, 97]]
    taken: list[int] = []

    def drawn(*_: object, **__: object) -> Iterator[list[int]]:
        for number, step in enumerate(steps):
            taken.append(number)
            yield step

    monkeypatch.setattr(generation, "generate", drawn)
    assert api.generate(loaded, "", num_samples=2) == ["a", "bc"]
    assert taken == [0, 1, 2], "no step is computed for a text that has ended"
    decoded = [loaded.tokenizer.decode(list(row)) for row in zip(*steps, strict=True)]
    assert api.generate(loaded, "", num_samples=2, stop_at_eot=False) == decoded


def test_the_loaded_model_is_the_trained_one(run: Path) -> None:
    loaded = api.load_model(run, device="cpu")
    assert (loaded.step, loaded.path.name, loaded.device.type) == (6, "step-00000006", "cpu")
    assert not loaded.model.training
    assert loaded.tokenizer.name == "byte"
    ids = torch.tensor([loaded.tokenizer.encode("abcdef").tolist()])
    with torch.no_grad():
        assert loaded.model(ids).shape == (1, 6, 264)  # vocab_size 257, padded to a multiple of 8
    for path in (run / "checkpoints", loaded.path):
        same = api.load_model(path, device="cpu")
        weights = zip(loaded.model.parameters(), same.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)


def test_the_best_checkpoint(run: Path) -> None:
    losses = {entry["iter"]: entry["val_loss"] for entry in run_log(run)["eval_steps"]}
    best = api.load_model(run, checkpoint="best", device="cpu")
    assert best.step == min(losses, key=lambda step: losses[step]) < 6


def test_a_configuration_made_in_python_trains(corpus: Path, tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257),
        data=DataConfig(dataset="text", data_dir=str(corpus / "data")),
        train=TrainConfig(batch_size=2, max_iters=2, eval_iters=1, out_dir=str(tmp_path / "out")),
        system=SystemConfig(device="cpu", dtype="float32", compile=False),
        log=LogConfig(sample_tokens=0),
    )
    assert api.train(config) == 0
    origins = run_log(tmp_path / "out")["config"]["origins"]
    assert origins.keys() == KEYS.keys()
    assert (origins["n_layer"], origins["min_lr"]) == ("Python", "default")
    assert api.load_model(tmp_path / "out", device="cpu").step == 2


def test_load_config_is_the_command_line(corpus: Path) -> None:
    config = api.load_config(str(corpus / "small.toml"), "--n_layer=3")
    assert (config.model.n_layer, config.model.n_embd, config.data.dataset) == (3, 32, "text")
    assert "n_embd = 32" in SMALL
    with pytest.raises(ConfigError, match=r"2 mistakes\n.*n_lear.*\n.*batch_size"):
        api.load_config("--n_lear=3", "--batch_size=0")


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_seeds_that_no_generator_takes(
    seed: int, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nearest = max(0, min(seed, 2**63 - 1))
    with pytest.raises(ConfigError, match=f"seed: found {seed}, wanted 0 to {2**63 - 1}; nearest: {nearest}"):
        api.stream(api.load_model(run, device="cpu"), "a", seed=seed)
    assert sample_command(tmp_path / "absent", f"--seed={seed}") == 2
    assert f"seed: found {seed}" in capsys.readouterr().err
    last = api.generate(api.load_model(run, device="cpu"), "a", tokens=2, seed=2**63 - 1, num_samples=2)
    assert len(last) == 2


@pytest.mark.parametrize("top_p", [0, -1, 1.5, float("nan")])
def test_top_p_is_a_probability(top_p: float, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"top_p: found {top_p}, wanted a number above 0 and up to 1"):
        api.stream(api.load_model(run, device="cpu"), "a", top_p=top_p)
    assert sample_command(tmp_path / "absent", f"--top_p={top_p}") == 2
    assert f"top_p: found {float(top_p)}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokens", "num_samples", "temperature", "top_k"])
def test_numbers_that_are_too_small(name: str, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"{name}: found -1, wanted . or more; nearest: ."):
        api.generate(api.load_model(run, device="cpu"), "a", **{name: -1})  # type: ignore[arg-type]
    assert sample_command(tmp_path / "absent", f"--{name}=-1") == 2  # before it looks for a checkpoint
    assert f"{name}: found -1" in capsys.readouterr().err


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no checkpoint, wanted the folder of a run or of a checkpoint"):
        api.load_model(tmp_path)
    for name in ("tiny", "other"):
        checkpoint.save(tmp_path / name / "checkpoints", step=0, tensors={"model": {"a": torch.ones(1)}}, state={})
    with pytest.raises(CheckpointError, match=r"found no checkpoint, .*; nearest: ") as e:
        api.load_model(tmp_path / "tinny")
    found = Path(str(e.value).rpartition("nearest: ")[2])
    assert found == tmp_path / "tiny"
    with pytest.raises(CheckpointError, match="no checkpoint with a validation loss; nearest: --checkpoint=latest"):
        api.load_model(found, checkpoint="best")
    assert api.checkpoint_path(found, "latest").name == "step-00000000"
