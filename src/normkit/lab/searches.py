"""Searches that the processes of a run share: each trial is made once, by whoever comes first, and kept.

A trial's outcome is a small JSON file in the run's folder, written whole or not at all. Whoever makes it holds a lock
that ends with the process, so that another takes over what a killed one leaves; whoever finds it held goes on with the
other trials and waits only when nothing else is left.
"""

import contextvars
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checkpoints import keeping
from .files import atomic_write

__all__ = ["forget_locks", "made_once", "sharing"]

Outcome = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """Where a run's trials are kept, and what they hang on beside their own words."""

    folder: Path
    identity: str


_SHARED: contextvars.ContextVar[_Shared | None] = contextvars.ContextVar("normkit_lab_searches", default=None)


@contextmanager
def sharing(folder: Path | None, identity: str) -> Iterator[None]:
    """Let the searches inside keep their trials and take over those of other processes.

    Args:
        folder: where they are kept; ``None`` keeps nothing.
        identity: whatever else the numbers hang on, such as versions; trials kept under another are not used.
    """
    token = _SHARED.set(None if folder is None else _Shared(folder=folder, identity=identity))
    try:
        yield
    finally:
        _SHARED.reset(token)


def made_once(trials: Sequence[Mapping[str, Any]], make: Callable[[int], Outcome]) -> list[Outcome]:
    """Return the outcome of every trial, made here where no process of the run has made it.

    Args:
        trials: what each one is, in words and numbers that JSON holds.
        make: makes the trial at this place.

    Raises:
        OSError: an outcome cannot be written; what was kept before stands.

    >>> made_once([{"rate": 0.1}, {"rate": 0.2}], lambda place: {"place": place})
    [{'place': 0}, {'place': 1}]
    """
    shared = _SHARED.get()
    if shared is None:
        with keeping(None, ""):
            return [make(place) for place in range(len(trials))]
    shared.folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[int, Outcome] = {}
    left, wait = list(range(len(trials))), False
    while left:
        for place in left:
            outcome = _made(shared, trials[place], partial(make, place), wait)
            wait = False
            if outcome is not None:
                outcomes[place] = outcome
        # All that are left are being made elsewhere: wait for the first of them.
        wait = all(place not in outcomes for place in left)
        left = [place for place in left if place not in outcomes]
    return [outcomes[place] for place in range(len(trials))]


def forget_locks(folder: Path) -> None:
    """Remove the locks of trials; only for who holds the run's folder, when no process works in it."""
    for lock in folder.glob("*.lock"):
        lock.unlink(missing_ok=True)


def _made(shared: _Shared, trial: Mapping[str, Any], make: Callable[[], Outcome], wait: bool) -> Outcome | None:
    """Return a trial's outcome; ``None`` where another process is at it and there is no waiting."""
    words = json.dumps({**trial, "identity": shared.identity}, sort_keys=True)
    path = shared.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    try:
        known = _read(path)
        if known is None:
            epochs = path.with_suffix("")
            with keeping(epochs, shared.identity):
                known = make()
            content = json.dumps({**trial, "outcome": known}, indent=2, ensure_ascii=False)
            atomic_write(path, content.encode() + b"\n")
            shutil.rmtree(epochs, ignore_errors=True)
        return known
    finally:
        lock.release()


def _read(path: Path) -> Outcome | None:
    """Return a kept outcome; a missing or damaged file holds none."""
    try:
        outcome: Outcome = json.loads(path.read_bytes())["outcome"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return outcome
