"""The command that exports a run: the folder as a whole, its card, padded batches, shards, dtypes, and refusals."""

import dataclasses
import errno
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import SIZES, greedy, loaded, saved
from run_helpers import run, run_log
from safetensors import safe_open
from safetensors.torch import load_file
from task_helpers import CHOICES, write_lines

from gptperf import api, checkpoint, files, registry
from gptperf.config import ModelConfig, command_line
from gptperf.config.presets import PRESETS
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.distributed.process import Process
from gptperf.errors import CheckpointError, DataError, DeviceError, DiskError, GptperfError
from gptperf.hugging_face import convert, export, exported_config
from gptperf.hugging_face.__main__ import main
from gptperf.training.reporting import Reporter

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

PRESET = {"gpt2": PRESETS["gpt2"], "llama": PRESETS["llama"]}


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 iterations with checkpoints of the iterations 5 and 10."""
    out = tmp_path_factory.mktemp("export") / "trained"
    tasks = write_lines(out.parent / "questions.jsonl", [CHOICES] * 3)
    flags = ("--max_iters=10", "--eval_interval=5", "--dropout=0.1", "--learning_rate=2e-2", f"--eval_tasks={tasks}")
    assert run(corpus, out, *flags) == 0
    return out


def test_the_command_writes_what_the_pipeline_reads(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)  # the export needs none
        assert main(["export", str(trained), str(tmp_path / "hf"), "--step=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'hf'}: LlamaForCausalLM of {trained / 'checkpoints' / 'step-00000005'}"
    generate = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    found = generate("ab cd", max_new_tokens=16, do_sample=False)[0]["generated_text"]
    wanted = api.generate(api.load_model(trained / "checkpoints" / "step-00000005"), "ab cd", tokens=16, temperature=0)
    assert found == wanted[0].partition("<|endoftext|>")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert modes == {(trained / "checkpoints" / "step-00000005" / "state.json").stat().st_mode}  # those of the umask


def test_the_help_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m gptperf.hugging_face export ")
    assert all(
        flag in shown for flag in ("RUN DIR", "--step ", "--checkpoint ", "--dtype ", "--tokenizer ", "--debug ")
    )


def test_the_card_tells_what_the_run_recorded(trained: Path, tmp_path: Path) -> None:
    log = run_log(trained)
    for which, step in (({"checkpoint": "latest"}, 10), ({"step": 5}, 5)):
        export(trained, tmp_path / str(step), **which)
        card = (tmp_path / str(step) / "README.md").read_text()
        (last,) = (entry for entry in log["training_iterations"] if entry["iter"] == step)
        (evaluated,) = (entry for entry in log["eval_steps"] if entry["iter"] == step)
        info = log["startup_info"]
        ((task, scores),) = evaluated["tasks"].items()
        assert f"| task {task} | acc {scores['acc']:.4f} +- {scores['acc_stderr']:.4f}, acc_norm " in card
        assert f"| training loss | {last['loss']:.4f} nats per token" in card
        assert f"| validation loss | {evaluated['val_loss']:.4f} nats per token |" in card
        assert f"| trained on | {last['tokens']:,} tokens in {step} iterations" in card
        assert f"| FLOPs | {info['flops_per_token'] * last['tokens']:.3g} (convention {info['convention']})" in card
        assert f"{info['total_parameters']:,}, stored in float32" in card
        assert f"torch {info['versions']['torch']}" in card
        assert "energy" not in card  # a CPU has no counter
    resolved = command_line.resolve([str(tmp_path / "10" / "train.toml")])
    wanted = checkpoint.load(trained / "checkpoints" / "step-00000010", only=()).state["config"]
    paths = {"out_dir", "data_dir", "eval_tasks"}
    for section in ("model", "data", "optimizer", "train", "system"):
        found = dataclasses.asdict(getattr(resolved.config, section))
        assert {k: v for k, v in found.items() if k not in paths} == {
            k: v for k, v in wanted[section].items() if k not in paths
        }
    assert str(trained.parent) not in "".join(path.read_text() for path in (tmp_path / "10").glob("*.[tm][od]*"))


def test_the_card_has_the_energy_of_the_iterations(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks used 36 kJ each between every two entries; without the counter of one there is no figure."""
    monkeypatch.setattr(Reporter, "_used_joules", lambda reporter: 3.6e4)
    monkeypatch.setattr(Process, "gather", lambda process, value: [value, value])
    run(corpus, tmp_path / "run", "--max_iters=4", "--save_interval=3")
    assert [entry["joules"] for entry in run_log(tmp_path / "run")["training_iterations"]] == [7.2e4] * 4
    export(tmp_path / "run", tmp_path / "hf", step=3)
    assert "| energy | 0.06 kWh, by the counters of the GPUs |" in (tmp_path / "hf" / "README.md").read_text()
    monkeypatch.setattr(Process, "gather", lambda process, value: [value, (value[0], None)])
    run(corpus, tmp_path / "blind", "--max_iters=1")
    assert "joules" not in run_log(tmp_path / "blind")["training_iterations"][0]


def test_a_checkpoint_without_its_run(trained: Path, tmp_path: Path) -> None:
    """The log is not there, and the card tells what the checkpoint itself records."""
    copy = tmp_path / "step-00000010"
    copy.mkdir()
    for path in (trained / "checkpoints" / copy.name).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    export(copy, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| trained on |" in card
    assert "| validation loss |" in card
    assert "| training loss |" not in card
    assert "FLOPs" not in card


@pytest.mark.parametrize("position", ["learned_absolute", "rope", "none"])
def test_padding_changes_nothing(position: str, tmp_path: Path) -> None:
    """In gptperf's own class: a batch of prompts of different lengths, padded on the left, with any cache."""
    model = ModelConfig(
        **SIZES
        | PRESETS["llama"]
        | {"normalization": "layernorm", "position_encoding": position, "n_kv_head": 2, "window": "8,full"}
    )
    ours, path = saved(model, tmp_path)
    assert export(path, tmp_path / "hf").kind.reason
    theirs = loaded(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", padding_side="left", trust_remote_code=True)
    texts = ["a", "abc def", "abcdefgh ij"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    wanted = [greedy(ours, torch.tensor(ByteTokenizer().encode(text).tolist()), 12) for text in texts]
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **cache}
        assert theirs.generate(**batch, **options)[:, -12:].tolist() == wanted
    labels = batch["input_ids"][-1:]
    loss = theirs(labels, labels=labels).loss
    logits = ours(labels)[0, :-1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels[0, 1:]), rtol=0, atol=1e-5)
    capped = loaded(tmp_path / "hf", logit_softcap=2.0)(labels).logits[0, :-1]
    torch.testing.assert_close(capped, 2 * torch.tanh(logits / 2), rtol=0, atol=1e-5)
    theirs.train()
    theirs(labels, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


@pytest.mark.parametrize("preset", PRESET)
def test_shards_and_dtypes(preset: str, tmp_path: Path) -> None:
    """Tied heads are stored once; the files together hold the same tensors, rounded if asked."""
    ours, path = saved(ModelConfig(**SIZES | PRESET[preset]), tmp_path)
    export(path, tmp_path / "one")
    export(path, tmp_path / "many", shard_bytes=20_000)
    export(path, tmp_path / "half", dtype="bfloat16")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert sum(tensor.numel() for tensor in whole.values()) == sum(p.numel() for p in ours.parameters())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    parts = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(parts) > 2
    assert parts == [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for part in parts:
        held = [whole[name].nbytes for name, where in index["weight_map"].items() if where == part]
        assert sum(held) <= 20_000 or len(held) == 1
    for name, tensor in whole.items():
        with safe_open(tmp_path / "many" / index["weight_map"][name], framework="pt") as part:
            assert torch.equal(part.get_tensor(name), tensor)
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        assert torch.equal(tensor, whole[name].bfloat16())
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "many")(tokens).logits, loaded(tmp_path / "one")(tokens).logits)
        half = loaded(tmp_path / "half", **({} if transformers.__version__ >= "5" else {"torch_dtype": "auto"}))
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half(tokens).logits.float(), ours(tokens), rtol=0.1, atol=0.2)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 257}
OTHERS = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}


@pytest.mark.parametrize(
    "described",
    [
        {"model_type": "gpt2", "vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
        {"model_type": "llama", **OTHERS, "tie_word_embeddings": True, "attention_bias": True},
        {"model_type": "llama", **OTHERS, "head_dim": 16, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"model_type": "mistral", **OTHERS, "sliding_window": 8},
        {"model_type": "qwen2", **OTHERS, **WINDOWS},
        {"model_type": "qwen3", **OTHERS, **WINDOWS, "head_dim": 8},
    ],
    ids=lambda described: described["model_type"],
)
def test_what_was_imported_is_exported_unchanged(described: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(**described)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "out", "byte")
    done = export(tmp_path / "out", tmp_path / "again")
    assert done.kind.model_type == described["model_type"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = loaded(tmp_path / "again")
    assert type(again) is type(theirs)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert "its training is not recorded" in (tmp_path / "again" / "README.md").read_text()
    assert not (tmp_path / "again" / "train.toml").exists()


def test_what_no_class_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    for table in ("_components", "_cards"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    registry.register("activation", "sine", act)
    with pytest.raises(CheckpointError, match=r"activation: found 'sine' of a plugin, wanted one of gelu"):
        exported_config.export_class(ModelConfig(**SIZES | {"activation": "sine"}))
    # A key that came later than the export, and changes the model.
    known = exported_config.EXPORTED - {"norm_eps"}
    monkeypatch.setattr(exported_config, "EXPORTED", known)
    assert exported_config.export_class(ModelConfig(**SIZES)).reason
    with pytest.raises(
        CheckpointError, match=r"norm_eps: found 0.01, wanted 1e-05: no class of Hugging Face reads another value"
    ):
        exported_config.export_class(ModelConfig(**SIZES | {"norm_eps": 1e-2}))


def test_places_that_are_wrong(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (tmp_path / "none", tmp_path / "hf", {}, "none: found no checkpoint, wanted the folder of a run"),
        (trained.parent / "trainde", tmp_path / "hf", {}, f"nearest: {trained}"),
        (tmp_path / "full", tmp_path / "hf", {}, "full: found no checkpoint"),
        (trained, tmp_path / "hf", {"step": 7}, "found no checkpoint of step 7; nearest: --step="),
        (trained / "checkpoints" / "step-00000010", tmp_path / "hf", {"step": 5}, "the checkpoint of step 10"),
        (trained, tmp_path / "full", {}, "full: found files, wanted a folder that does not exist or is empty"),
        (trained, tmp_path / "full" / "file", {}, "file: found a file, wanted a folder"),
    ]
    for source, target, options, text in cases:
        with pytest.raises(CheckpointError, match=text):
            export(source, target, **options)
    (tmp_path / "empty").mkdir()
    export(trained, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize("tokenizer", ["unknown", "ids:65", "gone"])
def test_a_tokenizer_without_a_vocabulary(tokenizer: str, tmp_path: Path) -> None:
    known = ByteTokenizer()
    known.name = tokenizer  # type: ignore[misc]
    _, path = saved(ModelConfig(**SIZES), tmp_path, known)
    with pytest.raises(DataError, match=f"tokenizer.*{tokenizer}"):
        export(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert export(path, tmp_path / "hf", tokenizer="unknown").tokenizer == ""
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    assert loaded(tmp_path / "hf").config.eos_token_id is None


def test_what_is_missing_or_full(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(error: type[GptperfError], text: str) -> None:
        with pytest.raises(error, match=text):
            export(trained, tmp_path / "hf")
        assert list(tmp_path.iterdir()) == []

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tokenizers", None)
        attempt(DeviceError, "tokenizer 'byte' needs the package tokenizers")
    with monkeypatch.context() as small:
        small.setattr(importlib.import_module("gptperf.hugging_face.export"), "free_bytes", lambda folder: 1000)
        attempt(DiskError, r"hf: 1.000 kB free, the model needs \d+")
    for nth in range(3):
        calls = []

        def write(fd: int, data: bytes, nth: int = nth, calls: list[int] = calls) -> None:
            calls.append(fd)
            if len(calls) > nth:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as full:
            full.setattr(files, "write_all", write)
            attempt(DiskError, "hf cannot be written: .*No space left")


def test_another_tokenizer_than_that_of_the_data(tmp_path: Path) -> None:
    other = ByteTokenizer()
    other.name, other.fingerprint = "mine", "0" * 64  # type: ignore[misc]
    _, path = saved(ModelConfig(**SIZES), tmp_path, other)
    with pytest.raises(DataError, match="--tokenizer: found 'byte', wanted 'mine', the tokenizer that the model"):
        export(path, tmp_path / "hf", tokenizer="byte")
