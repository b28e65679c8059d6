"""The IDX format of MNIST and FashionMNIST, read without pickle and with every field of the header checked.

A file is two zero bytes, a type code, the number of dimensions, each dimension as a big-endian 32-bit number, and
then the values in row-major order. Only unsigned bytes (type 8) are read: the data sets use nothing else.
"""

import gzip
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

__all__ = ["read_idx"]

UNSIGNED_BYTE = 8


class Stream(Protocol):
    """What is read from: a file, or what a gzip file unpacks to."""

    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes, fewer only at the end."""


# More than any data set of this form holds; a damaged count must not ask for terabytes.
MOST_ITEMS = 10_000_000


def read_idx(path: Path, item_shape: Sequence[int]) -> NDArray[np.uint8]:
    """Read one IDX file, gzipped when its name ends in ``.gz``.

    Args:
        path: the file.
        item_shape: the shape of one item: ``(28, 28)`` for images, ``()`` for labels.

    Returns:
        An array of shape ``(N, *item_shape)``, where N is the count that the header gives.

    Raises:
        DataError: the file is missing, damaged, of another shape or type, cut short or too long. The message names
            the file and what was expected.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            return _read(stream, path, tuple(item_shape))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected an IDX file of items of shape {tuple(item_shape)}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); expected a complete gzip file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read(stream: Stream, path: Path, item_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Check the header, then the length, then return the values."""
    shape = _read_header(stream, path, item_shape)
    expected = prod(shape)
    values = stream.read(expected)
    if len(values) < expected:
        raise DataError(f"{path}: cut short: {expected} bytes expected after the header, {len(values)} found")
    if stream.read(1):
        raise DataError(f"{path}: bytes follow the {expected} that the header announces; the file is damaged")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_header(stream: Stream, path: Path, item_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape ``(N, *item_shape)`` that a sound header gives."""
    dimensions = 1 + len(item_shape)
    header = stream.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions:
        raise DataError(f"{path}: cut short: a header of {4 + 4 * dimensions} bytes expected, {len(header)} found")
    expected_magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if header[:4] != expected_magic:
        raise DataError(
            f"{path}: not the IDX file expected: it begins with {header[:4].hex(' ')}, expected "
            f"{expected_magic.hex(' ')} (unsigned bytes in {dimensions} dimensions)"
        )
    shape = tuple(int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    if shape[1:] != item_shape:
        raise DataError(f"{path}: items of shape {shape[1:]}, expected {item_shape}")
    if not 0 < shape[0] <= MOST_ITEMS:
        raise DataError(f"{path}: the header announces {shape[0]} items, expected 1 to {MOST_ITEMS}")
    return shape
