"""CIFAR-100's binary form, read without pickle and with every length and label checked.

``train.bin`` and ``test.bin`` hold records of 3074 bytes without a header: the superclass (0 to 19), the class (0 to
99), and 32x32 pixels of red, then of green, then of blue, row by row. ``fine_label_names.txt`` holds the classes'
names, one a line. The three files lie in one folder, or in the archive that the data set's page offers.
"""

import gzip
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

__all__ = ["ARCHIVE", "Cifar100", "read_cifar100"]

ARCHIVE = "cifar-100-binary.tar.gz"
FOLDER = "cifar-100-binary"
NAMES = "fine_label_names.txt"
SUPERCLASSES, CLASSES = 20, 100
PIXELS = 3 * 32 * 32
RECORD = 2 + PIXELS
# The format has no header; without these counts a file cut at the end of a record would pass.
COUNTS = {"train.bin": 50_000, "test.bin": 10_000}


@dataclass(frozen=True, eq=False, kw_only=True)
class Cifar100:
    """What the files hold.

    Attributes:
        train_images: ``(N, 3, 32, 32)``.
        train_labels: ``(N,)``, the class.
        test_images: as the training images.
        test_labels: as the training labels.
        classes: the hundred names.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    classes: tuple[str, ...]


def read_cifar100(folder: Path) -> Cifar100:
    """Read the binary form from a folder that holds its three files, or the folder of them, or the archive.

    Raises:
        DataError: a file is missing, damaged, cut short or too long; the message names it and what was expected.
    """
    contents = _contents(folder)
    train, test = (_records(*contents[name], COUNTS[name]) for name in COUNTS)
    return Cifar100(
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=_names(*contents[NAMES]),
    )


def _contents(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Return where each file was found, in words, and its bytes."""
    names = (*COUNTS, NAMES)
    for place in (folder, folder / FOLDER):
        if any((place / name).is_file() for name in COUNTS):
            return {name: (str(place / name), _read_file(place / name)) for name in names}
    archive = folder / ARCHIVE
    if not archive.is_file():
        raise DataError(f"{folder}: no CIFAR-100 here; expected {', '.join(names)}, or {ARCHIVE}")
    return {name: (f"{archive}, {name}", content) for name, content in _read_archive(archive, names).items()}


def _read_file(path: Path) -> bytes:
    """Return a file's bytes, one more than any sound file has at the most."""
    try:
        with path.open("rb") as stream:
            return stream.read(_longest(path.name) + 1)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected beside the other files of CIFAR-100's binary form") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the bytes of the archive's members of these names; nothing is unpacked to the disk."""
    found = {}
    try:
        with gzip.open(path, "rb") as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                stream = archive.extractfile(member) if name in names and member.isfile() else None
                if stream is not None:
                    found[name] = stream.read(_longest(name) + 1)
            # To the end, where the sum over everything stands.
            while unpacked.read(1 << 20):
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); expected the complete archive {ARCHIVE}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path}: holds no {', '.join(missing)}; expected CIFAR-100's binary form")
    return found


def _longest(name: str) -> int:
    return COUNTS[name] * RECORD if name in COUNTS else 100_000


def _records(where: str, content: bytes, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images and classes of so many records."""
    expected = count * RECORD
    if len(content) < expected:
        raise DataError(f"{where}: cut short: {expected} bytes expected ({count} images), {len(content)} found")
    if len(content) > expected:
        raise DataError(f"{where}: bytes follow the {expected} of {count} images; the file is damaged")
    records = np.frombuffer(content, np.uint8).reshape(count, RECORD)
    for column, (name, classes) in enumerate((("superclass", SUPERCLASSES), ("class", CLASSES))):
        wrong = np.flatnonzero(records[:, column] >= classes)
        if wrong.size:
            raise DataError(
                f"{where}: image {wrong[0]} has the {name} {records[wrong[0], column]}, expected 0 to {classes - 1}; "
                "the file is damaged"
            )
    return records[:, 2:].reshape(count, 3, 32, 32), records[:, 1].copy()


def _names(where: str, content: bytes) -> tuple[str, ...]:
    try:
        names = tuple(content.decode("ascii").split())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not text ({error}); the file is damaged") from error
    if len(names) != CLASSES:
        raise DataError(f"{where}: {len(names)} names found, expected {CLASSES}")
    return names
