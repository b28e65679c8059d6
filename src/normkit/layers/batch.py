"""Batch normalization as modules: torch's classes, with our functions below them."""

from torch import nn

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalization of ``(N, C)`` or ``(N, C, L)``."""


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization of ``(N, C, H, W)``."""


class BatchNorm3d(nn.BatchNorm3d):
    """Batch normalization of ``(N, C, D, H, W)``."""
