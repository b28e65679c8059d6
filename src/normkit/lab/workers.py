"""Where cells are run: processes of this machine, or the workers of a Dask cluster."""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joblib import Parallel, parallel_config

from ..errors import ArgumentError, RunError

__all__ = ["Where", "workers"]


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where cells are run.

    Attributes:
        jobs: how many processes of this machine.
        scheduler: the address of a Dask scheduler, whose workers take the place of the processes.
    """

    jobs: int
    scheduler: str | None = None


@contextmanager
def workers(where: Where, folder: Path) -> Iterator[Parallel]:
    """Give what runs joblib's tasks and hands their results over as they come, in any order.

    Args:
        where: processes or cluster.
        folder: where finished cells are kept, for the message when a worker dies.

    Raises:
        ArgumentError: the scheduler cannot be reached, or its workers are not fit.
        RunError: a worker died, and again in its place; what was handed over before is whole.
    """
    kept = f"finished cells are kept in {folder}: run the same command again"
    if where.scheduler is None:
        try:
            yield Parallel(n_jobs=where.jobs, return_as="generator_unordered", batch_size=1)
        except BrokenProcessPool as error:
            raise RunError(
                f"a worker process died (killed, or out of memory); {kept}, with a smaller --jobs if memory ran out"
            ) from error
        return
    with _client(where.scheduler) as client:
        from distributed import KilledWorker

        try:
            with parallel_config(backend="dask", client=client, wait_for_workers_timeout=30):
                yield Parallel(return_as="generator_unordered", batch_size=1)
        except KilledWorker as error:
            raise RunError(f"workers of {where.scheduler} died again and again over one cell; {kept}") from error


@contextmanager
def _client(address: str) -> Iterator[Any]:
    """Connect to a scheduler whose workers can run cells."""
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise ArgumentError('--scheduler needs distributed: pip install "normkit[cluster]"') from error
    try:
        client = Client(address, set_as_default=False, timeout=10)
    except (OSError, ValueError, TimeoutError) as error:
        raise ArgumentError(
            f"--scheduler {address}: cannot be reached ({error}); expected an address such as tcp://host:8786"
        ) from error
    with client:
        _check(client.nthreads(), address)
        yield client


def _check(threads: dict[str, int], address: str) -> None:
    """Refuse workers of several threads: torch's random numbers belong to a process, and a cell needs them alone."""
    several = [worker for worker, count in threads.items() if count > 1]
    if several:
        raise ArgumentError(
            f"--scheduler {address}: the worker {several[0]} runs {threads[several[0]]} cells at once in one process; "
            "start workers with --nthreads 1 and as many --nworkers as you like"
        )
