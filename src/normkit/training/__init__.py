"""Where training happens: ledger and cures in a loop of one's own, in Lightning, in transformers' Trainer."""

from .accumulate import accumulate
from .callbacks import lightning_callback, trainer_callback
from .care import Care, Moment
from .simulate import Simulation, simulate

__all__ = ["Care", "Moment", "Simulation", "accumulate", "lightning_callback", "simulate", "trainer_callback"]
