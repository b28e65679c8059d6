"""Run the cells of plans, beside each other in processes, and keep each one's rows as soon as it is done.

Workers compute and the parent alone writes results. Progress travels through ``log.jsonl``: workers append one line per
epoch, with times, and the parent reads along. The log holds what must not be in the results, because it differs from
run to run.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed

from ..errors import ArgumentError, RunError
from .backends import seen_backends
from .claim import Cell, Plan
from .claims import all_claims, get_claim
from .data import Dataset, limited, load
from .record import check_record, check_versions, commit, device_name, read_record, versions, write_record
from .results import append_rows, locked, read_cells, rewrite
from .training import deterministic

__all__ = ["Event", "available_jobs", "check_device", "run"]

OnEvent = Callable[["Event"], None]

# Often enough for a progress bar, seldom enough to cost nothing.
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened that a progress display may want to show.

    Attributes:
        kind: ``"begin"`` (all cells are known), ``"dropped"`` (unfinished rows were left out), ``"epoch"``, ``"cell"``.
        cell: the cell's key, for the last two.
        steps: all measurements of the run, for ``"begin"``.
        done: how many of them were done before, for ``"begin"``.
        text: a sentence, for ``"dropped"``.
    """

    kind: str
    cell: str = ""
    steps: int = 0
    done: int = 0
    text: str = ""


def run(plans: Sequence[Plan], folder: Path, *, jobs: int, data_dir: Path | None, on_event: OnEvent) -> None:
    """Run what is not done yet of these plans, and leave ``results.jsonl`` complete and in order.

    Args:
        plans: one per claim.
        folder: where results are kept; made if it does not exist.
        jobs: how many processes; the numbers do not hang on it.
        data_dir: the folder of the data set's files.
        on_event: called as the work goes on, also from another thread.

    Raises:
        ArgumentError: the device is not there.
        DataError: the data are missing or damaged; nothing was run.
        ResultsError: the folder is damaged, in use, or was made with other settings; nothing was run.
        RunError: a worker died; every finished cell is kept.
        OSError: results cannot be written; every finished cell is kept.
    """
    for plan in plans:
        check_device(plan.device)
    datasets = {plan.claim: load(plan.data, data_dir) for plan in plans}
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    with locked(folder):
        for plan in plans:
            check_record(folder, plan, datasets[plan.claim])
        loaded = read_cells(results)
        pending = _pending(plans, folder, set(loaded.cells), datasets)
        if loaded.dropped:
            on_event(Event(kind="dropped", text=f"{results}: dropped {loaded.dropped}; it is run again"))
            rewrite(results, loaded.rows)
        cells = [cell for plan in plans for cell in plan.cells()]
        steps, left = sum(cell.steps for cell in cells), sum(cell.steps for cell in pending)
        on_event(Event(kind="begin", steps=steps, done=steps - left))
        if pending:
            _run_pending(pending, folder, jobs, data_dir, on_event)
        rewrite(results, _in_order(folder, read_cells(results).cells))


def available_jobs() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(device: str) -> None:
    """Refuse a device that torch does not have.

    Raises:
        ArgumentError: unknown, or not there.
    """
    if device not in ("cpu", "cuda"):
        raise ArgumentError(f"unknown device {device!r}; known are: cpu, cuda")
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


def _run_pending(pending: Sequence[Cell], folder: Path, jobs: int, data_dir: Path | None, on_event: OnEvent) -> None:
    """Run cells in processes and append each one's rows when it is done."""
    log, stamp = folder / "log.jsonl", commit()
    jobs = min(jobs, len(pending))
    parent = os.getpid() if jobs > 1 else None
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
    tasks = (delayed(_run_cell)(cell, data_dir, log, stamp, parent) for cell in pending)
    with _follow(log, on_event):
        try:
            for rows in parallel(tasks):
                append_rows(folder / "results.jsonl", rows)
                on_event(Event(kind="cell", cell=rows[0]["cell"]))
        except BrokenProcessPool as error:
            raise RunError(
                f"a worker process died (killed, or out of memory); finished cells are kept in {folder}: run the same "
                "command again, with a smaller --jobs if memory ran out"
            ) from error


def _run_cell(
    cell: Cell, data_dir: Path | None, log: Path, stamp: str | None, parent: int | None
) -> list[dict[str, Any]]:
    """Measure one cell and return its rows, each with everything needed to repeat it."""
    if parent is not None:
        _serve(parent)
    dataset = limited(load(cell.data, data_dir), cell.settings.train_images, cell.settings.test_images)
    measurements = []
    with deterministic(cell.device), seen_backends() as backends:
        begun = time.perf_counter()
        for measurement in get_claim(cell.claim).measure(cell, dataset):
            measurements.append(measurement)
            _write_log(log, cell, len(measurements), time.perf_counter() - begun)
    common = {
        "claim": cell.claim,
        "data": cell.data,
        "norm": cell.norm,
        **dict(cell.variant),
        "seed": cell.seed,
    }
    evidence = {
        "device": device_name(cell.device),
        "backend": dict(sorted(backends.items())),
        "settings": asdict(cell.settings),
        "versions": versions(),
        "commit": stamp,
        "cell": cell.key,
        "rows": len(measurements),
    }
    return [
        {**common, **measurement, **evidence, "row": number} for number, measurement in enumerate(measurements, start=1)
    ]


@lru_cache(maxsize=1)
def _serve(parent: int) -> None:
    """Make this process a worker of the parent: it leaves Ctrl-C to the parent, and ends when the parent is gone."""
    # Ctrl-C reaches every process of the terminal; the parent ends its workers itself, without their tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    # A parent that is killed cannot end its workers, which would compute on for nobody.
    threading.Thread(target=watch, daemon=True).start()


def _write_log(log: Path, cell: Cell, step: int, seconds: float) -> None:
    """Append one line in one call, so that lines of several processes do not mix."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cell": cell.key,
        "step": step,
        "steps": cell.steps,
        "seconds": round(seconds, 3),
        "process": os.getpid(),
    }
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
    finally:
        os.close(file)


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
