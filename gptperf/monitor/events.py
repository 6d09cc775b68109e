"""The fields of a run's log, declared once: the events of the journal, and the JSON file assembled from them.

A new field is declared here and filled where its record is built (`gptperf.training.reporting` for most).
"""

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
    "StartupInfo",
    "Summary",
]

SCHEMA_VERSION = 1
"""Version of `RunLog`; an additional field does not change it."""


class StartupInfo(TypedDict, total=False):
    """Facts about a run, printed at its start and stored in its log. What is unknown is absent or None."""

    total_parameters: int
    trainable_parameters: int
    non_embedding_parameters: int
    """All parameters except the position table."""
    n_layer: int
    n_embd: int
    n_head: int
    kv_heads: int
    block_size: int
    vocab_size: int
    components: dict[str, str | bool | float]
    """Component kind -> what was built: normalization, position_encoding, ffn_type, bias, ..."""
    kernels: dict[str, str]
    """Op -> eager or triton."""
    kernel_reasons: dict[str, str]
    """Op -> why it is not triton."""
    batch_size: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    """Sequences per iteration: batch_size * gradient_accumulation_steps."""
    tokens_per_iter: int
    max_iters: int
    learning_rate: float
    min_lr: float
    lr_schedule: str
    warmup_iters: int
    weight_decay: float
    grad_clip: float
    dataset: str
    tokenizer: str
    train_tokens: int
    val_tokens: int
    device: str
    """Name of the GPU or CPU."""
    num_gpus: int
    """0 on a CPU."""
    memory_gb: float | None
    """Memory of one GPU."""
    dtype: str
    parallelism: str
    """single process, DDP, ..."""
    attention_backend: str
    """Backend of the attention, with the reason."""
    compile: str
    """model, block, or off with the reason."""
    versions: dict[str, str]
    """Versions of gptperf, torch and python."""
    hardware_peak_tflops: float
    """Peak of one GPU. This field and the next ones come from `gptperf.monitor.throughput.theoretical`."""
    peak_basis: str
    peak_source: str
    peak_hint: str
    """Why there is no peak, from `gptperf.hardware.no_peak_hint`; present only without one."""
    flops_per_token: float
    convention: str
    attention_ffn_ratio: float
    expected_tokens_per_sec: float
    plan: dict[str, Any]
    """The plan of the run, from `gptperf.plan.plan_record`."""
    notes: list[str]
    """What is allowed but may surprise, one line each."""


class Start(TypedDict, total=False):
    """Event `start`: what is about to run."""

    config: Required[Mapping[str, Any]]
    """The value of every key, and under `origins` where each comes from (default, preset, file, command line)."""
    startup_info: Required[Mapping[str, Any]]
    """Parameters, FLOPs, hardware, versions, resolved implementations: a `StartupInfo`."""


class Mfu(TypedDict, total=False):
    """Speed of one iteration. What is not known (no peak for this device) is absent."""

    mfu_percent: float
    achieved_tflops: float
    """Achieved by one GPU, as the peak is that of one GPU."""
    hardware_peak_tflops: float
    tokens_per_sec: float
    """Tokens per second of the whole job."""
    flops_per_token: float
    convention: str
    """Name of the convention by which `flops_per_token` counts."""
    peak_basis: str
    """"dense" or "sparse"."""
    hfu_percent: float
    of_ceiling_percent: float
    """Share of the speed that was measured for this card on the model's matmuls alone."""


class Memory(TypedDict, total=False):
    """Memory in GB of 1e9 bytes, now and its peak since the process began: the first three on a GPU, the others on a
    CPU."""

    allocated_gb: float
    peak_gb: float
    reserved_gb: float
    rss_gb: float
    peak_rss_gb: float


class Gradients(TypedDict, total=False):
    """Figures of the gradient before clipping."""

    global_norm: float | None
    grad_mean: float | None
    grad_std: float | None
    grad_min: float | None
    grad_max: float | None
    zero_share: float | None
    """Share of the elements that are zero, 0..1."""
    non_finite: int
    """Elements that are infinite or NaN."""
    layer_norms: Mapping[str, float | None]
    """Norm by layer: "embedding", "0", "1", ... for the blocks, "head". Their 2-norm is the global norm."""
    component_norms: Mapping[str, float | None]
    """Norm by component: "attention", "ffn", "norm", "embedding", "lm_head". Their 2-norm is the global norm."""
    histogram: Mapping[str, list[float]]
    """"log2_edges" of the magnitudes, and "shares" of the elements below the first edge, between edges, and above the
    last one."""
    update_ratios: Mapping[str, float | None]
    """Norm of the step's update divided by that of the weights, by component."""


class Stability(TypedDict, total=False):
    """Statistics of the losses of the last logged iterations."""

    window: Required[int]
    """Number of these losses."""
    loss_mean: float | None
    loss_variance: float | None
    spike: bool
    """This loss is far above those before it."""
    plateau: bool
    """The mean of the window's second half is not below that of the first."""
    non_finite: int
    """Steps skipped so far because a gradient was not finite."""


class Iteration(TypedDict, total=False):
    """Event `iteration`: one logged optimizer step."""

    iter: Required[int]
    loss: Required[float | None]
    """Mean over the tokens of the step, natural logarithm."""
    time_ms: Required[float]
    """Mean time of the iterations since the last entry, without evaluation, saving and compilation. In the first entry
    of a process: the time of that one iteration, with its compilation."""
    data_wait_ms: float
    """Part of `time_ms` that was spent waiting for the loader."""
    lr: float
    tokens: int
    """Tokens trained on so far."""
    mfu: Mfu | Mapping[str, Any]
    """Empty in the first entry of a process."""
    memory: Memory | Mapping[str, Any]
    gradients: Gradients
    stability: Stability
    loss_scale: float
    """Scale of the loss in float16."""


class Eval(TypedDict, total=False):
    """Event `eval`: one pass over the fixed validation batches."""

    iter: Required[int]
    val_loss: Required[float | None]
    best_val_loss: float | None
    time_ms: float


class Checkpoint(TypedDict, total=False):
    """Event `checkpoint`: a checkpoint that is complete on disk."""

    iter: Required[int]
    path: Required[str]
    val_loss: float | None
    """Validation loss of this iteration, if it was evaluated."""
    time_ms: float
    """From the start of the save to the last byte on disk."""
    stall_ms: float
    """How long training waited for the save."""


class Profile(TypedDict, total=False):
    """Event `profile`: some iterations that were recorded."""

    iter: Required[int]
    """The last of the recorded iterations."""
    trace: Required[str]
    """File to open in Perfetto."""
    steps: int
    step_ms: float
    parts_ms: Mapping[str, float]
    """Time of a step by the parts of `gptperf.monitor.waterfall`."""
    waterfall: Mapping[str, float] | None
    """Points of MFU that each part costs; None without a peak."""
    mfu_percent: float | None
    kernels: Sequence[Mapping[str, Any]]
    """The kernels that take most time: name, part, ms per step, calls per step."""


class Message(TypedDict, total=False):
    """Event `message`: a line for the user."""

    level: Required[str]
    """"info", "warning" or "error"."""
    text: Required[str]
    iter: int
    time: str
    """When the line was logged; the journal adds it."""


class Resume(TypedDict):
    """Event `resume`: earlier entries with a greater `iter` no longer count."""

    iter: int
    time: str


class Summary(TypedDict, total=False):
    """Event `summary`: how a run ended."""

    iterations: int
    val_loss: float | None
    best_val_loss: float | None
    best_iter: int | None
    trigram_loss: float
    """Loss of a trigram model of the same data, which a language model has to beat."""
    tokens_per_sec: float | None
    mfu_percent: float | None
    wall_time_s: float
    sample: str
    """Text that the model generated."""
    log_path: str
    checkpoint_dir: str
    plan: dict[str, float]
    """Planned memory and speed beside the measured ones."""
    stopped: str
    """Why the run ended before max_iters."""


EVENTS = {
    "start": Start,
    "iteration": Iteration,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "profile": Profile,
    "message": Message,
    "resume": Resume,
}
"""The class of each event whose fields are checked. The event `summary` takes any fields."""


class RunLog(TypedDict):
    """The log that `assemble` returns and `<run_name>.json` holds."""

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
    """Lines that could not be read: the torn last line of a killed run, or what a full disk cut off."""
    ignored_events: int
    """Events of a type that this gptperf does not know."""
