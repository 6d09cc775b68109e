"""The public Python API: train a model, load a checkpoint, and generate text.

Example:
    >>> from gptperf import api
    >>> config = api.load_config("configs/tiny.toml", "--max_iters=200", "--out_dir=out/short")
    >>> api.train(config)
    0
    >>> loaded = api.load_model("out/short")
    >>> print(api.generate(loaded, "def ", tokens=100)[0])

`gptperf.data.prepare.prepare` prepares a data set. A mistake of the caller, a missing device or a full disk raises a
subclass of `gptperf.errors.GptperfError`; a command instead prints one line and ends with an exit code. Importing this
module loads no torch.
"""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptperf.config import KEYS, Config, ModelConfig, command_line
from gptperf.errors import CheckpointError, DataError, mistakes, nearest
from gptperf.ops import resolve_ops, without_triton

if TYPE_CHECKING:
    import torch

    from gptperf.checkpoint import Checkpoint
    from gptperf.data.tokenizers import Tokenizer
    from gptperf.model import GPT

__all__ = ["LoadedModel", "checkpoint_path", "generate", "load_config", "load_model", "loaded_from"]
__all__ += ["sampling_problems", "stream", "streams", "train"]

ROWS = 32
"""Most samples that are generated together."""


def load_config(*arguments: str) -> Config:
    """Reads and checks a configuration, written as on the command line of `python -m gptperf.train`.

    Args:
        arguments: TOML files and flags, "CONFIG.toml" and "--key=value". Files are read from left to right, then the
            flags; the last value of a key wins.

    Returns:
        The configuration. `config.sections()` has every value. A value that was changed because of a value of a higher
        layer, such as a warm-up that is longer than the run, gives a Python warning.

    Raises:
        ConfigError: The files or flags are wrong; the message has one line for each mistake.

    Example:
        >>> load_config("configs/tiny.toml", "--n_layer=6").model.n_layer
        6
    """
    resolved = command_line.resolve(arguments, world_size=command_line.world_size())
    for line in resolved.changes.values():
        warnings.warn(line, stacklevel=2)
    return resolved.config


def train(config: Config) -> int:
    """Trains a model, from the start or from the checkpoint that `config.train.init_from` names.

    Checkpoints, logs and plots go to `config.train.out_dir`. The caller must be the main thread, because the function
    handles SIGTERM and Ctrl-C: either one saves a checkpoint and ends the run. Collective: under torchrun every rank
    must call it.

    Args:
        config: What `load_config` returned, or a `Config` made in Python, which is checked when it is made.

    Returns:
        0, or `gptperf.errors.PREEMPTED` where a signal ended the run after its checkpoint was saved.

    Raises:
        GptperfError: The run failed; the class says what was wrong.

    Example:
        >>> train(load_config("configs/tiny.toml", "--max_iters=10", "--device=cpu"))
        0
    """
    from gptperf.training import trainer

    origins = {key: "default" if value == KEYS[key].default else "Python" for key, value in config.flat().items()}
    return trainer.train(config, origins)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A trained model with the tokenizer of its training data."""

    model: "GPT"
    """The model, on `device` and in evaluation mode."""
    tokenizer: "Tokenizer"
    device: "torch.device"
    dtype: "torch.dtype"
    """Compute dtype: the training's dtype on a GPU, float32 on a CPU. Call the model under torch.autocast with it."""
    path: Path
    """Directory of the checkpoint."""
    step: int
    """Number of iterations that the model was trained for."""
    config: Mapping[str, Mapping[str, Any]]
    """Configuration of the training: section -> key -> value."""


def load_model(
    run: str | os.PathLike[str],
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> LoadedModel:
    """Loads a trained model and its tokenizer.

    If the model has components of a plugin, import the modules of the plugin first, so that they are registered.

    Args:
        run: Directory of a run, of its checkpoints, or of one checkpoint.
        checkpoint: Which checkpoint of a run: the newest one, or the one with the lowest validation loss.
        device: "auto" is the GPU where there is one.

    Raises:
        CheckpointError: There is no checkpoint, or it is corrupt.
        ConfigError: The model has a component that is not registered.
        DataError: The checkpoint has no tokenizer, or one that is corrupt or does not fit the model.
        DeviceError: `device` is "cuda", and there is no usable GPU; or a package of the tokenizer is not installed.

    Example:
        >>> loaded = load_model("out/tiny", checkpoint="best", device="cpu")
        >>> ids = torch.tensor([loaded.tokenizer.encode("def ").tolist()])
        >>> with torch.no_grad():
        ...     logits = loaded.model(ids)  # (B, T, padded vocab_size)
    """
    return loaded_from(read_checkpoint(Path(run), checkpoint), device)


def loaded_from(found: "Checkpoint", device: Literal["auto", "cuda", "cpu"] = "auto") -> LoadedModel:
    """Returns the model of a checkpoint that is in memory; `load_model` has the errors.

    Args:
        found: The checkpoint.
        device: "auto" is the GPU where there is one.
    """
    from gptperf.distributed.process import start_process

    tokenizer = saved_tokenizer(found)
    here = start_process(device).device
    model, dtype = build_model(found, here)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=here,
        dtype=dtype,
        path=found.path,
        step=found.step,
        config=found.state["config"],
    )


def read_checkpoint(run: Path, which: Literal["latest", "best"]) -> "Checkpoint":
    """Reads what `load_model` needs of a checkpoint; the arguments are those of `load_model`."""
    from gptperf.checkpoint import load
    from gptperf.training.saved_state import VOCABULARY

    return load(checkpoint_path(run, which), only=("model", "buffers", VOCABULARY))


def build_model(found: "Checkpoint", here: "torch.device") -> tuple["GPT", "torch.dtype"]:
    """Returns the model of a checkpoint in evaluation mode, and its compute dtype."""
    import torch

    from gptperf.distributed.replicated import Replicated
    from gptperf.model import GPT
    from gptperf.training import selftest
    from gptperf.training.build import DTYPES
    from gptperf.training.saved_state import restore_weights

    saved = found.state["config"]
    dtype = DTYPES[saved["system"]["dtype"]] if here.type == "cuda" else torch.float32
    config = ModelConfig(**saved["model"])
    ops = resolve_ops("auto", here.type)
    ops = without_triton(ops, "auto", selftest.broken_ops(ops, config, here, dtype, trains=False))
    with here:
        model = GPT(config, ops).eval()
    restore_weights(found, model, Replicated(model, dtype))
    return model, dtype


def saved_tokenizer(found: "Checkpoint") -> "Tokenizer":
    """Returns the tokenizer of a checkpoint, from the files in it; an earlier version has saved its name alone."""
    from gptperf.data.format import TokenizerInfo
    from gptperf.data.tokenizers import restore_tokenizer
    from gptperf.training.saved_state import saved_vocabulary

    saved = found.state["tokenizer"]
    if saved["name"] == "unknown":
        raise DataError(
            f"{found.path}: found no tokenizer, wanted one; convert the model with --tokenizer=NAME: "
            "python -m gptperf.hugging_face FOLDER --tokenizer=NAME --out_dir=OUT"
        )
    info = TokenizerInfo(**({"vocab_size": 0, "eot": 0} | saved))
    tokenizer = restore_tokenizer(info, saved_vocabulary(found), found.path)
    vocab_size = found.state["config"]["model"]["vocab_size"]
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{found.path}: found tokenizer {tokenizer.name} with {tokenizer.vocab_size:,} ids, and vocab_size = "
            f"{vocab_size:,}; wanted at most as many ids as the model has"
        )
    return tokenizer


def checkpoint_path(run: Path, which: Literal["latest", "best"] = "latest", step: int | None = None) -> Path:
    """Returns the directory of a checkpoint.

    Args:
        run: Directory of a run, of its checkpoints, or of one checkpoint.
        which: Which checkpoint of a run: the newest one, or the one with the lowest validation loss.
        step: Iteration of the checkpoint of a run; None: `which` decides.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    from gptperf.checkpoint import best, checkpoints, latest

    directory = run / "checkpoints" if os.path.isdir(run / "checkpoints") else run
    if os.path.isfile(directory / "MANIFEST.json"):
        return directory
    infos = checkpoints(directory)
    if not infos:
        runs = [str(folder.parent) for folder in run.parent.glob("*/checkpoints")]
        near = nearest(str(run), runs)
        raise CheckpointError(f"{run}: found no checkpoint, wanted the folder of a run or of a checkpoint{near}")
    if step is not None:
        there = {info.step: info.path for info in infos}
        if step not in there:
            close = min(there, key=lambda other: abs(other - step))
            raise CheckpointError(f"{run}: found no checkpoint of step {step}; nearest: --step={close}")
        return there[step]
    found = latest(directory) if which == "latest" else best(directory)
    if found is None:
        raise CheckpointError(f"{run}: found no checkpoint with a validation loss; nearest: --checkpoint=latest")
    return found.path


def generate(
    loaded: LoadedModel,
    prompt: str,
    *,
    tokens: int = 200,
    num_samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 1337,
    stop: str | Sequence[str] = (),
    stop_at_eot: bool = True,
) -> list[str]:
    """Continues a text.

    Args:
        loaded: What `load_model` returned.
        prompt: Text to continue; "" stands for the start of a document.
        tokens: Most tokens to generate in each sample.
        num_samples: Number of samples, which are generated together.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Number of the likeliest tokens to draw from; 0 draws from all.
        top_p: Draws from the fewest of the likeliest tokens whose probabilities add up to this; 1 draws from all.
        seed: Seed of the draws of the first sample; the next samples have the next seeds.
        stop: Strings that end a sample. It ends before the first of them in the continuation.
        stop_at_eot: Whether a sample also ends before the token that ends a document.

    Returns:
        The prompt with its continuation, for each sample. The same arguments give the same samples on the same device.

    Raises:
        ConfigError: A number is out of range, or a stop string is empty.

    Example:
        >>> generate(load_model("out/tiny"), "def ", tokens=20, temperature=0)
        ['def __init__(self, *args']
    """
    keys: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    keys |= {"seed": seed, "stop": stop, "stop_at_eot": stop_at_eot}
    return [prompt + "".join(pieces) for pieces in streams(loaded, [prompt], num_samples=num_samples, **keys)]


def stream(
    loaded: LoadedModel,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 1337,
    stop: str | Sequence[str] = (),
    stop_at_eot: bool = True,
) -> Iterator[str]:
    """Continues a text, and returns the continuation in pieces, each as soon as its characters are complete.

    Args:
        loaded, prompt, tokens, temperature, top_k, top_p, seed, stop, stop_at_eot: As for `generate`.

    Returns:
        The pieces. Joined they are the continuation that `generate` returns after the prompt.

    Raises:
        ConfigError: As for `generate`.

    Example:
        >>> for piece in stream(load_model("out/tiny"), "def ", stop="\\n\\n"):
        ...     print(piece, end="", flush=True)
    """
    keys: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    return streams(loaded, [prompt], **keys, seed=seed, stop=stop, stop_at_eot=stop_at_eot)[0]


def streams(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    tokens: int = 200,
    num_samples: int = 1,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 1337,
    stop: str | Sequence[str] = (),
    stop_at_eot: bool = True,
) -> list[Iterator[str]]:
    """Continues texts together, and returns the continuations in pieces.

    Args:
        loaded, tokens, num_samples, temperature, top_k, top_p, seed, stop, stop_at_eot: As for `generate`.
        prompts: Texts to continue.

    Returns:
        The pieces of each sample, as for `stream`: first all samples of the first prompt, then of the next one. They
        may be read in any order. The samples of a prompt do not depend on the other prompts, up to the rounding of
        matrix products, whose kernels differ with the number of texts on a GPU.

    Raises:
        ConfigError: As for `generate`.
    """
    import torch

    from gptperf.data.text_stream import before_stop, new_text, rows_of
    from gptperf.model import generate as model

    numbers: dict[str, Any] = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    wrong = sampling_problems(num_samples=num_samples, seed=seed, stop=stop, **numbers)
    if wrong:
        raise mistakes(wrong)
    tokenizer = loaded.tokenizer
    stops = [stop] if isinstance(stop, str) else stop
    end = tokenizer.eot if stop_at_eot else None
    sampling = model.Sampling(tokenizer.vocab_size, temperature, top_k, top_p)
    encoded = [tokenizer.encode(prompt).tolist() or [tokenizer.eot] for prompt in prompts]
    samples = [(ids, seed + i) for ids in encoded for i in range(num_samples)]
    found: list[Iterator[str]] = []
    for start in range(0, len(samples), ROWS):
        batch = samples[start : start + ROWS]
        sources = [torch.Generator().manual_seed(one) for _, one in batch]
        steps = model.generate(loaded.model, [ids for ids, _ in batch], tokens, sampling, sources, dtype=loaded.dtype)
        rows = rows_of(steps, len(batch), end)
        found += [before_stop(new_text(tokenizer, ids, row), stops) for (ids, _), row in zip(batch, rows, strict=True)]
    return found


def sampling_problems(
    *, tokens: int, num_samples: int, temperature: float, top_k: int, top_p: float, seed: int, stop: str | Sequence[str]
) -> list[str]:
    """Returns a line for each argument of `generate` that is wrong, so that a command can refuse it at once."""
    wrong = [
        f"{name}: found {value}, wanted {lowest} or more; nearest: {lowest}"
        for name, value, lowest in (
            ("tokens", tokens, 1),
            ("num_samples", num_samples, 1),
            ("temperature", temperature, 0),
            ("top_k", top_k, 0),
        )
        if not value >= lowest
    ]
    if not 0 <= seed < 1 << 63:
        wrong.append(f"seed: found {seed}, wanted 0 to {(1 << 63) - 1}; nearest: {0 if seed < 0 else (1 << 63) - 1}")
    if not 0 < top_p <= 1:
        wrong.append(f"top_p: found {top_p}, wanted a number above 0 and up to 1; nearest: {0.01 if top_p <= 0 else 1}")
    if temperature == math.inf:
        wrong.append("temperature: found inf, wanted a number of 0 or more")
    if "" in ([stop] if isinstance(stop, str) else stop):
        wrong.append("stop: found an empty string, which ends every text at once; wanted a text")
    return wrong
