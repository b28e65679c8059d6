"""CPU kernels: explicit vectors, compiled by Numba, on torch's own threads."""
