"""Change a model, provably: every operation is a transaction, checks itself and returns a record."""

from .fold import Folding, fold
from .freeze import freeze, unfreeze
from .recalibrate import Recalibration, recalibrate
from .record import Record

__all__ = ["Folding", "Recalibration", "Record", "fold", "freeze", "recalibrate", "unfreeze"]
