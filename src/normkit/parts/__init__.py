"""One batch in parts: micro-batches that are the large batch, and the ranks of a distributed run in one process."""

from .accumulate import accumulate
from .simulate import Simulation, simulate

__all__ = ["Simulation", "accumulate", "simulate"]
