"""Finds the row of the GPU table that a plan is for."""

from gptperf import hardware
from gptperf.errors import ConfigError
from gptperf.hardware import Gpu

__all__ = ["find_gpu", "own_gpu"]


def own_gpu() -> Gpu | None:
    """Returns the row of this machine's first GPU, or None if there is no GPU or the table does not have it."""
    states, _ = hardware.gpu_states()
    return hardware.match_gpu(states[0].name, states[0].memory_gb) if states and states[0].name else None


def find_gpu(name: str | None) -> Gpu:
    """Returns the row of the table that a user names.

    Args:
        name: a row's name or words of it ("H200", "a100 sxm 80"), or a device's own name; None: this machine's GPU.

    Raises:
        ConfigError: no row matches, or several rows match; the message lists the candidates.
    """
    if name is None:
        own = own_gpu()
        if own is None:
            raise ConfigError(
                "command line: gpu: found no --gpu and no known GPU in this machine; wanted --gpu=NAME, such as "
                "--gpu=H100"
            )
        return own
    exact = hardware.match_gpu(name)
    if exact is not None:
        return exact
    words = name.lower().replace("-", " ").split()
    rows = [gpu for gpu in hardware.GPUS if gpu.name.lower().split()[: len(words)] == words]
    rows = rows or [gpu for gpu in hardware.GPUS if all(word in gpu.name.lower().split() for word in words)]
    same = [gpu for gpu in rows if gpu.name.lower().split() == words]
    if len(same or rows) == 1:
        return (same or rows)[0]
    known = ", ".join(gpu.name for gpu in rows or hardware.GPUS)
    raise ConfigError(f"command line: gpu: found {name!r}, wanted one of {known}")
