"""Change a model, provably: every operation is a transaction, checks itself and returns a record."""

from .freeze import freeze, unfreeze
from .recalibrate import Recalibration, recalibrate
from .record import Record

__all__ = ["Recalibration", "Record", "freeze", "recalibrate", "unfreeze"]
