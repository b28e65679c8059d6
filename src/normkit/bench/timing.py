"""Time several calls side by side, so that what disturbs the machine disturbs all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Timing", "interleave", "summarize"]

# A sample shorter than this is made of several calls: the clock and the loop around it cost a microsecond.
_SAMPLE = 1e-3
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Timing:
    """Seconds for one call: the median, and the quantiles at 20 % and 80 %.

    Attributes:
        median: half of the samples were quicker.
        low: a fifth of the samples were quicker.
        high: a fifth of the samples were slower.
        samples: how many there are.
        calls: how many calls each of them averages.
    """

    median: float
    low: float
    high: float
    samples: int
    calls: int


def interleave(
    calls: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5, most: int = 200
) -> dict[str, Timing]:
    """Time the calls in turns, in an order that rotates, until the seconds are used up.

    Args:
        calls: what to time. Each is called three times first, so that kernels are compiled and caches warm.
        seconds: for all of them together.
        least: so many rounds at least, whatever they take.
        most: so many rounds at most.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    repeats = {name: _calibrate(call) for name, call in calls.items()}
    with _no_collection():
        end = time.perf_counter() + seconds
        for number in range(most):
            if number >= least and time.perf_counter() >= end:
                break
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(_time(calls[name], repeats[name]))
    return {name: summarize(samples[name], repeats[name]) for name in names}


def summarize(samples: Sequence[float], calls: int = 1) -> Timing:
    """Return the median and quantiles of some seconds.

    >>> summarize([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]).median
    3.5
    """
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, calls)
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), low, high, len(samples), calls)


def _calibrate(call: Callable[[], object]) -> int:
    """Warm a call and return how many make a sample that the clock can resolve."""
    call()
    call()
    once = _time(call, 1)
    if once >= _SAMPLE:
        return 1
    rough = min(_MOST_CALLS, max(1, int(_SAMPLE / 4 / max(once, 1e-7))))
    return min(_MOST_CALLS, max(1, round(_SAMPLE / max(_time(call, rough), 1e-7))))


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from falling into one sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
