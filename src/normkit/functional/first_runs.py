"""What a forward was corrected with, kept for the backward that runs it again.

A layer whose output in training hangs on its running statistics cannot be run again when they have moved: batch
renormalization, and a frozen layer that goes on tracking. Under activation checkpointing what its first run took from
them is kept here, and is found again by the mean and variance of the batch.
"""

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import StatisticsError
from . import checks

__all__ = ["find_first_run", "keep_first_run"]

# How many forwards of one layer under activation checkpointing may wait for their backward.
_WAITING = 256
# How far mean and variance of a repetition may lie from those of its first run, in deviations.
_SAME_BATCH = 1e-3
_REPETITIONS = itertools.count(1)


@dataclass(slots=True)
class _Run:
    """A forward that a backward may run again: its batch, what it took from the running statistics, and its use."""

    mean: Tensor
    var: Tensor
    taken: tuple[Tensor, ...]
    repeated: int = 0


# By running_mean, or by the layer where what is taken are statistics that it shares with others.
_OF_STATISTICS = WeakTensorKeyDictionary()
_OF_LAYERS: WeakKeyDictionary[nn.Module, deque[_Run]] = WeakKeyDictionary()


def _runs(key: Tensor | nn.Module) -> deque[_Run]:
    by_key: Any = _OF_STATISTICS if isinstance(key, Tensor) else _OF_LAYERS
    found: deque[_Run] = by_key.setdefault(key, deque(maxlen=_WAITING))
    return found


def keep_first_run(key: Tensor | nn.Module, mean: Tensor, var: Tensor, taken: tuple[Tensor, ...]) -> None:
    """Keep what a forward with this batch took from the running statistics, or from others."""
    _runs(key).append(_Run(mean, var, taken))


def find_first_run(
    key: Tensor | nn.Module, mean: Tensor, var: Tensor, eps: float, caller: nn.Module | None
) -> tuple[Tensor, ...]:
    """Return what the first run of a forward that a backward runs again took.

    Raises:
        StatisticsError: none had this batch, or several that took other values.
    """
    runs = _runs(key)
    sigma = (var + eps).sqrt()
    apart = [
        float(torch.maximum((run.mean - mean).abs() / sigma, (run.var - var).abs() / sigma.square()).max())
        for run in runs
    ]
    nearest = min(apart, default=math.inf)
    again = "a backward runs this forward again (activation checkpointing)"
    if not nearest < _SAME_BATCH:
        checks.refuse(
            StatisticsError,
            f"{again}, and the running statistics of its first run are lost: none of the {len(runs)} that are kept, "
            f"{_WAITING} at most, had this batch. Leave the layer out of the checkpoint, or let it compute the same "
            "both times (preserve_rng_state=True)",
            caller,
        )
    same = [run for run, distance in zip(runs, apart, strict=True) if distance == nearest]
    waiting = [run for run in same if not run.repeated]
    if any(not all(map(torch.equal, run.taken, waiting[0].taken)) for run in waiting[1:]):
        checks.refuse(
            StatisticsError,
            f"{again}, and {len(waiting)} first runs had this very batch, with other running statistics: which one it "
            "is cannot be told. Leave the layer out of the checkpoint, or run one batch backward before it comes again",
            caller,
        )
    run = waiting[0] if waiting else max(same, key=lambda run: run.repeated)
    # A graph that is kept, and nested checkpoints, ask for the latest again.
    run.repeated = next(_REPETITIONS)
    return run.taken
