"""Batch normalization and its family for PyTorch, from the equation to the deployed model.

Where to look:

- layers: `BatchNorm2d` and its kin, `GroupNorm`, `LayerNorm`, `BatchNormAct2d`, ...; as functions `functional`
- which kernel serves a call: `explain`, `use_backend`
- what is wrong with a model: `diagnose`, `watch`, `doctor`
- mend or change one: `recalibrate`, `freeze`, `unfreeze`, `fold`, `convert`, `repair`, `mask_padding`, `port_state`,
  `merge_states`, `param_groups`, `register_norm`, `hold_statistics`
- a step in micro-batches, or of many ranks in one process: `accumulate`, `simulate`
- hold a layer of one's own to its contract: `testing.check_norm_layer`
- the mathematics in NumPy, to read: `reference`
- claims put to the test: `lab`, and ``normkit lab`` on the command line

Each has a page of its own: ``help(normkit.fold)``. ``help(normkit)`` as a whole is long, because every layer lists all
that it inherits from ``torch.nn.Module``.
"""

import sys
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
    from . import anatomy as anatomy
    from . import doctor as doctor
    from . import lab as lab
    from . import parts as parts
    from . import reference as reference
    from . import surgery as surgery
    from . import testing as testing
    from . import training as training
    from .anatomy.explain import explain
    from .anatomy.forms import register_norm
    from .anatomy.hold import hold_statistics
    from .doctor.examine import diagnose
    from .doctor.planning import plan
    from .doctor.watch import watch
    from .parts.accumulate import accumulate
    from .parts.simulate import simulate
    from .surgery.convert import convert
    from .surgery.fold import fold
    from .surgery.freeze import freeze, unfreeze
    from .surgery.mask_padding import mask_padding
    from .surgery.merge import merge_states
    from .surgery.param_groups import param_groups
    from .surgery.port import port_state
    from .surgery.recalibrate import recalibrate
    from .surgery.repair import repair

__version__ = "0.2.0"

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
    "plan",
    "port_state",
    "recalibrate",
    "register_norm",
    "repair",
    "simulate",
    "unfreeze",
    "use_backend",
    "watch",
]

# Rooms that are imported when first asked for: `import normkit` stays light.
_LATER = ("anatomy", "doctor", "lab", "native", "parts", "reference", "surgery", "testing", "training")
# Public names of the rooms above the layers, likewise.
_ROOMS = {
    "accumulate": "parts",
    "convert": "surgery",
    "diagnose": "doctor",
    "explain": "anatomy",
    "fold": "surgery",
    "freeze": "surgery",
    "hold_statistics": "anatomy",
    "mask_padding": "surgery",
    "merge_states": "surgery",
    "param_groups": "surgery",
    "plan": "doctor",
    "port_state": "surgery",
    "recalibrate": "surgery",
    "register_norm": "anatomy",
    "repair": "surgery",
    "simulate": "parts",
    "unfreeze": "surgery",
    "watch": "doctor",
}


def __getattr__(name: str) -> Any:
    """Import the room that a public name stands in, or a room itself."""
    if name in _LATER:
        return import_module(f".{name}", __name__)
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    # With these two Python itself asks "Did you mean: ...?".
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    """List the public names, those not yet imported among them."""
    return [*__all__, *_LATER]


# The room that draws pages needs the extra ``lab`` and is imported when it is asked.
def _page(*shown: object) -> str:
    page: str = import_module(".report.diagnosis", __name__).render_diagnosis(*shown)
    return page


def _page_of_plan(*shown: object) -> str:
    page: str = import_module(".report.plan", __name__).render_plan(*shown)
    return page


renderers.register("diagnosis as a page", _page)
renderers.register("plan as a page", _page_of_plan)
