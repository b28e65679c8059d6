"""Functions on torch tensors: check the arguments, resolve the axes, call the kernel."""

from .batch import batch_norm

__all__ = ["batch_norm"]
