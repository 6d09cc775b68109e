"""The linear layers that run in 8 bits (`--matmul_dtype=fp8`): which ones, their scales, and what is counted of them.

A tensor's scale comes from its largest absolute value in the last iterations (`HISTORY`). `collect` takes the
statistics of a micro-batch, which backward leaves as the gradient of each layer's probe; `update` combines them over
micro-batches and ranks once an iteration, and writes the next scales. So scales are the same on every rank, do not
depend on the number of ranks, and stay what they are during an iteration. A scale of 0 lets the kernels use the largest
value of the tensor itself: in the first iteration of a run, for a tensor that was never finite or above 0, and always
with `--fp8_scaling=current`. Everything is in fixed memory on the device, and nothing is decided on the host, so that
CUDA graphs can replay it.

For the first `HISTORY` iterations of a tensor, its scale leaves room for as much growth as in the last iteration. While
the learning rate rises linearly, the largest value of a weight that begins as 0, and of the gradients that it
multiplies, grows by 3, 2, 1.67, ... times from one iteration to the next; a scale without more room than
`gptperf.kernels.float8.scale_of` leaves would clamp them beyond 1.75 times.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from gptperf.config import Config, SystemConfig
from gptperf.distributed.process import Process
from gptperf.errors import ConfigError, DeviceError, nearest
from gptperf.flops.float8 import skips
from gptperf.kernels import float8_reference
from gptperf.kernels.float8 import E4M3, STATISTICS, scale_of
from gptperf.kernels.float8_linear import GRADIENTS, OPERANDS, Float8State
from gptperf.model import GPT
from gptperf.model.linear import Linear
from gptperf.monitor.events import Float8

__all__ = ["HISTORY", "Float8Layers", "check_float8", "make_float8"]

HISTORY = 16
"""Iterations whose largest values decide a scale."""
_MOST_GROWTH = 4.0
"""Most growth of a largest value from one iteration to the next for which a scale leaves room."""
_OLDEST_CAPABILITY = (8, 9)
_MULTIPLE = 16
_STALE = 2.0**-6
"""A scale is stale if the largest value of a tensor is below this share of what the scale leaves room for: values that
could be represented become 0."""
_SATURATES = 1e-3
"""Share of clamped elements from which a layer is named in a warning."""
_TOLERANCE = 0.01


def check_float8(config: Config, device: torch.device) -> None:
    """Checks that this device and the sizes of this model can run in 8 bits, where the configuration asks for it.

    Raises:
        DeviceError: the device has no 8-bit tensor cores.
        ConfigError: a size is not a multiple of 16, or `fp8_skip` names no layer.
    """
    if config.system.matmul_dtype != "fp8":
        return
    nearest_value = "nearest: --matmul_dtype=dtype, which computes in bfloat16"
    if device.type != "cuda" and config.system.kernels != "eager":
        raise DeviceError(
            f"matmul_dtype = 'fp8' needs a GPU, found {device.type}; {nearest_value}; --kernels=eager emulates it"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        raise DeviceError(f"matmul_dtype = 'fp8' needs sm_89 or higher, found {name}; {nearest_value}")
    tokens = config.train.batch_size * config.model.block_size
    if tokens % _MULTIPLE:
        raise ConfigError(
            f"batch_size, block_size: matmul_dtype = 'fp8' needs a multiple of {_MULTIPLE} tokens per micro-batch, "
            f"found {tokens}; {nearest_value}"
        )
    with torch.device("meta"):  # for the shapes of its weights
        _layers(GPT(config.model), config.system)


class Float8Layers:
    """The layers of a model that run in 8 bits.

    Args:
        model: the model, whose linear layers get their `Float8State`.
        config: configuration of the run; `check_float8` has accepted it.
        triton: whether Triton's kernels quantise, else eager PyTorch.

    Raises:
        ConfigError: a width is not a multiple of 16, or `fp8_skip` names no layer.
    """

    def __init__(self, model: GPT, config: Config, *, triton: bool):
        layers = _layers(model, config.system)
        device, count = next(model.parameters()).device, len(layers)
        self.names = list(layers)
        self.delayed = config.system.fp8_scaling == "delayed"
        shape = (count, len(OPERANDS))
        self.history = torch.zeros(*shape, HISTORY, device=device)
        """Largest value of each tensor in each of the last iterations, the newest first; 0 where there was none."""
        self._scales = torch.zeros(*shape, 4, device=device)  # each at a multiple of 16 bytes
        self._seen = torch.zeros(*shape, len(STATISTICS), device=device)
        """Statistics of the current iteration."""
        self._counts = torch.zeros(*shape, len(STATISTICS), device=device)
        """Since the last log line: elements that were clamped, that became 0, that were counted; iterations with a
        stale scale."""
        self._tops = torch.tensor([E4M3.top, E4M3.top, GRADIENTS.top], dtype=torch.int32, device=device)
        self._largest = torch.tensor([E4M3.largest, E4M3.largest, GRADIENTS.largest], device=device)
        self._states: list[Float8State] = []
        self._skip = config.system.fp8_skip
        self._warned: set[str] = set()
        for i, (name, layer) in enumerate(layers.items()):
            x, weight, dy = self._scales[i].unbind()
            keeps = name.endswith("attention.out")  # attention keeps its output for its own backward
            probe = Float8State.probe_like(x)
            layer.float8 = Float8State((x, weight, dy), probe, config.system.fp8_level, keeps, triton)
            self._states.append(layer.float8)

    def start_step(self) -> None:
        """Forgets the statistics of an iteration that was dropped."""
        self._seen.zero_()

    def start_micro_batch(self) -> None:
        """Forgets the statistics of a micro-batch whose backward did not end, as a CUDA graph could not record it."""
        for state in self._states:
            state.probe.grad = None

    @torch.no_grad()
    def collect(self) -> None:
        """Takes the statistics of the micro-batch whose backward has ended."""
        grads = [(state.probe, state.probe.grad) for state in self._states]
        parts = torch.stack([torch.zeros_like(probe) if grad is None else grad for probe, grad in grads])
        torch.maximum(self._seen[..., 0], parts[:, :, 0].amax(-1), out=self._seen[..., 0])
        self._seen[..., 1:] += parts[:, :, 1:].sum(-1)

    @torch.no_grad()
    def update(self, process: Process) -> None:
        """Ends an iteration: combines the statistics of all ranks and writes the next scales. Collective.

        A count is the largest of all ranks, so that one small reduction is enough.
        """
        amax = self._seen[..., 0]
        amax.copy_(torch.where(amax.isfinite(), amax, 0.0))  # a step that is not finite says nothing about the next
        if process.world_size > 1:
            with process.progress.collective("all_reduce of the fp8 statistics"):
                dist.all_reduce(self._seen, op=dist.ReduceOp.MAX)
        scale = self._scales[..., 0]
        stale = (amax > 0) & (amax * scale < _STALE * self._largest) & (scale > 0)
        self._counts += torch.cat([self._seen[..., 1:], stale[..., None].float()], -1)
        self.history.copy_(torch.cat([amax[..., None], self.history[..., :-1]], -1))
        self._write_scales()
        self._seen.zero_()

    def _write_scales(self) -> None:
        if self.delayed:
            newest, before, oldest = self.history[..., 0], self.history[..., 1], self.history[..., -1]
            # Without a value before, the growth is not known: the most is assumed.
            growth = torch.where(before > 0, newest / before, _MOST_GROWTH).clamp(1.0, _MOST_GROWTH)
            amax = self.history.amax(-1) * torch.where(oldest > 0, 1.0, growth)
            self._scales[..., 0].copy_(torch.where(amax > 0, scale_of(amax, self._tops), 0.0))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the state that a checkpoint saves, by layer; it is the same on every rank."""
        return dict(zip(self.names, self.history, strict=True))

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned. A layer that was not saved, as it was not in fp8, starts without a scale.

        Raises:
            ValueError: a tensor has another shape.
        """
        for name, history in zip(self.names, self.history, strict=True):
            found = saved.get(name)
            if found is not None and found.shape != history.shape:
                raise ValueError(f"float8: found {tuple(found.shape)} for {name}, wanted {tuple(history.shape)}")
            history.zero_() if found is None else history.copy_(found)
        self._write_scales()

    def record(self) -> tuple[Float8, str | None]:
        """Returns what was counted since the last log line, and a warning that names a layer which saturates, or None.

        Waits for the device.
        """
        counts = self._counts.double().cpu()
        self._counts.zero_()
        counted = counts[..., 2].clamp(min=1)
        saturated, flushed = counts[..., 0] / counted, counts[..., 1] / counted
        worst = dict(zip(self.names, saturated.amax(1).tolist(), strict=True))
        record: Float8 = {
            "saturated_share": (counts[..., 0].sum() / counted.sum()).item(),
            "flushed_share": (counts[..., 1].sum() / counted.sum()).item(),
            "stale_scales": (counts[..., 3] > 0).sum().item(),
            "saturated_layers": {name: share for name, share in worst.items() if share > 0},
            "flushed_layers": {
                name: share for name, share in zip(self.names, flushed.amax(1).tolist(), strict=True) if share > 0
            },
        }
        name = max(worst, key=lambda layer: worst[layer])
        if worst[name] <= _SATURATES or name in self._warned:
            return record, None
        self._warned.add(name)
        operand = OPERANDS[int(saturated[self.names.index(name)].argmax())]
        return record, (
            f"fp8: {name} saturates: {worst[name]:.2%} of the elements of its {operand} were above the largest number "
            f"of the scale and were clamped; --fp8_skip={_with(self._skip, name)} keeps it in bfloat16"
        )


def _with(fp8_skip: str, *more: str) -> str:
    """Returns the value of `fp8_skip` that names more layers."""
    return ",".join(filter(None, [fp8_skip, *more]))


def _layers(model: GPT, system: SystemConfig) -> dict[str, Linear]:
    """Returns the linear layers of the blocks that run in 8 bits, by name."""
    modules = dict(model.named_modules())
    found = {name: x for name, x in modules.items() if isinstance(x, Linear) and name.startswith("blocks.")}
    for part in filter(None, system.fp8_skip.split(",")):
        if part.startswith("blocks.") and not any(f"{name}.".startswith(f"{part}.") for name in found):
            raise ConfigError(f"fp8_skip: found {part!r}, wanted a layer{nearest(part, found)}")
    chosen = {name: x for name, x in found.items() if not skips(system.fp8_skip, name, len(model.blocks))}
    wrong = [name for name, x in chosen.items() if any(size % _MULTIPLE for size in x.weight.shape)]
    if wrong:
        kinds = {name.split(".")[2] for name in wrong}
        if kinds < {name.split(".")[2] for name in chosen}:
            remedy = f"--fp8_skip={_with(system.fp8_skip, *sorted(kinds))}"
        else:
            remedy = "--matmul_dtype=dtype"
        raise ConfigError(
            f"{wrong[0]}: matmul_dtype = 'fp8' needs widths that are multiples of {_MULTIPLE}, found a weight "
            f"{tuple(chosen[wrong[0]].weight.shape)}; nearest: {remedy}"
        )
    return chosen


def make_float8(model: GPT, config: Config, device: torch.device, *, triton: bool) -> Float8Layers | None:
    """Sets the layers of a model that run in 8 bits, and returns them; None where the configuration has no fp8.

    Args:
        model: the model on its device.
        config: configuration of the run; `check_float8` has accepted it.
        device: device of this rank.
        triton: whether Triton's kernels run here.

    Raises:
        ConfigError: see `Float8Layers`.
        DeviceError: the kernels do not work on this GPU.
    """
    if config.system.matmul_dtype != "fp8":
        return None
    problem = _broken_kernel(device) if triton else None
    if problem is not None:
        raise DeviceError(f"matmul_dtype = 'fp8': {problem}; nearest: --matmul_dtype=dtype, which computes in bfloat16")
    layers = Float8Layers(model, config, triton=triton)
    return layers if layers.names else None


def _broken_kernel(device: torch.device) -> str | None:
    """Runs the kernel that quantises on a few rows, and returns what is wrong with it, or None."""
    from gptperf.kernels.quantize import quantize  # not above, because eager PyTorch runs without triton

    x = torch.linspace(-3, 3, 96 * 64, device=device).view(96, 64).bfloat16()
    scale = torch.zeros(4, device=device)
    ours, wanted = (op(x, scale, columns=True) for op in (quantize, float8_reference.quantize))
    off = [(a.float() - b.float()).abs().max().item() for a, b in zip(ours[:3], wanted[:3], strict=True)]
    return None if max(off) <= _TOLERANCE else f"the kernel that quantises is off eager PyTorch by {max(off):.2g}"
