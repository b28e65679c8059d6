"""Findings and results as pages, figures and tables."""

from ..extras import require_lab

require_lab(__name__)
