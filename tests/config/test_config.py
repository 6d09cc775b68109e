"""One parser for files and flags: origins, overrides, and every mistake at once."""

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptperf.config import KEYS, Config, ModelConfig, OptimizerConfig, command_line, config_files
from gptperf.config.flags import Given
from gptperf.config.presets import PRESETS
from gptperf.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _config(*argv: str) -> Config:
    return command_line.resolve(argv).config


def _problems(*argv: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        command_line.resolve(argv, world_size=world_size)
    return str(caught.value)


def _write(folder: Path, text: str, name: str = "c.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# Flags that have to be accepted as they are written here, with what each has to give.
DESCRIBED = {
    "--max_iters=100": 100,
    "--position_encoding=rope": "rope",
    "--normalization=layernorm_nobias": "layernorm_nobias",
    "--normalization=rmsnorm": "rmsnorm",
    "--ffn_type=standard": "standard",
    "--ffn_type=swiglu": "swiglu",
    "--norm_position=pre": "pre",
    "--dataset=slimpajama_627b": "slimpajama_627b",
    "--batch_size=16": 16,
    "--learning_rate=3e-4": 3e-4,
    "--max_iters=10000": 10000,
    "--compile=False": False,
    "--compile=True": True,
    "--wandb_project=my-project": "my-project",
    "--fsdp_min_num_params=500000": 500000,
    "--gradient_accumulation_steps=20": 20,
    "--arch_preset=llama": "llama",
    "--n_layer=2": 2,
    "--n_head=4": 4,
    "--n_embd=384": 384,
    "--block_size=32": 32,
    "--dtype=float16": "float16",
    "--activation=silu": "silu",
    "--attention_backend=manual": "manual",
    "--bias=True": True,
    "--weight_tying=False": False,
    "--dropout=0.1": 0.1,
    "--use_zero1=False": False,
    "--use_fsdp=False": False,
    "--wandb_log=False": False,
}


@pytest.mark.parametrize("flag", DESCRIBED)
@pytest.mark.parametrize("file", ["configs/gpt2_124m.toml", "configs/llama_1.36b.toml", None])
def test_described_flag(flag: str, file: str | None) -> None:
    resolved = command_line.resolve([*([file] if file else []), flag])
    key = flag[2:].partition("=")[0]
    assert resolved.config.flat()[key] == DESCRIBED[flag]
    assert resolved.origins[key] == "command line"


@pytest.mark.parametrize(("flag", "package"), [("wandb_log", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_named_with_its_remedy(
    flag: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = f"command line: {flag}: {flag} = true needs the package {package}: pip install 'gptperf[{package}]'"
    assert _problems(f"--{flag}=True") == text
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / package).mkdir()  # as the tracker's own output is called
    assert _problems(f"--{flag}=True") == text
    (tmp_path / package / "__init__.py").touch()
    assert _config(f"--{flag}=True").flat()[flag]


@pytest.mark.parametrize("path", CONFIGS)
def test_every_file_is_valid(path: str) -> None:
    base = ["configs/gpt2_124m.toml"] if Path(path).stem in ("gpt2_owt", "quick_test") else []
    assert _config(*base, path).model.n_layer > 0


def test_defaults_are_gpt2_124m() -> None:
    default, file = Config().flat(), _config("configs/gpt2_124m.toml").flat()
    assert default == file
    assert {key: default[key] for key in PRESETS["gpt2"]} == PRESETS["gpt2"]


def test_later_wins_and_origin_is_known(tmp_path: Path) -> None:
    one = _write(tmp_path, "[model]\nn_layer = 2\nn_head = 2\n", "one.toml")
    two = _write(tmp_path, "[model]\nn_layer = 3\n", "two.toml")
    resolved = command_line.resolve([one, two, "--n_embd=64", "--n_embd=32"])
    model = resolved.config.model
    assert (model.n_layer, model.n_head, model.n_embd) == (3, 2, 32)
    assert [resolved.origins[k] for k in ("n_layer", "n_head", "n_embd", "bias")] == [
        two,
        one,
        "command line",
        "default",
    ]


def test_preset_lies_under_the_keys_beside_it_and_over_earlier_files(tmp_path: Path) -> None:
    file = _write(tmp_path, '[model]\nnormalization = "layernorm"\narch_preset = "llama"\n')
    resolved = command_line.resolve([file])
    assert resolved.config.model.normalization == "layernorm"
    assert resolved.config.model.position_encoding == "rope"
    assert resolved.origins["position_encoding"] == f"preset llama ({file})"
    over = _config(file, "--arch_preset=gpt2", "--bias=True").model
    assert (over.normalization, over.position_encoding, over.bias) == (
        "layernorm_nobias",
        "learned_absolute",
        True,
    )


@pytest.mark.parametrize("name", [n for n in KEYS if n != "plugins"])
def test_typo_names_the_nearest_key(name: str, tmp_path: Path) -> None:
    typo = name[:-2] + name[-1] if len(name) > 4 else name + "x"
    if typo in KEYS:
        typo = name + "x"
    file = _write(tmp_path, f"[{KEYS[name].section}]\n{typo} = 1\n")
    assert f"{file}: unknown key {typo!r}; nearest: " in _problems(file)
    assert f"command line: unknown key {typo!r}; nearest: " in _problems(f"--{typo}=1")


@pytest.mark.parametrize(
    ("key", "toml", "wanted"),
    [
        ("n_layer", '"8"', "a whole number from 1 to 10000"),
        ("n_layer", "8.0", "a whole number from 1 to 10000"),
        ("n_layer", "true", "a whole number from 1 to 10000"),
        ("n_layer", "0", "a whole number from 1 to 10000"),
        ("n_layer", "[1]", "a whole number from 1 to 10000"),
        ("compile", "1", "true or false"),
        ("compile", '"True"', "true or false"),
        ("learning_rate", '"3e-4"', "a number > 0"),
        ("learning_rate", "0", "a number > 0"),
        ("learning_rate", "nan", "a number > 0"),
        ("learning_rate", "inf", "a number > 0"),
        ("dropout", "1.5", "a number from 0 to 1; nearest: 1"),
        ("dtype", '"bf16"', "one of bfloat16, float16, float32; nearest: bfloat16"),
        ("normalization", '"rmsnrm"', "one of layernorm, layernorm_nobias, rmsnorm; nearest: rmsnorm"),
        ("arch_preset", '"lama"', "nearest: llama"),
        ("out_dir", "3", "a string"),
    ],
)
def test_wrong_value_names_file_key_found_wanted(key: str, toml: str, wanted: str, tmp_path: Path) -> None:
    file = _write(tmp_path, f"[{KEYS[key].section}]\n{key} = {toml}\n")
    text = _problems(file)
    assert text.startswith(f"{file}: {key}: found ")
    assert wanted in text


def test_all_mistakes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    file = _write(
        tmp_path,
        '[model]\nn_layer = "8"\nlearing_rate = 1\nn_head = 7\n[optimzer]\nx = 1\n[train]\ndtype = "x"\n',
    )
    text = _problems(file, "--wandb_log=True", "--batch_size=0", "stray", "--n_embd", world_size=3)
    for part in (
        "mistakes",
        f"{file}: n_layer: found '8'",
        f"{file}: unknown key 'learing_rate'; nearest: learning_rate",
        f"{file}: unknown table [optimzer]; wanted one of model, data, optimizer, train, system, log; nearest: optim",
        f"{file}: dtype: found in [train], wanted in [system]",
        "n_embd = 768 is not a multiple of n_head = 7; nearest n_head: 6",
        "command line: wandb_log: wandb_log = true needs the package wandb: pip install 'gptperf[wandb]'",
        "command line: batch_size: found 0",
        "command line: found 'stray', wanted CONFIG.toml, the name of a shipped configuration or --key=value",
        "command line: --n_embd has no value",
        "gradient_accumulation_steps: found 40 micro-batches per iteration for 3 ranks, wanted a multiple of 3; "
        "nearest: 39 or 42",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--n_head=5"], "n_embd = 768 is not a multiple of n_head = 5; nearest n_head: 4"),
        (["--n_kv_head=5"], "n_head = 12 is not a multiple of n_kv_head = 5; nearest n_kv_head: 4"),
        (["--n_embd=36", "--position_encoding=rope"], "head_dim = n_embd / n_head = 3 is odd"),
        (["--head_dim=5", "--position_encoding=rope"], "head_dim = 5 is odd; nearest: 6"),
        (["--rope_scaling=linear"], "needs position_encoding = 'rope', found 'learned_absolute'"),
        (["--arch_preset=llama", "--rope_scaling=llama3", "--rope_low_freq_factor=4"], "nearest: 8.0"),
        (["--min_lr=1"], "min_lr = 1.0 is above learning_rate = 0.0006; nearest min_lr: 0.0006"),
        (["--init_from=resum"], "init_from: found 'resum', wanted scratch, resume, auto or the path"),
        (["--kernels=triton", "--device=cpu"], "needs a GPU"),
        (["--use_fsdp=True", "--use_zero1=True"], "exclude each other"),
        (["--fsdp_reduce_once=True"], "nearest: fsdp_reduce_once = false"),
        (["--use_zero1=True", "--fsdp_gather_once=True"], "nearest: fsdp_gather_once = false"),
        (["--use_fsdp=True", "--compile_scope=model"], "nearest compile_scope: 'block'"),
        (["--recompute=full", "--compile_scope=model"], "nearest compile_scope: 'block'"),
        (["--overwrite=True", "--init_from=resume"], "move aside"),
        (["--attention_backend=flash_attn", "--device=cpu"], "nearest: 'sdpa'"),
    ],
)
def test_impossible_combination(flags: list[str], part: str) -> None:
    assert part in _problems(*flags)


def test_sections_built_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="n_layer: found 0"):
        ModelConfig(n_layer=0)
    with pytest.raises(ConfigError, match="is not a multiple"):
        Config(model=ModelConfig(n_head=7))


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--no_compile", "--use_zero1=True"], "unknown key 'no_compile'; nearest: compile=false"),
        (["--no_compile", "--wandb_log=2"], "wandb_log: found '2', wanted true or false"),
        (["--beta2=1"], "beta2: found 1.0, wanted a number from 0 to below 1"),
        (["--seed=18446744073709551616"], "seed: found 18446744073709551616"),
        (["--out_dir=a\0b"], "wanted a string without control characters"),
        (["--plugins=.x"], "plugins: .x: TypeError"),
    ],
)
def test_odd_flags_are_config_errors(flags: list[str], part: str) -> None:
    assert part in _problems(*flags)


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000])
def test_long_numbers_are_config_errors(number: str, tmp_path: Path) -> None:
    _problems(_write(tmp_path, f"[optimizer]\nlearning_rate = {number}\n"))
    _problems(_write(tmp_path, f"[model]\nn_layer = 1.{number}\n"))


def test_a_plugin_that_fails_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plugin.py").write_text("1 +")
    monkeypatch.syspath_prepend(tmp_path)
    assert "plugins: broken_plugin: SyntaxError" in _problems("--plugins=broken_plugin")


def test_flag_forms() -> None:
    assert _config("--out_dir", "x.toml").train.out_dir == "x.toml"
    assert _config("--batch-size", "3", "--compile", "--bias").train.batch_size == 3
    assert _config("--n_kv_head=none").model.n_kv_head is None
    assert _config("--out_dir=-odd=name").train.out_dir == "-odd=name"
    assert _config("--wandb_run_name=").log.wandb_run_name == ""


@pytest.mark.parametrize("path", [None, *CONFIGS])
def test_show_config_is_a_file_that_gives_the_same(path: str | None, tmp_path: Path) -> None:
    argv = [*([path] if path else []), '--out_dir=a "quoted" \\ path']
    resolved = command_line.resolve(argv)
    page = command_line.show_config(resolved)
    again = _config(_write(tmp_path, page))
    assert again == resolved.config
    assert all(f"# {resolved.origins[key]}" in page for key in KEYS)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe",
        b"a = ",
        b"[model]\nn_layer = 1\nn_layer = 2\n",
        b"[" * 5000,
        b"x" * 1_100_000,
        b"[model",
        b"\0",
        b"a = {b = {c = 1}}",
    ],
)
def test_broken_files_are_config_errors(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(raw)
    assert str(tmp_path / "c.toml") in _problems(str(tmp_path / "c.toml"))


def test_bom_and_crlf_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[model]\r\nn_layer = 3\r\n")
    assert _config(str(tmp_path / "c.toml")).model.n_layer == 3


@given(st.binary(max_size=200))
def test_any_bytes_are_a_config_or_a_config_error(raw: bytes) -> None:
    problems: list[str] = []
    path = Path("/tmp") / "gptperf_fuzz.toml"
    path.write_bytes(raw)
    list(config_files.read_file(str(path), problems))
    path.unlink()


@pytest.mark.slow
@given(st.sampled_from(sorted(KEYS)), st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none()))
def test_a_value_is_taken_as_it_is_or_refused(name: str, value: object) -> None:
    problems: list[str] = []
    checked = command_line._check(Given(name, value, "f.toml"), (), problems, "")
    assert (checked is None) == bool(problems)
    if checked is not None and value is not None:
        assert checked.value == value
        assert type(checked.value) is KEYS[name].type


def test_missing_file_names_the_nearest() -> None:
    assert "nearest: configs/llama_124m.toml" in _problems("configs/lama_124m.toml")


def test_plugins_are_for_the_command_line_only(tmp_path: Path) -> None:
    assert "can be named on the command line only" in _problems(_write(tmp_path, '[system]\nplugins = "os"\n'))
    assert "plugins: no_such_module: ModuleNotFoundError" in _problems("--plugins=no_such_module")


def test_help_is_fast_and_loads_no_torch() -> None:
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from gptperf.errors import run_main\n"
        "from gptperf.train import main\n"
        "try: run_main(main)\n"
        "except SystemExit as e: print('exit', e.code)\n"
        "print('torch' in sys.modules)"
    )
    for flag, exit_line in (("--help", "exit 0"), ("--n_layr=3", "exit 2")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-2:] == [exit_line, "False"]
    assert "gptperf: E2: command line: unknown key 'n_layr'; nearest: n_layer" in done.stderr


def test_every_key_is_documented() -> None:
    command = [sys.executable, "-m", "gptperf.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"})
    for name in KEYS:
        assert f"--{name} " in done.stdout


def test_files_use_their_tables() -> None:
    for path in CONFIGS:
        for section, keys in tomllib.loads(Path(path).read_text()).items():
            assert {KEYS[key].section for key in keys} == {section}


@pytest.mark.parametrize("path", CONFIGS)
def test_a_configuration_is_built_from_its_flat_values(path: str) -> None:
    config = _config(path, "--n_kv_head=1", "--seed=7", "--dtype=float16", "--compile=False")
    assert Config.from_flat(config.flat()) == config
    with pytest.raises(ConfigError, match="n_layer: found 0"):
        Config.from_flat(config.flat() | {"n_layer": 0})


def test_derived_widths() -> None:
    assert ModelConfig(n_embd=2048, ffn_type="swiglu").ffn_width == 5632
    assert ModelConfig(n_embd=768, ffn_type="swiglu").ffn_width == 2048
    assert ModelConfig(n_embd=768).ffn_width == 3072
    assert ModelConfig(d_ff=100, ffn_type="swiglu").ffn_width == 100
    assert ModelConfig(vocab_size=50257, vocab_multiple=64).padded_vocab_size == 50304


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizerConfig().learning_rate = 1.0  # type: ignore[misc]


def test_no_rule_judges_a_key_that_is_wrong_itself(tmp_path: Path) -> None:
    """A wrong value of a higher layer: the rules do not fall back to the value of the layer below."""
    (tmp_path / "a.toml").write_text("[model]\nn_embd = 128\nn_head = 4\n")
    with pytest.raises(ConfigError) as error:
        command_line.resolve([str(tmp_path / "a.toml"), "--n_embd=wide", "--n_head=7"])
    assert error.value.problems == ("command line: n_embd: found 'wide', wanted a whole number from 1 to 1048576",)
