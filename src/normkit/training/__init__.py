"""Where training happens: ledger and cures in a loop of one's own, in Lightning, in transformers' Trainer."""

from .callbacks import lightning_callback, trainer_callback
from .care import Care, Moment

__all__ = ["Care", "Moment", "lightning_callback", "trainer_callback"]
