"""Look at a model and change nothing: probes, checks, findings. A finding names its remedy as text."""

from . import text as _text  # noqa: F401  # registers how findings are shown
from .examine import diagnose
from .findings import Diagnosis, Finding, Gap, LayerRow
from .ledger import Ledger, Write
from .planning import PlannedLayer, TrainingPlan, plan
from .watch import watch

__all__ = [
    "Diagnosis",
    "Finding",
    "Gap",
    "LayerRow",
    "Ledger",
    "PlannedLayer",
    "TrainingPlan",
    "Write",
    "diagnose",
    "plan",
    "watch",
]
