"""What every process of a distributed training holds, gathered on all of them."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, distributed

from ..errors import ArgumentError
from ..functional.exchange import group_of
from .subjects import Subject

__all__ = ["RankState", "check_group", "gather_ranks"]


@dataclass(frozen=True, kw_only=True)
class RankState:
    """One process's statistics and plan.

    Attributes:
        rank: its number in the group.
        statistics: running mean and variance by layer, float64 on the CPU.
        updates: the counters by layer.
        batches: how many batches its loader holds, None where it does not say.
        calls: how often each layer was called: in one forward, or while it was watched.
    """

    rank: int
    statistics: Mapping[str, tuple[Tensor, Tensor]]
    updates: Mapping[str, int | None]
    batches: int | None
    calls: Mapping[str, int] = field(default_factory=dict)


def check_group(group: Any) -> Any:
    """Return the group that is meant, where one runs.

    Raises:
        ArgumentError: ``torch.distributed`` is not initialised, or it is no group.
    """
    if group is not None and not (distributed.is_available() and distributed.is_initialized()):
        raise ArgumentError("group= needs a running process group: call torch.distributed.init_process_group first")
    return group_of(group, "group")


def gather_ranks(
    subjects: Sequence[Subject], batches: Any, calls: Mapping[str, int], group: Any
) -> tuple[RankState, ...]:
    """Gather the state of all processes; every process of the group must call this.

    Raises:
        ArgumentError: no process group is running.
    """
    group = check_group(group)
    own = RankState(
        rank=distributed.get_rank(group),
        statistics={
            s.name: (s.running_mean.double().cpu(), s.running_var.double().cpu())
            for s in subjects
            if s.tracks and s.running_mean is not None and s.running_var is not None
        },
        updates={s.name: s.updates for s in subjects if s.tracks},
        batches=len(batches) if isinstance(batches, Sized) else None,
        calls=dict(calls),
    )
    states: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(states, own, group=group)
    return tuple(states)
