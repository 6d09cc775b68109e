"""What a value changes in lower layers: the schedule of a shorter run, contradicting values; and limits of a check."""

import contextlib
import itertools
import time
from pathlib import Path

import pytest

from gptperf.config import KEYS, Config, command_line
from gptperf.config.keys import Range
from gptperf.config.rules import RULES
from gptperf.errors import ConfigError
from gptperf.training.optimizers.schedule import learning_rate

INTEGERS = [name for name, key in KEYS.items() if key.type is int]
CONTRADICTIONS = [
    # flag, the file below it, the key that yields, its new value
    ("--init_from=resume", "[train]\noverwrite = true", "overwrite", False),
    ("--init_from=auto", "[train]\noverwrite = true", "overwrite", False),
    ("--overwrite=True", '[train]\ninit_from = "auto"', "init_from", "scratch"),
    ("--learning_rate=1e-5", "[optimizer]\nmin_lr = 1e-4", "min_lr", 1e-5),
    ("--device=cpu", '[system]\nkernels = "triton"', "kernels", "auto"),
    ("--kernels=triton", '[system]\ndevice = "cpu"', "device", "auto"),
    ("--use_zero1=True", "[system]\nuse_fsdp = true", "use_fsdp", False),
    ("--use_fsdp=True", "[system]\nuse_zero1 = true", "use_zero1", False),
    ("--use_fsdp=true", '[system]\ncompile_scope = "model"', "compile_scope", "block"),
    ("--recompute=full", '[system]\ncompile_scope = "model"', "compile_scope", "block"),
    ("--use_fsdp=False", "[system]\nuse_fsdp = true\nfsdp_gather_once = true", "fsdp_gather_once", False),
    ("--use_zero1=true", "[system]\nuse_fsdp = true\nfsdp_reduce_once = true", "fsdp_reduce_once", False),
    ("--optimizer=adamw", '[optimizer]\noptimizer = "muon"\nnormuon = true', "normuon", False),
    ("--optimizer=adamw", '[optimizer]\noptimizer = "muon"\nmuon_lr = 0.1', "muon_lr", None),
    (
        "--optimizer=adamw",
        '[optimizer]\noptimizer = "muon"\ncautious_weight_decay = true',
        "cautious_weight_decay",
        False,
    ),
    ("--dtype=float32", '[system]\nmatmul_dtype = "fp8"', "matmul_dtype", "dtype"),
    ("--max_iters=12", '[log]\nprofile = "100:104"', "profile", "10:12"),
]


OF_FP8 = {"fp8_level": ("forward", "full"), "fp8_scaling": ("current", "delayed"), "fp8_skip": ("first,last", "")}
"""Keys that apply to fp8 only -> a value, and the default."""


def _file(folder: Path, text: str) -> str:
    path = folder / "below.toml"
    path.write_text(text + "\n")
    return str(path)


def _rates(config: Config) -> list[float]:
    return [learning_rate(i, config.optimizer, config.train.max_iters) for i in range(config.train.max_iters)]


@pytest.mark.parametrize(("flag", "text", "key", "value"), CONTRADICTIONS)
def test_a_flag_wins_over_a_contradicting_value_of_a_file_and_says_so(
    flag: str, text: str, key: str, value: object, tmp_path: Path
) -> None:
    file = _file(tmp_path, text)
    resolved = command_line.resolve([file, flag])
    flat = resolved.config.flat()
    name = flag[2:].partition("=")[0]
    assert flat[key] == value
    assert resolved.origins[name] == "command line"
    assert file in resolved.changes[key]
    assert "command line" in resolved.changes[key]
    assert resolved.origins[key] in command_line.show_config(resolved)
    with pytest.raises(ConfigError):  # beside each other they are a mistake
        command_line.resolve([*_as_flags(text), flag])


@pytest.mark.parametrize("key", OF_FP8)
def test_a_flag_that_turns_fp8_off_turns_its_keys_off(key: str, tmp_path: Path) -> None:
    value, usual = OF_FP8[key]
    file = _file(tmp_path, f'[system]\nmatmul_dtype = "fp8"\n{key} = "{value}"')
    assert command_line.resolve([file]).config.flat()[key] == value
    resolved = command_line.resolve([file, "--matmul_dtype=dtype"])
    assert resolved.config.flat()[key] == usual
    assert file in resolved.changes[key]


def _as_flags(text: str) -> list[str]:
    pairs = [line.split(" = ") for line in text.splitlines() if " = " in line]
    return [f"--{key}={value.strip(chr(34))}" for key, value in pairs]


@pytest.mark.parametrize(
    ("text", "flag", "both"),
    [
        ("[model]\nn_head = 8\nn_embd = 64", "--n_embd=36", ("n_embd", "n_head")),
        ("[model]\nn_head = 8\nn_kv_head = 4", "--n_head=6", ("n_kv_head", "n_head")),
        ("[optimizer]\nlearning_rate = 1e-4", "--min_lr=1e-3", ("min_lr", "learning_rate")),
        ("[train]\nmax_iters = 50", "--profile=100:104", ("profile", "max_iters")),
        ('[system]\nrecompute = "full"', "--compile_scope=model", ("recompute", "compile_scope")),
        ("[system]\nuse_fsdp = true", "--compile_scope=model", ("use_fsdp", "compile_scope")),
        ('[train]\ninit_from = "resume"\noverwrite = true', "--n_layer=2", ("overwrite", "init_from")),
    ],
)
def test_where_losing_a_value_is_not_harmless_both_are_named(
    text: str, flag: str, both: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.resolve([_file(tmp_path, text), flag])
    assert all(name in str(caught.value) for name in both)


def test_every_value_that_yields_is_tried_here() -> None:
    yields = {key for rule in RULES for key in rule.yields} - {"attention_backend"}  # needs a package
    assert yields == {key for _, _, key, _ in CONTRADICTIONS} | set(OF_FP8)


@pytest.mark.parametrize("below", ["", "[optimizer]\nwarmup_iters = 2000", "[train]\nmax_iters = 9000"])
@pytest.mark.parametrize("iters", [1, 5, 100, 3000])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_short_run_leaves_a_warm_up_from_a_lower_layer(below: str, iters: int, schedule: str, tmp_path: Path) -> None:
    resolved = command_line.resolve([_file(tmp_path, below), f"--max_iters={iters}", f"--lr_schedule={schedule}"])
    config = resolved.config
    assert max(_rates(config)) == config.optimizer.learning_rate
    assert config.optimizer.warmup_iters <= iters / 10
    assert "warmup_iters" in resolved.changes
    assert "max_iters = " in resolved.origins["warmup_iters"]
    again = command_line.resolve([_file(tmp_path, command_line.show_config(resolved))])
    assert again.config == config
    assert not again.changes


def test_a_warm_up_that_fits_or_is_given_with_the_length_of_the_run_is_kept(tmp_path: Path) -> None:
    for argv in (
        [_file(tmp_path, "[optimizer]\nwarmup_iters = 10"), "--max_iters=100"],
        ["--max_iters=100", "--warmup_iters=10"],
        ["configs/quick_test.toml"],
        [],
    ):
        assert not command_line.resolve(argv).changes
    beside = command_line.resolve([_file(tmp_path, "[train]\nmax_iters = 50\n[optimizer]\nwarmup_iters = 60")])
    over = command_line.resolve([_file(tmp_path, "[train]\nmax_iters = 50"), "--warmup_iters=60"])
    for resolved in (beside, over):
        assert resolved.config.optimizer.warmup_iters == 60
        assert not resolved.changes
        assert any("never reaches its peak" in line for line in resolved.config.notes())


def test_a_decay_from_a_lower_layer_ends_with_the_run(tmp_path: Path) -> None:
    file = _file(tmp_path, "[train]\nmax_iters = 5000\n[optimizer]\nwarmup_iters = 1\nlr_decay_iters = 5000")
    shorter = command_line.resolve([file, "--max_iters=100"])
    assert _rates(shorter.config)[-1] < 1.01 * shorter.config.optimizer.min_lr
    assert "lr_decay_iters" in shorter.changes
    given = command_line.resolve([file, "--max_iters=100", "--lr_decay_iters=5000"])
    assert given.config.optimizer.lr_decay_iters == 5000
    longer = command_line.resolve([file, "--max_iters=9000"])
    assert longer.config.optimizer.lr_decay_iters == 5000
    assert not longer.changes
    decay = command_line.resolve(["--max_iters=1000", "--lr_decay_iters=50"])
    assert decay.config.optimizer.warmup_iters == 5


def test_every_number_of_things_has_a_largest_value() -> None:
    rules = {name: KEYS[name].rule for name in INTEGERS}
    assert all(isinstance(rule, Range) and rule.high is not None for rule in rules.values())
    for name, rule in rules.items():
        assert isinstance(rule, Range)
        with pytest.raises(ConfigError, match=f"{name}: found .* to {rule.high}.*nearest: {rule.high}"):
            command_line.resolve([f"--{name}={10**30}"])


def test_a_check_is_quick_whatever_the_values(tmp_path: Path) -> None:
    extreme = (-(10**30), -1, 0, 1, 7, 65_521, 65_536, 2**20 - 3, 2**20, 999_983, 2**24, 10**9, 10**30)
    pairs = itertools.combinations(("n_embd", "n_head", "n_kv_head", "d_ff", "gradient_accumulation_steps"), 2)
    cases = [[f"--{name}={value}"] for name in INTEGERS for value in extreme]
    cases += [[f"--{a}={x}", f"--{b}={y}"] for a, b in pairs for x in extreme[3:] for y in extreme[3:]]
    for number, text in enumerate(
        (
            "[model]\n" + "".join(f"n_laye{i} = 1\n" for i in range(4000)),
            "".join(f"[modl{i}]\n" for i in range(6000)),
            ".".join("a" * 30_000) + " = 1",
            "a = [" + "1," * 400_000 + "]",
        )
    ):
        (tmp_path / f"{number}.toml").write_text(text)
        cases.append([str(tmp_path / f"{number}.toml")])
    worst = {0.0: [""]}
    for argv in cases:
        begin = time.process_time()
        with contextlib.suppress(ConfigError):
            command_line.resolve([*argv, "--position_encoding=rope"], world_size=7)
        worst[time.process_time() - begin] = argv
    assert max(worst) < 1.0, worst[max(worst)]  # 0.1 s with room for a busy machine


def test_a_file_with_many_mistakes_names_the_first_ones(tmp_path: Path) -> None:
    file = _file(tmp_path, "[model]\n" + "".join(f"n_laye{i} = 1\n" for i in range(3000)))
    with pytest.raises(ConfigError, match="20 mistakes or more") as caught:
        command_line.resolve([file])
    assert len(str(caught.value).splitlines()) == 21
