"""Benchmarks: both sides on one machine in one run."""
