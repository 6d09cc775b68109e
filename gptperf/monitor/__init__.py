"""Measures a run and shows it: throughput, memory, gradients, stability, console, journal and trackers."""
