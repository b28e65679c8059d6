"""A step of many ranks in one process: a distributed run's numbers, and its mistakes, without processes."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, SyncError
from ..functional.exchange import Book, simulated
from .lockstep import Lockstep

__all__ = ["Simulation", "simulate"]


class Simulation:
    """Copies of a model, one a rank, that run in lockstep; made by :func:`simulate`.

    Attributes:
        models: the copies, in rank order.
    """

    def __init__(self, model: nn.Module, ranks: int, synchronized: bool) -> None:
        self.models: list[nn.Module] = [copy.deepcopy(model) for _ in range(ranks)]
        self._synchronized = synchronized
        self._books = [Book() for _ in range(ranks)]

    def run(self, step: Callable[..., Any], *shares: Sequence[Any]) -> list[Any]:
        """Call ``step(model, ...)`` on every rank with its model and its part of each of ``shares``.

        One rank computes at a time, until it waits for the others. Every rank starts with the random state that the
        caller has, as processes do that were seeded alike.

        Returns:
            What each rank's step returned.

        Raises:
            ArgumentError: a share does not hold one part for each rank.
            SyncError: the ranks called other layers, or one more often than another; the message names them.
        """
        for share in shares:
            if len(share) != len(self.models):
                raise ArgumentError(f"{len(self.models)} ranks need as many parts each, got {len(share)}")
        together = Lockstep(len(self.models), _share, _refuse_missing)

        def run_one(rank: int) -> Any:
            member = _Rank(together, rank, self._books[rank])
            with simulated(member) if self._synchronized else contextlib.nullcontext():
                return step(self.models[rank], *(share[rank] for share in shares))

        return together.run(run_one)


def _share(brought: list[tuple[str, Tensor]]) -> list[Tensor]:
    """Return all rows to each rank."""
    if len({row.shape for _, row in brought}) > 1:
        each = "; ".join(f"rank {rank}: {words}" for rank, (words, _) in enumerate(brought))
        raise SyncError(f"the ranks called different layers. {each}")
    return [torch.stack([row for _, row in brought])] * len(brought)


def _refuse_missing(brought: list[tuple[str, Tensor] | None]) -> SyncError:
    absent = ", ".join(str(rank) for rank, entry in enumerate(brought) if entry is None)
    words = next(entry[0] for entry in brought if entry is not None)
    return SyncError(f"{words}: rank {absent} did not come: its step has ended")


class _Rank:
    """One rank's view of the lockstep, in the place of a process group."""

    careful = True

    def __init__(self, together: Lockstep, rank: int, book: Book) -> None:
        self.together, self.rank, self.size, self.book = together, rank, together.parts, book

    def gather(self, row: Tensor, words: str) -> Tensor:
        rows: Tensor = self.together.meet((words, row))
        return rows


def simulate(model: nn.Module, ranks: int = 8, *, synchronized: bool = True) -> Simulation:
    """Run steps of many ranks in one process, with the numbers that processes have, bit for bit.

    Each rank is a copy of the model; its :class:`normkit.SyncBatchNorm` layers exchange their rows with the other
    copies' as processes do. Gradients stay each rank's own: what data parallelism does with them is not simulated, nor
    are process groups smaller than all.

    Args:
        model: not changed; on a CPU, for the backward of a GPU runs in one thread that cannot wait for itself.
        ranks: how many, at least 1.
        synchronized: False for layers that see their own rank only.

    Raises:
        ArgumentError: ranks below 1, or a model on another device.

    >>> import normkit
    >>> run = simulate(normkit.SyncBatchNorm(1), ranks=2)
    >>> outputs = run.run(lambda model, x: model(x), [torch.tensor([[1.0]]), torch.tensor([[3.0]])])
    >>> [output.item() for output in outputs]  # doctest: +ELLIPSIS
    [-0.99999..., 0.99999...]
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ArgumentError(f"ranks must be an integer of at least 1, got {ranks!r}")
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        raise ArgumentError("simulate runs a model on a CPU; pass model.cpu()")
    return Simulation(model, ranks, synchronized)
