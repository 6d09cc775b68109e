"""Parameters, FLOPs and bytes of a model, counted from its configuration."""

from gptperf.flops.count import (
    CONVENTIONS,
    RECOMPUTE,
    BytesMoved,
    Convention,
    FlopCount,
    ParameterCount,
    VectorCount,
    attention_ffn_ratio,
    bytes_moved,
    flops_per_token,
    parameters,
    uncountable_flops,
    uncountable_parameters,
    uncountable_vector_flops,
    vector_flops,
)

__all__ = [
    "BytesMoved",
    "CONVENTIONS",
    "Convention",
    "FlopCount",
    "ParameterCount",
    "RECOMPUTE",
    "VectorCount",
    "attention_ffn_ratio",
    "bytes_moved",
    "flops_per_token",
    "parameters",
    "uncountable_flops",
    "uncountable_parameters",
    "uncountable_vector_flops",
    "vector_flops",
]
