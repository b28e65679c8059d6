"""Kernels compiled at first use, for one element type, activation and residual, and cached on disk by Numba."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, types

from . import planes, rows, sample_columns, sample_planes, sample_rows, steps
from .simd import Arguments

__all__ = ["address"]

_KERNELS: dict[str, Callable[..., None]] = {
    "planes.forward": planes.forward,
    "planes.partial": planes.partial,
    "planes.finish": steps.finish,
    "planes.apply": planes.apply,
    "planes.backward": planes.backward,
    "planes.backward_partial": planes.backward_partial,
    "planes.finish_sums": steps.finish_sums,
    "planes.apply_backward": planes.apply_backward,
    "rows.forward": rows.forward,
    "rows.partial": rows.partial,
    "rows.finish": rows.finish,
    "rows.apply": rows.apply,
    "rows.backward": rows.backward,
    "rows.backward_partial": rows.backward_partial,
    "rows.finish_sums": rows.finish_sums,
    "rows.apply_backward": rows.apply_backward,
    "stored": steps.stored,
    "given": steps.given,
    "given_sums": steps.given_sums,
    "sample_rows.forward": sample_rows.forward,
    "sample_rows.backward": sample_rows.backward,
    "sample_rows.total": sample_rows.total,
    "sample_planes.forward": sample_planes.forward,
    "sample_planes.backward": sample_planes.backward,
    "sample_columns.forward": sample_columns.forward,
    "sample_columns.backward": sample_columns.backward,
}
_SOURCES = (
    *("simd", "arguments", "activations", "slots", "moments", "channel_vectors", "planes", "rows", "steps"),
    *("sample_slots", "sample_arguments", "sample_statistics", "sample_rows", "sample_planes", "sample_columns"),
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
