"""Look at a model and change nothing: probes, checks, findings. A finding names its remedy as text."""

from .examine import diagnose
from .findings import Diagnosis, Finding, LayerRow

__all__ = ["Diagnosis", "Finding", "LayerRow", "diagnose"]
