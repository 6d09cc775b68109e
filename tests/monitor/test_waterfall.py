"""The parts of a step and the waterfall, on kernels whose sums are known."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptperf import flops
from gptperf.config import Config, ModelConfig, TrainConfig
from gptperf.monitor import waterfall
from gptperf.monitor.trace import Kernel
from gptperf.monitor.waterfall import PARTS

GEMM, ATTENTION = "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"
NCCL, UNKNOWN = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "somebody_elses"
NAMES = {
    GEMM: "gemm",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "gemm",
    "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn": "gemm",
    "triton_tem_fused_mm_3": "gemm",
    ATTENTION: "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, cutlass::half_t>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)": "attention",
    "_norm_forward_kernel": "memory_bound",
    "_norm_backward_kernel": "memory_bound",
    "_rope_backward_kernel": "memory_bound",
    "_activation_forward_kernel": "memory_bound",
    "_cross_entropy_kernel": "memory_bound",
    "_column_sum_kernel": "memory_bound",
    "_scale_kernel": "memory_bound",
    "triton_poi_fused__unsafe_view_mul_silu_split_3": "memory_bound",
    "triton_poi_fused__scaled_dot_product_flash_attention_5": "memory_bound",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "memory_bound",
    "Memset (Device)": "memory_bound",
    "Memcpy DtoD (Device -> Device)": "memory_bound",
    "_adamw_kernel": "optimizer",
    "_accumulate_kernel": "optimizer",
    "triton_poi_fused_add_copy_copy__div_eq_lerp_mul_rsub_sqrt_sub_unbind_where_0": "optimizer",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::TensorListMetadata<2>>": "optimizer",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>": "optimizer",
    "Memcpy HtoD (Pinned -> Device)": "loader",
    NCCL: "communication",
    UNKNOWN: "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_known_by_their_names(name: str) -> None:
    assert waterfall.classify(name) == NAMES[name]


def test_every_moment_belongs_to_one_part() -> None:
    kernels = [
        Kernel(GEMM, 0, 1000),
        Kernel("_norm_forward_kernel", 1000, 500),
        Kernel(NCCL, 500, 2000, stream=2),  # until 2500: 1000 hidden by computation, 1000 alone
        Kernel("_adamw_kernel", 3000, 400),  # after a gap of 500
        Kernel(UNKNOWN, 3400, 100),
        Kernel(ATTENTION, 3500, 500),
    ]
    found = waterfall.breakdown(kernels, steps=2)
    assert found.step_ms == 2.0
    expected = {
        "gemm": 0.5,
        "attention": 0.25,
        "memory_bound": 0.25,
        "optimizer": 0.2,
        "other": 0.05,
        "loader": 0.0,
        "communication": 0.5,
        "host_gaps": 0.25,
    }
    assert found.parts_ms == pytest.approx(expected)
    assert found.hidden_communication_ms == pytest.approx(0.5)
    assert found.unknown_ms == pytest.approx({UNKNOWN: 0.05})


def test_a_wait_for_the_loader_is_the_loaders_only_while_the_device_is_idle() -> None:
    kernels = [Kernel(GEMM, 0, 1000), Kernel(GEMM, 2000, 1000)]
    found = waterfall.breakdown(kernels, 1, waits=[(500, 1600), (2500, 2600)])
    assert found.parts_ms["loader"] == pytest.approx(0.6)
    assert found.parts_ms["host_gaps"] == pytest.approx(0.4)
    assert found.parts_ms["gemm"] == pytest.approx(2.0)


KERNELS = st.lists(
    st.builds(
        Kernel,
        name=st.sampled_from(list(NAMES)),
        start_us=st.integers(0, 60).map(float),
        duration_us=st.integers(0, 25).map(float),
    ),
    min_size=1,
    max_size=25,
).filter(lambda kernels: max(k.interval[1] for k in kernels) > min(k.start_us for k in kernels))


@given(kernels=KERNELS, waits=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=3))
@settings(max_examples=150, deadline=None)
def test_parts_are_those_of_a_clock_that_ticks(kernels: list[Kernel], waits: list[tuple[int, int]]) -> None:
    """The same parts as a count of every microsecond."""
    intervals = [(float(begin), float(begin + length)) for begin, length in waits]
    found = waterfall.breakdown(kernels, 1, intervals)
    begin, end = min(k.start_us for k in kernels), max(k.interval[1] for k in kernels)
    counted = dict.fromkeys(PARTS, 0)
    for tick in range(int(begin), int(end)):
        running = {waterfall.classify(k.name) for k in kernels if k.start_us <= tick < k.interval[1]}
        waiting = "loader" if any(a <= tick < b for a, b in intervals) else "host_gaps"
        counted[next((part for part in PARTS if part in running), waiting)] += 1
    assert found.parts_ms == pytest.approx({part: ticks / 1e3 for part, ticks in counted.items()})
    assert sum(found.parts_ms.values()) == pytest.approx(found.step_ms)


def test_the_waterfall_ends_at_the_mfu() -> None:
    """1 ms of GEMM and 0.5 ms of attention at the peak, in a step of 4 ms: 37.5%."""
    kernels = [Kernel(GEMM, 0, 2000), Kernel(ATTENTION, 2000, 1000), Kernel("_norm_forward_kernel", 3000, 600)]
    kernels.append(Kernel("_adamw_kernel", 3800, 200))
    found = waterfall.breakdown(kernels, 1)
    fall = waterfall.waterfall(found, (1e12, 0.5e12), peak_flop_s=1e15, timed_ms=4.0)
    lost = {"gemm": 25.0, "attention": 12.5, "memory_bound": 15.0, "optimizer": 5.0, "host_gaps": 5.0}
    assert fall.lost_points == pytest.approx({part: lost.get(part, 0.0) for part in PARTS})
    assert fall.mfu_percent == pytest.approx(37.5)
    assert fall.mfu_percent + sum(fall.lost_points.values()) == pytest.approx(100)
    assert fall.closes
    assert not waterfall.waterfall(found, (1e12, 0.5e12), 1e15, timed_ms=3.8).closes  # 39.5% timed, 2 points off
    wrong = waterfall.waterfall(found, (4e12, 0.5e12), 1e15, timed_ms=4.0)
    assert wrong.lost_points["gemm"] < 0  # faster than the peak, so the peak is not that of this card


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        waterfall.breakdown([], 1)


def test_flops_of_a_step_are_those_of_the_mfu() -> None:
    config = Config(model=ModelConfig(), train=TrainConfig(batch_size=4, gradient_accumulation_steps=2))
    gemm, attention = waterfall.step_flops(config)
    per_token = float(flops.flops_per_token(config.model).training_per_token)
    assert gemm + attention == pytest.approx(per_token * config.tokens_per_iter)
    longer = dataclasses.replace(config, model=dataclasses.replace(config.model, block_size=2048))
    assert waterfall.step_flops(longer)[0] == pytest.approx(2 * gemm)  # twice the tokens
    assert waterfall.step_flops(longer)[1] == pytest.approx(4 * attention, rel=1e-3)  # T (T + 1) / 2 pairs
    assert waterfall.step_flops(config, num_gpus=2) == pytest.approx((gemm / 2, attention / 2))
    pairs = config.tokens_per_iter / 2 * config.model.n_layer  # every token attends to itself alone
    alone = 3 * 2 * 2 * config.model.n_embd * pairs
    assert waterfall.step_flops(config, 2, pairs) == pytest.approx((gemm / 2, alone))
