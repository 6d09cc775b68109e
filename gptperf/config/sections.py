"""The configuration: frozen dataclasses, one a section, and what is wrong with a set of values.

A key's annotation is its schema: the type, a `Literal` or `Component` for its choices, a `Range` for its limits. Keys
are unique over all sections, so that one flat name serves TOML, command line and log. `gptperf.config.command_line`
reads files and flags into these classes. No torch here.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from gptperf import registry
from gptperf.cards import FFN
from gptperf.config.keys import Choice, Component, Key, Range, key_of, value_problem
from gptperf.config.presets import PRESETS
from gptperf.config.rules import combination_problems
from gptperf.errors import ConfigError

__all__ = [
    "Config",
    "DataConfig",
    "Key",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SystemConfig",
    "TrainConfig",
]
__all__ += ["KEYS", "value_problem"]


_Positive = Annotated[int, Range(1)]
_Count = Annotated[int, Range(0)]
_Seconds = Annotated[float, Range(0, open=True)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is computed. Sizes, then components."""

    arch_preset: Annotated[str, Choice(tuple(PRESETS))] = "gpt2"
    """Architecture preset: gpt2, llama, team, hybrid, gpt2_openai, custom. Keys given beside it override it."""
    n_layer: _Positive = 12
    """Transformer blocks."""
    n_head: _Positive = 12
    """Query heads."""
    n_kv_head: _Positive | None = None
    """Key and value heads (grouped-query attention); default: n_head."""
    n_embd: _Positive = 768
    """Width of the residual stream."""
    d_ff: _Positive | None = None
    """Width of the FFN; default: 4 n_embd (standard), 8/3 n_embd rounded up to d_ff_multiple (swiglu)."""
    d_ff_multiple: _Positive = 256
    """The default SwiGLU width is rounded up to a multiple of this."""
    block_size: _Positive = 1024
    """Sequence length in tokens."""
    vocab_size: _Positive = 50304
    """Token ids of the vocabulary."""
    vocab_multiple: _Positive = 1
    """The embedding and lm_head are padded to a multiple of this many rows."""
    normalization: Annotated[str, Component("normalization")] = "layernorm_nobias"
    """layernorm, layernorm_nobias, rmsnorm, or one of a plugin."""
    activation: Annotated[str, Component("activation")] = "gelu"
    """Of the standard FFN: gelu, gelu_tanh, silu, relu, leaky_relu, relu_squared. SwiGLU is SiLU by definition."""
    position_encoding: Annotated[str, Component("position_encoding")] = "learned_absolute"
    """learned_absolute, rope, none."""
    attention_backend: Annotated[str, Component("attention_backend")] = "sdpa"
    """sdpa (cuDNN first where it wins), manual, flash_attn (needs that package)."""
    norm_position: Annotated[str, Component("norm_position")] = "post"
    """pre: norm before attention and FFN. post: norm after each residual add."""
    ffn_type: Annotated[str, Component("ffn_type")] = "standard"
    """standard: up, activation, down. swiglu: silu(gate) * up, down."""
    bias: bool = False
    """Biases in the linear layers of attention and FFN."""
    weight_tying: bool = True
    """lm_head is the token embedding."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    """Dropout after embedding, attention weights, attention and FFN."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before the position encoding."""
    norm_eps: Annotated[float, Range(0, open=True)] = 1e-5
    """Epsilon of every norm."""
    rope_theta: Annotated[float, Range(1, open=True)] = 1e4
    """Base of RoPE's wavelengths."""
    rope_pairs: Literal["half", "interleaved"] = "half"
    """Which elements RoPE rotates together: i and i + D/2 (Hugging Face LLaMA), or 2i and 2i + 1."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_kv_head or self.n_head

    @property
    def ffn_width(self) -> int:
        """Width of the FFN: `d_ff`, or the default of the FFN type."""
        if self.d_ff is not None:
            return self.d_ff
        ffn: FFN | None = registry.card("ffn_type", self.ffn_type)
        return 4 * self.n_embd if ffn is None else ffn.default_width(self.n_embd, self.d_ff_multiple)

    @property
    def applied_activation(self) -> str:
        """The activation that the FFN applies: its own where it has one, as SwiGLU has SiLU, or else `activation`."""
        return self.own_activation or self.activation

    @property
    def own_activation(self) -> str | None:
        """The activation of an FFN that applies no other one; None where it applies `activation`."""
        ffn: FFN | None = registry.card("ffn_type", self.ffn_type)
        return None if ffn is None else ffn.activation

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of lm_head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def __post_init__(self) -> None:
        _raise_if_wrong(self)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens."""

    dataset: str = "python_stdlib"
    """A prepared data set: NAME is data_dir/NAME, or a path. python_stdlib is prepared when it is missing."""
    data_dir: str = "data"
    """Folder of prepared data sets."""
    prefetch: _Positive = 4
    """Batches read ahead by the loader's thread."""
    loader_timeout_s: _Seconds = 120.0
    """Seconds without a batch after which storage counts as stuck."""

    def __post_init__(self) -> None:
        _raise_if_wrong(self)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning-rate schedule."""

    learning_rate: Annotated[float, Range(0, open=True)] = 6e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Range(0)] = 6e-5
    """Learning rate at the end of the decay."""
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; wsd is constant, then a linear decay over the last wsd_decay_fraction."""
    warmup_iters: _Count = 2000
    """Iterations of linear warm-up."""
    lr_decay_iters: _Positive | None = None
    """Iteration at which min_lr is reached; default: max_iters."""
    wsd_decay_fraction: Annotated[float, Range(0, 1)] = 0.2
    """Share of lr_decay_iters that wsd decays over."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """On matrices only."""
    beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.95
    """Decay of AdamW's second moment."""
    adam_eps: Annotated[float, Range(0, open=True)] = 1e-8
    """AdamW's epsilon."""
    grad_clip: Annotated[float, Range(0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _raise_if_wrong(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at a time, what is kept."""

    batch_size: _Positive = 12
    """Sequences in a micro-batch on one GPU."""
    gradient_accumulation_steps: _Positive = 40
    """Micro-batches in an iteration of the whole job, shared out over the GPUs."""
    max_iters: _Positive = 600000
    """Iterations (optimizer steps) of the run."""
    eval_interval: _Positive = 2000
    """Iterations between evaluations; the last iteration is always evaluated."""
    eval_iters: _Positive = 200
    """Validation batches an evaluation, at most what the validation split holds."""
    save_interval: _Positive | None = None
    """Iterations between checkpoints; default: eval_interval. The last iteration is always saved."""
    async_save: bool = True
    """Write checkpoints while training goes on."""
    keep_checkpoints: _Positive = 3
    """Newest checkpoints to keep; the best one is kept besides."""
    init_from: str = "scratch"
    """scratch, resume, auto (resume if there is a checkpoint), or the path of a checkpoint or run to start from."""
    out_dir: str = "out"
    """Folder of the run: logs and checkpoints."""
    overwrite: bool = False
    """Start from scratch where checkpoints lie already; they are moved aside."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1337
    """Seed of initialisation, data order and dropout."""

    def __post_init__(self) -> None:
        _raise_if_wrong(self)


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """With what it is computed."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype. Master weights and optimizer states are float32 whatever it is."""
    compile: bool = True
    """Use torch.compile."""
    compile_scope: Literal["block", "model"] = "block"
    """Compile block by block, or the model as one graph: with the Triton ops as fast, and ten times the start."""
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """Implementation of the ops: Triton where it can run, Triton or an error, PyTorch."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again to save memory: nothing, norms and activations, or the whole block."""
    deterministic: bool = False
    """Same bits in every run, at some cost in speed."""
    use_zero1: bool = False
    """Shard the optimizer states over the GPUs (ZeRO-1)."""
    use_fsdp: bool = False
    """Shard parameters, gradients and optimizer states over the GPUs (FSDP)."""
    fsdp_min_num_params: _Count = 100_000
    """FSDP: parameters of a unit; smaller blocks share one with the next."""
    fsdp_reduce_once: bool = False
    """FSDP: keep whole gradients between micro-batches and reduce them once: less communication, more memory."""
    fsdp_gather_once: bool = False
    """FSDP: keep gathered weights until the last backward of the iteration: less communication, more memory."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which NCCL sums gradients over the GPUs; copy engines do so in float32."""
    communication: Literal["auto", "copy_engine", "process_group"] = "auto"
    """What moves data between the GPUs: their copy engines where one host has them all, or NCCL."""
    peak_tflops: Annotated[float, Range(0, open=True)] | None = None
    """Peak of the GPU in TFLOP/s for the MFU; default: the GPU table."""
    peak_basis: Literal["dense", "sparse"] = "dense"
    """Which column of the GPU table the MFU is taken against."""
    collective_timeout_s: _Seconds = 600.0
    """Seconds that processes wait for one that does not come, after which it counts as hanging."""
    ignore_plan: bool = False
    """Start a run that the plan says does not fit into the GPU's memory."""
    plugins: str = ""
    """Python modules, comma-separated, that register components. Command line only."""
    debug: bool = False
    """Show the stack of an error."""

    def __post_init__(self) -> None:
        _raise_if_wrong(self)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What the user sees."""

    log_interval: _Positive = 10
    """Iterations between log lines; between two of them the GPU is not synchronised."""
    profile: str = ""
    """Iterations START:STOP to record: a trace for Perfetto, and where the time goes."""
    memory_history: bool = False
    """Record who allocates GPU memory, for the snapshots that SIGUSR2 and running out of memory write."""
    console: Annotated[str, Choice(("auto", "live", "plain"))] = "auto"
    """live: a panel that is redrawn; plain: lines; auto: live where stdout is a terminal."""
    sample_tokens: _Count = 200
    """Tokens of the sample generated at the end of the run; 0: none."""
    trigram_baseline: bool = False
    """At the end, print the loss of a trigram model of the same tokens (for vocabularies of bytes)."""
    wandb_log: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "gptperf"
    """Weights & Biases project."""
    wandb_run_name: str = ""
    """Weights & Biases run name; default: the run's own."""
    tensorboard: bool = False
    """Log to TensorBoard, in out_dir/tensorboard."""

    def __post_init__(self) -> None:
        _raise_if_wrong(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is told, a section each."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    system: SystemConfig = dataclasses.field(default_factory=SystemConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        problems = combination_problems(self.flat())
        if problems:
            raise ConfigError("; ".join(f"{', '.join(p.keys)}: {p.text}" for p in problems))

    def flat(self) -> dict[str, Any]:
        """Key -> value over all sections."""
        return {key: getattr(getattr(self, spec.section), key) for key, spec in KEYS.items()}

    def sections(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, as in a TOML file."""
        return dataclasses.asdict(self)

    @property
    def tokens_per_iter(self) -> int:
        """Tokens of one iteration, whatever the number of GPUs."""
        return self.train.batch_size * self.train.gradient_accumulation_steps * self.model.block_size

    def notes(self) -> list[str]:
        """What is legal but may surprise, one line each."""
        lines = []
        end = self.optimizer.lr_decay_iters or self.train.max_iters
        if self.optimizer.lr_schedule != "constant" and self.optimizer.warmup_iters >= end:
            lines.append(
                f"warmup_iters = {self.optimizer.warmup_iters} is not shorter than the schedule ({end} iterations)"
            )
        model = self.model
        if model.own_activation is not None and model.activation != KEYS["activation"].default:
            applied = f"ffn_type = {model.ffn_type!r} applies {model.own_activation}"
            lines.append(f"activation = {model.activation!r} has no effect: {applied}")
        if model.arch_preset == "gpt2" and model.norm_position == "post":
            lines.append("preset gpt2 is post-norm without biases; the released GPT-2 is preset gpt2_openai")
        return lines


def _keys() -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for section in dataclasses.fields(Config):
        cls = typing.cast(type, section.type)
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            assert field.name not in keys, f"{field.name} stands in two sections"
            keys[field.name] = key_of(section.name, field, hints[field.name])
    return keys


KEYS: dict[str, Key] = _keys()
"""Every configuration key, in the order of the sections."""


def _raise_if_wrong(section: Any) -> None:
    """Check a section that was built in Python, where no file or flag has been checked before."""
    wrong = {f.name: value_problem(KEYS[f.name], getattr(section, f.name)) for f in dataclasses.fields(section)}
    if any(wrong.values()):
        raise ConfigError("; ".join(f"{name}: {text}" for name, text in wrong.items() if text))
