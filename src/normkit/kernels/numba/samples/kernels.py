"""The kernels of norms whose statistics belong to a sample, by name."""

from ..compiled import SHARED, Kernels
from . import channels_last, contiguous, elementwise

__all__ = ["KERNELS"]

# Walks over rows and columns are shared with the norms whose statistics belong to a channel.
_OF_CHANNELS = ("columns", "finish", "contiguous", "channels_last", "channels_last_backward")
_OWN = ("slots", "arguments", "statistics", "elementwise", "contiguous", "channels_last")

KERNELS = Kernels(
    functions={
        "samples.elementwise.forward": elementwise.forward,
        "samples.elementwise.backward": elementwise.backward,
        "samples.elementwise.total": elementwise.total,
        "samples.contiguous.forward": contiguous.forward,
        "samples.contiguous.backward": contiguous.backward,
        "samples.channels_last.forward": channels_last.forward,
        "samples.channels_last.backward": channels_last.backward,
    },
    sources=(*SHARED, *(f"channels.{name}" for name in _OF_CHANNELS), *(f"samples.{name}" for name in _OWN)),
)
