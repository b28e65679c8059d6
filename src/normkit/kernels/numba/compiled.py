"""Kernels compiled at first use, for one element type, activation and residual, and kept on disk."""

import contextlib
import functools
import hashlib
import marshal
import sys
from collections.abc import Callable
from typing import Any

from numba import types
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from .channels import channels_last as channels_last_channels
from .channels import channels_last_backward, steps
from .channels import contiguous as contiguous_channels
from .kernel_cache import KernelCache
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
    "channels_last.backward": channels_last_backward.backward,
    "channels_last.backward_partial": channels_last_backward.backward_partial,
    "channels_last.finish_sums": channels_last_backward.finish_sums,
    "channels_last.apply_backward": channels_last_backward.apply_backward,
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
    *(
        f"channels/{name}"
        for name in ("columns", "finish", "contiguous", "channels_last", "channels_last_backward", "steps")
    ),
    *(f"samples/{name}" for name in ("slots", "arguments", "statistics", "elementwise", "contiguous", "channels_last")),
)


@functools.cache
def _revision() -> str:
    """A word for the source of every kernel: Numba would look only at the file a kernel stands in."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(_source(f"{__package__}.{name.replace('/', '.')}"))
    return digest.hexdigest()[:16]


def _source(name: str) -> bytes:
    """Return what a module was loaded from: its source, or its code where that was left out or is packed away."""
    spec = sys.modules[name].__spec__
    assert spec is not None
    loader: Any = spec.loader
    with contextlib.suppress(OSError, AttributeError):
        return bytes(loader.get_data(spec.origin))
    return marshal.dumps(loader.get_code(name))


class _Kernel(CFunc):
    """A Numba ``cfunc`` with a cache of ours."""

    def __init__(self, name: str, signature: Any, cache: KernelCache) -> None:
        super().__init__(_KERNELS[name], normalize_signature(signature), {}, {"error_model": "numpy"})
        self._cache = cache
        self.compile()


@functools.cache
def _kernel(name: str, element: str, activation: str | None, residual: bool) -> Any:
    signature = types.void(types.int64, types.int64, Arguments(element, activation, residual, _revision()))
    parts = [name, element, *([activation] if activation else []), *(["residual"] if residual else [])]
    return _Kernel(name, signature, KernelCache("-".join(parts), _revision()))


def address(name: str, element: str, activation: str | None, residual: bool) -> int:
    """Return the machine address of a kernel, compiled on the way where it is not cached."""
    found: int = _kernel(name, element, activation, residual).address
    return found
