"""The native part: the quick way to the CPU kernels, autograd nodes in C++ that are built where a compiler is found.

Results are the same in every bit with and without it; on tensors of a few thousand values a call takes a third of the
time. It is built by `build`, or ``normkit native build``: never at import, never inside a forward. It is kept for each
torch, Python, processor and source, and one that fits none of them is not loaded. ``NORMKIT_NATIVE=0`` turns it off.

Example:
    >>> status().loaded in (True, False)
    True
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .kernels.native import build as building
from .kernels.native import calls

__all__ = ["Status", "build", "compile_kernels", "status"]


@dataclass(frozen=True)
class Status:
    """Which way calls to the CPU kernels go, and why.

    Attributes:
        loaded: whether they go the native way.
        file: the built file for this torch, Python, processor and source, or None.
        reason: why they go through Python, and what to type; None where they do not.
    """

    loaded: bool
    file: Path | None
    reason: str | None

    def __str__(self) -> str:
        """One line, or two."""
        if self.loaded:
            return f"native: calls to the CPU kernels go through C++\nfile: {self.file}"
        return f"python: calls to the CPU kernels go through Python: {self.reason}"


def status() -> Status:
    """Say which way calls go, and why."""
    reason = calls.unavailable()
    return Status(reason is None, building.path(), reason)


def build() -> Path:
    """Build the native part in half a minute, where it is not built yet, and return its file.

    Raises:
        BackendError: there is no compiler, no Python header, or the compiler failed; the message says which. Nothing
            else is lost: all works without the native part.
    """
    return building.build()


def compile_kernels() -> Iterator[tuple[int, int, str]]:
    """Compile the common kernels ahead, so that no first call waits; yield how many are done, of how many, and which.

    They are kept where Numba keeps them: in the package's ``__pycache__``, or in ``NUMBA_CACHE_DIR``.
    """
    from .kernels.numba import ahead

    jobs = ahead.common()
    for done, job in enumerate(jobs, 1):
        ahead.compile_one(job)
        yield done, len(jobs), job.name
