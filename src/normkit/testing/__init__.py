"""For those who write normalization layers: hold one to the contract that ours are held to."""

from .conformance import check_norm_layer
from .report import Finding, Report

__all__ = ["Finding", "Report", "check_norm_layer"]
