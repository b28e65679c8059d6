"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import ArgumentError

__all__ = ["check_place", "write_atomically"]

_FULL = 1 << 20  # a disk with less than that left is full, whatever a library calls the failure


def check_place(path: Path, *, force: bool = False, said: str = "") -> None:
    """Refuse a path at which no file can be put, before the work whose result should stand there.

    Args:
        path: where.
        force: a file that is there may be replaced. A folder, a pipe or a device may not.
        said: the option that names the path, for the message.

    Raises:
        ArgumentError: the message says what stands there, or why the folder takes no file.
    """
    named = f"{said} {path}".strip()
    _check_what_is_there(path, named, force)
    folder = path.resolve().parent
    try:
        # Rights do not tell: root has all of them, and /proc or a disk mounted to be read takes no file from it.
        handle, probe = tempfile.mkstemp(dir=folder, prefix=".normkit-")
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        said = error.strerror or str(error)
        raise ArgumentError(f"{named}: no file can be put into {folder}: {said}; give another folder") from error


def _check_what_is_there(path: Path, named: str, force: bool) -> None:
    """Refuse a path that is no place for a file."""
    if not path.parent.is_dir():
        raise ArgumentError(f"{named}: expected a file in a folder that exists; {path.parent} does not exist")
    if path.is_dir():
        raise ArgumentError(f"{named} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise ArgumentError(f"{named} is a pipe or a device; give the name of a file")
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        if not force:
            raise ArgumentError(
                f"{named} is a link to {target}, which is not there; give another name, or --force to write there"
            )
        _check_end(path, named, target)
    if path.exists() and not force:
        raise ArgumentError(f"{named} is there already; give another name, or --force to replace it")


def _check_end(path: Path, named: str, target: str) -> None:
    """Refuse a link that leads nowhere: round in a circle, or into a folder that is not there."""
    try:
        end = path.resolve()
    except (OSError, RuntimeError):
        raise ArgumentError(f"{named} is a link that leads back to itself; give another name") from None
    if end.is_symlink() or not end.parent.is_dir():
        raise ArgumentError(f"{named} is a link to {target}, and no file can be put there; give another name")


def write_atomically(path: Path, write: Callable[[Path], object], *, force: bool = False) -> None:
    """Let ``write(path)`` fill a file beside the wanted one, then rename it into place.

    A reader sees the old content or the new, never a part. A link stays a link, and what it names is written.

    Raises:
        ArgumentError: `check_place` refuses the path.
        OSError: the disk is full or may not be written, with the path; the old content stands.
    """
    _check_what_is_there(path, str(path), force)
    path = path.resolve()
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:64]}-", suffix=path.suffix)
        os.close(handle)
        beside = Path(name)
        try:
            write(beside)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.chmod(0o666 & ~_umask())
            beside.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except RuntimeError as error:
        # torch's own writer says of a full disk that something was not enforced.
        if "write" not in str(error) and shutil.disk_usage(path.parent).free > _FULL:
            raise
        code = errno.ENOSPC if shutil.disk_usage(path.parent).free <= _FULL else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def _umask() -> int:
    """Read the process's file mask; the system offers no way but to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
