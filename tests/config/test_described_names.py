"""The system description's names of configurations and programs."""

import re
import sys
from pathlib import Path

import pytest

from gptperf.config import command_line, config_files
from gptperf.errors import ConfigError

ROOT = Path(__file__).parents[2]
DESCRIBED = {
    "full_gpt2_124m": "gpt2_124m",
    "full_llama_124m": "llama_124m",
    "full_gpt2_1.36b": "gpt2_1.36b",
    "full_llama_1.36b": "llama_1.36b",
    "full_team_124m": "team_124m",
    "full_custom": "custom",
    "preset_quick_test": "quick_test",
    "preset_gpt2_owt": "gpt2_owt",
}
FORMS = ["config/{}.py", "{}.py", "{}", "config/{}", "config/{}.toml", "./config/{}.py", "configs/{}.py", "{}.toml"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no note that was printed before."""
    monkeypatch.chdir(tmp_path)
    config_files._say.cache_clear()
    return tmp_path


def test_the_guide_lists_every_described_configuration() -> None:
    guide = (ROOT / "gptperf" / "GUIDE.md").read_text()
    assert set(re.findall(r"config/((?:full|preset)_[\w.]+)\.py", guide)) <= set(DESCRIBED)


@pytest.mark.parametrize(("described", "shipped"), DESCRIBED.items())
@pytest.mark.parametrize("form", FORMS)
def test_a_described_name_is_the_shipped_file_with_one_note(
    described: str, shipped: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written = form.format(described)
    for _ in range(2):  # the note is printed once
        assert command_line.resolve([written]).config == command_line.resolve([shipped]).config
    captured = capsys.readouterr()
    assert captured.err == f"gptperf: {written} means the shipped configuration {shipped}\n"
    assert captured.out == ""


def test_one_rank_of_a_job_prints_the_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    command_line.resolve(["full_llama_124m"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("written", ["config/full_llama_124m.py", "full_llama_124m.py", "tiny.py"])
def test_a_python_file_is_refused_and_never_executed(written: str, folder: Path) -> None:
    (folder / "config").mkdir()
    (folder / written).write_text("import sys\nsys.modules['executed'] = sys\n")
    with pytest.raises(ConfigError, match=r"a configuration is a TOML file, and no code is executed; nearest: "):
        command_line.resolve([written])
    assert "executed" not in sys.modules


@pytest.mark.parametrize("written", ["full_llama_124m", "config/full_llama_124m"])
def test_a_toml_file_of_the_user_wins(written: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config").mkdir()
    (folder / f"{written}.toml").write_text("[model]\nn_layer = 3\n")
    assert command_line.resolve([written]).config.model.n_layer == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("written", ["other/full_llama_124m.py", "../config/full_llama_124m.py", "full_llama_999m.py"])
def test_another_name_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"found {written!r}, wanted CONFIG.toml")):
        command_line.resolve([written])


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("compare_architectures", "python -m gptperf.compare --configs configs/*.toml"),
        ("compare_architectures.py", "python -m gptperf.compare --configs configs/*.toml"),
        ("test_imports.py", "python -m gptperf.doctor"),
        ("train.py", "python -m gptperf.train CONFIG"),
        ("data/shakespeare/prepare.py", "python -m gptperf.prepare WHAT"),
        ("model_builder.py", "import gptperf.model"),
    ],
)
def test_a_program_of_the_description_names_the_command(written: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"found {written!r}, wanted CONFIG; nearest: {hint}")):
        command_line.resolve([written])
