"""Kernels compiled at first use, for one element type, activation and residual, and kept on disk."""

import contextlib
import functools
import hashlib
import marshal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numba import types
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from .kernel_cache import KernelCache
from .pipeline import KernelCompiler
from .vectors import Arguments

__all__ = ["SHARED", "Kernels"]

# The modules that the kernels of every room are made of, besides its own.
SHARED = ("pipeline", "processor", "vectors", "arguments", "activations", "slots", "moments")


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels of one room, each compiled when it is first asked for.

    Attributes:
        functions: each kernel by the name it is called and kept by.
        sources: the modules they are made of, as they are named within this package.
    """

    functions: Mapping[str, Callable[..., None]]
    sources: tuple[str, ...]

    @functools.cached_property
    def revision(self) -> str:
        """A word for the source of every kernel: Numba would look only at the file a kernel stands in."""
        digest = hashlib.sha256()
        for name in self.sources:
            digest.update(_source(f"{__package__}.{name}"))
        return digest.hexdigest()[:16]

    def address(self, name: str, element: str, activation: str | None, residual: bool) -> int:
        """Return the machine address of a kernel, compiled on the way where it is not cached."""
        found: int = _kernel(self, name, element, activation, residual).address
        return found


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

    def __init__(self, function: Callable[..., None], signature: Any, cache: KernelCache) -> None:
        settings = {"error_model": "numpy"}
        super().__init__(function, normalize_signature(signature), {}, settings, pipeline_class=KernelCompiler)
        self._cache = cache
        self.compile()


@functools.cache
def _kernel(kernels: Kernels, name: str, element: str, activation: str | None, residual: bool) -> Any:
    signature = types.void(types.int64, types.int64, Arguments(element, activation, residual, kernels.revision))
    parts = [name, element, *([activation] if activation else []), *(["residual"] if residual else [])]
    return _Kernel(kernels.functions[name], signature, KernelCache("-".join(parts), kernels.revision))
