"""What all commands have in common: names, help, versions, flags, exit codes, and output that cannot be written.

Every table is made from the list of commands, so that a new command is tested too.
"""

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_cases import Case, Ended, run_cases
from run_helpers import ROOT

from gptperf import __main__ as commands
from gptperf.config.flags import Flags
from gptperf.errors import READER_GONE, ConfigError, DiskError, run_main


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _programs() -> list[str]:
    """Every module that ends with a call of `main`, whatever it is named."""
    files = [*(ROOT / "gptperf").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    return sorted(_module(path) for path in files if 'if __name__ == "__main__":' in path.read_text())


PROGRAMS = [name for name in _programs() if name not in ("gptperf.__main__", "bench.measure.worker")]
"""The modules of all commands; the worker is a process of the bench that talks with it through pipes."""


def test_the_list_names_every_command() -> None:
    ours = {name.removeprefix("gptperf.").removesuffix(".__main__") for name in PROGRAMS if name.startswith("gptperf")}
    assert ours == set(commands.COMMANDS)


def test_every_command_is_run_by_run_main() -> None:
    """One guard for all of them: exit codes, closed pipes, full devices."""
    for name in PROGRAMS:
        text = (ROOT / name.replace(".", "/")).with_suffix(".py").read_text()
        assert text.endswith('if __name__ == "__main__":\n    run_main(main)\n'), name
        assert "argparse" not in text


def _run(module: str, *argv: str) -> object:
    """The exit code of a command that runs in this process."""
    with pytest.raises(SystemExit) as ended:
        run_main(importlib.import_module(module).main, argv)
    return ended.value.code


@pytest.mark.parametrize("module", PROGRAMS)
def test_versions_and_wrong_flags(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(module, "--version") == 0
    assert capsys.readouterr().out.startswith("gptperf 0.")
    assert _run(module, "--no_such_flag=1", "--debug=maybe") == ConfigError.exit_code
    out, err = capsys.readouterr()
    first, *lines = err.splitlines()
    assert re.fullmatch(r"gptperf: E2: \d mistakes", first)
    command = module.removesuffix(".__main__")
    assert f"  command line: unknown key 'no_such_flag'; python -m {command} --help lists the keys" in lines
    assert "  command line: debug: found 'maybe', wanted true or false" in lines
    assert out == ""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Ended]:
    """Commands whose output is broken, without those that load torch first: each of their processes ends slowly."""
    modules = [name for name in PROGRAMS if name.startswith("gptperf.") and "hugging_face" not in name]
    cases = []
    for name in [*modules, "gptperf.__main__"]:
        cases += [Case(name, ("--help",), *both) for both in (("full", "file"), ("pipe", "file"))]
        cases += [Case(name, ("--help",), "closed", "closed")]
        cases += [Case(name, ("--n=1",), *both) for both in (("file", "full"), ("closed", "closed"))]
    return dict(zip(cases, run_cases(cases, tmp_path_factory.mktemp("cases")), strict=True))


@pytest.mark.slow
def test_a_full_device_is_one_line_and_the_exit_code_of_the_disk(ended: dict[Case, Ended]) -> None:
    line = "gptperf: E8: the output cannot be written: No space left on device\n"
    for case, end in ended.items():
        if case.stdout == "full":
            assert (end.code, end.stderr) == (DiskError.exit_code, line), case


@pytest.mark.slow
def test_a_reader_that_is_gone_is_silent(ended: dict[Case, Ended]) -> None:
    for case, end in ended.items():
        if case.stdout == "pipe":
            assert (end.code, end.stderr) == (READER_GONE, ""), case


@pytest.mark.slow
def test_closed_streams_are_no_error(ended: dict[Case, Ended]) -> None:
    for case, end in ended.items():
        if case.stdout == "closed" and case.argv == ("--help",):
            assert end.code == 0, case


@pytest.mark.slow
def test_a_mistake_keeps_its_exit_code_if_it_cannot_be_printed(ended: dict[Case, Ended]) -> None:
    for case, end in ended.items():
        if case.argv != ("--help",):
            assert (end.code, end.stdout) == (ConfigError.exit_code, ""), case


def _flag_classes(module: str) -> list[type[Flags]]:
    classes = [found for _, found in inspect.getmembers(importlib.import_module(module), inspect.isclass)]
    return [found for found in classes if issubclass(found, Flags) and found is not Flags]


@pytest.mark.parametrize("module", PROGRAMS)
def test_help_has_a_text_for_every_flag(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(module, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m {module.removesuffix('.__main__')} ")
    text = re.sub(r"\W+", " ", shown)
    for kind in _flag_classes(module):
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            found = re.search(rf'^    {field.name}: .*\n    """([^"]+)"""', source, re.MULTILINE)
            assert found is not None, f"{module}: {field.name} has no text"
            assert re.sub(r"\W+", " ", found[1]).strip() in text, f"{module}: {field.name}"
            required = field.default is dataclasses.MISSING
            assert f"--{field.name} " in shown or required, f"{module}: {field.name}"
    assert "--debug" in shown
    assert "--version" in shown


@pytest.mark.parametrize("value", ["True", "true", "1", "yes", "on", "False", "false", "0", "no", "OFF"])
def test_a_boolean_is_written_in_one_way_everywhere(value: str) -> None:
    """In a command with a configuration and in one without."""
    from gptperf.config import command_line
    from gptperf.config.flags import parse, take

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Switch(Flags):
        on_top: bool = False

    wanted = value.lower() in ("true", "1", "yes", "on")
    for flag in (f"--on_top={value}", f"--on-top={value}"):
        assert parse(Switch, [flag], "x", "").on_top is wanted
        assert take(Switch, ["tiny", flag, "--seed=3"], "x", "").flags.on_top is wanted
    assert parse(Switch, ["--on_top"], "x", "").on_top
    assert command_line.resolve([f"--compile={value}"]).config.system.compile is wanted
    for argv in (["--no_on_top"], ["--no-on-top"], ["--on_top=maybe"], ["--on_top="]):
        with pytest.raises(ConfigError, match=r"nearest: on_top=false|wanted true or false"):
            parse(Switch, argv, "x", "")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["sample", "--temprature=1", "--top_k=x", "--tokens=0", "--device=gpu"],
            [
                "'temprature'; nearest: temperature",
                "top_k: found 'x'",
                "tokens: found 0, wanted 1",
                "nearest: cuda",
                "no RUN",
            ],
        ),
        (
            ["plan", "--num_gpu=2", "--gpu=H2000", "--json=maybe", "--n_layr=3", "--dtype=bf16"],
            ["nearest: num_gpus", "H2000", "json: found 'maybe'", "nearest: n_layer", "nearest: bfloat16"],
        ),
        (
            ["ablate", "tiny", "--seeds=0", "--equal=flop", "--n_layr=3", "--paralel=2"],
            ["found no --vary", "seeds: found 0", "nearest: flops", "nearest: n_layer", "nearest: parallel"],
        ),
        (
            ["ablate", "tiny", "--seeds=0", "--vary", "positon=rope", "--vary", "n_layer=0,n_embd=x"],
            [
                "seeds: found 0",
                "--vary positon=rope: unknown key 'positon'; nearest: position_encoding",
                "n_embd=x: n_la",
            ],
        ),
        (
            [
                *("ablate", "--n_layr=3", "--paralel=2", "--vary=n_heda=3", "--vary=n_embd=97", "--vary=foo,n_layer=x"),
                *("--tune_lr", "--lr_factors=x", "--vary=min_lr=1", "--out_dir=x"),
            ],
            [
                "command line: unknown key 'n_layr'; nearest: n_layer",
                "command line: unknown key 'paralel'; nearest: parallel",
                "--vary n_heda=3: unknown key 'n_heda'; nearest: n_head",
                "--vary n_embd=97: n_embd, n_head: n_embd = 97 is not a multiple",
                "--vary foo,n_layer=x: found 'foo', wanted key=value",
                "--vary foo,n_layer=x: n_layer: found 'x'",
                "lr_factors: found 'x'",
                "min_lr is set by the ablation",
                "out_dir is set by the ablation",
            ],
        ),
        (
            ["race", "tiny", "--n_layr=3", "--paralel=2", "--vary", "n_embd=97", "--out_dir=x"],
            ["nearest: n_layer", "nearest: parallel", "--vary n_embd=97: n_embd, ", "out_dir is set by the race"],
        ),
        (
            ["race", "tiny", "--seeds=0", "--minutes=0", "--n_layr=3", "--paralel=2", "--vary", "n_layer=0"],
            ["seeds: found 0", "minutes: found 0", "nearest: n_layer", "nearest: parallel", "--vary n_layer=0: n_la"],
        ),
        (
            ["race", "tiny", "--vary", "positon=rope", "--vary=seed=1", "--out_dir=x"],
            [
                "1 configuration and 2 changes",
                "nearest: position_encoding",
                "seed is set by the race",
                "out_dir is set by the race",
            ],
        ),
        (
            ["hardware", "--again", "--jsn", "--dtype=bf16"],
            ["--again goes with --measure", "nearest: json", "nearest: bfloat16"],
        ),
        (["prepare", "--shard_tokens=x", "--overwrit"], ["shard_tokens: found 'x'", "nearest: overwrite", "no WHAT"]),
        (["compare", "a", "--gpu=H200", "--htlm=x"], ["--gpu goes with --configs", "nearest: html"]),
        (["compare", "--configs", "nope.toml", "tini", "--html=x"], ["--html goes with runs"]),
        (["compare", "--configs", "nope.toml", "tini"], ["nope.toml: No such file", "'tini', wanted"]),
        (["report", "a", "b", "--ot=x"], ["found 'b'", "unknown key 'ot'"]),
        (
            ["evaluate", "--contains", "--ngrm=3", "--split=test", "--num_fewshot=2", "--batch_size=0"],
            [
                "no MODEL",
                "--contains goes with",
                "nearest: ngram",
                "split: found",
                "nearest: shots",
                "batch_size: found 0",
            ],
        ),
        (["doctor", "json", "--verbose"], ["found 'json', wanted --json", "unknown key 'verbose'"]),
        (["flops", "tiny", "json", "--n_layr=3"], ["found 'json', wanted --json", "nearest: n_layer"]),
        (["train", "tiny", "--n_layer=0", "--show_confg"], ["n_layer: found 0", "nearest: show_config"]),
        (["hugging_face", "--tokeniser=x"], ["no MODEL", "no OUT_DIR", "nearest: tokenizer"]),
    ],
)
def test_all_mistakes_are_reported_at_once(argv: Sequence[str], parts: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        commands.main(argv)
    count = len(caught.value.problems)
    assert len(set(caught.value.problems)) == count
    assert sum("unknown key 'n_layr'" in problem for problem in caught.value.problems) <= 1
    assert count == 1 or str(caught.value) == "\n  ".join([f"{count} mistakes", *caught.value.problems])
    for part in parts:
        assert any(part in problem for problem in caught.value.problems), (part, caught.value.problems)


@pytest.mark.parametrize(
    ("first", "hint"),
    [
        ("trian", "nearest: train"),
        ("generate", "nearest: sample"),
        ("tiny", "nearest: train tiny"),
        ("configs/tiny.toml", "nearest: train configs/tiny.toml"),
        ("config/full_llama_124m.py", "nearest: train config/full_llama_124m.py"),
        ("--n_layer=3", "nearest: train --n_layer=3"),
        ("train.py", "nearest: python -m gptperf.train CONFIG"),
        ("compare_architectures", "nearest: python -m gptperf.compare --configs configs/*.toml"),
        ("test_imports.py", "nearest: python -m gptperf.doctor"),
        ("serve", f": {', '.join(commands.COMMANDS)}"),
    ],
)
def test_an_unknown_command_names_what_is_meant(first: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        commands.main([first])
    assert str(caught.value).startswith(f"command line: found {first!r}, wanted a command")
    assert str(caught.value).endswith(hint)


def test_the_list_is_quick_and_loads_no_torch() -> None:
    code = "import sys\nfrom gptperf.__main__ import main\nmain([])\nmain(['--version'])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    *lines, version, loaded = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(commands.COMMANDS)
    assert re.match(r"gptperf [\d.]+, Python [\d.]+, torch \S+, triton ", version)
    assert loaded == "False"


def test_the_console_script_is_the_list_of_commands() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["gptperf"].partition(":")
    assert getattr(importlib.import_module(module), function) is commands.command


SHELL = [
    ("gptperf.flops tiny --json >/dev/full", DiskError.exit_code, 1),
    ("gptperf flops tiny >/dev/full", DiskError.exit_code, 1),
    ("gptperf train tiny --show_config >/dev/full", DiskError.exit_code, 1),
    ("gptperf.monitor.schema | true", READER_GONE, 0),
    ("gptperf.plan tiny --gpu=H200 >&- 2>&-", 0, 0),
    ("gptperf.plan tiny --gpu=H2000 2>/dev/full", 2, 0),
]


@pytest.mark.parametrize(("line", "code", "errors"), SHELL)
def test_broken_output_in_a_shell(line: str, code: int, errors: int) -> None:
    command = ["bash", "-c", f"{sys.executable} -m {line}; exit ${{PIPESTATUS[0]}}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (code, errors), done.stderr


def test_an_error_of_a_file_or_a_socket_is_not_taken_for_one_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_file(argv: Sequence[str]) -> int:
        raise FileNotFoundError(2, "No such file", "x")

    def other_pipe(argv: Sequence[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(FileNotFoundError):
        run_main(no_such_file, [])
    with pytest.raises(BrokenPipeError):
        run_main(other_pipe, [])
    for debug in ("--debug", "--debug=True"):
        with pytest.raises(ConfigError):
            run_main(commands.main, ["flops", "--n_layer=0", debug])
