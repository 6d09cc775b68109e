"""What a message proposes for an unknown name: something near in spelling or in meaning, or nothing."""

import dataclasses
import importlib
import re

import pytest

from gptperf.__main__ import COMMANDS
from gptperf.config import KEYS, command_line, flags
from gptperf.config.synonyms import COMMAND_SYNONYMS, KEY_SYNONYMS, VALUE_SYNONYMS, near_key
from gptperf.errors import ConfigError, nearest

MEANT = """
lr learning_rate | max_lr learning_rate | optimizer.lr learning_rate | learing_rate learning_rate | wd weight_decay
optim optimizer | optimizer_name optimizer | matrix_lr muon_lr | optimizer_type optimizer
bs batch_size | micro_batch_size batch_size | per_device_train_batch_size batch_size | batchsize batch_size
seq_len block_size | max_seq_len block_size | n_ctx block_size | max_position_embeddings block_size
epochs max_iters | num_train_epochs max_iters | training.steps max_iters | max_steps max_iters | max_iter max_iters
grad_clip_norm grad_clip | max_grad_norm grad_clip | clip_grad grad_clip | grad_accum gradient_accumulation_steps
num_layers n_layer | n_layers n_layer | num_hidden_layers n_layer | n_layr n_layer | model.n_layer n_layer
hidden_size n_embd | d_model n_embd | dim n_embd | n_embed n_embd | intermediate_size d_ff | ffn_hidden_size d_ff
num_attention_heads n_head | n_heads n_head | num_key_value_heads n_kv_head | num_query_groups n_kv_head
norm normalization | norm_type normalization | pos position_encoding | positon position_encoding | act activation
attn_implementation attention_backend | rms_norm_eps norm_eps | sliding_window window
d_head head_dim | qkv_bias attention_bias | original_max_position_embeddings rope_original_block_size
rope_base rope_theta | tie_word_embeddings weight_tying
fp8 matmul_dtype=fp8 | use_fp8 matmul_dtype=fp8
precision dtype | bf16 dtype=bfloat16 | fp16 dtype=float16 | amp dtype | no_cuda device=cpu | gpu device=cuda
fsdp use_fsdp | zero3 use_fsdp | zero use_zero1 | use_distributed_optimizer use_zero1 | backend communication
torch_compile compile | no_compile compile=false | no_bias bias=false | disable_compile compile=false
gradient_checkpointing recompute | activation_checkpoint recompute | recompute_granularity recompute
resume init_from=resume | resume_from_checkpoint init_from | pretrained init_from | load init_from
output_dir out_dir | outdir out_dir | checkpoint_dir out_dir | save_steps save_interval
save_total_limit keep_checkpoints
logging_steps log_interval | log_freq log_interval | eval_every eval_interval | warmup_steps warmup_iters
lr_scheduler_type lr_schedule | decay_lr lr_schedule | adam_epsilon adam_eps | adam_beta1 beta1 | random_seed seed
dataset_name dataset | datset dataset | num_workers prefetch | report_to wandb_log | run_name wandb_run_name
vocab vocab_size | dropout_p dropout | swiglu ffn_type=swiglu | rope position_encoding=rope | dtyp dtype | sede seed
"""
NOTHING = """muon verbose tp pp ep cp moe use_moe num_experts lora quantization
label_smoothing ema amsgrad log_file port host wandb_mode wandb_entity shuffle streaming
pin_memory patience early_stopping theta alibi softcap foo x cosine eval_only tf32 dry_run interval"""


@pytest.mark.parametrize("pair", [pair.split() for pair in MEANT.replace("\n", "|").split("|") if pair.strip()])
def test_a_word_of_another_project_names_the_key_that_it_means(pair: list[str]) -> None:
    word, key = pair
    assert near_key(word, KEYS) == f"; nearest: {key}"
    with pytest.raises(ConfigError, match=re.escape(f"unknown key '{word}'; nearest: {key}")):
        command_line.resolve([f"--{word}=1"])
    assert key.partition("=")[0] in KEYS


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("temperature", "; --temperature is a flag of gptperf.sample"),
        ("gpu", "; nearest: device=cuda; --gpu is a flag of gptperf.compare and gptperf.plan"),
        ("seeds", "; nearest: seed; --seeds is a flag of gptperf.ablate and gptperf.race"),
        ("json", "; python -m gptperf.train --help lists the keys"),
    ],
)
def test_a_flag_of_another_command_names_the_command(word: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.resolve([f"--{word}=1"])
    assert str(caught.value) == f"command line: unknown key {word!r}{told}"


def test_a_key_of_a_configuration_names_training_where_a_command_takes_none() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'n_layer'; --n_layer is a flag of gptperf\.train"):
        importlib.import_module("gptperf.report.__main__").main(["out/run", "--n_layer=3"])


def test_the_table_of_flags_is_that_of_the_commands() -> None:
    found = {}
    for name in (*COMMANDS, "hugging_face.export_command"):
        module = importlib.import_module(f"gptperf.{name}")
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"gptperf.{name}.__main__")
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, flags.Flags)]
        for kind in (kind for kind in kinds if kind.__module__ == module.__name__):
            optional = [x.name for x in dataclasses.fields(kind) if x.default is not dataclasses.MISSING]
            found[name.replace(".export_command", " export")] = " ".join(optional)
    assert found == flags._FLAGS_OF_COMMANDS


@pytest.mark.parametrize("word", NOTHING.split())
def test_nothing_is_proposed_where_nothing_is_near(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.resolve([f"--{word}=1"])
    assert str(caught.value) == (f"command line: unknown key {word!r}; python -m gptperf.train --help lists the keys")


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--dtype=bf16", "bfloat16"),
        ("--dtype=half", "float16"),
        ("--dtype=float8", None),
        ("--normalization=rms", "rmsnorm"),
        ("--normalization=batchnorm", None),
        ("--activation=swish", "silu"),
        ("--position_encoding=rotary", "rope"),
        ("--position_encoding=alibi", None),
        ("--attention_backend=flash", "flash_attn"),
        ("--attention_backend=xformers", None),
        ("--ffn_type=geglu", "swiglu"),
        ("--ffn_type=moe", None),
        ("--device=gpu", "cuda"),
        ("--device=cuda:0", "cuda"),
        ("--device=mps", None),
        ("--arch_preset=lama", "llama"),
        ("--arch_preset=mistral", None),
        ("--communication=nccl", "process_group"),
        ("--norm_position=prenorm", "pre"),
        ("--lr_schedule=cos", "cosine"),
    ],
)
def test_a_value_has_a_near_one_or_none(flag: str, near: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.resolve([flag])
    assert str(caught.value).partition("; nearest: ")[2] == (near or "")


def test_every_synonym_means_something_that_exists() -> None:
    own = {"tokens", "num_samples", "temperature", "top_k", "prompt", "run", "gpu", "num_gpus", "name", "val_fraction"}
    own |= {"tokenizer", "text_field", "shard_tokens", "vary", "seeds", "parallel", "html", "list"}  # of other commands
    own |= {"tasks", "shots", "limit", "contains", "ngram"}
    own |= {"minutes", "price", "lr_factors", "tolerance", "keep_models"}
    for meant in KEY_SYNONYMS.values():
        for text in meant:
            key, _, value = text.partition("=")
            assert key in KEYS or key in own
            assert not value or key == "init_from" or KEYS[key].type is bool or value in (KEYS[key].choices or ())
    choices = {name for key in KEYS.values() for name in key.choices or ()} | {"resume", "scratch"}
    assert {text for meant in VALUE_SYNONYMS.values() for text in meant} <= choices


def test_a_number_of_gpus_belongs_to_torchrun_unless_the_command_has_it() -> None:
    assert "torchrun" in near_key("gpus", KEYS)
    assert near_key("gpus", [*KEYS, "num_gpus"]) == "; nearest: num_gpus"
    assert "without a flag" in near_key("config_file", KEYS)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("max_iters=5", "wanted --max_iters=5"),
        ("-n_layer=3", "wanted --n_layer=3"),
        ("compile", "wanted --compile"),
        ("lr=3e-4", "wanted --key=value; nearest: learning_rate"),
        ("--versoin", "unknown key 'versoin'; nearest: version"),
        ("--hlep", "unknown key 'hlep'; nearest: help"),
        ("nope.toml", "nope.toml: No such file or directory; shipped: custom, "),
        ("nope", "; shipped: custom, "),
        ("config/train_shakespeare_char.py", "no code is executed; nearest: shakespeare_char"),
    ],
)
def test_a_word_without_a_flag_is_explained(word: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.resolve([word])
    assert meant in str(caught.value)
    assert "pyproject" not in str(caught.value)


def test_commands_have_near_ones() -> None:
    commands = ("train", "sample", "prepare", "doctor", "hugging_face")
    for word, meant in {"trian": "train", "generate": "sample", "hf": "hugging_face", "serve": ""}.items():
        assert nearest(word, commands, COMMAND_SYNONYMS).removeprefix("; nearest: ") == meant
