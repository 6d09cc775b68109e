"""Words that other projects use for the keys and values of this one, so that a message can name what was meant.

They are never accepted in place of the real name. This module loads no torch.
"""

from collections.abc import Iterable

from gptperf.errors import nearest

__all__ = ["COMMAND_SYNONYMS", "KEY_SYNONYMS", "PROGRAMS", "VALUE_SYNONYMS", "near_key"]

_KEYS = {
    "arch_preset": "arch architecture model model_type model_name model_config preset flavor",
    "n_layer": "layers num_layers n_layers num_hidden_layers depth n_blocks num_blocks",
    "n_head": "heads num_heads n_heads num_attention_heads attention_heads nhead",
    "n_kv_head": "kv_heads num_kv_heads n_kv_heads num_key_value_heads num_query_groups n_query_groups gqa",
    "n_embd": "hidden hidden_size d_model dim model_dim embed_dim embedding_dim n_embed emb_dim width hidden_dim",
    "head_dim": "d_head dim_head head_size kv_channels attention_head_dim key_length",
    "d_ff": "ffn_hidden_size ffn_dim ffn_size ff_dim mlp_dim mlp_hidden_size intermediate_size inner_dim n_inner d_mlp",
    "d_ff_multiple": "multiple_of",
    "block_size": "seq_len seq_length seqlen sequence_length max_seq_len max_seq_length max_length block ctx ctx_len "
    "n_ctx context context_length context_size context_window n_positions max_position_embeddings",
    "vocab_size": "vocab n_vocab",
    "vocab_multiple": "pad_vocab_size_multiple padding_multiple make_vocab_size_divisible_by",
    "window": "sliding_window attention_window local_window window_size",
    "normalization": "norm norm_type norm_layer normalisation layernorm_type",
    "normalization=rmsnorm": "rmsnorm use_rmsnorm",
    "activation": "act act_fn hidden_act activation_function activation_fn nonlinearity",
    "position_encoding": "pos position positional pos_enc pos_encoding pos_emb pos_embed position_embedding "
    "position_embedding_type positional_encoding positional_embedding",
    "position_encoding=rope": "rope use_rope rotary use_rotary",
    "attention_backend": "attn attention attn_backend attn_implementation attention_implementation attn_impl",
    "attention_backend=flash_attn": "flash flash_attention use_flash_attn use_flash_attention",
    "norm_position": "norm_pos norm_placement",
    "norm_position=pre": "pre_norm prenorm pre_ln use_pre_norm",
    "norm_position=post": "post_norm postnorm post_ln",
    "ffn_type": "ffn mlp mlp_type feedforward feed_forward",
    "ffn_type=swiglu": "swiglu use_swiglu glu gated_mlp",
    "bias": "use_bias add_bias mlp_bias add_bias_linear",
    "attention_bias": "qkv_bias attn_bias add_qkv_bias use_qkv_bias",
    "weight_tying": "tie_weights tied tie_embeddings tie_word_embeddings weight_tie tie_embedding",
    "weight_tying=false": "untie_embeddings_and_output_weights untie_embeddings",
    "dropout": "drop dropout_p dropout_rate hidden_dropout attention_dropout resid_pdrop attn_pdrop embd_pdrop",
    "qk_norm": "qk_layernorm qknorm use_qk_norm query_key_norm",
    "norm_eps": "layer_norm_eps layer_norm_epsilon layernorm_epsilon rms_norm_eps rms_eps",
    "rope_theta": "rope_base rotary_base rotary_emb_base",
    "rope_scaling": "rope_type rope_parameters rope_scaling_type",
    "rope_factor": "rope_scaling_factor rope_scale",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_block_size": "original_max_position_embeddings original_context_length",
    "dataset": "data dataset_name train_data data_path dataset_path corpus train_file",
    "data_dir": "data_root dataset_dir data_folder",
    "prefetch": "num_workers workers dataloader_num_workers prefetch_factor",
    "learning_rate": "lr max_lr peak_lr base_lr init_lr step_size",
    "min_lr": "lr_min end_lr final_lr eta_min min_learning_rate",
    "lr_schedule": "scheduler schedule lr_scheduler lr_scheduler_type lr_decay_style decay_lr decay_type",
    "warmup_iters": "warmup lr_warmup warmup_steps warmup_ratio lr_warmup_iters lr_warmup_steps num_warmup_steps",
    "lr_decay_iters": "lr_decay_steps decay_steps decay_iters",
    "wsd_decay_fraction": "decay_ratio decay_fraction cooldown cooldown_fraction",
    "optimizer": "optim optimizer_type optimizer_name opt",
    "weight_decay": "wd decay l2",
    "muon_lr": "matrix_lr muon_learning_rate",
    "cautious_weight_decay": "cautious cwd",
    "beta1": "adam_beta1 b1 momentum betas",
    "beta2": "adam_beta2 b2",
    "adam_eps": "eps epsilon adam_epsilon",
    "optimizer_state_dtype": "state_dtype moment_dtype moments_dtype optim_dtype optimizer_dtype adam_dtype optim_bits",
    "grad_clip": "clip clip_grad max_norm max_grad_norm gradient_clipping gradient_clip grad_norm_clip "
    "grad_clip_norm clip_grad_norm gradient_clip_val",
    "batch_size": "bs mbs batch micro_batch micro_batch_size local_batch_size device_batch_size train_batch_size "
    "per_device_train_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_acc ga accum accumulation accumulation_steps grad_accum_steps "
    "accumulate_grad_batches global_batch_size total_batch_size",
    "max_iters": "iters iterations steps max_steps num_steps n_steps train_iters train_steps num_iterations "
    "total_steps training_steps epoch epochs n_epochs num_epochs max_epochs num_train_epochs max_tokens train_tokens",
    "eval_interval": "eval_every eval_freq eval_steps val_interval val_every val_check_interval eval_frequency",
    "eval_iters": "eval_batches val_iters val_batches limit_val_batches eval_tokens",
    "eval_tasks": "task_list benchmarks benchmark eval_files eval_suite lm_eval icl_tasks core_tasks",
    "eval_tasks_interval": "core_metric_every task_interval tasks_interval eval_tasks_every icl_eval_interval",
    "save_interval": "save_every save_steps save_freq checkpoint_interval ckpt_interval checkpoint_every "
    "always_save_checkpoint",
    "async_save": "async_checkpoint async_mode",
    "keep_checkpoints": "save_total_limit keep_latest_k max_checkpoints save_top_k",
    "init_from=resume": "resume resume_training continue restart",
    "init_from": "resume_from resume_from_checkpoint load load_from load_checkpoint checkpoint ckpt ckpt_path "
    "checkpoint_path model_name_or_path pretrained from_pretrained init_checkpoint",
    "out_dir": "out output output_dir save_dir log_dir checkpoint_dir ckpt_dir run_dir dump_folder save_path",
    "overwrite": "force overwrite_output_dir",
    "seed": "random_seed rng_seed manual_seed",
    "device": "accelerator",
    "device=cpu": "cpu use_cpu no_cuda",
    "device=cuda": "cuda gpu use_cuda use_gpu",
    "dtype": "precision amp use_amp mixed_precision mp compute_dtype torch_dtype param_dtype",
    "dtype=bfloat16": "bf16 bfloat16",
    "dtype=float16": "fp16 float16 half",
    "dtype=float32": "fp32 float32",
    "matmul_dtype=fp8": "fp8 float8 use_fp8 enable_fp8 fp8_training enable_float8",
    "compile": "torch_compile use_compile use_torch_compile compile_model jit",
    "kernels": "use_kernels fused use_liger use_liger_kernel backend_ops",
    "kernels=triton": "triton use_triton",
    "kernels=eager": "eager",
    "recompute": "checkpointing gradient_checkpointing grad_checkpointing activation_checkpoint "
    "activation_checkpointing use_gradient_checkpointing recompute_granularity",
    "deterministic": "deterministic_mode full_determinism determinism",
    "use_zero1": "zero zero1 zero_1 zero_stage use_zero deepspeed use_distributed_optimizer shard_optimizer",
    "use_fsdp": "fsdp fsdp2 zero2 zero3 use_zero2 use_zero3 data_parallel_shard_degree",
    "reduce_dtype": "mixed_precision_reduce grad_reduce_dtype allreduce_dtype",
    "communication": "backend dist_backend ddp_backend distributed_backend",
    "peak_tflops": "peak_flops gpu_peak_flops promised_flops",
    "collective_timeout_s": "timeout ddp_timeout nccl_timeout dist_timeout train_timeout_seconds",
    "plugins": "plugin custom_import import",
    "log_interval": "log_every log_freq logging_steps log_steps log_every_n_steps print_every",
    "profile": "profiler profiling enable_profiling use_profiler",
    "console": "ui display progress progress_bar",
    "sample_tokens": "num_samples sample sample_every",
    "wandb_log": "wandb use_wandb enable_wandb report_to",
    "wandb_project": "project project_name",
    "wandb_run_name": "run_name wandb_name experiment_name exp_name",
    "tensorboard": "tb use_tensorboard enable_tensorboard",
    # Flags of other commands than train.
    "tokens": "max_new_tokens n_tokens num_tokens length max_tokens",
    "tasks": "task benchmarks benchmark eval_tasks",
    "shots": "num_fewshot n_shot n_shots num_shots fewshot few_shot k_shot",
    "limit": "max_items max_samples num_items max_per_task max_docs",
    "contains": "contamination decontaminate decontamination check_contamination overlap",
    "ngram": "n_gram ngram_size n",
    "num_samples": "n samples n_samples num_return_sequences",
    "temperature": "temp",
    "top_k": "topk",
    "prompt": "start text input",
    "run": "out_dir out model_path",
    "gpu": "card gpu_name gpu_type device device_name",
    "num_gpus": "gpus n_gpus ngpus ngpu world_size nproc_per_node devices",
    "name": "dataset dataset_name",
    "val_fraction": "val val_split val_ratio val_size validation_split test_size",
    "tokenizer": "encoding tokenizer_name enc",
    "text_field": "field column text_column text_key",
    "shard_tokens": "shard_size",
    "vary": "variant variants change sweep",
    "seeds": "n_seeds num_seeds repeats",
    "parallel": "jobs n_jobs workers",
    "html": "page report",
    "minutes": "time_limit max_minutes max_time budget timeout_minutes",
    "price": "cost price_per_hour gpu_price dollars usd",
    "lr_factors": "lrs learning_rates lr_grid",
    "tolerance": "margin equivalence",
    "keep_models": "keep_all keep_runs",
    "list": "dry_run",
}
KEY_SYNONYMS: dict[str, tuple[str, ...]] = {}
"""Word -> the keys, or `key=value`, that it can mean. Which of them a command has decides."""
for _key, _words in _KEYS.items():
    for _word in _words.split():
        KEY_SYNONYMS[_word] = (*KEY_SYNONYMS.get(_word, ()), _key)

_VALUES = {
    "bfloat16": "bf16 bf16_mixed mixed amp torch.bfloat16",
    "float16": "fp16 half 16 torch.float16",
    "float32": "fp32 float full 32 tf32 torch.float32",
    "rmsnorm": "rms rms_norm",
    "layernorm": "ln layer_norm",
    "silu": "swish",
    "gelu_tanh": "gelu_new gelu_approx gelu_pytorch_tanh",
    "relu_squared": "relu2 squared_relu relu_sq",
    "leaky_relu": "lrelu",
    "rope": "rotary rotary_embedding rotary_emb",
    "learned_absolute": "learned absolute abs wpe",
    "none": "nope no off false null",
    "flash_attn": "flash flash_attention flash2 flash_attention_2 fa2 fa3",
    "sdpa": "torch pytorch scaled_dot_product_attention",
    "manual": "eager math naive",
    "pre": "pre_norm prenorm pre_ln preln",
    "post": "post_norm postnorm post_ln",
    "standard": "mlp default vanilla",
    "swiglu": "glu gated geglu llama silu",
    "cuda": "gpu nvidia cuda:0",
    "eager": "torch pytorch off none",
    "cosine": "cos cosine_annealing",
    "wsd": "warmup_stable_decay trapezoid trapezoidal",
    "constant": "none off fixed",
    "process_group": "nccl gloo",
    "full": "true on all",
    "selective": "partial",
    "live": "rich tui panel",
    "plain": "text lines log",
    "gpt2_openai": "gpt2_hf openai gpt_2",
    "llama": "llama1 llama2 llama3",
    "resume": "continue",
    "scratch": "new random none",
}
VALUE_SYNONYMS: dict[str, tuple[str, ...]] = {}
"""Word -> the values that it can mean. Which of them are choices of the key decides."""
for _key, _words in _VALUES.items():
    for _word in _words.split():
        VALUE_SYNONYMS[_word] = (*VALUE_SYNONYMS.get(_word, ()), _key)


PROGRAMS = {
    "train": "python -m gptperf.train CONFIG",
    "prepare": "python -m gptperf.prepare WHAT",
    "sample": "python -m gptperf.sample RUN",
    "compare_architectures": "python -m gptperf.compare --configs configs/*.toml",
    "test_imports": "python -m gptperf.doctor",
    "configurator": "python -m gptperf.train CONFIG --key=value",
    "model": "import gptperf.model",
    "model_builder": "import gptperf.model",
    "model_components": "import gptperf.model",
    "model_config": "import gptperf.config",
    "training_logger": "import gptperf.monitor",
}
"""Name of a program or module of the system description -> what does that here."""


COMMAND_SYNONYMS = {
    word: (command,)
    for command, words in {
        "train": "pretrain run fit start training launch torchrun finetune resume",
        "sample": "generate inference infer chat complete completion predict text",
        "prepare": "data dataset download tokenize preprocess prep",
        "doctor": "check diagnose env environment info system test verify selftest",
        "plan": "memory estimate fit_memory predict_memory simulate cost",
        "flops": "count params parameters mfu size model_size",
        "hardware": "gpu gpus devices device ceilings",
        "report": "html plot page visualize dashboard",
        "compare": "rank diff leaderboard architectures",
        "evaluate": "eval evaluation score benchmark lm_eval perplexity test_loss",
        "ablate": "ablation sweep tune vary search",
        "race": "speedrun time_to_loss head_to_head fork versus vs",
        "hugging_face": "hf huggingface convert import from_hf import_hf",
        "monitor.schema": "schema json_schema log_schema",
    }.items()
    for word in words.split()
}
"""Word -> the command that does it."""


_ADVICE = {
    word: advice
    for words, advice in {
        "config config_file config_path conf cfg": "a configuration is written without a flag: CONFIG.toml",
        "gpus num_gpus n_gpu n_gpus ngpus nproc nproc_per_node devices num_devices world_size ddp num_processes": (
            "torchrun --standalone --nproc_per_node=N -m gptperf.train ... trains on N GPUs"
        ),
        "nnodes num_nodes nodes node_rank master_addr master_port": "torchrun --nnodes=N ... starts a job on N hosts",
        "threads num_threads n_threads omp_num_threads": "the environment variable OMP_NUM_THREADS sets the threads",
    }.items()
    for word in words.split()
}


def near_key(name: str, keys: Iterable[str]) -> str:
    """Returns "; nearest: KEY" for the key that a word resembles or means, "; ADVICE", or "" if there is neither.

    `model.n_layer` and `training.steps` are read as their last word. `no_KEY` means `KEY=false`.
    """
    keys = list(keys)
    word = name.lower().replace("-", "_").rpartition(".")[2]
    for prefix in ("no_", "disable_"):
        if word.removeprefix(prefix) in keys and word != word.removeprefix(prefix):
            return f"; nearest: {word.removeprefix(prefix)}=false"
    if word in _ADVICE and not any(key in keys for key in KEY_SYNONYMS.get(word, ())):
        return f"; {_ADVICE[word]}"
    return nearest(word, keys, KEY_SYNONYMS)
