"""Runs or architectures side by side."""
