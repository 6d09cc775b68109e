"""GPT pretraining on NVIDIA GPUs: one TOML file, fused Triton kernels, exact MFU."""

__version__ = "0.1.0"
