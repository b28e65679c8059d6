"""What the reference accepts: anything that is a real array becomes float64, or an error says why it cannot."""

from math import isnan
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..axes import channel_shape
from ..errors import ArgumentError, DtypeError, ShapeError

__all__ = [
    "Array",
    "Intermediates",
    "as_float64",
    "check_eps",
    "check_layout",
    "check_same_shape",
    "per_channel",
    "spread",
]

Array: TypeAlias = NDArray[np.float64]

_LAYOUTS = "(N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W)"


class Intermediates:
    """What a forward or a backward returns: shown, its names and shapes instead of all its numbers."""

    def __repr__(self) -> str:
        """Return the names in one line, arrays by their shapes."""
        shown = (f"{name} {_shape_or_value(value)}" for name, value in vars(self).items())
        return f"<{type(self).__name__}: {', '.join(shown)}>"


def _shape_or_value(value: object) -> str:
    return str(value.shape) if isinstance(value, np.ndarray) else repr(value)


def as_float64(values: ArrayLike, name: str) -> Array:
    """Return the values as a float64 array; real numbers only.

    Raises:
        DtypeError: the values are complex, text or objects, or a tensor that NumPy cannot read.
        ShapeError: nested lists of uneven lengths.
    """
    if values is None:
        raise DtypeError(f"{name} is None; pass an array of real numbers")
    try:
        array = np.asarray(values)
    except (TypeError, RuntimeError) as error:
        raise DtypeError(
            f"{name} of type {type(values).__name__} cannot be read by NumPy: {error} "
            f"For a torch tensor pass {name}.detach().cpu().double()"
        ) from error
    except ValueError as error:
        raise ShapeError(f"{name} is no rectangular array: {error}. Pass rows of equal length") from error
    if array.dtype.kind not in "fiu":
        raise DtypeError(
            f"{name} has dtype {array.dtype}; allowed are real numbers (floating point or integer). "
            f"Convert it first, for example {name}.astype(float)"
        )
    return array.astype(np.float64)


def check_layout(x: Array, name: str = "x") -> None:
    """Refuse what is not ``(N, C)`` with up to three spatial dimensions, or holds no channel or no value."""
    if not 2 <= x.ndim <= 5:
        raise ShapeError(
            f"{name} has {x.ndim} dimensions, shape {x.shape}; allowed are {_LAYOUTS}. "
            "Reshape it so that the second axis holds the channels"
        )
    if x.size == 0:
        raise ShapeError(f"{name} of shape {x.shape} holds no value, so it has no mean; pass at least one sample")


def check_same_shape(values: Array, expected: tuple[int, ...], name: str) -> None:
    """Refuse values of another shape than expected."""
    if values.shape != expected:
        raise ShapeError(f"{name} has shape {values.shape}, but {expected} is needed")


def check_eps(eps: float) -> None:
    """Refuse an eps that is negative, infinite or NaN."""
    if isnan(eps) or not 0 <= eps < float("inf"):
        raise ArgumentError(f"eps is {eps}; allowed is zero or a positive finite number, for example eps=1e-5")


def per_channel(values: ArrayLike | None, channels: int, name: str, *, default: float) -> Array:
    """Return one value per channel, shape ``(C,)``; None stands for the default in every channel."""
    if values is None:
        return np.full(channels, default)
    array = as_float64(values, name)
    if array.shape != (channels,):
        raise ShapeError(f"{name} has shape {array.shape}, but x has {channels} channels; pass shape ({channels},)")
    return array


def spread(values: Array, ndim: int) -> Array:
    """Shape one value per channel so that it broadcasts against ``(N, C, *)``."""
    return values.reshape(channel_shape(ndim, len(values)))
