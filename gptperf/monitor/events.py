"""The fields of a run's log, told once: the events of the journal and the JSON file assembled from them."""

from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

__all__ = [
    "EVENTS",
    "SCHEMA_VERSION",
    "Checkpoint",
    "Eval",
    "Gradients",
    "Iteration",
    "Memory",
    "Message",
    "Mfu",
    "Profile",
    "Resume",
    "RunLog",
    "Stability",
    "Start",
]

SCHEMA_VERSION = 1
"""Of `RunLog`; a field more does not change it."""


class Start(TypedDict, total=False):
    """Event `start`: what is about to run."""

    config: Required[Mapping[str, Any]]
    """Every key's value, and under `origins` where each comes from (default, preset, file, command line)."""
    startup_info: Required[Mapping[str, Any]]
    """Parameters, FLOPs, hardware, versions, resolved implementations."""


class Mfu(TypedDict, total=False):
    """Speed of one iteration; what is not known (no peak for this device) is absent."""

    mfu_percent: float
    achieved_tflops: float
    """Of one GPU, as is the peak."""
    hardware_peak_tflops: float
    tokens_per_sec: float
    """Of the whole job."""
    flops_per_token: float
    convention: str
    """How `flops_per_token` counts, by the name of the formula."""
    peak_basis: str
    """"dense" or "sparse"."""
    hfu_percent: float
    of_ceiling_percent: float
    """Of what the card was measured to reach on the model's matmuls alone."""


class Memory(TypedDict, total=False):
    """GB of 1e9 bytes now, peaks since the process began: the first three on a GPU, the others on a CPU."""

    allocated_gb: float
    peak_gb: float
    reserved_gb: float
    rss_gb: float
    peak_rss_gb: float


class Gradients(TypedDict, total=False):
    """Health of the gradient before clipping."""

    global_norm: float | None
    grad_mean: float | None
    grad_std: float | None
    grad_min: float | None
    grad_max: float | None
    zero_share: float | None
    """Of the elements, 0..1."""
    non_finite: int
    """Elements that are infinite or no number."""
    layer_norms: Mapping[str, float | None]
    """By "embedding", "0", "1", ... for the blocks, "head"; together they are the global norm."""
    component_norms: Mapping[str, float | None]
    """By "attention", "ffn", "norm", "embedding", "lm_head"; the same sum."""
    histogram: Mapping[str, list[float]]
    """"log2_edges" of the magnitudes, and "shares" of the elements below the first, between them, above the last."""
    update_ratios: Mapping[str, float | None]
    """Norm of the step's update over that of the weights, by component."""


class Stability(TypedDict, total=False):
    """The losses of the last logged iterations."""

    window: Required[int]
    """How many they are."""
    loss_mean: float | None
    loss_variance: float | None
    spike: bool
    """This loss is far above those before it."""
    plateau: bool
    """The mean of the window's second half is not below that of the first."""
    non_finite: int
    """Steps left out so far because a gradient was not finite."""


class Iteration(TypedDict, total=False):
    """Event `iteration`: one logged optimizer step."""

    iter: Required[int]
    loss: Required[float | None]
    """Mean over the tokens of the step, natural logarithm."""
    time_ms: Required[float]
    """Mean over the iterations since the last entry, without evaluation, saving and compilation; of the first entry of
    a process that one iteration, with its compilation."""
    data_wait_ms: float
    """Of `time_ms`, waiting for the loader."""
    lr: float
    tokens: int
    """Tokens trained on so far."""
    mfu: Mfu | Mapping[str, Any]
    """Empty in the first entry of a process."""
    memory: Memory | Mapping[str, Any]
    gradients: Gradients
    stability: Stability
    loss_scale: float
    """Of fp16."""


class Eval(TypedDict, total=False):
    """Event `eval`: one pass over the fixed validation batches."""

    iter: Required[int]
    val_loss: Required[float | None]
    best_val_loss: float | None
    time_ms: float


class Checkpoint(TypedDict, total=False):
    """Event `checkpoint`: one that is complete on disk."""

    iter: Required[int]
    path: Required[str]
    val_loss: float | None
    """Of this iteration, where it was evaluated."""
    time_ms: float


class Profile(TypedDict, total=False):
    """Event `profile`: steps that were recorded."""

    iter: Required[int]
    """The last of them."""
    trace: Required[str]
    """File for Perfetto."""
    steps: int
    step_ms: float
    parts_ms: Mapping[str, float]
    """Of a step, by the parts of `gptperf.monitor.waterfall`."""
    waterfall: Mapping[str, float] | None
    """Points of MFU that each part costs; None without a peak."""
    mfu_percent: float | None
    kernels: Sequence[Mapping[str, Any]]
    """The longest: name, part, ms a step, calls a step."""


class Message(TypedDict, total=False):
    """Event `message`: a line that the user saw, or should have."""

    level: Required[str]
    """"info", "warning" or "error"."""
    text: Required[str]
    iter: int


class Resume(TypedDict):
    """Event `resume`: entries of a greater `iter` written before it no longer count."""

    iter: int
    time: str


EVENTS = {
    "start": Start,
    "iteration": Iteration,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "profile": Profile,
    "message": Message,
    "resume": Resume,
}
"""The class of each event; `summary` has none, the trainer says what it likes."""


class RunLog(TypedDict):
    """What `assemble` returns and `<run_name>.json` holds."""

    schema_version: int
    run_name: str
    start_time: str
    config: dict[str, Any]
    startup_info: dict[str, Any]
    training_iterations: list[dict[str, Any]]
    eval_steps: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    profiles: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    resumes: list[dict[str, Any]]
    summary: dict[str, Any]
    damaged_lines: int
    """Lines that could not be read: the torn end of a killed run, or what a full disk cut off."""
    ignored_events: int
    """Events of types that this gptperf does not know."""
