"""What surgery and doctor both stand on: find a model's normalization layers, run it on batches, keep its state."""

from .batches import Call, iterate, run, sample_count
from .explain import ModelExplanation, explain
from .hold import hold_statistics
from .layers import NormLayer, norm_layers
from .snapshot import Snapshot, fingerprint, preserved

__all__ = [
    "Call",
    "ModelExplanation",
    "NormLayer",
    "Snapshot",
    "explain",
    "fingerprint",
    "hold_statistics",
    "iterate",
    "norm_layers",
    "preserved",
    "run",
    "sample_count",
]
