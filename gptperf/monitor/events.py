"""Declares the fields of a run's log: the events of the journal, and the JSON file that is assembled from them.

A new field is declared here and filled where its record is built (`gptperf.training.reporting` for most).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

__all__ = [
    "EVENTS",
    "SCHEMA_VERSION",
    "Checkpoint",
    "Eval",
    "Float8",
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
    """Facts about a run, printed at its start and stored in its log. Unknown facts are absent or None."""

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
    """Op -> the reason why it does not use triton."""
    batch_size: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    """Number of sequences per iteration: batch_size * gradient_accumulation_steps."""
    tokens_per_iter: int
    max_iters: int
    parent: dict[str, str | int]
    """The run that a fork continues: its name (run), the checkpoint (path) and its iteration (step)."""
    optimizer: str
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
    dataset_fingerprint: str
    """Fingerprint of the training data."""
    epochs: float
    """How often the whole run reads the training data; of a mixture, the data set that is read most often."""
    sources: dict[str, dict[str, float]]
    """Data set of a mixture -> weight, train_tokens, val_tokens, and epochs over the whole run."""
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
    """Backend of the attention, with details of its choice."""
    compile: str
    """model, block, or off with the reason."""
    cuda_graph: str
    """on, or off with the reason."""
    versions: dict[str, str]
    """Versions of gptperf, torch and python."""
    hardware_peak_tflops: float
    """Peak of one GPU. This field and the next ones come from `gptperf.monitor.throughput.theoretical`."""
    peak_dtype: str
    peak_basis: str
    peak_source: str
    peak_hint: str
    """The reason why there is no peak, from `gptperf.hardware.no_peak_hint`; present only without a peak."""
    flops_per_token: float
    convention: str
    attention_ffn_ratio: float
    expected_tokens_per_sec: float
    expected_iteration_s: float
    """Estimated seconds of an iteration: on a CPU from a short measurement before the run, on a GPU from the plan."""
    expected_total_s: float
    """Estimated seconds of the remaining iterations with their evaluations and the sample, without compilation."""
    plan: dict[str, Any]
    """The plan of the run, from `gptperf.plan.plan_record`."""
    notes: list[str]
    """Properties of the run that are allowed but may surprise, one line each."""


class Start(TypedDict, total=False):
    """Event `start`: the configuration of a run, and the facts about it."""

    config: Required[Mapping[str, Any]]
    """The value of every key, and under `origins` the source of each value (default, preset, file, command line)."""
    startup_info: Required[Mapping[str, Any]]
    """Parameters, FLOPs, hardware, versions, resolved implementations: a `StartupInfo`."""


class Mfu(TypedDict, total=False):
    """Speed of one iteration. Unknown figures are absent, such as the MFU on a device without a known peak."""

    mfu_percent: float
    """FLOPs of the model relative to the peak of `peak_dtype`, also where matmuls run in fp8."""
    blended_mfu_percent: float
    """MFU in which each matmul counts relative to the peak of its own dtype; only with fp8."""
    achieved_tflops: float
    """TFLOP/s achieved by one GPU, comparable with the peak, which is that of one GPU too."""
    hardware_peak_tflops: float
    tokens_per_sec: float
    """Tokens per second of the whole job."""
    flops_per_token: float
    convention: str
    """Name of the convention by which `flops_per_token` counts."""
    peak_dtype: str
    peak_basis: str
    """"dense", "sparse", or "given" by the user."""
    hfu_percent: float
    of_ceiling_percent: float
    """Achieved speed as a percentage of the speed measured for this card on the model's matmuls alone."""


class Memory(TypedDict, total=False):
    """Memory of this process in GB (1e9 bytes), now and at its peak since the start. The first three fields are for a
    GPU, the others for a CPU."""

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
    """Number of elements that are infinite or NaN."""
    layer_norms: Mapping[str, float | None]
    """Norm by layer: "embedding", "0", "1", ... for the blocks, "head". Their 2-norm is the global norm."""
    component_norms: Mapping[str, float | None]
    """Norm by component: "attention", "ffn", "norm", "embedding", "lm_head". Their 2-norm is the global norm."""
    histogram: Mapping[str, list[float]]
    """"log2_edges" are base-2 logarithms of magnitudes. "shares" are the shares of the elements below the first edge,
    between each two edges, and above the last edge."""
    update_ratios: Mapping[str, float | None]
    """Norm of the step's update divided by the norm of the weights, by component."""


class Stability(TypedDict, total=False):
    """Statistics over a window: the losses of the last logged iterations."""

    window: Required[int]
    """Number of losses in the window."""
    loss_mean: float | None
    loss_variance: float | None
    spike: bool
    """Whether this loss is far above those before it."""
    plateau: bool
    """Whether the mean of the window's second half is not clearly below the mean of the first half."""
    non_finite: int
    """Number of steps skipped so far because a gradient was not finite."""


class Float8(TypedDict, total=False):
    """What was counted in a sample of the tensors that fp8 quantises, since the last entry. A count is the largest of
    all ranks."""

    saturated_share: float
    """Share of the elements that were above the largest number of their scale, and were clamped, 0..1."""
    flushed_share: float
    """Share of the elements that became 0, 0..1."""
    stale_scales: float
    """Number of tensors whose values were far below what their scale leaves room for."""
    saturated_layers: Mapping[str, float]
    """Layer -> share of clamped elements, of the tensor with most of them; layers without any are left out."""
    flushed_layers: Mapping[str, float]
    """Layer -> share of elements that became 0, of the tensor with most of them; layers without any are left out."""


class Iteration(TypedDict, total=False):
    """Event `iteration`: one logged optimizer step."""

    iter: Required[int]
    loss: Required[float | None]
    """Mean loss over the tokens of the step, in nats."""
    time_ms: Required[float]
    """Mean time of the iterations since the last entry, without evaluation, saving and compilation. In the first entry
    of a process it is the time of that iteration, including compilation."""
    data_wait_ms: float
    """Part of `time_ms` that was spent waiting for the loader."""
    lr: float
    tokens: int
    """Number of tokens trained on so far."""
    mfu: Mfu | Mapping[str, Any]
    """Speed of the iteration; empty in the first entry of a process."""
    memory: Memory | Mapping[str, Any]
    gradients: Gradients
    stability: Stability
    joules: float
    """Energy that all GPUs of the job have used since the last entry of the process, or since its start, with what was
    done between the iterations. Absent if the counter of a GPU cannot be read."""
    loss_scale: float
    """Scale of the loss in float16."""
    float8: Float8
    """What fp8 does to the tensors; only with fp8."""


class Eval(TypedDict, total=False):
    """Event `eval`: one pass over the fixed validation batches."""

    iter: Required[int]
    val_loss: Required[float | None]
    best_val_loss: float | None
    time_ms: float
    sources: dict[str, dict[str, float]]
    """Data set of a mixture -> its val_loss, and its share and epochs of the training data read so far. The validation
    loss is the mean of theirs by the weights of the mixture."""
    tasks: dict[str, dict[str, float | None]]
    """Task -> its scores, where `eval_tasks` was due: items, truncated (items that lost the start of their context),
    acc, acc_norm or perplexity, and centred, each with its standard error NAME_stderr."""
    core: float | None
    """Mean of the centred scores of the tasks."""
    core_stderr: float | None
    tasks_ms: float
    """Part of `time_ms` that the tasks took."""


class Checkpoint(TypedDict, total=False):
    """Event `checkpoint`: a checkpoint that is complete on disk."""

    iter: Required[int]
    path: Required[str]
    val_loss: float | None
    """Validation loss of this iteration, if it was evaluated."""
    time_ms: float
    """Time from the start of the save to the last byte on disk."""
    stall_ms: float
    """Time for which training waited for the save."""


class Profile(TypedDict, total=False):
    """Event `profile`: the profile of some iterations."""

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
    convention: str
    hardware_peak_tflops: float
    peak_dtype: str
    peak_basis: str
    kernels: Sequence[Mapping[str, Any]]
    """The kernels that take the most time, each with name, part, ms per step and calls per step."""


class Message(TypedDict, total=False):
    """Event `message`: a line for the user."""

    level: Required[str]
    """"info", "warning" or "error"."""
    text: Required[str]
    iter: int
    time: str
    """Time at which the line was logged, in UTC. The journal adds this field and the next one."""
    elapsed_s: float
    """Seconds since this process opened the journal, by a clock that is never set."""


class Resume(TypedDict):
    """Event `resume`: earlier entries with a greater `iter` no longer count."""

    iter: int
    time: str
    """In UTC."""


class Summary(TypedDict, total=False):
    """Event `summary`: how a run ended. The figures are those of the whole run, over all its starts."""

    iterations: int
    tokens: int
    """Number of tokens trained on."""
    starts: int
    """Number of processes that have trained the run."""
    this_start: Mapping[str, float]
    """What the last process added, if the run was resumed: first_iter, iterations, tokens, wall_time_s."""
    train_loss: float
    """Mean training loss of the last iterations."""
    train_loss_iterations: int
    """Number of iterations in that mean."""
    val_loss: float | None
    best_val_loss: float | None
    best_iter: int | None
    trigram_loss: float
    """Loss of a trigram model trained on the same data: a baseline for the language model. Of a mixture, the mean by
    weight of one model for each data set."""
    tokens_per_sec: float | None
    mfu_percent: float | None
    blended_mfu_percent: float
    convention: str
    hardware_peak_tflops: float
    peak_dtype: str
    peak_basis: str
    wall_time_s: float
    """Time of all processes. One that was killed counts up to the checkpoint from which the next one resumed."""
    sample: str
    """Text that the model generated."""
    log_path: str
    checkpoint_dir: str
    plan: dict[str, float]
    """Planned memory and speed, with the measured ones."""
    stopped: str
    """The reason why the run ended before max_iters."""


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
    """Time of the first start, in UTC: YYYY-mm-ddTHH:MM:SSZ."""
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
    """Number of lines that could not be read, such as the torn last line of a killed run, or a line that a full disk
    cut off."""
    ignored_events: int
    """Number of events of a type that this version of gptperf does not know."""
