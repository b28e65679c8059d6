"""The kernels of norms whose statistics belong to a channel, by name."""

from ..compiled import SHARED, Kernels
from . import channels_last, channels_last_backward, contiguous, steps

__all__ = ["KERNELS"]

_OWN = ("columns", "finish", "contiguous", "channels_last", "channels_last_backward", "steps")

KERNELS = Kernels(
    functions={
        "contiguous.forward": contiguous.forward,
        "contiguous.partial": contiguous.partial,
        "contiguous.finish": steps.finish,
        "contiguous.apply": contiguous.apply,
        "contiguous.backward": contiguous.backward,
        "contiguous.backward_partial": contiguous.backward_partial,
        "contiguous.finish_sums": steps.finish_sums,
        "contiguous.apply_backward": contiguous.apply_backward,
        "channels_last.forward": channels_last.forward,
        "channels_last.partial": channels_last.partial,
        "channels_last.finish": channels_last.finish,
        "channels_last.apply": channels_last.apply,
        "channels_last.backward": channels_last_backward.backward,
        "channels_last.backward_partial": channels_last_backward.backward_partial,
        "channels_last.finish_sums": channels_last_backward.finish_sums,
        "channels_last.apply_backward": channels_last_backward.apply_backward,
        "stored": steps.stored,
        "given": steps.given,
        "given_sums": steps.given_sums,
    },
    sources=(*SHARED, *(f"channels.{name}" for name in _OWN)),
)
