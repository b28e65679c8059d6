"""The quick way to the numba kernels: autograd nodes in C++, built where a compiler is found, never needed."""
