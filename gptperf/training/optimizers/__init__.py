"""Optimizers over flat buckets, and the learning-rate schedule."""
