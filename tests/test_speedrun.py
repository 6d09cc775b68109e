"""The public speed run: its three commands on a small stand-in, and the figures of its page."""

import importlib.util
import json
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from run_helpers import ROOT, run_log

from gptperf import flops, prepare, train
from gptperf.config import command_line
from gptperf.data.find_source import find_source
from gptperf.plan import find_gpu, plan, strategy_of

FOLDER = ROOT / "configs" / "speedrun"
PAGE = (FOLDER / "README.md").read_text()
CONFIG = "configs/speedrun/fineweb_edu_124m.toml"
PREPARE, TRAIN, EVALUATE = re.findall(r"^(?:python|torchrun) .*", PAGE.split("```")[1], re.MULTILINE)
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--vocab_size=264", "--batch_size=2"]
SMALL += ["--max_iters=45", "--warmup_iters=5", "--eval_interval=15", "--save_interval=45", "--learning_rate=1e-2"]
SMALL += ["--eval_iters=20", "--trigram_baseline=False"]
SMALL += ["--device=cpu", "--dtype=float32", "--compile=False", "--sample_tokens=0", "--out_dir=out/speedrun"]


def arguments(command: str, module: str) -> list[str]:
    """The words of a command after the module, without its comment."""
    words = shlex.split(command, comments=True)
    return words[words.index(module) + 1 :]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with 800 short documents of few words, and a small vocabulary under the name of GPT-2's."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(repo: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((repo, config, split, streaming))
        draw = np.random.default_rng(0)
        words = np.array(["learn", "the", "water", "cycle", "because", "plants", "need", "light"])
        for i in range(800):
            yield {"text": f"{i}: " + " ".join(words[draw.integers(0, 8, 12)]), "id": "x"}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"wa": 257}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return asked


def test_prepare_train_and_evaluate(
    stand_in: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the page as they are, but for the sizes of the model and the run."""
    monkeypatch.chdir(tmp_path)
    # The real data set holds out 0.05%, which is too little of a small one.
    assert prepare.main([*arguments(PREPARE, "gptperf.prepare"), "--val_fraction=0.1"]) == 0
    assert stand_in == [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True)]
    assert train.main([*arguments(TRAIN, "gptperf.train"), *SMALL]) == 0
    log = run_log(tmp_path / "out" / "speedrun")
    curve = [entry["val_loss"] for entry in log["eval_steps"]]
    assert len(curve) == 3
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.5 * np.log(259)
    if importlib.util.find_spec("gptperf.evaluate") is None:
        return
    item = {"activity_label": "Water", "ctx_a": "The", "ctx_b": "water", "endings": ["cycle", "xyz"], "label": 0}
    (tmp_path / "hellaswag_val.jsonl").write_text(3 * (json.dumps(item) + "\n"))
    capsys.readouterr()
    main = importlib.import_module("gptperf.evaluate.__main__").main
    assert main([*arguments(EVALUATE, "gptperf.evaluate"), "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"{curve[-1]:.4f}" in printed
    assert "hellaswag_val" in printed


def test_the_commands_are_those_of_the_configuration() -> None:
    words = arguments(PREPARE, "gptperf.prepare")
    assert find_source(words[0], "data").name == "fineweb_edu"
    for count in (1, 2, 4, 8):
        config = command_line.resolve(arguments(TRAIN, "gptperf.train"), world_size=count).config
        assert config.tokens_per_iter == 524_288
        assert config.data.dataset == words[0]
        assert config.train.out_dir == "out/speedrun"
    assert arguments(EVALUATE, "gptperf.evaluate")[0] == config.train.out_dir
    assert command_line.resolve(["speedrun/fineweb_edu_124m"]).config == config


@pytest.mark.parametrize(("count", "name"), [(1, "one"), (8, "eight")])
def test_the_figures_of_the_page_are_those_of_the_plan(count: int, name: str) -> None:
    config = command_line.resolve([str(ROOT / CONFIG)], world_size=count).config
    found = plan(
        config, find_gpu("H200"), num_gpus=count, strategy=strategy_of(config), recompute=config.system.recompute
    )
    (rate, time, unit, price) = re.search(  # type: ignore[union-attr]
        rf"\| {name} H200 \| ([\d,]+) \| ([\d.]+) (hours|minutes) \| (\d+) dollars \|", PAGE
    ).groups()
    assert float(rate.replace(",", "")) == pytest.approx(found.tokens_per_sec, rel=0.005)
    tokens = config.train.max_iters * config.tokens_per_iter
    seconds = tokens / found.tokens_per_sec
    assert float(time) * {"hours": 3600, "minutes": 60}[unit] == pytest.approx(seconds, rel=0.02)
    assert float(price) == pytest.approx(3 * count * seconds / 3600, abs=0.5)
    assert f"{tokens / 1e9:.2f} billion tokens" in PAGE
    assert f"{flops.parameters(config.model).total:,} parameters" in PAGE
    assert "prediction" in PAGE


def test_the_predicted_curve_is_its_formula() -> None:
    rows = re.findall(r"^\| (?:billions of tokens|predicted loss, decayed) \| (.*) \|$", PAGE, re.MULTILINE)
    tokens, losses = ([float(cell) for cell in row.split(" | ")] for row in rows)
    for count, loss in zip(tokens, losses, strict=True):
        assert loss == pytest.approx(3.282 + 410.7 * ((count * 1e9) ** -0.28 - 5e9**-0.28), abs=0.006)
    config = command_line.resolve([str(ROOT / CONFIG)]).config
    decay_from = config.train.max_iters * (1 - config.optimizer.wsd_decay_fraction) * config.tokens_per_iter
    assert tokens[-2:] == [round(decay_from / 1e9, 2), round(config.train.max_iters * config.tokens_per_iter / 1e9, 2)]
    assert losses[-1] < 3.28
