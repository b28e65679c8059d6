"""What surgery and doctor both stand on: find a model's normalization layers, run it on batches, keep its state."""

from .batches import Call, iterate, run, sample_count
from .evaluation import Affine, affine_in_evaluation
from .forms import NormForm, register_norm
from .hold import hold_statistics
from .layers import NormLayer, norm_layers
from .programs import refuse_programs, unwrapped
from .snapshot import Snapshot, fingerprint, preserved

__all__ = [
    "Affine",
    "Call",
    "NormForm",
    "NormLayer",
    "Snapshot",
    "affine_in_evaluation",
    "fingerprint",
    "hold_statistics",
    "iterate",
    "norm_layers",
    "preserved",
    "refuse_programs",
    "register_norm",
    "run",
    "sample_count",
    "unwrapped",
]
