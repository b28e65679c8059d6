"""Run the cells of plans, beside each other in processes, and keep each one's rows as soon as it is done.

Workers compute and the parent alone writes results. Progress travels through ``log.jsonl``: workers append one line per
epoch, with times, and the parent reads along. The log holds what must not be in the results, because it differs from
run to run.
"""

import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from joblib import delayed

from ..errors import ArgumentError
from ..spelling import alternatives
from .cells import SEARCHES, SECONDS_BETWEEN_LOOKS, Surroundings, forget_checkpoints, run_cell, write_log
from .claim import Cell, Plan, Row
from .claims import all_claims
from .data import Dataset, load
from .processes import from_first, is_first, joined, processes
from .record import check_record, check_versions, commit, elsewhere, read_record, write_record
from .results import append_rows, locked, read_cells, rewrite
from .searches import forget_locks
from .sequential import LOOKS
from .workers import Where, workers

__all__ = ["Event", "available_jobs", "check_device", "run"]

OnEvent = Callable[["Event"], None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened that a progress display may want to show.

    Attributes:
        kind: ``"begin"`` (all cells are known), ``"dropped"`` (unfinished rows were left out, the folder is of
            another machine, or holds more seeds), ``"epoch"``, ``"cell"``.
        cell: the cell's key, for the last two.
        steps: all measurements of the run, for ``"begin"``.
        done: how many of them were done before, for ``"begin"``.
        cells: how many cells each claim has, for ``"begin"``.
        left: how many of them are still to run, for ``"begin"``.
        text: a sentence, for ``"dropped"``.
        rows: the rows of the cell, for ``"cell"``.
    """

    kind: str
    cell: str = ""
    steps: int = 0
    done: int = 0
    cells: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    text: str = ""
    rows: tuple[Row, ...] = ()


def run(
    plans: Sequence[Plan],
    folder: Path,
    *,
    jobs: int,
    data_dir: Path | None,
    on_event: OnEvent,
    scheduler: str | None = None,
    modules: str | None = None,
    deadline: float = math.inf,
) -> None:
    """Run what is not done yet of these plans, and leave ``results.jsonl`` complete and in order.

    Args:
        plans: one per claim.
        folder: where results are kept; made if it does not exist.
        jobs: how many processes; the numbers do not hang on it.
        data_dir: the folder of the data set's files.
        on_event: called as the work goes on, also from another thread.
        scheduler: the address of a Dask scheduler whose workers run the cells, in the place of processes here.
        modules: a folder in which workers find a reader's modules too.
        deadline: no cell is begun after this time of `time.monotonic`; those that are running end.

    Raises:
        ArgumentError: the device is not there, or the scheduler's workers cannot run the cells.
        DataError: the data are missing or damaged; nothing was run.
        ResultsError: the folder is damaged, in use, or was made with other settings; nothing was run.
        RunError: a worker died; every finished cell is kept.
        OSError: results cannot be written; every finished cell is kept.
    """
    for plan in plans:
        check_device(plan.device)
    datasets = {plan.claim: load(plan.data, data_dir) for plan in plans}
    # Absolute: a worker may have been started in another folder, by an earlier run of this process.
    surroundings = Surroundings(
        data_dir=data_dir, folder=folder.absolute(), commit=commit(), parent=None, modules=modules
    )
    with joined(plans[0].device):
        if not is_first():
            _run_shared(from_first(list[Cell]()), surroundings, on_event)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            pending = _begin(plans, folder, datasets, on_event)
            if processes() > 1:
                _run_shared(from_first(pending), surroundings, on_event)
            elif pending:
                where = Where(jobs=min(jobs, len(pending)), scheduler=scheduler)
                _run_pending(pending, folder, where, surroundings, on_event, deadline)
            forget_locks(folder / SEARCHES)
            results = folder / "results.jsonl"
            rewrite(results, _in_order(folder, read_cells(results).cells))


def _begin(plans: Sequence[Plan], folder: Path, datasets: dict[str, Dataset], on_event: OnEvent) -> list[Cell]:
    """Check that the folder may be gone on with, leave out what is unfinished in it, and return the cells to run."""
    results = folder / "results.jsonl"
    for plan in plans:
        check_record(folder, plan, datasets[plan.claim])
    loaded = read_cells(results)
    told = dict.fromkeys(elsewhere(folder, plan) for plan in plans if _unfinished(plan, loaded.cells))
    more = (_more_seeds(plan, folder, loaded.rows) for plan in plans)
    for text in filter(None, (*told, *more)):
        on_event(Event(kind="dropped", text=text))
    pending = _pending(plans, folder, set(loaded.cells), datasets)
    if loaded.dropped:
        on_event(Event(kind="dropped", text=f"{results}: dropped {loaded.dropped}; it is run again"))
        rewrite(results, loaded.rows)
    cells = [cell for plan in plans for cell in plan.cells()]
    steps, left = sum(cell.steps for cell in cells), sum(cell.steps for cell in pending)
    counts = [Counter(cell.claim for cell in part) for part in (cells, pending)]
    on_event(Event(kind="begin", steps=steps, done=steps - left, cells=counts[0], left=counts[1]))
    return pending


def _more_seeds(plan: Plan, folder: Path, rows: Sequence[Row]) -> str:
    """Say that the folder holds seeds that were not asked for, since the verdict is of all of them; else nothing."""
    held = {row["seed"] for row in rows if row["claim"] == plan.claim}
    if held <= set(plan.seeds):
        return ""
    asked, count = len(plan.seeds), len(held.union(plan.seeds))
    kept, were = f"{len(held)} seed{'s' * (len(held) > 1)}", "was" if asked == 1 else "were"
    looks = f"all {count} count, a verdict at looks of {', '.join(map(str, LOOKS[:-1]))} and {LOOKS[-1]}"
    return f"{folder} holds {kept} of {plan.claim}, and {asked} {were} asked for: {looks}"


def _unfinished(plan: Plan, done: Mapping[str, object]) -> bool:
    return any(cell.key not in done for cell in plan.cells())


def available_jobs() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(device: str) -> None:
    """Refuse a device that torch does not have.

    Raises:
        ArgumentError: unknown, or not there.
    """
    if device not in ("cpu", "cuda"):
        raise ArgumentError(f"unknown device {device!r}; {alternatives(device, ('cpu', 'cuda'))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: torch finds no CUDA device on this machine; use --device cpu")


def _pending(plans: Sequence[Plan], folder: Path, done: set[str], datasets: dict[str, Dataset]) -> list[Cell]:
    """Return the cells still to run, after the record of each plan is checked and written."""
    pending = []
    for plan in plans:
        mine = [cell for cell in plan.cells() if cell.key not in done]
        if mine:
            check_versions(folder, plan)
        write_record(folder, plan, datasets[plan.claim])
        pending += mine
    return pending


def _run_pending(
    pending: Sequence[Cell],
    folder: Path,
    where: Where,
    surroundings: Surroundings,
    on_event: OnEvent,
    deadline: float,
) -> None:
    """Run cells where they are to be run and append each one's rows when it is done."""
    if where.scheduler:
        # Other machines see no folder of ours: their cells are neither followed nor gone on with inside.
        surroundings = replace(surroundings, folder=None)
    elif where.jobs > 1:
        surroundings = replace(surroundings, parent=os.getpid())
    begun = time.perf_counter()
    with _follow(folder / "log.jsonl", on_event), workers(where, folder) as parallel:
        # joblib takes tasks from this as workers fall idle.
        tasks = (delayed(run_cell)(cell, surroundings) for cell in pending if time.monotonic() < deadline)
        for rows in parallel(tasks):
            append_rows(folder / "results.jsonl", rows)
            forget_checkpoints(folder, rows[0]["cell"])
            if where.scheduler:
                for step in range(1, len(rows) + 1):
                    write_log(folder, rows[0]["cell"], step, time.perf_counter() - begun)
            on_event(Event(kind="cell", cell=rows[0]["cell"], rows=tuple(rows)))


def _run_shared(pending: Sequence[Cell], surroundings: Surroundings, on_event: OnEvent) -> None:
    """Run cells one after another, each in all processes that torchrun started; the first alone writes.

    Nothing is kept within a cell: what is kept would have to be the same in every process.
    """
    folder = surroundings.folder
    assert folder is not None
    if not is_first():
        for cell in pending:
            run_cell(cell, replace(surroundings, folder=None))
        return
    with _follow(folder / "log.jsonl", on_event):
        for cell in pending:
            rows = run_cell(cell, replace(surroundings, keeps=False))
            append_rows(folder / "results.jsonl", rows)
            on_event(Event(kind="cell", cell=cell.key, rows=tuple(rows)))


@contextmanager
def _follow(log: Path, on_event: OnEvent) -> Iterator[None]:
    """Turn what is added to the log into events, in a thread."""
    stop = threading.Event()
    start = log.stat().st_size if log.exists() else 0
    thread = threading.Thread(target=_read_along, args=(log, start, stop, on_event), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read_along(log: Path, position: int, stop: threading.Event, on_event: OnEvent) -> None:
    """Report every line after ``position``, until told to stop and then once more."""
    last = False
    while not last:
        last = stop.wait(SECONDS_BETWEEN_LOOKS)
        if not log.exists():
            continue
        with log.open("rb") as stream:
            stream.seek(position)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        position += len(whole)
        for line in whole.splitlines():
            on_event(Event(kind="epoch", cell=json.loads(line)["cell"]))


def _in_order(folder: Path, cells: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return all rows of the folder in the claims' order, and within a claim in its plan's order."""
    record = read_record(folder)
    rows: list[dict[str, Any]] = []
    for claim in all_claims():
        if claim.id in record:
            mine = {key: value for key, value in cells.items() if value[0]["claim"] == claim.id}
            plan = record[claim.id]["plan"]
            rows += [row for key in sorted(mine, key=lambda key: _place(mine[key][0], plan)) for row in mine[key]]
    return rows


def _place(row: dict[str, Any], plan: dict[str, Any]) -> tuple[int, int, int]:
    """Return a row's place in its plan: variant, norm, seed."""
    variants = [dict(variant) for variant in plan["variants"]]
    variant = next(i for i, names in enumerate(variants) if all(row[name] == value for name, value in names.items()))
    return variant, plan["norms"].index(row["norm"]), row["seed"]
