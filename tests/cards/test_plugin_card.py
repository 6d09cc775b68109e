"""The FFN of a plugin is counted and planned like a built-in one if it has a card; if not, a sentence says why not."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from run_helpers import run, run_log
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.serial import serial_ms
from gptperf import flops, plan, registry
from gptperf.cards import FFN, Cost, Implementation, Matmul, Moved
from gptperf.config import Config, ModelConfig, SystemConfig
from gptperf.errors import ConfigError
from gptperf.flops import __main__ as flops_command
from gptperf.flops.tables import report_lines
from gptperf.hardware.workload import gemm_list
from gptperf.model import GPT
from gptperf.monitor.throughput import theoretical
from gptperf.ops import Ops
from gptperf.plan import memory
from gptperf.plan.__main__ import main as plan_command

REASON = "component ffn_type = 'reglu' has no card"


class ReGLU(nn.Module):
    """relu(gate) * up, down."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.ffn_width, bias=config.bias)
        self.out = nn.Linear(config.ffn_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.relu(gate) * up)


class ReGLUCard(FFN):
    def matmuls(self, C: int, F: int) -> tuple[Matmul, ...]:
        return Matmul("ffn_gate_up", 2 * F, C), Matmul("ffn_out", C, F)

    def moved(self, F: int) -> Moved:
        return Moved(2 * F + 3 * F, 3 * F + 3 * F + 2 * F)

    def kept(self, F: int, implementation: Implementation) -> int:
        return 2 * F + F + F  # gate and up, relu(gate), the product

    def backward_peak(self, F: int) -> int:
        return 4 * F


CARD = ReGLUCard(activation="relu", cost=Cost(2, "relu of gate, times up"))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("_components", "_cards"):
        monkeypatch.setattr(registry, table, getattr(registry, table).copy())


@pytest.fixture
def _with_card(_own_registry: None) -> None:
    registry.register("ffn_type", "reglu", ReGLU, card=CARD)


@pytest.fixture
def _without_card(_own_registry: None) -> None:
    registry.register("ffn_type", "reglu", ReGLU)


def model_of(bias: bool = False) -> ModelConfig:
    return ModelConfig(
        n_layer=2, n_head=4, n_embd=24, d_ff=17, block_size=6, vocab_size=50, ffn_type="reglu", bias=bias,
        attention_backend="manual",
    )  # fmt: skip


@pytest.mark.usefixtures("_with_card")
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_and_flops_are_those_of_the_built_model(bias: bool) -> None:
    model = model_of(bias)
    gpt, tokens = GPT(model), torch.zeros(3, 6, dtype=torch.int64)
    assert flops.parameters(model).total == sum(p.numel() for p in gpt.parameters())
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, tokens).backward()
    assert counter.get_total_flops() == 3 * flops.flops_per_token(model, "palm").training
    ffn = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith(".ffn"))
    assert ffn == 3 * 3 * flops.flops_per_token(model).ffn


@pytest.mark.usefixtures("_with_card")
def test_it_has_a_plan_and_bench_entries() -> None:
    model = model_of()
    config = Config(model=model, system=SystemConfig(compile=False))
    planned = plan.plan(config, plan.find_gpu("H200"))
    assert planned.fits
    assert planned.mfu is not None
    standard = Config(model=ModelConfig(**{**model.__dict__, "ffn_type": "standard"}), system=config.system)
    more = memory.saved_bytes(config, "none") - memory.saved_bytes(standard, "none")
    assert more == model.n_layer * (4 - 2) * 17 * 2  # bfloat16
    sizes = {gemm.name: (gemm.m, gemm.n, gemm.k, gemm.count) for gemm in gemm_list(model, 3)}
    assert sizes["ffn_gate_up_forward"] == (18, 34, 24, 2)
    assert sizes["ffn_out_wgrad"] == (24, 17, 18, 2)
    rates = dict.fromkeys(("gemm_flop_s", "attention_forward_flop_s", "attention_backward_flop_s", "copy_byte_s"), 1e12)
    assert serial_ms(config, rates)["gemm"] > serial_ms(standard, rates)["gemm"]
    assert "flops_per_token" in theoretical(model, None, 1)


@pytest.mark.usefixtures("_with_card")
def test_the_table_shows_its_cost_and_its_activation() -> None:
    counts = flops_command.count_all(Config(model=model_of()))
    assert counts["model"]["activation"] == "relu"
    assert counts["vector_flops"]["forward_parts"]["activation"] == 2 * 2 * 17
    assert any("reglu: relu of gate, times up" in line for line in report_lines(counts))
    assert ModelConfig(n_embd=24, ffn_type="reglu").ffn_width == 4 * 24
    notes = Config(model=ModelConfig(ffn_type="reglu", activation="silu")).notes()
    assert "activation = 'silu' has no effect: ffn_type = 'reglu' applies relu" in notes


@pytest.mark.usefixtures("_without_card")
def test_without_a_card_nothing_is_counted_and_one_sentence_says_why() -> None:
    config = Config(model=model_of())
    assert flops.uncountable_flops(config.model) == flops.uncountable_parameters(config.model) == REASON
    for count in (flops.parameters, flops.flops_per_token, flops.vector_flops, flops.bytes_moved):
        with pytest.raises(ValueError, match=REASON):
            count(config.model)
    with pytest.raises(ValueError, match=REASON):
        memory.footprint(config)
    with pytest.raises(ValueError, match=f"no plan: {REASON}"):
        plan.plan(config, plan.find_gpu("H200"))
    with pytest.raises(ConfigError, match=f"no plan: {REASON}"):
        plan_command(["--ffn_type=reglu", "--gpu=H200"])
    with pytest.raises(ConfigError, match=f"the GEMMs of the model are not known: {REASON}"):
        gemm_list(config.model, 3)
    text = "\n".join(report_lines(flops_command.count_all(config)))
    assert text.count(f"not counted: {REASON}") == 4 + len(flops_command._rows())
    assert "flops_per_token" not in theoretical(config.model, None, 1)
    assert ModelConfig(n_embd=24, ffn_type="reglu").ffn_width == 4 * 24


@pytest.mark.usefixtures("_without_card")
def test_a_run_says_that_it_has_no_mfu(corpus: Path, tmp_path: Path) -> None:
    assert run(corpus, tmp_path, "--ffn_type=reglu", "--max_iters=1", "--sample_tokens=0", "--eval_iters=1") == 0
    assert f"no MFU: {REASON}" in run_log(tmp_path)["startup_info"]["notes"]


def test_a_backend_without_a_card_has_flops_and_no_plan() -> None:
    registry.register("attention_backend", "mine", registry.component("attention_backend", "manual"))
    config = Config(model=ModelConfig(attention_backend="mine"))
    assert flops.flops_per_token(config.model) == flops.flops_per_token(ModelConfig())
    reason = plan.unplannable(config, plan.find_gpu("H200"))
    assert reason == "component attention_backend = 'mine' has no card"
