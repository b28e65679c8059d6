"""The seventeen checks, in the order of the report. A new check is one function and one row here."""

from ..examination import Check
from .averaging import AVERAGING_CHECKS
from .batches import BATCH_CHECKS
from .dead import DEAD_CHECKS
from .gaps import GAP_CHECKS
from .graph import GRAPH_CHECKS
from .mixtures import MIXTURE_CHECKS
from .modes import MODE_CHECKS
from .padding import PADDING_CHECKS
from .populations import POPULATION_CHECKS
from .ranks import RANK_CHECKS
from .state import STATE_CHECKS
from .training import TRAINING_CHECKS

__all__ = ["CHECKS", "CHECK_NAMES"]

_ORDER = (
    "nonfinite",
    "never-updated",
    "mode",
    "drift",
    "gap",
    "batch-dependence",
    "freeze-leak",
    "effective-n",
    "ema-window",
    "update-count",
    "rank-agreement",
    "dead-channel",
    "precision",
    "padding",
    "mixed-populations",
    "fold-ready",
    "optimizer",
)

CHECKS: tuple[Check, ...] = tuple(
    sorted(
        (
            *STATE_CHECKS,
            *DEAD_CHECKS,
            *MODE_CHECKS,
            *PADDING_CHECKS,
            *AVERAGING_CHECKS,
            *POPULATION_CHECKS,
            *MIXTURE_CHECKS,
            *BATCH_CHECKS,
            *GAP_CHECKS,
            *GRAPH_CHECKS,
            *RANK_CHECKS,
            *TRAINING_CHECKS,
        ),
        key=lambda check: _ORDER.index(check.name),
    )
)

CHECK_NAMES: tuple[str, ...] = tuple(check.name for check in CHECKS)
