"""Configurations by name, from any folder: a file of the user comes before one that ships with the package."""

from pathlib import Path

import pytest

from gptperf.compare.architectures import compare
from gptperf.config import command_line
from gptperf.config.presets import PRESETS
from gptperf.errors import ConfigError

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.name.removesuffix(".toml") for path in (ROOT / "configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _problems(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        command_line.resolve(argv)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["{}", "{}.toml", "configs/{}.toml", "./configs/{}.toml"])
def test_a_shipped_configuration_is_found_from_any_folder(name: str, form: str) -> None:
    written = form.format(name)
    found = command_line.resolve([written])
    whole = command_line.resolve([str(ROOT / "configs" / f"{name}.toml")])
    assert found.config == whole.config
    assert set(found.origins.values()) == {
        origin.replace(str(ROOT / "configs" / f"{name}.toml"), written) for origin in whole.origins.values()
    }


@pytest.mark.parametrize("written", ["llama_124m", "llama_124m.toml", "configs/llama_124m.toml"])
def test_an_existing_file_wins(written: str, folder: Path) -> None:
    mine = folder / (written.removesuffix(".toml") + ".toml")
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("[model]\nn_layer = 3\n")
    assert command_line.resolve([written]).config.model.n_layer == 3


def test_shipped_and_own_files_are_laid_over_each_other(folder: Path) -> None:
    (folder / "mine.toml").write_text("[model]\nn_layer = 3\n")
    resolved = command_line.resolve(["llama_124m", "mine.toml", "--n_head=4"])
    assert (resolved.config.model.n_layer, resolved.config.model.n_head) == (3, 4)
    assert resolved.config.model.normalization == PRESETS["llama"]["normalization"]
    assert (resolved.origins["n_layer"], resolved.origins["vocab_size"]) == ("mine.toml", "llama_124m")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "lama_124m",
            "command line: found 'lama_124m', wanted CONFIG.toml, the name of a shipped configuration or --key=value; "
            "nearest: llama_124m",
        ),
        ("llama_1.3b", "nearest: llama_1.36b"),
        ("lama_124m.toml", "lama_124m.toml: No such file or directory; nearest: llama_124m.toml"),
        ("configs/lama_124m.toml", "No such file or directory; nearest: configs/llama_124m.toml"),
    ],
)
def test_an_unknown_name_is_one_error_with_the_nearest(written: str, message: str) -> None:
    assert message in _problems(written)
    assert "\n" not in _problems(written)


@pytest.mark.parametrize("written", ["other/llama_124m.toml", "other/llama_124m", "/llama_124m.toml", "-llama_124m"])
def test_another_folder_never_means_a_shipped_file(written: str) -> None:
    assert written in _problems(written)


def test_compare_takes_names() -> None:
    assert list(compare(["llama_1.36b", "configs/gpt2_1.36b.toml"], None)) == ["llama_1.36b", "gpt2_1.36b"]
