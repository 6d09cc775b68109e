"""The same run in any layout (one rank or several, DDP, ZeRO-1 or FSDP), saved by one layout and resumed by another."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SIZES = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=97", "--vocab_multiple=64"]
TRAIN = ["--batch_size=2", "--max_iters=20", "--warmup_iters=1", "--learning_rate=1e-2", "--min_lr=1e-3"]
SMALL = [*SIZES, *TRAIN, "--dtype=float32", "--compile=False", "--fsdp_min_num_params=0"]
STRATEGIES = {
    "ddp": [],
    "zero1": ["--use_zero1=True"],
    "fsdp": ["--use_fsdp=True"],
    "fsdp_once": ["--use_fsdp=True", "--fsdp_reduce_once=True"],
    "fsdp_gathered": ["--use_fsdp=True", "--fsdp_gather_once=True"],
    "fsdp_both": ["--use_fsdp=True", "--fsdp_gather_once=True", "--fsdp_reduce_once=True"],
    "fsdp_joined": ["--use_fsdp=True", "--fsdp_min_num_params=20000"],
}
MUON = ["--optimizer=muon", "--normuon=True", "--cautious_weight_decay=True", "--n_kv_head=1", "--n_embd=48"]
MODELS = {
    "llama": ["--arch_preset=llama"],  # untied
    "gpt2": ["--arch_preset=gpt2"],  # tied, a position embedding, post-norm
    "biases": ["--arch_preset=gpt2_openai", "--n_embd=36"],  # sizes that leave gaps
    "recomputed": ["--arch_preset=llama", "--recompute=full"],
    "selective": ["--arch_preset=llama", "--recompute=selective"],
    "documents": ["--window=5,full,3", "--document_mask=True", "--recompute=full", "--vocab_size=13"],
    "dropout": ["--arch_preset=llama", "--dropout=0.2"],
    "muon": ["--arch_preset=llama", *MUON],
}
KEYS = ("losses", "norms", "evaluated")
WATCHED = ("global_norm", "grad_std", "grad_min", "grad_max", "non_finite", "layer_norms", "component_norms")
Results = dict[str, list[dict[str, Any]]]


def spawn(processes: int, cases: dict[str, dict[str, Any]], folder: Path, device: str = "cpu") -> Results:
    """Runs the cases on several ranks, and returns the figures of every case and rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        sys.executable,
        *launcher,
        "tests/helpers/parallel_worker.py",
        str(folder / "cases.json"),
        str(folder),
        device,
    ]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = range(processes)
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in ranks] for name in cases}


def matrix(device: str, compiled: bool = False) -> dict[str, dict[str, Any]]:
    """Returns a case for every model, strategy and number of micro-batches."""
    flags = [f"--device={device}", *(["--compile=True"] if compiled else [])]
    return {
        f"{model}-{strategy}-{micro}": {
            "flags": [*SMALL, *flags, *MODELS[model], f"--gradient_accumulation_steps={micro}", *STRATEGIES[strategy]],
            "document_end": 7,
        }
        for model in MODELS
        for strategy in STRATEGIES
        for micro in ((4, 16) if model in ("llama", "gpt2") else (8,))
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """The figures of the matrix, by the number of ranks."""
    found: dict[int, Results] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def of(processes: int) -> Results:
        if device == "cuda" and torch.cuda.device_count() < processes:
            pytest.skip(f"needs {processes} GPUs")
        if processes not in found:
            found[processes] = spawn(processes, matrix(device), tmp_path_factory.mktemp(f"of{processes}"), device)
        return found[processes]

    return of


def base_of(name: str) -> str:
    """Returns the name of the same case under plain replication."""
    model, _, micro = name.split("-")
    return f"{model}-ddp-{micro}"


def gpus_reach_each_other() -> bool:
    """Returns whether there are several GPUs, each of which can read the memory of every other one."""
    pairs = list(itertools.permutations(range(torch.cuda.device_count()), 2))
    return bool(pairs) and all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)


PROCESSES = [1, 2, pytest.param(4, marks=pytest.mark.matrix)]


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("name", matrix("cpu"))
def test_any_layout_is_the_same_run(results: Callable[[int], Results], name: str, processes: int) -> None:
    wanted = results(1)[base_of(name)][0]
    for found in results(processes)[name]:
        for key in KEYS:
            assert found[key] == pytest.approx(wanted[key], rel=1e-5), key
        for got, want in zip(found["watched"], wanted["watched"], strict=True):
            for key in WATCHED:
                assert got[key] == pytest.approx(want[key], rel=1e-4), key
            assert got["grad_mean"] == pytest.approx(want["grad_mean"], abs=1e-6 * want["grad_std"])
            assert got["zero_share"] == pytest.approx(want["zero_share"], abs=1e-3)
            assert got["update_ratios"] == pytest.approx(want["update_ratios"], rel=1e-2)
            assert got["histogram"]["shares"] == pytest.approx(want["histogram"]["shares"], abs=2e-3)
        assert found["groups"] == wanted["groups"]
        assert found["pairs"] == wanted["pairs"]
        assert found["moved_by"] == ("copy_engine" if processes > 1 and gpus_reach_each_other() else "process_group")
        assert bool(found["reason"]) == (processes > 1 and not gpus_reach_each_other())
    if processes > 1:
        losses = [found["losses"] for found in results(processes)[name]]
        assert all(loss == losses[0] for loss in losses)


def pulled(folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Runs cases twice: by the process group, and with ranks that pull from each other's memory, as copy engines do."""
    cases = {}
    for model in ("llama", "gpt2", "biases"):
        for strategy, flags in STRATEGIES.items():
            for micro in (processes, 2 * processes):
                name = f"{model}-{strategy}-{micro}"
                case = {"flags": [*SMALL, "--device=cpu", *MODELS[model], *flags]}
                case["flags"].append(f"--gradient_accumulation_steps={micro}")
                cases |= {name: case, f"{name}-pulled": {**case, "shared": str(folder / name)}}
    for strategy in ("ddp", "zero1", "fsdp"):  # one micro-batch a step: its gradients travel in 16 bits
        name = f"biases-{strategy}-bfloat16"
        case = {"flags": [*SMALL, "--device=cpu", *MODELS["biases"], *STRATEGIES[strategy], "--dtype=bfloat16"]}
        case["flags"].append(f"--gradient_accumulation_steps={processes}")
        cases |= {name: case, f"{name}-pulled": {**case, "shared": str(folder / name)}}
    return cases


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_pulling_is_the_same_run(processes: int, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("on GPUs every other test here does so")
    found = spawn(processes, pulled(tmp_path / "shared", processes), tmp_path / "out")
    for name, ranks in found.items():
        for rank, wanted in zip(ranks, found[name.removesuffix("-pulled")], strict=True):
            for key in KEYS:
                assert rank[key] == pytest.approx(wanted[key], rel=1e-5), (name, key)
            assert rank["losses"] == ranks[0]["losses"]
            for key in ("state_bytes", "gradient_bytes"):
                assert rank[key] == wanted[key]


@pytest.mark.parametrize("processes", PROCESSES[1:])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_who_holds_what(results: Callable[[int], Results], strategy: str, processes: int) -> None:
    whole = results(1)["llama-ddp-4"][0]
    for found in results(processes)[f"llama-{strategy}-4"]:
        states = 1 if strategy == "ddp" else processes
        gradients = processes if strategy in ("fsdp", "fsdp_gathered", "fsdp_joined") else 1
        assert found["state_bytes"] == pytest.approx(whole["state_bytes"] / states, rel=0.01)
        # The gradients of vectors stay whole: half a per cent of this model.
        assert found["gradient_bytes"] == pytest.approx(whole["gradient_bytes"] / gradients, rel=0.02)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_matrix_is_orthogonalized_by_one_rank(
    results: Callable[[int], Results], strategy: str, processes: int
) -> None:
    """The 7 matrices of each of the 3 blocks, in each of the 4 steps."""
    each = [found["orthogonalized"] for found in results(processes)[f"muon-{strategy}-8"]]
    assert sum(each) == 7 * 3 * 4
    assert max(each) < 7 * 3 * 4 or processes == 1


@pytest.mark.parametrize("processes", PROCESSES[1:])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_how_often_weights_are_gathered(results: Callable[[int], Results], model: str, processes: int) -> None:
    """For forward and backward of each of the three blocks, or once an iteration; all are dropped by its end."""
    found = {
        (strategy, micro): results(processes)[f"{model}-{strategy}-{micro}"][0]
        for strategy in ("fsdp", "fsdp_once", "fsdp_gathered", "fsdp_both")
        for micro in (4, 16)
    }
    for strategy in ("fsdp", "fsdp_once"):
        few, many = (found[strategy, micro]["gathers"] for micro in (4, 16))
        assert [b - a for a, b in zip(few, many, strict=True)] == [12 // processes * 2 * 3] * 4
    for strategy in ("fsdp_gathered", "fsdp_both"):
        for micro in (4, 16):
            buckets = found[strategy, micro]["buckets"]  # an evaluation drops two, which are gathered again
            assert all(buckets <= gathers <= buckets + 2 for gathers in found[strategy, micro]["gathers"])
    matrices = 5  # of the embedding, three blocks, lm_head; or positions in its place
    for (strategy, micro), figures in found.items():
        held = [tuple(entry) for entry in figures["held"]][micro // processes + 1 :]  # after the first step
        own = micro // processes
        between = matrices if strategy in ("fsdp_gathered", "fsdp_both") else {"llama": 2, "gpt2": 3}[model]
        step = [("micro-batch", 1), *[("micro-batch", between)] * (own - 1), ("update", 0)]
        assert held == step * 3, (strategy, micro)


def test_an_overflow_in_one_share_is_one_for_all(tmp_path: Path) -> None:
    """In float16, an overflow in one shard makes every rank skip the update and lower the scale."""
    flags = [*SMALL, "--device=cpu", "--dtype=float16", "--arch_preset=llama", "--gradient_accumulation_steps=4"]
    cases = {name: {"flags": [*flags, *STRATEGIES[name]], "overflow": 2} for name in ("ddp", "zero1", "fsdp")}
    for name, ranks in spawn(2, cases, tmp_path).items():
        for found in ranks:
            assert found["scales"] == [65536, 65536, 65536, 32768], name
            losses = found["evaluated"]
            assert losses[2] == losses[1] == losses[3], name
            assert losses[1] != losses[0], name


LAYOUTS = ("ddp", "zero1", "fsdp")


ELASTIC_FLAGS = [*SMALL, "--device=cpu", "--arch_preset=llama"]
OPTIMIZERS = {"adamw": [], "muon": MUON}


def _elastic(processes: int, kind: str, folder: Path, common: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the cases that save, or those that load what `kind` processes saved; `folder` has an entry for each."""
    cases = {}
    for (optimizer, flags), a in itertools.product(OPTIMIZERS.items(), LAYOUTS):
        if kind == "save":
            place = str(folder / f"{optimizer}-{a}{processes}")
            flags_a = [*common, *flags, *STRATEGIES[a]]
            cases[f"{optimizer}-{a}"] = {"flags": flags_a, "steps": [0, 2], "save": place}
            continue
        place = str(folder / f"{optimizer}-{a}{kind}")
        for b in LAYOUTS:
            flags_b = [*common, *flags, *STRATEGIES[b]]
            cases[f"{optimizer}-{a}-{b}"] = {"flags": flags_b, "steps": [2, 4], "load": place}
    return cases


ELASTIC = [(2, 1, "bfloat16"), (1, 2, "float32")]
ELASTIC += [
    pytest.param(*pair, "float32", marks=pytest.mark.matrix) for pair in ((4, 2), (4, 1), (2, 4), (8, 4), (2, 8))
]


@pytest.mark.parametrize(("saved_by", "resumed_by", "moments"), ELASTIC)
def test_resumed_in_any_layout(saved_by: int, resumed_by: int, moments: str, tmp_path: Path) -> None:
    """Moments in bfloat16 are rounded by the same random bits in every layout."""
    micro = max(4, saved_by, resumed_by)
    common = [*ELASTIC_FLAGS, f"--gradient_accumulation_steps={micro}", f"--optimizer_state_dtype={moments}"]
    before = spawn(saved_by, _elastic(saved_by, "save", tmp_path, common), tmp_path / "before")
    after = spawn(resumed_by, _elastic(resumed_by, str(saved_by), tmp_path, common), tmp_path / "after")
    cases = {name: {"flags": [*common, *flags]} for name, flags in OPTIMIZERS.items()}
    unbroken = {name: ranks[0] for name, ranks in spawn(1, cases, tmp_path / "unbroken").items()}
    for name, ranks in before.items():
        assert ranks[0]["losses"] == pytest.approx(unbroken[name.partition("-")[0]]["losses"][:2], rel=1e-5), name
        files = {path.name for path in (tmp_path / f"{name}{saved_by}" / "step-00000002").iterdir()}
        parts = {f"model-{rank:05d}.safetensors" for rank in range(saved_by)} if saved_by > 1 else {"model.safetensors"}
        assert {name for name in files if name.startswith("model")} == parts
    for name, ranks in after.items():
        wanted = unbroken[name.partition("-")[0]]
        for found in ranks:
            assert found["losses"] == pytest.approx(wanted["losses"][2:], rel=1e-5), name
            assert found["norms"] == pytest.approx(wanted["norms"][2:], rel=1e-5), name


def test_eight_ranks_train_as_one_and_so_do_fewer_that_resume(tmp_path: Path) -> None:
    """8 ranks save, 4 resume and save, 2 resume: under another strategy each time, with the losses of one process."""
    chains = {"adamw": ("fsdp", "ddp", "zero1"), "muon": ("zero1", "fsdp", "ddp")}
    common = [*ELASTIC_FLAGS, "--gradient_accumulation_steps=8"]
    one = spawn(1, {name: {"flags": [*common, *OPTIMIZERS[name]]} for name in chains}, tmp_path / "one")
    for part, (processes, steps) in enumerate([(8, [0, 2]), (4, [2, 3]), (2, [3, 4])]):
        cases: dict[str, dict[str, Any]] = {}
        for name, chain in chains.items():
            flags = [*common, *OPTIMIZERS[name], *STRATEGIES[chain[part]]]
            cases[name] = {"flags": flags, "steps": steps, "save": str(tmp_path / name)}
            cases[name] |= {"load": str(tmp_path / name)} if part else {}
        for name, ranks in spawn(processes, cases, tmp_path / f"of{processes}").items():
            for found, key in itertools.product(ranks, KEYS):
                wanted = one[name][0][key][slice(*steps)]
                assert found[key] == pytest.approx(wanted, rel=1e-5), (processes, name, key)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled_on_gpus(dtype: str, tmp_path: Path) -> None:
    """With the Triton ops and torch.compile, every strategy trains as one process does."""
    processes = min(torch.cuda.device_count(), 4)
    if processes < 2:
        pytest.skip("needs 2 GPUs")
    cases = {
        f"{model}-{strategy}": {
            "flags": [
                *SMALL,
                *MODELS[model],
                *("--device=cuda", "--compile=True", "--n_embd=128", f"--dtype={dtype}"),
                "--gradient_accumulation_steps=8",
                *STRATEGIES[strategy],
            ]
        }
        for model in ("llama", "gpt2", "recomputed", "selective")
        for strategy in STRATEGIES
    }
    one = spawn(1, {name: case for name, case in cases.items() if name.endswith("-ddp")}, tmp_path / "one", "cuda")
    several = spawn(processes, cases, tmp_path / "several", "cuda")
    for name, ranks in several.items():
        wanted = one[f"{name.partition('-')[0]}-ddp"][0]
        for found in ranks:
            assert found["losses"] == pytest.approx(wanted["losses"], rel=2e-3), name  # bfloat16 keeps 8 bits
            assert found["norms"] == pytest.approx(wanted["norms"], rel=2e-2), name
