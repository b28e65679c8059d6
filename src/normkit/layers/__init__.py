"""Normalization as ``torch.nn`` modules: state only, no arithmetic."""

from .adaptive import AdaptiveInstanceNorm
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from .batch_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from .group import GroupNorm
from .instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer import LayerNorm, SampleLayerNorm
from .masked import MaskedBatchNorm1d
from .quantization import enter_tables
from .renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .response import LocalResponseNorm
from .rms import RMSNorm
from .sync import SyncBatchNorm
from .weight import WeightNorm, WeightStandardization
from .whitening import WhiteningBatchNorm1d, WhiteningBatchNorm2d, WhiteningBatchNorm3d

__all__ = [
    "AdaptiveInstanceNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LocalResponseNorm",
    "MaskedBatchNorm1d",
    "RMSNorm",
    "SampleLayerNorm",
    "SyncBatchNorm",
    "WeightNorm",
    "WeightStandardization",
    "WhiteningBatchNorm1d",
    "WhiteningBatchNorm2d",
    "WhiteningBatchNorm3d",
]

enter_tables()
