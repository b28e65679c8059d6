"""The laboratory: every claim made for batch normalization put to the test, one file per claim under ``claims/``."""

from ..extras import require_lab

require_lab(__name__)
