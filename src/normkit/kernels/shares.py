"""What all processes of one user keep of a thing together, told to each other in a file: one share, not one for each.

Each process holds a place in the file by a lock on its byte, and writes there how much it keeps. The system lets go of
the lock when the process ends, however it ends, and a fork does not inherit it: what stands in a place that nobody
holds is void.
"""

import contextlib
import os
import stat
import sys
from array import array
from collections.abc import Sequence

if sys.platform != "win32":
    import fcntl

__all__ = ["Share"]

_FOLDERS = ("/dev/shm", "/tmp", "/var/tmp")  # noqa: S108  what is opened there is checked
_PLACES = 1024
_BYTES = 8  # of a number; it is stored one larger, so that a place with zero is free


class Share:
    """This process's place among those that keep something.

    Where there is no such file, because no folder takes one or more processes ask than it has places for, nothing may
    be kept. On Windows, which has no such locks, every process is told that it is alone.

    Args:
        name: of the file; the user's number is added to it.
        folders: where to try it. Not where a process is told to keep its temporary files: all must find the same.
    """

    def __init__(self, name: str, folders: Sequence[str] = _FOLDERS) -> None:
        self._name, self._folders = name, folders
        self._descriptor, self._place, self._owner = -1, 0, 0
        self._identity = (-1, -1)

    def allowed(self, whole: int, held: int) -> int:
        """Return how much this process may keep, which keeps ``held``, where all may keep ``whole`` together.

        That is an equal part, or what the others leave where one of them keeps more than that.
        """
        if sys.platform == "win32":
            return whole
        if whole == 0:
            self.leave()
            return 0
        try:
            # Said before the others are asked: of two that take more at once, at least one sees the other.
            self._write(held)
            others = self._others()
            if held > _part(whole, others):
                others = self._living(others)
        except OSError:
            return 0
        return _part(whole, others)

    def tell(self, held: int) -> None:
        """Say what this process keeps now, where it is less than it said."""
        if sys.platform != "win32" and self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self._write(held)

    def leave(self) -> None:
        """Give the place up; the next `allowed` takes one again."""
        if sys.platform == "win32" or self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if self._links() is not None:
                if self._owner == os.getpid():
                    os.pwrite(self._descriptor, bytes(_BYTES), self._place * _BYTES)
                os.close(self._descriptor)
        self._descriptor = -1

    def _write(self, held: int) -> None:
        # A file without a name is one that somebody has removed: others have begun another.
        if self._descriptor < 0 or self._owner != os.getpid() or not self._links():
            self.leave()
            self._enter()
        os.pwrite(self._descriptor, (held + 1).to_bytes(_BYTES, sys.byteorder), self._place * _BYTES)

    def _links(self) -> int | None:
        """Return how many names the file has, or None where the descriptor is not the file that was opened.

        Who makes a daemon of a process closes every descriptor, and the number is then another file's.
        """
        try:
            status = os.fstat(self._descriptor)
        except OSError:
            return None
        return status.st_nlink if (status.st_dev, status.st_ino) == self._identity else None

    def _enter(self) -> None:
        """Open the file and take a place.

        Raises:
            OSError: there is none to be had.
        """
        failed = OSError("every place is taken")
        for folder in self._folders:
            try:
                descriptor = _open(os.path.join(folder, f"{self._name}-{os.getuid()}"))
            except OSError as error:
                failed = error
                continue
            for place in range(_PLACES):
                if _locked(descriptor, place):
                    status = os.fstat(descriptor)
                    self._descriptor, self._place, self._owner = descriptor, place, os.getpid()
                    self._identity = (status.st_dev, status.st_ino)
                    return
            os.close(descriptor)
        raise failed

    def _others(self) -> dict[int, int]:
        """Return what stands in the places of others."""
        content = os.pread(self._descriptor, _PLACES * _BYTES, 0)
        numbers = array("q", content[: len(content) // _BYTES * _BYTES])
        return {place: max(0, n - 1) for place, n in enumerate(numbers) if n and place != self._place}

    def _living(self, others: dict[int, int]) -> dict[int, int]:
        """Return the places that a process holds, and free the rest."""
        living = {}
        for place, held in others.items():
            if _locked(self._descriptor, place):
                os.pwrite(self._descriptor, bytes(_BYTES), place * _BYTES)
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, place)
            else:
                living[place] = held
        return living


def _part(whole: int, others: dict[int, int]) -> int:
    return max(0, min(whole // (1 + len(others)), whole - sum(others.values())))


def _open(path: str) -> int:
    """Open the file; one that another user made, or laid a link to, is left alone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_nlink != 1:
        os.close(descriptor)
        raise PermissionError(f"{path} is not this user's own file")
    return descriptor


def _locked(descriptor: int, place: int) -> bool:
    """Take a place's lock, and tell whether it was free."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        return False
    return True
