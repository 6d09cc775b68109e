"""Architectures side by side."""

import json
from pathlib import Path

import pytest
from golden import PARAMETERS

from gptperf import compare, plan
from gptperf.errors import ConfigError

FILES = [f"configs/{name}.toml" for name in ("gpt2_124m", "llama_124m", "llama_1.36b")]


def test_counts_are_the_golden_ones() -> None:
    facts = compare.compare(FILES, plan.find_gpu("H200"))
    for name in facts:
        assert facts[name]["parameters, total"] == PARAMETERS[name]
    assert facts["gpt2_124m"]["GFLOP a token, strict"] == facts["llama_124m"]["GFLOP a token, strict"] == 0.798087168
    assert facts["llama_124m"]["activation"] == "silu"


def test_what_differs_is_in_columns_and_the_rest_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--configs", *FILES[:2]]) == 0
    text, _, shared = capsys.readouterr().out.partition("the same in all: ")
    assert "normalization" in text
    assert "layernorm_nobias" in text
    assert "n_layer 12" in shared
    assert "n_layer" not in text
    widths = {len(line) for line in text.strip("\n").splitlines()}
    assert len(widths) == 1, "columns are ragged"


def test_every_configuration_can_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(map(str, Path("configs").glob("*.toml")))
    assert compare.main(["--configs", *files, "--gpu=B200", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts) == len(files)
    assert all(of["B200: tokens/s"] > 0 for of in facts.values())


def test_two_files_of_one_name(tmp_path: Path) -> None:
    copy = tmp_path / "gpt2_124m.toml"
    copy.write_text(Path(FILES[0]).read_text())
    with pytest.raises(ConfigError, match="two files named gpt2_124m"):
        compare.compare([FILES[0], str(copy)], plan.find_gpu("H200"))
