"""Who computes next, where several computations stand open: each in a thread of its own, or all in one thread."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from .surroundings import Surroundings, copied_context, surroundings

__all__ = ["Turns", "in_one_thread", "in_threads"]

Live = Callable[[int], None]


class Turns(Protocol):
    """Several open computations, the parts, of which one goes on at a time until it waits or ends.

    Attributes:
        ordered: whether they compute in one thread, so that autograd's numbers tell their order.
    """

    ordered: bool

    def begin(self, live: Live, parts: int) -> None:
        """Open them: ``live(part)`` is each, and raises nothing. None goes on yet."""

    def surrounded(self) -> Callable[[Callable[[int], Any], int], Any]:
        """Return a function that, called in a part, calls another as if it were called here and now."""

    def round(self, parts: Sequence[int]) -> None:
        """Let these go on, one after another, each until it waits or ends."""

    def wait(self, part: int) -> None:
        """Called in a part: let the others go on, until the part's next turn."""

    def part(self) -> int | None:
        """Return the part that this is called in, or None."""

    def finish(self, living: list[int]) -> None:
        """Let those that live come to their end; they leave the list when they do."""


def in_one_thread() -> Turns:
    """Return turns in the thread of the caller, or, without ``greenlet``, in a thread each.

    One thread is quicker. OpenMP keeps workers for every thread that computes, who are woken anew at every turn; and
    the memory allocator keeps a heap for every thread, which is given back to the system at the end and fetched again.
    A part may not wait inside a backward: autograd has one engine for a thread.
    """
    return _Threads() if _greenlet() is None else _OneThread()


def in_threads() -> Turns:
    """Return turns in a thread for each part, in which it may wait inside a backward."""
    return _Threads()


@functools.cache
def _greenlet() -> Any:
    """Return the library, or None where it has no build for this Python."""
    try:
        import greenlet
    except ImportError:
        return None
    return greenlet


class _Threads:
    """Each part in a thread of its own."""

    ordered = False

    def __init__(self) -> None:
        # Not by the number of a thread, which the next thread gets when it has ended.
        self._own = threading.local()
        self._turns: list[threading.Semaphore] = []
        self._threads: list[threading.Thread] = []
        self._line: Iterator[int] = iter(())

    def begin(self, live: Live, parts: int) -> None:
        self._turns = [threading.Semaphore(0) for _ in range(parts + 1)]

        def run(part: int) -> None:
            self._own.part = part
            self._wait_for_turn(part)
            try:
                live(part)
            finally:
                self._pass_on()

        self._threads = [threading.Thread(target=run, args=(part,), daemon=True) for part in range(parts)]
        for thread in self._threads:
            thread.start()

    def surrounded(self) -> Callable[[Callable[[int], Any], int], Any]:
        enter, call = surroundings(), copied_context()

        def surrounded(work: Callable[[int], Any], part: int) -> Any:
            with enter():
                return call(work, part)

        return surrounded

    def round(self, parts: Sequence[int]) -> None:
        # From part to part, and back to the caller after the last.
        self._line = iter(list(parts))
        self._pass_on()
        self._wait_for_turn(len(self._threads))

    def wait(self, part: int) -> None:
        self._pass_on()
        self._wait_for_turn(part)

    def part(self) -> int | None:
        return getattr(self._own, "part", None)

    def finish(self, living: list[int]) -> None:
        # Also where the caller was interrupted while a part computes.
        self._line = iter(())
        for part in list(living):
            self._turns[part].release()
        for thread in self._threads:
            thread.join()

    def _wait_for_turn(self, place: int) -> None:
        # A part's place is its number; the caller's comes after the last.
        self._turns[place].acquire()

    def _pass_on(self) -> None:
        self._turns[next(self._line, len(self._threads))].release()


class _OneThread:
    """All parts in the thread of the caller, each with a stack of its own."""

    ordered = True

    def __init__(self) -> None:
        self._caller: Any = None
        self._parts: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._callers = Surroundings()

    def begin(self, live: Live, parts: int) -> None:
        greenlet = _greenlet()
        self._caller, self._callers = greenlet.getcurrent(), Surroundings()
        self._parts = [greenlet.greenlet(live) for _ in range(parts)]
        self._numbers = {part: number for number, part in enumerate(self._parts)}

    def surrounded(self) -> Callable[[Callable[[int], Any], int], Any]:
        return copied_context()

    def round(self, parts: Sequence[int]) -> None:
        for part in list(parts):
            self._parts[part].switch(part)

    def wait(self, part: int) -> None:
        with self._callers.again():
            self._caller.switch()

    def part(self) -> int | None:
        return self._numbers.get(_greenlet().getcurrent())

    def finish(self, living: list[int]) -> None:
        while living:
            self.round(living)
        # They hold their work, and that may hold this.
        self._parts, self._numbers = [], {}
