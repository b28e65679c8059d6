"""Functions on torch tensors: check the arguments, resolve the axes, call the kernel."""
