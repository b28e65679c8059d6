"""What surgery and doctor both stand on: find a model's normalization layers, run it on batches, keep its state."""

from .apart import without_exchange
from .batches import Call, iterate, run, sample_count
from .evaluation import Affine, affine_in_evaluation
from .explain import ModelExplanation, explain
from .forms import NormForm, register_norm
from .hold import hold_statistics
from .layers import NormLayer, norm_layers
from .programs import eagerly, refuse_lazy, refuse_meta, refuse_programs, unwrapped
from .snapshot import Snapshot, fingerprint, preserved

__all__ = [
    "Affine",
    "Call",
    "ModelExplanation",
    "NormForm",
    "NormLayer",
    "Snapshot",
    "affine_in_evaluation",
    "eagerly",
    "explain",
    "fingerprint",
    "hold_statistics",
    "iterate",
    "norm_layers",
    "preserved",
    "refuse_lazy",
    "refuse_meta",
    "refuse_programs",
    "register_norm",
    "run",
    "sample_count",
    "unwrapped",
    "without_exchange",
]
