"""Where compiled kernels are kept between processes, one file each, and what is done where nothing can be kept.

Numba's own cache raises where it finds no folder, where the disk is full and where a file is damaged, and its index and
data files are written one after the other: of two processes that compile two forms of one function at once, one may
later be given the other's kernel. Here a file holds one kernel, is written beside its place and renamed, and begins
with a digest of its content and of everything the kernel hangs on. What does not match is compiled again and replaced.

A file is read as a pickle, which runs what stands in it. So it is read only where nobody but this user, the system's
administrator, or the owner of this package can have written it; Numba does not ask.
"""

import contextlib
import errno
import hashlib
import os
import pickle
import stat
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

__all__ = ["VARIABLE", "KernelCache", "Place", "places"]

VARIABLE = "NUMBA_CACHE_DIR"

_PACKAGE = Path(__file__).parent
_BY_GROUP, _BY_ALL = 0o020, 0o002
_DIGEST = 32  # bytes at the beginning of a file
_warned = False


@dataclass(frozen=True)
class Place:
    """A folder in which kernels may be kept.

    Attributes:
        folder: where; it need not exist.
        asked: the user named it.
        private: it lies among other users' folders, and must be this user's alone.
        packaged: it lies in the package, whose owner may write what runs here in any case.
    """

    folder: str
    asked: bool = False
    private: bool = False
    packaged: bool = False

    def trouble(self, status: os.stat_result) -> str | None:
        """Say why a file or folder of this place may hold what another user wrote, or None."""
        if not hasattr(os, "geteuid"):
            return None
        owners, groups = {os.geteuid(), 0}, {os.getegid()}
        if self.private:
            return None if status.st_uid == os.geteuid() and not status.st_mode & 0o077 else "it is not this user's own"
        if self.packaged:
            package = os.stat(_PACKAGE)
            owners, groups = owners | {package.st_uid}, groups | {package.st_gid}
        if status.st_uid not in owners:
            return f"it belongs to another user, number {status.st_uid}"
        if status.st_mode & _BY_ALL or (status.st_mode & _BY_GROUP and status.st_gid not in groups):
            return "other users may write to it"
        return None

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            OSError: it is not there, cannot be read, or may be another user's.
        """
        self._check_folder()
        # A pipe under this name must not stop the process.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        path = os.path.join(self.folder, name)
        with open(path, "rb", opener=lambda path, _: os.open(path, flags)) as file:
            status = os.fstat(file.fileno())
            trouble = self.trouble(status) if stat.S_ISREG(status.st_mode) else "it is no file"
            if trouble is not None:
                raise PermissionError(errno.EPERM, trouble, path)
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Put a file in its place whole; a process killed here leaves the old file, or none.

        Raises:
            OSError: the folder cannot be made or written, or may be another user's.
        """
        os.makedirs(self.folder, mode=0o700 if self.private else 0o755, exist_ok=True)
        self._check_folder()
        path = os.path.join(self.folder, name)
        beside = f"{path}.{uuid.uuid4().hex[:16]}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(beside, flags, 0o600 if self.private else 0o644), "wb") as file:
                file.write(content)
            os.replace(beside, path)
        except BaseException:
            if os.path.lexists(beside):
                os.unlink(beside)
            raise

    def _check_folder(self) -> None:
        # A private folder is no link: another user may have laid one where it is looked for.
        status = os.lstat(self.folder) if self.private else os.stat(self.folder)
        trouble = self.trouble(status) if stat.S_ISDIR(status.st_mode) else "it is no folder"
        if trouble is not None:
            raise PermissionError(errno.EPERM, trouble, self.folder)


def places() -> list[Place]:
    """Return the folders to try, the preferred one first: Numba's, in Numba's order, then a temporary one."""
    mark = hashlib.sha256(str(_PACKAGE).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    found = [Place(str(_PACKAGE / "__pycache__"), packaged=True)]
    asked: str = config.CACHE_DIR  # type: ignore[attr-defined]
    if asked:
        found.insert(0, Place(os.path.join(asked, f"normkit_{mark}"), asked=True))
    of_user = AppDirs(appname="numba", appauthor=False).user_cache_dir
    if os.path.isabs(of_user):  # a user without a home folder has "~/.cache", which would be made where we stand
        found.append(Place(os.path.join(of_user, f"normkit_{mark}")))
    with contextlib.suppress(OSError):  # there may be no folder for temporary files
        user = os.geteuid() if hasattr(os, "geteuid") else "user"
        found.append(Place(os.path.join(tempfile.gettempdir(), f"normkit_{user}_{mark}"), private=True))
    return found


class KernelCache(_Cache):
    """The cache of one kernel, as Numba asks for it.

    Args:
        name: the kernel and what it is specialised for, fit for a file's name.
        revision: a word for the source of every kernel.
    """

    def __init__(self, name: str, revision: str) -> None:
        self._name, self._revision, self._enabled = name, revision, True

    @property
    def cache_path(self) -> str:
        """The folder that is tried first."""
        return places()[0].folder

    def enable(self) -> None:
        """Read and keep kernels again."""
        self._enabled = True

    def disable(self) -> None:
        """Neither read nor keep kernels."""
        self._enabled = False

    def flush(self) -> None:
        """Do nothing: a file that does not match is replaced."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the kernel that is kept, or None where it must be compiled."""
        target_context.refresh()
        if not self._enabled:
            return None
        file, key = self._file_and_key(sig, target_context.codegen())
        for place in places():
            try:
                content = place.read(file)
            except OSError:
                continue
            payload = content[_DIGEST:]
            if content[:_DIGEST] != _digest(key, payload):
                continue
            # The bytes are those that were written. What fails now is Numba's own, and compiling is the way out.
            try:
                found = CompileResult._rebuild(target_context, *pickle.loads(payload))  # noqa: S301
            except Exception:  # noqa: S112
                continue
            # Whoever names a folder may want to hand it on: it gets what was found elsewhere.
            asked = [first for first in places() if first.asked and first != place]
            _keep(file, content, asked, otherwise=place)
            return found
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a kernel in the first folder that takes it; where none does, it serves this process."""
        if self._enabled and not data.library.has_dynamic_globals:
            file, key = self._file_and_key(sig, data.library.codegen)
            payload = dumps(data._reduce())
            _keep(file, _digest(key, payload) + payload, places(), otherwise=None)

    def _file_and_key(self, sig: Any, codegen: Any) -> tuple[str, bytes]:
        """Return the file's name, and everything that the kernel in it hangs on.

        A changed source changes the key alone, so that its kernel takes the old one's place.
        """
        machine = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, codegen.magic_tuple())
        file = f"{self._name}.{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.kernel"
        return file, repr((file, self._revision, str(sig), machine)).encode()


def _digest(key: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(key).digest() + payload).digest()


def _keep(file: str, content: bytes, into: Iterable[Place], *, otherwise: Place | None) -> None:
    """Write a kernel to the first place that takes it, and say so where that is not one to rely on."""
    kept, failed = otherwise, None
    for place in into:
        try:
            place.write(file, content)
        except OSError as error:
            failed = failed or (place, error)
        else:
            kept = place
            break
    if kept is None or kept.private or (failed is not None and failed[0].asked):
        _warn(kept, failed)


def _warn(kept: Place | None, failed: tuple[Place, OSError] | None) -> None:
    """Say once in a process that kernels are not kept where they should be."""
    global _warned
    if _warned:
        return
    _warned = True
    cannot = "" if failed is None else f"cannot be kept in {failed[0].folder} ({failed[1].strerror}); they "
    are = "are compiled anew in every process, a few seconds each" if kept is None else f"are kept in {kept.folder}"
    warnings.warn(
        f"normkit: compiled kernels {cannot}{are}. Set {VARIABLE} to a folder of your own that can be written",
        stacklevel=2,
    )
