"""The configuration as frozen dataclasses, one for each section.

The annotation of a key is its schema: the type, a `Literal`, `Choice` or `Component` for its choices, a `Range` for its
limits. The docstring of a key is its text in `--help`. Keys are unique over all sections, so that TOML files, the
command line and the log use the same name. `gptperf.config.command_line` reads files and flags into these classes.
This module loads no torch.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from gptperf.config.keys import Choice, Component, Key, Range, key_of, value_problem
from gptperf.config.model_sizes import ModelSizes
from gptperf.config.notes import notes_on
from gptperf.config.presets import PRESETS
from gptperf.config.rules import combination_problems
from gptperf.errors import ConfigError

__all__ = [
    "KEYS",
    "SECTIONS",
    "Config",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SystemConfig",
    "TrainConfig",
]

# The upper limits are far above any run, and low enough that no check or count takes long.
_Iterations = Annotated[int, Range(1, 10**12)]
_Seconds = Annotated[float, Range(0, 10**7, exclude_low=True)]


class _Section:
    """Base class that checks every value of a section, so that one built in Python cannot hold an invalid value."""

    def __post_init__(self) -> None:
        wrong = {name: value_problem(KEYS[name], value) for name, value in vars(self).items()}
        if any(wrong.values()):
            raise ConfigError("; ".join(f"{name}: {text}" for name, text in wrong.items() if text))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section, ModelSizes):
    """The model: its sizes and its components."""

    arch_preset: Annotated[str, Choice(tuple(PRESETS))] = "gpt2"
    """Architecture preset: gpt2, llama, team, hybrid, gpt2_openai or custom. Keys given with it override it."""
    n_layer: Annotated[int, Range(1, 10_000)] = 12
    """Number of transformer blocks."""
    n_head: Annotated[int, Range(1, 65_536)] = 12
    """Number of query heads."""
    n_kv_head: Annotated[int, Range(1, 65_536)] | None = None
    """Number of key and value heads (grouped-query attention); default: n_head."""
    n_embd: Annotated[int, Range(1, 2**20)] = 768
    """Width of the residual stream."""
    head_dim: Annotated[int, Range(1, 65_536)] | None = None
    """Width of one head; default: n_embd / n_head."""
    d_ff: Annotated[int, Range(1, 2**24)] | None = None
    """Width of the FFN; default: 4 n_embd (standard), or 8/3 n_embd rounded up to a multiple (swiglu)."""
    d_ff_multiple: Annotated[int, Range(1, 2**20)] = 256
    """The default SwiGLU width is rounded up to a multiple of this."""
    block_size: Annotated[int, Range(1, 2**24)] = 1024
    """Sequence length in tokens."""
    vocab_size: Annotated[int, Range(1, 2**24)] = 50304
    """Number of token ids in the vocabulary."""
    vocab_multiple: Annotated[int, Range(1, 2**20)] = 1
    """The embedding and lm_head are padded to a multiple of this number of rows."""
    normalization: Annotated[str, Component("normalization")] = "layernorm_nobias"
    """Norm: layernorm, layernorm_nobias, rmsnorm, or one that a plugin registers."""
    activation: Annotated[str, Component("activation")] = "gelu"
    """Activation of the standard FFN: gelu, gelu_tanh, silu, relu, leaky_relu or relu_squared. SwiGLU uses SiLU."""
    position_encoding: Annotated[str, Component("position_encoding")] = "learned_absolute"
    """Position encoding: learned_absolute, rope or none."""
    attention_backend: Annotated[str, Component("attention_backend")] = "sdpa"
    """Attention: sdpa (cuDNN first where it is fastest), manual, or flash_attn (needs the package flash-attn)."""
    window: str = "full"
    """Tokens that a query attends to, itself included: a number or full. Numbers with commas, such as 512,512,full, are
    for the layers in turn, again and again."""
    norm_position: Annotated[str, Component("norm_position")] = "post"
    """pre: norm before attention and FFN. post: norm after each residual addition."""
    ffn_type: Annotated[str, Component("ffn_type")] = "standard"
    """standard: up projection, activation, down projection. swiglu: silu(gate) * up, down projection."""
    bias: bool = False
    """Add a bias to the linear layers of attention and FFN."""
    attention_bias: Literal["none", "qkv", "all"] | None = None
    """Biases of attention: none; qkv: of queries, keys and values; all: of the output too; default: as bias says."""
    weight_tying: bool = True
    """Use the token embedding as the weight of lm_head."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    """Dropout probability after the embedding, the attention weights, attention and FFN."""
    qk_norm: bool = False
    """Apply RMSNorm to every query and key head before the position encoding."""
    logit_softcap: Annotated[float, Range(0)] = 0.0
    """Limits the logits to cap tanh(logits / cap); 0 leaves them as they are."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """First values of the projections into the residual stream. scaled: N(0, 0.02 / sqrt(2 n_layer)); zero: 0."""
    norm_eps: Annotated[float, Range(0, exclude_low=True)] = 1e-5
    """Epsilon of every norm."""
    rope_theta: Annotated[float, Range(1, exclude_low=True)] = 1e4
    """Base of the wavelengths of RoPE."""
    rope_pairs: Literal["half", "interleaved"] = "half"
    """Elements that RoPE rotates together. half: i and i + D/2, as in Hugging Face; interleaved: 2i and 2i + 1."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """linear: RoPE with all wavelengths times rope_factor. llama3: with the long ones, as in LLaMA 3.1."""
    rope_factor: Annotated[float, Range(1)] = 8.0
    """Factor of the wavelengths under rope_scaling."""
    rope_low_freq_factor: Annotated[float, Range(0, exclude_low=True)] = 1.0
    """llama3: wavelengths above rope_original_block_size divided by this are multiplied by rope_factor."""
    rope_high_freq_factor: Annotated[float, Range(0, exclude_low=True)] = 4.0
    """llama3: wavelengths below rope_original_block_size divided by this are kept; those between are mixed."""
    rope_original_block_size: Annotated[int, Range(1, 2**24)] = 8192
    """llama3: sequence length that the model was trained with before its context was extended."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """The data set and its loader."""

    dataset: str = "python_stdlib"
    """Prepared data set: NAME for data_dir/NAME, or a path; or a mixture by weight: NAME:0.7,NAME:0.3. python_stdlib is
    prepared if it is missing."""
    data_dir: str = "data"
    """Folder of prepared data sets."""
    verify_data: Literal["used", "full", "off"] = "used"
    """Comparison of the data with its checksums. used: each block before its first use; full: all, before training,
    too; off: none."""
    document_mask: bool = False
    """Attention stays inside a document, and learned positions count from its first token."""
    prefetch: Annotated[int, Range(1, 10_000)] = 4
    """Number of batches that the loader reads ahead."""
    loader_timeout_s: _Seconds = 120.0
    """Seconds without a batch after which the run fails because storage does not respond."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Section):
    """The optimizer and the learning-rate schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for embeddings, lm_head, norms and biases."""
    learning_rate: Annotated[float, Range(0, exclude_low=True)] = 6e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Range(0)] = 6e-5
    """Learning rate at the end of the decay."""
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up. wsd: constant, then a linear decay over the last wsd_decay_fraction."""
    warmup_iters: Annotated[int, Range(0, 10**12)] = 2000
    """Number of iterations of linear warm-up."""
    lr_decay_iters: _Iterations | None = None
    """Iteration at which the learning rate reaches min_lr; default: max_iters."""
    wsd_decay_fraction: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of lr_decay_iters over which wsd decays."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """Weight decay, times the learning rate; applies to matrices only."""
    beta1: Annotated[float, Range(0, 1, exclude_high=True)] = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: Annotated[float, Range(0, 1, exclude_high=True)] = 0.95
    """Decay rate of AdamW's second moment."""
    adam_eps: Annotated[float, Range(0, exclude_low=True)] = 1e-8
    """Epsilon of AdamW."""
    muon_lr: Annotated[float, Range(0, exclude_low=True)] | None = None
    """Peak learning rate of Muon, which follows the same schedule; default: learning_rate, which serves both."""
    muon_momentum: Annotated[float, Range(0, 1, exclude_high=True)] = 0.95
    """Nesterov momentum of Muon."""
    normuon: bool = False
    """Divide each row of Muon's update by the root of its mean square, averaged with beta2 (NorMuon)."""
    cautious_weight_decay: bool = False
    """Muon decays only the weights that its update moves towards zero."""
    optimizer_state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's moments. bfloat16 saves 4 bytes per parameter, and is rounded up or down at random."""
    grad_clip: Annotated[float, Range(0)] = 1.0
    """Maximum global norm of the gradients; 0 disables clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """The training loop: batches, length, evaluations and checkpoints."""

    batch_size: Annotated[int, Range(1, 2**20)] = 12
    """Number of sequences in a micro-batch on one GPU."""
    gradient_accumulation_steps: Annotated[int, Range(1, 2**20)] = 40
    """Number of micro-batches in an iteration of the whole job; the GPUs share them."""
    max_iters: _Iterations = 600000
    """Number of iterations (optimizer steps) of the run."""
    eval_interval: _Iterations = 2000
    """Iterations between evaluations; the last iteration is always evaluated."""
    eval_iters: Annotated[int, Range(1, 10**9)] = 200
    """Number of validation batches per evaluation, limited by the size of the validation split."""
    eval_tasks: str = ""
    """Task files, with commas between them, whose items an evaluation scores by likelihood."""
    eval_tasks_interval: _Iterations | None = None
    """Iterations between evaluations of eval_tasks; default: eval_interval. The last iteration is always evaluated."""
    save_interval: _Iterations | None = None
    """Iterations between checkpoints; default: eval_interval. The last iteration is always saved."""
    async_save: bool = True
    """Write checkpoints in the background while training continues."""
    keep_checkpoints: Annotated[int, Range(1, 10**6)] = 3
    """Number of newest checkpoints to keep; the best one is kept too."""
    init_from: str = "scratch"
    """scratch, resume, auto (resume if there is a checkpoint), the path of a run or checkpoint whose weights to start
    from, or RUN@STEP: a fork, which continues another run from a checkpoint with the keys that are given."""
    out_dir: str = "out"
    """Folder for the logs and checkpoints of the run."""
    overwrite: bool = False
    """Start a new run even if out_dir has checkpoints, which are then moved aside."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1337
    """Seed of the initialisation, the data order and dropout."""


@dataclass(frozen=True, kw_only=True)
class SystemConfig(_Section):
    """The device, the precision, the kernels and the parallelism."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device; auto is the GPU if there is one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype. Master weights are always float32."""
    matmul_dtype: Literal["dtype", "fp8"] = "dtype"
    """Operands of the blocks' linear layers. dtype: as the key dtype; fp8: 8-bit floats (Ada, Hopper, Blackwell)."""
    fp8_level: Literal["forward", "forward+dgrad", "full"] = "full"
    """Matmuls in fp8. forward: the forward pass; forward+dgrad: also gradients of inputs; full: also of weights."""
    fp8_scaling: Literal["delayed", "current"] = "delayed"
    """Scales of fp8. delayed: from the last iterations; current: from the tensor itself, which is read once more."""
    fp8_skip: str = ""
    """Comma-separated layers without fp8: first, last or numbers of blocks, attention, ffn, blocks.3.ffn.out."""
    compile: bool | Literal["auto"] = "auto"
    """Use torch.compile. auto: unless each op is one Triton kernel: no slower without it, and it starts at once."""
    compile_scope: Literal["block", "model"] = "block"
    """Compile each block, or the model as one graph, which is no faster with Triton and starts up 10 times slower."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Record the kernels of a step as CUDA graphs and replay them. auto: where the GPU might wait for the host."""
    kernels: Literal["auto", "triton", "eager"] = "auto"
    """Implementation of the ops. auto: Triton where it can run; triton: Triton or an error; eager: PyTorch."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward recomputes to save memory. selective: norms and activations; full: the whole block."""
    recompute_ffn: bool = False
    """Compute the activation of the FFN again in backward: less memory, up to 1% more time. fp8 always does so."""
    deterministic: bool = False
    """Compute the same bits in every run, at some cost in speed."""
    use_zero1: bool = False
    """Shard the optimizer states over the GPUs (ZeRO-1)."""
    use_fsdp: bool = False
    """Shard parameters, gradients and optimizer states over the GPUs (FSDP)."""
    fsdp_min_num_params: Annotated[int, Range(0, 10**15)] = 100_000
    """FSDP: minimum number of parameters in a unit; a smaller block shares a unit with the next one."""
    fsdp_reduce_once: bool = False
    """FSDP: keep full gradients between micro-batches and reduce them once; less communication, more memory."""
    fsdp_gather_once: bool = False
    """FSDP: keep gathered weights until the last backward of the iteration; less communication, more memory."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which NCCL reduces gradients over the GPUs; with copy engines sums are always in float32."""
    communication: Literal["auto", "copy_engine", "process_group"] = "auto"
    """How data moves between GPUs. auto: copy engines if one host has all GPUs, else the process group (NCCL)."""
    peak_tflops: Annotated[float, Range(0, exclude_low=True)] | None = None
    """Peak of the GPU in TFLOP/s for the MFU; default: the value in the GPU table."""
    peak_basis: Literal["dense", "sparse"] = "dense"
    """Column of the GPU table with the peak that the MFU is relative to."""
    collective_timeout_s: _Seconds = 600.0
    """Seconds that ranks wait for another rank before they report that it hangs."""
    ignore_plan: bool = False
    """Start the run even if the plan says that it does not fit into GPU memory."""
    plugins: str = ""
    """Comma-separated Python modules that register components. Valid on the command line only."""
    debug: bool = False
    """Show the stack trace of an error."""

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled, if its ops run as `kernels` says and none is of a plugin or manual attention.

        Not compiled, a step with Triton's ops is as fast or up to 1.5% faster, and its first iteration ends 10 to 19 s
        earlier (an H200, `bench/NOTES.md`). Recomputation was not measured without torch.compile.
        """
        if self.compile != "auto":
            return self.compile
        eager = self.kernels == "eager" or self.device == "cpu"
        return eager or self.compile_scope == "model" or self.recompute != "none"

    @property
    def keeps_ffn(self) -> bool:
        """Whether backward reads the activation of the FFN instead of computing it again, as `recompute` and fp8 do."""
        return not self.recompute_ffn and self.recompute == "none" and self.matmul_dtype == "dtype"

    @property
    def one_graph(self) -> bool:
        """Whether the model is compiled as one graph."""
        return self.compiles and self.compile_scope == "model"

    @property
    def compute_dtype(self) -> str:
        """Dtype of autocast, and therefore of activations and their gradients."""
        return self.dtype

    @property
    def weight_copy_dtype(self) -> str:
        """Dtype of the copy of the weight matrices that the model reads, and therefore of their gradients."""
        return self.dtype

    def without_fp8(self) -> "SystemConfig":
        """Returns this section with all matmuls in the compute dtype."""
        return dataclasses.replace(self, matmul_dtype="dtype", fp8_level="full", fp8_scaling="delayed", fp8_skip="")

    @property
    def peak_dtype(self) -> str:
        """Dtype of the peak that the MFU is relative to, also where matmuls run in fp8."""
        return self.dtype


@dataclass(frozen=True, kw_only=True)
class LogConfig(_Section):
    """Logs, console, profiler and trackers."""

    log_interval: _Iterations = 10
    """Iterations between log lines; the GPU is not synchronised between them."""
    profile: str = ""
    """Iterations START:STOP to profile; writes a trace for Perfetto and a breakdown of the step time."""
    memory_history: bool = False
    """Record the stack of every GPU allocation, for the snapshots that SIGUSR2 and an out-of-memory error write."""
    console: Annotated[str, Choice(("auto", "live", "plain"))] = "auto"
    """live: a panel that is redrawn; plain: lines; auto: live if stdout is a terminal."""
    sample_tokens: Annotated[int, Range(0, 10**6)] = 200
    """Number of tokens to generate as a sample at the end of the run; 0 disables it."""
    trigram_baseline: bool = False
    """At the end, print the loss of a trigram model on the same tokens (byte vocabularies only)."""
    wandb_log: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "gptperf"
    """Project in Weights & Biases."""
    wandb_run_name: str = ""
    """Run name in Weights & Biases; default: the name of the run."""
    tensorboard: bool = False
    """Log to TensorBoard in out_dir/tensorboard."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a run, by section."""

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

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "Config":
        """Builds the configuration from key -> value; `values` has every key of `KEYS`."""
        return cls(
            **{
                section: section_class(**{key: values[key] for key, spec in KEYS.items() if spec.section == section})
                for section, section_class in SECTIONS.items()
            }
        )

    def flat(self) -> dict[str, Any]:
        """Returns key -> value over all sections."""
        return {key: getattr(getattr(self, spec.section), key) for key, spec in KEYS.items()}

    def sections(self) -> dict[str, dict[str, Any]]:
        """Returns section -> key -> value, as in a TOML file."""
        return dataclasses.asdict(self)

    @property
    def tokens_per_iter(self) -> int:
        """Number of tokens in one iteration of the whole job; independent of the number of GPUs."""
        return self.train.batch_size * self.train.gradient_accumulation_steps * self.model.block_size

    def notes(self) -> list[str]:
        """Returns a line for each choice that is valid but may surprise."""
        return notes_on(self.flat(), self.model.windows, {name: key.default for name, key in KEYS.items()})


SECTIONS: dict[str, type] = {field.name: typing.cast(type, field.type) for field in dataclasses.fields(Config)}
"""Name of a section, which is also the name of its TOML table -> its class."""


def _keys() -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for section, section_class in SECTIONS.items():
        hints = typing.get_type_hints(section_class, include_extras=True)
        for field in dataclasses.fields(section_class):
            assert field.name not in keys, f"{field.name} is a key of two sections"
            keys[field.name] = key_of(section, field, hints[field.name])
    return keys


KEYS: dict[str, Key] = _keys()
"""Every configuration key, in the order of the sections."""
