"""Kernels compiled at first use, for one element type, activation and residual, and cached on disk by Numba."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, types

from .channels import channels_last as channels_last_channels
from .channels import contiguous as contiguous_channels
from .channels import steps
from .samples import channels_last as channels_last_samples
from .samples import contiguous as contiguous_samples
from .samples import elementwise
from .vectors import Arguments

__all__ = ["address"]

_KERNELS: dict[str, Callable[..., None]] = {
    "contiguous.forward": contiguous_channels.forward,
    "contiguous.partial": contiguous_channels.partial,
    "contiguous.finish": steps.finish,
    "contiguous.apply": contiguous_channels.apply,
    "contiguous.backward": contiguous_channels.backward,
    "contiguous.backward_partial": contiguous_channels.backward_partial,
    "contiguous.finish_sums": steps.finish_sums,
    "contiguous.apply_backward": contiguous_channels.apply_backward,
    "channels_last.forward": channels_last_channels.forward,
    "channels_last.partial": channels_last_channels.partial,
    "channels_last.finish": channels_last_channels.finish,
    "channels_last.apply": channels_last_channels.apply,
    "channels_last.backward": channels_last_channels.backward,
    "channels_last.backward_partial": channels_last_channels.backward_partial,
    "channels_last.finish_sums": channels_last_channels.finish_sums,
    "channels_last.apply_backward": channels_last_channels.apply_backward,
    "stored": steps.stored,
    "given": steps.given,
    "given_sums": steps.given_sums,
    "samples.elementwise.forward": elementwise.forward,
    "samples.elementwise.backward": elementwise.backward,
    "samples.elementwise.total": elementwise.total,
    "samples.contiguous.forward": contiguous_samples.forward,
    "samples.contiguous.backward": contiguous_samples.backward,
    "samples.channels_last.forward": channels_last_samples.forward,
    "samples.channels_last.backward": channels_last_samples.backward,
}
_SOURCES = (
    *("vectors", "arguments", "activations", "slots", "moments"),
    *(f"channels/{name}" for name in ("finish", "contiguous", "channels_last", "steps")),
    *(f"samples/{name}" for name in ("slots", "arguments", "statistics", "elementwise", "contiguous", "channels_last")),
)


@functools.cache
def _revision() -> str:
    """A word for the source of every kernel: the disk cache looks only at the file a kernel stands in."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _kernel(name: str, element: str, activation: str | None, residual: bool) -> Any:
    signature = types.void(types.int64, types.int64, Arguments(element, activation, residual, _revision()))
    return cfunc(signature, cache=True, error_model="numpy")(_KERNELS[name])


def address(name: str, element: str, activation: str | None, residual: bool) -> int:
    """Return the machine address of a kernel, compiled on the way where it is not cached."""
    found: int = _kernel(name, element, activation, residual).address
    return found
