"""Benchmarks: how fast and how exact batch normalization is beside torch's, on this machine."""
