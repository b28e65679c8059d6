"""The mathematics in NumPy float64: slow, short, and the judge of every other implementation."""

from .adaptive import AdaptiveBackward, AdaptiveForward, adaptive_instance_norm, adaptive_instance_norm_backward
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
from .ghost import GhostBackward, GhostForward, ghost_batch_norm, ghost_batch_norm_backward, ghost_sizes
from .group import group_norm, group_norm_backward
from .instance import instance_norm, instance_norm_backward, instance_statistics
from .layer import layer_norm, layer_norm_backward
from .masked import MaskedBackward, MaskedForward, masked_batch_norm, masked_batch_norm_backward
from .renorm import RenormForward, batch_renorm, batch_renorm_backward
from .response import ResponseBackward, ResponseForward, local_response_norm, local_response_norm_backward
from .rms import RMSBackward, RMSForward, rms_norm, rms_norm_backward
from .standardize import SampleBackward, SampleForward
from .statistics import (
    Running,
    Statistics,
    averaged_statistics,
    batch_statistics,
    cumulative_update,
    debiased_update,
    merge_statistics,
    population_statistics,
    running_update,
)
from .weight import (
    WeightBackward,
    WeightForward,
    weight_norm,
    weight_norm_backward,
    weight_standardization,
    weight_standardization_backward,
)
from .whitening import (
    WhiteningBackward,
    WhiteningForward,
    whitening_batch_norm,
    whitening_batch_norm_backward,
    whitening_batch_norm_inference,
)

__all__ = [
    "AdaptiveBackward",
    "AdaptiveForward",
    "Backward",
    "DoubleBackward",
    "Forward",
    "GhostBackward",
    "GhostForward",
    "InferenceBackward",
    "MaskedBackward",
    "MaskedForward",
    "RMSBackward",
    "RMSForward",
    "RenormForward",
    "ResponseBackward",
    "ResponseForward",
    "Running",
    "SampleBackward",
    "SampleForward",
    "Statistics",
    "WeightBackward",
    "WeightForward",
    "WhiteningBackward",
    "WhiteningForward",
    "adaptive_instance_norm",
    "adaptive_instance_norm_backward",
    "averaged_statistics",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_renorm",
    "batch_renorm_backward",
    "batch_statistics",
    "cumulative_update",
    "debiased_update",
    "ghost_batch_norm",
    "ghost_batch_norm_backward",
    "ghost_sizes",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "instance_statistics",
    "layer_norm",
    "layer_norm_backward",
    "local_response_norm",
    "local_response_norm_backward",
    "masked_batch_norm",
    "masked_batch_norm_backward",
    "merge_statistics",
    "population_statistics",
    "rms_norm",
    "rms_norm_backward",
    "running_update",
    "weight_norm",
    "weight_norm_backward",
    "weight_standardization",
    "weight_standardization_backward",
    "whitening_batch_norm",
    "whitening_batch_norm_backward",
    "whitening_batch_norm_inference",
]
