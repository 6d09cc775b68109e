"""Opens and verifies the data of a run, says how much of it is read, and compares it with the data of a checkpoint."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptperf.config import Config, DataConfig, ModelConfig
from gptperf.data.format import read_manifest
from gptperf.data.mixture import MixedTokens, open_tokens, order_of, parts_of, read_shares, weighted_names
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource, resolve_dataset
from gptperf.distributed.agreement import fail_together
from gptperf.distributed.process import Process
from gptperf.errors import DataError
from gptperf.formats import byte_text
from gptperf.monitor.console import Console
from gptperf.monitor.events import StartupInfo

__all__ = ["compare_data", "data_facts", "data_record", "open_dataset", "repeated", "source_facts", "verify_all"]

BUILT_IN_DATASET = "python_stdlib"
MOST_EPOCHS = 4
"""Up to here, repeated data is worth about as much as new data (Muennighoff et al., 2023)."""
SAMPLED_BLOCKS = 16
"""Blocks of each data set whose content a checkpoint records: 1 MiB, read once at the start of a run."""


def open_dataset(
    data: DataConfig, model: ModelConfig, process: Process
) -> tuple[TokenSource | MixedTokens, TokenSource | MixedTokens]:
    """Opens and checks a data set or a mixture; the main rank first prepares the built-in one if it does not exist.

    Collective: every rank must call it.

    Returns:
        The training tokens and the validation tokens.

    Raises:
        DataError: a data set is missing or corrupt, or has a token id that is not in the model's vocabulary.
    """
    built_in = Path(data.data_dir) / BUILT_IN_DATASET
    names = [name for name, _ in weighted_names(data.dataset, data.data_dir)]
    if BUILT_IN_DATASET in names and process.is_main and not os.path.exists(built_in):
        try:
            prepare(BUILT_IN_DATASET, data_dir=data.data_dir)
        except DataError:
            if not os.path.exists(built_in):  # if it exists now, another run has prepared it meanwhile
                raise
    process.barrier()
    for name in names:
        path = resolve_dataset(name, data.data_dir)
        tokenizer = read_manifest(path).tokenizer
        if tokenizer.vocab_size > model.vocab_size:
            raise DataError(
                f"{path}: found tokenizer {tokenizer.name} with {tokenizer.vocab_size:,} ids, and "
                f"vocab_size = {model.vocab_size:,}; wanted --vocab_size={tokenizer.vocab_size} or more"
            )
    checked = data.verify_data != "off"
    train, val = (
        open_tokens(data.dataset, data.data_dir, split, vocab_size=model.vocab_size, verify=checked)
        for split in ("train", "val")
    )
    return train, val


def verify_all(tokens: Sequence[TokenSource | MixedTokens], process: Process, console: Console) -> None:
    """Compares all data with its checksums, each rank a share of it. Collective: every rank must call it.

    A host with a copy of its own verifies the rest of it while the run reads it.

    Raises:
        DataError: the data is corrupt; the message names the shard.
    """
    done = 0
    with fail_together(process, "reading the data"):
        for part in (part for split in tokens for part in parts_of(split)):
            done += part.source.verify_share(process.rank, process.world_size)
    console.message(f"verified {byte_text(sum(process.gather(done)))} of the data")


def data_facts(config: Config, train: TokenSource | MixedTokens, val: TokenSource | MixedTokens) -> StartupInfo:
    """Returns the fields of the startup info about the data, and its epochs over the whole run."""
    order = order_of(train, config.model.block_size, config.train.seed)
    samples = config.train.max_iters * config.train.batch_size * config.train.gradient_accumulation_steps
    shares = read_shares(order, samples)
    found: StartupInfo = {
        "train_tokens": len(train),
        "val_tokens": len(val),
        "dataset_fingerprint": train.fingerprint,
        "epochs": max(epochs for _, epochs in shares),
    }
    if isinstance(train, MixedTokens):
        found["sources"] = {
            part.name: {
                "weight": part.weight,
                "train_tokens": len(part.source),
                "val_tokens": len(held_out.source),
                "epochs": epochs,
            }
            for part, held_out, (_, epochs) in zip(parts_of(train), parts_of(val), shares, strict=True)
        }
    unchecked = [part.name for part in parts_of(train) if part.source.checksums is None]
    if unchecked and config.data.verify_data == "used":
        found["notes"] = [
            f"{', '.join(unchecked)}: an earlier version wrote no checksums of blocks, so damage is not found while "
            "the data is read; prepare it again, or give --verify_data=full"
        ]
    return found


def repeated(info: StartupInfo, dataset: str) -> list[str]:
    """Returns a warning for each data set that a run reads more often than `MOST_EPOCHS` times."""
    read = {name: source["epochs"] for name, source in info.get("sources", {}).items()} or {dataset: info["epochs"]}
    return [
        f"the run reads {name} {epochs:.1f} times; more than {MOST_EPOCHS} epochs teach a model little that is new"
        for name, epochs in read.items()
        if epochs > MOST_EPOCHS
    ]


def source_facts(
    config: Config, train: TokenSource | MixedTokens, losses: Mapping[str, float], iterations: int
) -> dict[str, dict[str, float]]:
    """Returns the validation loss of each data set of a mixture, and its share and epochs of the data read so far.

    Args:
        config: the run.
        train: the training data.
        losses: validation loss by the name of the data set.
        iterations: iterations done.
    """
    order = order_of(train, config.model.block_size, config.train.seed)
    samples = iterations * config.train.batch_size * config.train.gradient_accumulation_steps
    return {
        part.name: {"val_loss": losses[part.name], "share": share, "epochs": epochs}
        for part, (share, epochs) in zip(parts_of(train), read_shares(order, samples), strict=True)
    }


def data_record(tokens: TokenSource | MixedTokens) -> list[dict[str, Any]]:
    """Returns what a checkpoint records of the training data: each data set, with the CRC-32 of sampled blocks."""
    return [
        {
            "name": part.name,
            "weight": part.weight,
            "fingerprint": part.source.fingerprint,
            "blocks": [
                [file, begin, part.source.block_sum(file, begin)]
                for file, begin in part.source.sampled_blocks(SAMPLED_BLOCKS)
            ],
        }
        for part in parts_of(tokens)
    ]


def compare_data(saved: Mapping[str, Any], tokens: TokenSource | MixedTokens, where: object) -> None:
    """Compares the training data with what a checkpoint records of it; an older checkpoint records its fingerprint.

    Args:
        saved: state of the checkpoint.
        tokens: the training data of this run.
        where: the checkpoint, for messages.

    Raises:
        DataError: the data is not the same; the message says what changed.
    """
    before, now = saved.get("dataset", []), parts_of(tokens)
    if saved["dataset_fingerprint"] != tokens.fingerprint and before:
        changes = "; ".join(_changes(before, now)) or "the order of the data sets"
        raise DataError(
            f"{where}: the run was trained on other data (saved -> now): {changes}; wanted the same data sets, "
            f"weights and shards; --init_from={where} starts on other data from the weights of the model alone"
        )
    for record, part in zip(before, now, strict=False):
        for file, begin, wanted in record["blocks"]:
            if part.source.block_sum(file, begin) != wanted:
                raise DataError(
                    f"{part.source.path / file}: found other bytes from {begin} on than the run of {where} read: the "
                    "shard was changed or is corrupt; wanted the same data, copied again from its source"
                )


def _changes(before: Sequence[Mapping[str, Any]], now: Sequence[Any]) -> list[str]:
    """Returns a line for each data set that was added, left out, weighted otherwise or made of other shards."""
    old, new = {record["name"]: record for record in before}, {part.name: part for part in now}
    if len(old) == len(new) == 1:  # the same data set may have another name
        new = dict(zip(old, new.values(), strict=True))
    lines = [f"{name} was left out" for name in old if name not in new]
    lines += [f"{name} is new" for name in new if name not in old]
    for name in (name for name in old if name in new):
        fingerprint = new[name].source.fingerprint
        if old[name]["fingerprint"] != fingerprint:
            lines.append(f"{name}: shards {old[name]['fingerprint'][:12]} -> {fingerprint[:12]}")
        if old[name]["weight"] != new[name].weight:
            lines.append(f"{name}: weight {old[name]['weight']:.4g} -> {new[name].weight:.4g}")
    return lines
