"""Put together what the processes of a distributed run have measured, each on its own share of the data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from ..errors import ArgumentError, SurgeryError
from ..functional.exchange import group_of

__all__ = ["check_group", "others_hidden", "refuse_differing", "together"]


def check_group(group: Any) -> Any:
    """Return the group that is meant, where one runs.

    Raises:
        ArgumentError: ``torch.distributed`` is not initialised, or it is no group of this process.
    """
    if group is not None and not (distributed.is_available() and distributed.is_initialized()):
        raise ArgumentError("group= needs a running process group: call torch.distributed.init_process_group first")
    group = group_of(group, "group")
    if group is not None and distributed.get_rank(group) < 0:
        raise ArgumentError("group= does not hold this process; call this in the processes of the group alone")
    return group


def others_hidden(group: Any) -> int:
    """Return how many processes run whose data are left out where no group is given; 0 where there is but this one."""
    if group is not None or not (distributed.is_available() and distributed.is_initialized()):
        return 0
    return distributed.get_world_size() - 1


def refuse_differing(what: str, settings: list[dict[str, Any]]) -> None:
    """Refuse processes that were told different things.

    Raises:
        SurgeryError: they were; all of them see it alike.

    >>> refuse_differing("recalibrate", [{"dropout": True}, {"dropout": True}])
    """
    for name in settings[0]:
        values = [of_rank[name] for of_rank in settings]
        if any(value != values[0] for value in values):
            each = "; ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise SurgeryError(
                f"{what}: the processes of the group have different {name}. {each}; pass the same in all"
            )


class _Share:
    """What one process hands in."""

    def __init__(self) -> None:
        self.brought: Any = None
        self.all: list[Any] = []


@contextmanager
def together(group: Any, what: str) -> Iterator[_Share]:
    """Let every process hand in ``share.brought`` inside the block; afterwards ``share.all`` holds those of all.

    A process that fails inside the block tells the others, so that none waits for ever and all fail.

    Raises:
        SurgeryError: another process failed.
    """
    share, finished = _Share(), False
    try:
        yield share
        finished = True
    finally:
        if group is None:
            share.all = [share.brought]
        else:
            given: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(given, (finished, share.brought if finished else None), group=group)
            failed = [rank for rank, (well, _) in enumerate(given) if not well]
            share.all = [brought for _, brought in given]
    if group is not None and failed:
        raise SurgeryError(f"{what}: failed on rank {', '.join(map(str, failed))}, whose own message says why")
