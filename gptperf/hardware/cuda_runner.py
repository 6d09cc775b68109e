"""Runs the workloads of `gptperf.hardware.workload` on the current CUDA device."""

from collections.abc import Callable, Sequence

import torch

import gptperf.model  # noqa: F401 - registers the built-in attention backends
from gptperf.config import ModelConfig
from gptperf.errors import DeviceError, OutOfMemoryError
from gptperf.formats import byte_text
from gptperf.hardware.ceilings import Machine
from gptperf.hardware.peaks import has_bfloat16
from gptperf.hardware.state import gpu_state
from gptperf.hardware.workload import CausalAttention, Copy, Gemm, Timer, Work
from gptperf.registry import component

__all__ = ["CudaRunner", "current_machine"]

_DEVICE = "cuda"


def current_machine() -> Machine:
    """Returns the current CUDA device, its driver, the versions of the libraries and the power cap.

    Raises:
        DeviceError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise DeviceError(
            "the ceilings are measured on a GPU, and torch sees none; nearest: python -m gptperf.hardware, "
            "which prints the data sheets' peaks"
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    state = gpu_state(f"GPU-{properties.uuid}")
    cudnn = torch.backends.cudnn.version()
    return Machine(
        device=properties.name,
        driver=state.driver,
        versions={"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn)},
        power_cap_w=state.power_cap_w,
        power_default_w=state.power_default_w,
    )


class CudaRunner:
    """Makes operands and timers. GEMMs share three buffers, so that they need only the memory of the largest ones."""

    def __init__(self, model: ModelConfig, works: Sequence[Work], dtype: str):
        """Allocates the operands of the GEMMs.

        Args:
            model: the model whose attention backend runs.
            works: all workloads that `prepare` will get.
            dtype: name of the compute dtype.

        Raises:
            DeviceError: there is no GPU, or it does not have the dtype.
            OutOfMemoryError: the operands do not fit.
        """
        self.here = current_machine()
        if dtype == "bfloat16" and not has_bfloat16(torch.cuda.get_device_capability()):
            raise DeviceError(f"dtype = 'bfloat16': {self.here.device} has no bfloat16 units; nearest: --dtype=float16")
        self.model, self.dtype = model, getattr(torch, dtype)
        gemms = [work for work in works if isinstance(work, Gemm)]
        sizes = [max(g.m * g.k for g in gemms), max(g.k * g.n for g in gemms), max(g.m * g.n for g in gemms)]
        try:
            self.a, self.b, self.c = (self._random(size) for size in sizes)
        except torch.OutOfMemoryError as error:
            needed = byte_text(sum(sizes) * self.dtype.itemsize)
            raise OutOfMemoryError(f"the GEMMs' operands need {needed}; lower --batch_size") from error

    def machine(self) -> Machine:
        """Returns the device that runs the workloads."""
        return self.here

    def prepare(self, work: Work) -> Timer:
        """Makes the operands of a workload, and returns its timer.

        Raises:
            OutOfMemoryError: the operands do not fit.
        """
        try:
            if isinstance(work, Copy):
                timers = [_timer(call) for call in self._copies(work)]
                return min(timers, key=lambda timer: (timer(1), timer(20))[1])  # the first call loads modules
            return _timer(self._gemm(work) if isinstance(work, Gemm) else self._attention(work))
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{work.name} does not fit on this GPU; lower --batch_size") from error

    def _random(self, *shape: int, requires_grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, device=_DEVICE, dtype=self.dtype, requires_grad=requires_grad)

    def _gemm(self, gemm: Gemm) -> Callable[[], object]:
        m, n, k = gemm.m, gemm.n, gemm.k
        a, b, c = self.a[: m * k], self.b[: k * n], self.c[: m * n].view(m, n)
        a = a.view(k, m).t() if gemm.kind == "wgrad" else a.view(m, k)
        b = b.view(n, k).t() if gemm.kind == "forward" else b.view(k, n)
        return lambda: torch.mm(a, b, out=c)

    def _attention(self, attention: CausalAttention) -> Callable[[], object]:
        """Returns a call of the model's own backend, without dropout. The forward pass keeps what backward needs."""
        backend = component("attention_backend", self.model.attention_backend)(self.model).eval()
        rows, D = (attention.batch_size, attention.tokens), attention.head_dim
        heads = (attention.n_head, attention.kv_heads, attention.kv_heads)
        q, k, v = (self._random(*rows, H, D, requires_grad=True) for H in heads)
        if attention.name == "attention_forward":
            return lambda: backend(q, k, v)
        y = backend(q, k, v)
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)

    def _copies(self, copy: Copy) -> list[Callable[[], object]]:
        """Returns three ways to copy: a memcpy is sometimes a third slower than usual, as long as its buffers exist."""
        source = self._random(copy.buffer_bytes // self.dtype.itemsize)
        first, second = torch.empty_like(source), torch.empty_like(source)
        return [lambda: first.copy_(source), lambda: second.copy_(source), lambda: torch.neg(source, out=first)]


def _timer(call: Callable[[], object]) -> Timer:
    def window(launches: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return window
