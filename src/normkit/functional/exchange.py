"""How the ranks of a group bring their numbers together: each brings a row, and each gets all rows, in rank order.

A group is one of ``torch.distributed``, or of a `lockstep` in one process. Both do nothing but carry rows; what is made
of them is the same operations in the same order on every rank, so that all ranks hold the same bits, and so that a
lockstep computes what processes compute.
"""

import contextlib
import contextvars
import datetime
import threading
import zlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn

from ..errors import ArgumentError, SyncError

__all__ = [
    "Book",
    "Exchange",
    "add_up",
    "alone",
    "exchange_of",
    "fingerprint",
    "group_of",
    "merge_moments",
    "ranks_of",
    "simulated",
]

# How long a rank that failed listens for the others that failed too, to name those that did not come.
_ROLL_CALL_SECONDS = 0.5


# Way, layer, and how many numbers.
Event = tuple[float, float, int]
# By so many exchanges at most the next one is known; and so many such rows of them are kept.
_CONTEXT, _REMEMBERED = 4, 1 << 14


class Book:
    """What one rank keeps of its calls in a group: how many, and the layers by the order of their first call."""

    def __init__(self) -> None:
        self.calls = 0
        self.names: list[str] = []
        self.numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        # The layer of the latest forward; and what every rank said where they were last found in different calls.
        self.layer: ReferenceType[nn.Module] | None = None
        self.told: list[str] = []
        # The latest exchanges, and what followed when they were the latest before: the same on every rank.
        self._latest: tuple[Event, ...] = ()
        self._followed: dict[tuple[Event, ...], Event] = {}

    def expected(self) -> "Event | None":
        """Return what came after the latest exchanges the last time, as many of them as came together before."""
        for first in range(len(self._latest) + 1):
            found = self._followed.get(self._latest[first:])
            if found is not None:
                return found
        return None

    def note(self, event: "Event") -> None:
        """Note an exchange that all ranks made."""
        if len(self._followed) >= _REMEMBERED:
            self._followed.clear()
        for first in range(len(self._latest) + 1):
            self._followed[self._latest[first:]] = event
        self._latest = (*self._latest, event)[-_CONTEXT:]


class Exchange(Protocol):
    """The ranks of a group, seen from one of them.

    Attributes:
        rank: the place of this one.
        size: how many there are.
        book: what this rank keeps of its calls.
        careful: compare before every call which layer it is, not only before a layer's first.
    """

    rank: int
    size: int
    book: Book
    careful: bool

    def gather(self, row: Tensor, words: str) -> Tensor:
        """Return the rows of all ranks, ``(R, K)`` in rank order. ``words`` name the call where it fails.

        Raises:
            SyncError: a rank is gone, did not come in time, or brought a row of another length.
        """
        ...


# The group that a simulation is; False where no others are to be asked; None for what torch.distributed says.
_HERE: contextvars.ContextVar[Exchange | Literal[False] | None] = contextvars.ContextVar(
    "normkit_exchange", default=None
)


@contextlib.contextmanager
def simulated(exchange: Exchange) -> Iterator[None]:
    """Let the layers called inside, in this thread, take this for their group."""
    token = _HERE.set(exchange)
    try:
        yield
    finally:
        _HERE.reset(token)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let the layers called inside, in this thread, normalize with what this process has, and exchange nothing."""
    token = _HERE.set(False)
    try:
        yield
    finally:
        _HERE.reset(token)


def exchange_of(group: Any, timeout: float | None) -> Exchange | None:
    """Return the ranks that share a call's statistics; None where this process is alone.

    Raises:
        ArgumentError: the group is none, does not hold this rank, or was destroyed.
    """
    here = _HERE.get()
    if here is False:
        return None
    if here is None:
        group = group_of(group)
        if not (distributed.is_available() and distributed.is_initialized()):
            if group is not None:
                raise ArgumentError(f"process_group was given, and {_GONE}; pass process_group=None for one process")
            return None
        group = distributed.group.WORLD if group is None else group
        if group is distributed.GroupMember.NON_GROUP_MEMBER or _rank_in(group) < 0:
            raise ArgumentError(
                f"process_group does not hold this process, rank {distributed.get_rank()}: give each process the group "
                "that new_group made with it among the ranks"
            )
        here = _Processes(group, timeout)
    return here if here.size > 1 else None


_GONE = "no process group is running: call torch.distributed.init_process_group, or it was destroyed since"


def _rank_in(group: Any) -> int:
    try:
        return int(distributed.get_rank(group))
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"process_group is not known to torch.distributed: it was destroyed ({error}); set process_group to a "
            "group that runs, or to None for all processes"
        ) from error


def ranks_of(group: Any) -> str:
    """Return which processes a group holds, in words that are the same in all of them."""
    try:
        return f"ranks {distributed.get_process_group_ranks(group)}"
    except Exception:
        return "a group that does not run"


def group_of(group: Any, name: str = "process_group") -> Any:
    """Return the group of ``torch.distributed`` that is meant, of a mesh of one dimension its own.

    Raises:
        ArgumentError: it is neither None, nor a group, nor such a mesh.
    """
    if group is None or not distributed.is_available():
        if group is not None:
            raise ArgumentError(f"{name} is {group!r}, and this torch was built without torch.distributed; pass None")
        return None
    if isinstance(group, distributed.ProcessGroup) or group is distributed.GroupMember.NON_GROUP_MEMBER:
        return group
    mesh: Any = distributed.DeviceMesh  # type: ignore[attr-defined]
    if isinstance(group, mesh):
        if group.ndim == 1:
            return group.get_group()
        dimensions: tuple[object, ...] = group.mesh_dim_names or tuple(range(group.ndim))
        said = f"{name} is a mesh of {group.ndim} dimensions, and statistics are shared along one"
        raise ArgumentError(f"{said}; pass mesh.get_group({dimensions[0]!r}), of {dimensions}")
    raise ArgumentError(
        f"{name} must be a group of torch.distributed (as new_group returns), a DeviceMesh of one dimension, or None "
        f"for all processes, got {type(group).__name__} {group!r}; pass torch.distributed.new_group(ranks)"
    )


def _is_detailed() -> bool:
    level: Any = getattr(distributed, "get_debug_level", None)
    return level is not None and str(level()).endswith("DETAIL")


_BOOKS: WeakKeyDictionary[Any, Book] = WeakKeyDictionary()


class _Processes:
    """A group of torch.distributed, on any backend."""

    def __init__(self, group: Any, timeout: float | None) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.book = _BOOKS.setdefault(group, Book())
        self.careful = _is_detailed()

    def gather(self, row: Tensor, words: str) -> Tensor:
        rows = row.new_empty((self.size, *row.shape))
        call = f"{self.book.calls}-{len(self.book.names)}"
        if self.careful:
            self._tell("latest", words)
        try:
            work = distributed.all_gather(list(rows.unbind(0)), row, group=self.group, async_op=True)
            if self.timeout is None:
                work.wait()
            else:
                work.wait(datetime.timedelta(seconds=self.timeout))
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0]
            raise SyncError(f"{words}: {self._roll_call(call)} ({said})") from error
        return rows

    def _store(self) -> Any:
        return distributed.distributed_c10d._get_process_group_store(self.group)

    def _tell(self, place: str, words: str) -> None:
        with contextlib.suppress(Exception):
            self._store().set(f"normkit/{place}/{self.rank}", words)

    def _roll_call(self, call: str) -> str:
        """Name the ranks that are not waiting in this call, as far as the store of the group can still be asked."""
        self._tell(f"waiting/{call}", "")
        wait = threading.Event()
        try:
            store, absent = self._store(), set(range(self.size))
            for _ in range(int(_ROLL_CALL_SECONDS / 0.05)):
                absent = {rank for rank in absent if not store.check([f"normkit/waiting/{call}/{rank}"])}
                if not absent:
                    return "every rank came, and the transport failed"
                wait.wait(0.05)
            missing = [str(rank) + self._latest(store, rank) for rank in sorted(absent)]
        except Exception:
            return "a rank is gone, and which one cannot be asked: the store of the group is gone too"
        return f"rank {', '.join(missing)} did not come: gone, slow, in evaluation mode, or in another call"

    def _latest(self, store: Any, rank: int) -> str:
        key = f"normkit/latest/{rank}"
        return f" (last in {store.get(key).decode()})" if self.careful and store.check([key]) else ""


def fingerprint(*settings: object) -> int:
    """Return a number that a float64 holds, by which ranks see whether they have the same settings."""
    return zlib.crc32(repr(settings).encode())


def add_up(rows: Tensor) -> Tensor:
    """Return the sum of the rows, ``(K,)``: neighbours first, so that the order depends on their number alone.

    >>> add_up(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([ 9., 12.])
    """
    while len(rows) > 1:
        odd = rows[len(rows) - len(rows) % 2 :]
        rows = torch.cat([rows[0 : len(rows) - 1 : 2] + rows[1::2], odd])
    return rows[0]


def merge_moments(counts: Tensor, means: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations of all ranks' values together, by Chan's formula.

    ``mean = a + (b - a) * n_b / n`` and ``m2 = m2_a + m2_b + (b - a)^2 * n_a * n_b / n``, neighbours first, in float64.
    A rank without values, whose mean is 0, changes no bit.

    Args:
        counts: ``(R,)``, the values per channel of each rank.
        means: ``(R, C)``.
        sums: ``(R, C)``, the sums of squared deviations from them.

    References:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979, (2.1).

    >>> mean, m2 = merge_moments(torch.tensor([2.0, 1.0]), torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [0.0]]))
    >>> mean, m2
    (tensor([2.]), tensor([8.]))
    """
    n = counts.reshape(-1, 1)
    while len(n) > 1:
        even = len(n) - len(n) % 2
        n_a, n_b = n[0:even:2], n[1:even:2]
        a, b = means[0:even:2], means[1:even:2]
        total = n_a + n_b
        share = n_b / total.clamp(min=1)
        between = b - a
        # With no values in a its mean is 0, and a + (b - a) is b.
        merged = a + between * share
        squared = sums[0:even:2] + sums[1:even:2] + between.square() * (n_a * share)
        n, means, sums = (torch.cat([new, old[even:]]) for new, old in ((total, n), (merged, means), (squared, sums)))
    return means[0], sums[0]
