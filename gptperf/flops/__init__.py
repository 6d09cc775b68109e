"""Counts the parameters, FLOPs and bytes of a model from its configuration. No module here loads torch."""

from gptperf.flops.count import (
    CONVENTIONS,
    RECOMPUTE,
    Convention,
    FlopCount,
    attended_pairs,
    attention_ffn_ratio,
    flops_per_token,
)
from gptperf.flops.elementwise import VectorCount, uncountable_vector_flops, vector_flops
from gptperf.flops.matmuls import uncountable_flops
from gptperf.flops.parameter_count import ParameterCount, parameters, uncountable_parameters
from gptperf.flops.traffic import BytesMoved, bytes_moved

__all__ = [
    "CONVENTIONS",
    "RECOMPUTE",
    "BytesMoved",
    "Convention",
    "FlopCount",
    "ParameterCount",
    "VectorCount",
    "attended_pairs",
    "attention_ffn_ratio",
    "bytes_moved",
    "flops_per_token",
    "parameters",
    "uncountable_flops",
    "uncountable_parameters",
    "uncountable_vector_flops",
    "vector_flops",
]
