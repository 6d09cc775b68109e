"""Compares runs at equal tokens, and architectures by their facts."""
