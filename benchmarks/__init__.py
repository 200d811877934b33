"""Benchmarks of the kernels, against the bare products and against peers."""
