"""Measure a plan row by row: refuse a wrong kernel, then time the right one beside its peers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from ..errors import RunError
from ..kernels import dispatch
from . import correctness
from .cases import OURS, Case, Peer, make_case, make_peers
from .shapes import DTYPES, Row
from .timing import Timing, interleave

__all__ = ["NotTimed", "limit_threads", "measure", "measure_row"]


@dataclass(frozen=True)
class NotTimed:
    """A row that was not timed, and why.

    Attributes:
        row: its name.
        reason: in words.
        wrong: normkit's result on it is wrong; otherwise it only does not fit this machine.
    """

    row: str
    reason: str
    wrong: bool


def measure(
    rows: Sequence[Row], *, seconds: float, least: int = 5, compiled: bool = False
) -> Iterator[dict[str, Any] | NotTimed]:
    """Yield the result of every row, or why it was not timed.

    Args:
        rows: from `shapes.plan`.
        seconds: for the timing of one row, all peers together.
        least: so many samples of each peer at least.
        compiled: time torch.compile too.
    """
    for row in rows:
        needed, available = row.bytes_needed(4 if compiled else 3), psutil.virtual_memory().available
        if needed > 0.8 * available:
            reason = f"needs {needed / 1e9:.1f} GB of memory, of which {available / 1e9:.1f} GB are free"
            yield NotTimed(row.name, reason, wrong=False)
            continue
        try:
            yield measure_row(row, seconds=seconds, least=least, compiled=compiled)
        except RunError as error:
            yield NotTimed(row.name, str(error), wrong=True)


def measure_row(row: Row, *, seconds: float, least: int = 5, compiled: bool = False) -> dict[str, Any]:
    """Check and time one row.

    Raises:
        RunError: normkit's result is wrong. It is not timed.
    """
    case = make_case(row)
    peers = make_peers(case, compiled=compiled)
    used = dispatch.explain(peers[OURS].layer, case.x.detach())
    errors = correctness.compare(case, {name: peer.results() for name, peer in peers.items()})
    wrong = correctness.faults(errors[OURS], DTYPES[row.dtype])
    if wrong:
        raise RunError(f"the {used.backend} kernel is wrong: {'; '.join(wrong)}")
    timings = _time(case, peers, seconds, least)
    return {
        "set": row.set,
        "shape": list(row.shape.sizes),
        "count": row.shape.count,
        "dtype": row.dtype,
        "layout": row.layout,
        "work": row.work,
        "chain": row.chain,
        "activation": row.activation,
        "elements": row.shape.elements,
        "bytes": row.bytes_of_tensor * row.tensors_moved,
        "backend": used.backend,
        "kernel": used.kernel,
        "peers": {name: _entry(row, name, timing, errors.get(name)) for name, timing in timings.items()},
    }


def _time(case: Case, peers: dict[str, Peer], seconds: float, least: int) -> dict[str, Timing]:
    source = case.x.detach()
    target = torch.empty_like(source)
    calls = {name: peer.run for name, peer in peers.items()}
    copies = {"copy": lambda: target.copy_(source), "clone": source.clone}
    return interleave({**calls, **copies}, seconds=seconds, least=least)


def _entry(row: Row, name: str, timing: Timing, errors: correctness.Errors | None) -> dict[str, Any]:
    """Return what is kept of one peer's timing; a copy reads one tensor and writes one."""
    moved = row.bytes_of_tensor * (2 if errors is None else row.tensors_moved)
    return {
        **asdict(timing),
        "ns_per_element": timing.median * 1e9 / row.shape.elements,
        "gb_per_second": moved / timing.median / 1e9,
        "error": None if errors is None else _finite(errors.output),
        "gradient_error": None if errors is None else _finite(errors.gradients),
    }


def _finite(error: float | None) -> float | None:
    """Return an error as JSON can hold it: a NaN in a result is as good as no digit, and written as the largest."""
    return None if error is None else min(error, torch.finfo(torch.float64).max)


@contextmanager
def limit_threads(count: int | None) -> Iterator[int]:
    """Run torch on so many threads inside; yield how many they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
