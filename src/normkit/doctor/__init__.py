"""Look at a model and change nothing: probes, checks, findings. A finding names its remedy as text."""

from .examine import diagnose
from .findings import Diagnosis, Finding, LayerRow
from .ledger import Ledger, Write
from .watch import watch

__all__ = ["Diagnosis", "Finding", "LayerRow", "Ledger", "Write", "diagnose", "watch"]
