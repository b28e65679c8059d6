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

    def __init__(self, model: nn.Module, ranks: int, synchronized: bool, group_size: int) -> None:
        self.models: list[nn.Module] = [copy.deepcopy(model) for _ in range(ranks)]
        self._synchronized, self._group_size = synchronized, group_size
        self._books = [Book() for _ in range(ranks)]

    def run(self, step: Callable[..., Any], *shares: Sequence[Any]) -> list[Any]:
        """Call ``step(model, ...)`` on every rank with its model and its part of each of ``shares``.

        One rank computes at a time, until it waits for the others. Every rank draws random numbers of its own, also for
        dropout: rank 0 those that the caller would draw, the others from seeds that follow from the caller's random
        state. A step that begins with ``torch.manual_seed(seed + rank)`` draws what a process draws that does so.

        The copies are of the model alone. What lies outside of it is one for all ranks: a list or dict that a hook or
        the step writes to, a global, NumPy's and Python's random numbers. Have the step return what is to be kept, or
        keep it on the model, as an attribute.

        Returns:
            What each rank's step returned.

        Raises:
            ArgumentError: the step cannot be called, or a share does not hold one part for each rank.
            SyncError: the ranks called other layers, or one more often than another; the message names them.
        """
        ranks = len(self.models)
        if not callable(step):
            raise ArgumentError(f"step must be a function of a model and its parts, got {type(step).__name__} {step!r}")
        for place, share in enumerate(shares):
            given: object = share
            if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")) or isinstance(given, dict):
                kind = type(given).__name__
                raise ArgumentError(
                    f"part {place} behind the step is a {kind}; pass a list or tensor of {ranks} parts, one a rank"
                )
            if len(share) != ranks:
                raise ArgumentError(f"{ranks} ranks need as many parts each, got {len(share)}")
        results: list[Any] = []
        seeds = _seeds(ranks)
        # Groups know nothing of each other: one runs after another. The caller goes on where rank 0 ended.
        for first in range(0, ranks, self._group_size):
            results += self._run_group(first, step, shares, seeds)
            if first == 0:
                random = torch.get_rng_state()
        torch.set_rng_state(random)
        return results

    def _run_group(
        self, first: int, step: Callable[..., Any], shares: Sequence[Sequence[Any]], seeds: list[int]
    ) -> list[Any]:
        together = Lockstep(self._group_size, _share, _refuse_missing)

        def run_one(place: int) -> Any:
            rank = first + place
            if rank > 0:
                torch.manual_seed(seeds[rank])
            member = _Rank(together, place, self._books[rank])
            with simulated(member) if self._synchronized else contextlib.nullcontext():
                return step(self.models[rank], *(share[rank] for share in shares))

        return together.run(run_one)


def _seeds(ranks: int) -> list[int]:
    """Return a seed for each rank that follows from the caller's random state and does not advance it."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    seeds: list[int] = torch.randint(2**62, (ranks,), generator=generator).tolist()
    return seeds


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
        if self.together.part() is None:
            raise SyncError(f"{words}: the simulation is over; call backward inside the step, where the ranks are")
        rows: Tensor = self.together.meet((words, row))
        return rows


def simulate(
    model: nn.Module, ranks: int = 8, *, synchronized: bool = True, group_size: int | None = None
) -> Simulation:
    """Run steps of many ranks in one process, with the numbers that processes have, bit for bit.

    Each rank is a copy of the model; its :class:`normkit.SyncBatchNorm` layers exchange their rows with the other
    copies' as processes do. Gradients stay each rank's own: what data parallelism does with them is not simulated. Each
    rank draws random numbers of its own; what lies outside the model is one for all: see :meth:`Simulation.run`.

    Args:
        model: not changed; on a CPU, for the backward of a GPU runs in one thread that cannot wait for itself.
        ranks: how many, at least 1.
        synchronized: False for layers that see their own rank only.
        group_size: how many neighbouring ranks share statistics, as in groups of ``torch.distributed.new_subgroups``;
            None for all. Errors then count the ranks of a group from 0.

    Raises:
        ArgumentError: no model, ranks below 1, a group size that does not divide them, or a model on another device.

    >>> import normkit
    >>> run = simulate(normkit.SyncBatchNorm(1), ranks=2)
    >>> outputs = run.run(lambda model, x: model(x), [torch.tensor([[1.0]]), torch.tensor([[3.0]])])
    >>> [output.item() for output in outputs]  # doctest: +ELLIPSIS
    [-0.99999..., 0.99999...]
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ArgumentError(f"ranks must be an integer of at least 1, got {ranks!r}")
    given: object = model
    if not isinstance(given, nn.Module):
        raise ArgumentError(f"simulate takes a model, an nn.Module, got {type(given).__name__} {given!r}")
    size = ranks if group_size is None else group_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or ranks % size:
        raise ArgumentError(f"group_size must divide the {ranks} ranks, got {group_size!r}")
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        raise ArgumentError("simulate runs a model on a CPU; pass model.cpu()")
    return Simulation(model, ranks, synchronized, size)
