"""The mathematics in NumPy float64: slow, short, and the judge of every other implementation."""

from .batch import (
    Backward,
    Forward,
    InferenceBackward,
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
)
from .batch_double import DoubleBackward, batch_norm_double_backward
from .statistics import (
    Running,
    Statistics,
    averaged_statistics,
    batch_statistics,
    cumulative_update,
    merge_statistics,
    population_statistics,
    running_update,
)

__all__ = [
    "Backward",
    "DoubleBackward",
    "Forward",
    "InferenceBackward",
    "Running",
    "Statistics",
    "averaged_statistics",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_statistics",
    "cumulative_update",
    "merge_statistics",
    "population_statistics",
    "running_update",
]
