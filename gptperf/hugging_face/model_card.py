"""The README.md of an exported model: what its checkpoint and the log of its run recorded, and nothing else."""

import json
import re
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from gptperf.checkpoint import Checkpoint
from gptperf.config import KEYS, ModelConfig
from gptperf.errors import DataError
from gptperf.formats import counted, duration, one_line, short_count, with_error
from gptperf.hugging_face.exported_config import ExportClass
from gptperf.monitor.blocks import SCORES
from gptperf.monitor.run_log import finite, load, mapping

__all__ = ["TRAIN_TOML", "model_card", "run_of", "train_toml"]

TRAIN_TOML = "train.toml"
"""File of the configuration beside the weights."""
_OF_THE_MACHINE = frozenset(("init_from", "out_dir", "data_dir", "overwrite", "plugins", "debug", "eval_tasks"))

_Record = Mapping[str, Any]


def run_of(found: Checkpoint) -> _Record:
    """Returns the log of the run that saved a checkpoint, or an empty mapping if it is not beside the checkpoint."""
    name = str(mapping(found.state.get("train_state")).get("run_name") or "")
    for path in (found.path.resolve().parent.parent / f"{name}{suffix}" for suffix in (".jsonl", ".json")):
        if name and path.is_file():
            try:
                return dict(load(path))
            except DataError:  # the log is corrupt, and the checkpoint alone is told
                return {}
    return {}


def train_toml(config: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a TOML file that trains the same model on data sets of the same names.

    It has every key of the model, and the other keys that differ from their defaults, without the paths of the machine.

    Args:
        config: Section -> key -> value.
    """
    lines = ["# The configuration of the run: python -m gptperf.train train.toml"]
    for section in (name for name in config if name != "log"):
        kept = {}
        for key, value in config[section].items():
            same = key in KEYS and value == KEYS[key].default and section != "model"
            if value is not None and not same and key not in _OF_THE_MACHINE:
                kept[key] = _names(value) if key == "dataset" else value
        if kept:
            pairs = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in kept.items())
            lines += ["", f"[{section}]", *pairs]
    return "\n".join(lines) + "\n"


def _names(dataset: str) -> str:
    """Returns the data sets of a run, with the last part of a path as its name."""
    return re.sub(r"[^,:]*/(?=[^/])", "", dataset.rstrip("/"))


def model_card(name: str, model: ModelConfig, kind: ExportClass, dtype: str, found: Checkpoint, log: _Record) -> str:
    """Returns the text of README.md.

    Args:
        name: Title.
        model: The architecture.
        kind: Class that reads the model.
        dtype: Dtype of the stored weights.
        found: The checkpoint.
        log: What `run_of` returned.
    """
    remote = "" if not kind.reason else ", trust_remote_code=True"
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gptperf"]
    lines = ["---", *head, "---", "", f"# {one_line(name)}", ""]
    lines += ["A language model trained with gptperf.", "", "```python", "from transformers import pipeline", ""]
    lines += [f'generate = pipeline("text-generation", model={json.dumps(name)}{remote})']
    lines += ['print(generate("...", max_new_tokens=50)[0]["generated_text"])', "```", ""]
    if kind.reason:
        lines += [f"`modeling_gptperf.py` beside the weights computes the model, because {kind.reason}.", ""]
    for title, rows in (("Model", _model_rows(model, kind, dtype, found)), ("Training", _training_rows(found, log))):
        table = [f"| {label} | {_cell(value)} |" for label, value in rows if value]
        if table:
            lines += [f"## {title}", "", "| | |", "| --- | --- |", *table, ""]
    if mapping(found.state.get("train_state")):
        ranks = int(finite(mapping(log.get("startup_info")).get("num_gpus")) or 0)
        launcher = f"torchrun --nproc_per_node={ranks} -m" if ranks > 1 else "python -m"
        lines += ["## To train it again", "", "```bash", f"{launcher} gptperf.train {TRAIN_TOML}", "```", ""]
    return "\n".join(lines)


def _cell(value: str) -> str:
    return one_line(value, 300).replace("|", "\\|").replace("<", "&lt;")


def _model_rows(model: ModelConfig, kind: ExportClass, dtype: str, found: Checkpoint) -> Iterator[tuple[str, str]]:
    count = sum(tensor.numel() for tensor in found.tensors["model"].values())
    yield "class", kind.name
    yield "parameters", f"{count:,}, stored in {dtype}"
    heads = counted(model.n_head, "head") + (
        f", {model.kv_heads} of keys and values" if model.kv_heads < model.n_head else ""
    )
    yield "sizes", f"{counted(model.n_layer, 'layer')} of width {model.n_embd}, {heads}, FFN of width {model.ffn_width}"
    yield "sequence", f"{counted(model.block_size, 'token')}"
    parts = (model.normalization, f"{model.norm_position}-norm", model.ffn_type, model.applied_activation)
    position = model.position_encoding + (f", base {model.rope_theta:g}" if model.position_encoding == "rope" else "")
    yield "parts", ", ".join((*parts, position)) + (", qk_norm" if model.qk_norm else "")
    if model.window != "full":
        yield "window", model.window
    tokenizer = mapping(found.state.get("tokenizer"))
    known = f", {tokenizer['vocab_size']:,} ids" if finite(tokenizer.get("vocab_size")) else ""
    yield "tokenizer", f"{tokenizer.get('name', '')}{known}; the model has {model.padded_vocab_size:,}"


def _training_rows(found: Checkpoint, log: _Record) -> Iterator[tuple[str, str]]:
    """Yields the rows of the training up to the checkpoint; a fact that was not recorded has no row."""
    state, info = mapping(found.state.get("train_state")), mapping(log.get("startup_info"))
    if not state:
        yield "weights", "converted from a model that another program trained; its training is not recorded"
        return
    config = mapping(found.state["config"])
    train = mapping(config.get("train"))
    if train.get("init_from") not in (None, "scratch", "resume", "auto"):
        yield "start", "the weights of another model"
    tokens, trained = finite(state.get("tokens")) or 0.0, finite(info.get("train_tokens"))
    sets = _names(str(mapping(config.get("data")).get("dataset", "")))
    yield "data", sets + (f", {trained:,.0f} tokens for training" if trained else "")
    yield "trained on", f"{tokens:,.0f} tokens in {counted(found.step, 'iteration')}" + _epochs(tokens, trained)
    entries = [entry for entry in log.get("training_iterations", ()) if entry["iter"] <= found.step]
    losses = [loss for entry in entries if (loss := finite(entry.get("loss"))) is not None]
    if losses:
        yield "training loss", f"{losses[-1]:.4f} nats per token, in the last logged iteration"
    if found.metric is not None:
        yield "validation loss", f"{found.metric:.4f} nats per token"
    for evaluated in (entry for entry in log.get("eval_steps", ()) if entry["iter"] == found.step):
        for task, scores in mapping(evaluated.get("tasks")).items():
            yield f"task {task}", ", ".join(f"{key} {with_error(scores, key)}" for key in SCORES if key in scores)
    counts = [mapping(entry.get("mfu")) for entry in entries]
    rates = [rate for count in counts if (rate := finite(count.get("flops_per_token")))]
    rate = statistics.fmean(rates) if rates else finite(info.get("flops_per_token"))
    if rate and tokens:
        yield (
            "FLOPs",
            f"{rate * tokens:.3g} (convention {info.get('convention', 'strict')}), {short_count(rate)} per token",
        )
    joules = [finite(entry.get("joules")) for entry in entries]
    if joules and None not in joules:
        yield "energy", f"{sum(filter(None, joules)) / 3.6e6:.3g} kWh, by the counters of the GPUs"
    gpus, seconds = int(finite(info.get("num_gpus")) or 0), finite(state.get("train_s"))
    device = str(info.get("device", ""))
    yield "trained with", f"{gpus} x {device}" if gpus > 1 else device
    yield "time", f"{duration(seconds)} of training" if seconds else ""
    yield "precision", f"{mapping(config.get('system')).get('dtype')}, with master weights in float32"
    versions = mapping(info.get("versions"))
    yield "versions", ", ".join(f"{package} {versions[package]}" for package in versions)
    yield "fingerprint of the data", str(found.state.get("dataset_fingerprint") or "")


def _epochs(tokens: float, trained: float | None) -> str:
    return f", {tokens / trained:.3g} epochs" if trained else ""
