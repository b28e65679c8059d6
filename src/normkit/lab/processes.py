"""Several processes that train one network together, as torchrun starts them: each takes its share of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ArgumentError

__all__ = ["averaged", "from_first", "is_first", "joined", "my_share", "processes", "wrapped"]

Value = TypeVar("Value")


def processes() -> int:
    """Return how many processes torchrun started beside each other; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return processes() == 1 or int(os.environ["RANK"]) == 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes, where there are several, for as long as the work inside takes.

    Raises:
        ArgumentError: the device is not the CPU: processes of a GPU are not supported.
    """
    if processes() == 1:
        yield
        return
    if device != "cpu":
        raise ArgumentError(f"--device {device}: under torchrun the laboratory runs on the CPU alone; use --device cpu")
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def from_first(value: Value) -> Value:
    """Return the first process's value in every process."""
    if not _together():
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def wrapped(model: nn.Module) -> nn.Module:
    """Return the network as it is called in training: with gradients averaged over the processes."""
    return DistributedDataParallel(model) if _together() else model


def my_share(batch: Tensor) -> Tensor:
    """Return this process's part of a batch; the parts are of one size and do not overlap."""
    return batch[distributed.get_rank() :: distributed.get_world_size()] if _together() else batch


def averaged(values: Tensor) -> Tensor:
    """Return the mean of the processes' values."""
    if _together():
        distributed.all_reduce(values)
        values = values / distributed.get_world_size()
    return values


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
