"""What surgery and doctor both stand on: find a model's normalization layers, run it on batches, keep its state."""

from .batches import Call, iterate, run, sample_count
from .layers import NormLayer, norm_layers
from .snapshot import Snapshot, fingerprint, preserved

__all__ = [
    "Call",
    "NormLayer",
    "Snapshot",
    "fingerprint",
    "iterate",
    "norm_layers",
    "preserved",
    "run",
    "sample_count",
]
