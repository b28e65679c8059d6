"""Functions on torch tensors: check the arguments, resolve the axes, call the kernel."""

from ..kernels.repeated import first_forward
from .adaptive import adaptive_instance_norm
from .batch import batch_norm
from .ghost import ghost_batch_norm
from .group import group_norm
from .instance import instance_norm
from .layer import layer_norm
from .masked import masked_batch_norm
from .renorm import batch_renorm
from .response import local_response_norm
from .rms import rms_norm
from .sync import sync_batch_norm
from .weight import weight_norm, weight_standardization
from .whitening import whitening_batch_norm

__all__ = [
    "adaptive_instance_norm",
    "batch_norm",
    "batch_renorm",
    "first_forward",
    "ghost_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "masked_batch_norm",
    "rms_norm",
    "sync_batch_norm",
    "weight_norm",
    "weight_standardization",
    "whitening_batch_norm",
]
