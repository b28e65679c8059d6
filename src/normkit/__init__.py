"""Batch normalization and its family for PyTorch, from the equation to the deployed model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import torch_versions

torch_versions.check()

from . import functional, layers, renderers  # noqa: E402  a torch that lacks a name is told before a module fails to find it
from .kernels.dispatch import use_backend  # noqa: E402
from .layers import (  # noqa: E402
    AdaptiveInstanceNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LocalResponseNorm,
    MaskedBatchNorm1d,
    RMSNorm,
    SampleLayerNorm,
    SyncBatchNorm,
    WeightNorm,
    WeightStandardization,
    WhiteningBatchNorm1d,
    WhiteningBatchNorm2d,
    WhiteningBatchNorm3d,
)

if TYPE_CHECKING:
    from .anatomy.explain import explain
    from .anatomy.forms import register_norm
    from .anatomy.hold import hold_statistics
    from .doctor.examine import diagnose
    from .doctor.watch import watch
    from .surgery.convert import convert
    from .surgery.fold import fold
    from .surgery.freeze import freeze, unfreeze
    from .surgery.mask_padding import mask_padding
    from .surgery.merge import merge_states
    from .surgery.param_groups import param_groups
    from .surgery.port import port_state
    from .surgery.recalibrate import recalibrate
    from .surgery.repair import repair
    from .training.accumulate import accumulate
    from .training.simulate import simulate

__version__ = "0.1.0"

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
    "accumulate",
    "convert",
    "diagnose",
    "explain",
    "fold",
    "freeze",
    "functional",
    "hold_statistics",
    "layers",
    "mask_padding",
    "merge_states",
    "param_groups",
    "port_state",
    "recalibrate",
    "register_norm",
    "repair",
    "simulate",
    "unfreeze",
    "use_backend",
    "watch",
]

# Public names of the rooms above the layers, imported when first asked for: `import normkit` stays light.
_ROOMS = {
    "accumulate": "training",
    "convert": "surgery",
    "diagnose": "doctor",
    "explain": "anatomy",
    "fold": "surgery",
    "freeze": "surgery",
    "hold_statistics": "anatomy",
    "mask_padding": "surgery",
    "merge_states": "surgery",
    "param_groups": "surgery",
    "port_state": "surgery",
    "recalibrate": "surgery",
    "register_norm": "anatomy",
    "repair": "surgery",
    "simulate": "training",
    "unfreeze": "surgery",
    "watch": "doctor",
}


def __getattr__(name: str) -> Any:
    """Import the room that a public name stands in."""
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, those not yet imported among them."""
    return __all__


def _page(*shown: object) -> str:
    """Draw a diagnosis as a page: the room that does it needs the extra ``lab`` and is imported when it is asked."""
    page: str = import_module(".report.diagnosis", __name__).render_diagnosis(*shown)
    return page


renderers.register("diagnosis as a page", _page)
