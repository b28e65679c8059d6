"""Change a model, provably: every operation is a transaction, checks itself and returns a record."""

from .convert import Conversion, convert
from .fold import Folding, fold
from .freeze import freeze, unfreeze
from .mask_padding import mask_padding
from .merge import merge_states
from .param_groups import param_groups
from .port import Ported, port_state
from .recalibrate import Recalibration, recalibrate
from .record import Record
from .repair import Repair, repair

__all__ = [
    "Conversion",
    "Folding",
    "Ported",
    "Recalibration",
    "Record",
    "Repair",
    "convert",
    "fold",
    "freeze",
    "mask_padding",
    "merge_states",
    "param_groups",
    "port_state",
    "recalibrate",
    "repair",
    "unfreeze",
]
