"""What ``normkit lab run`` does once its options are read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..lab.claim import Plan
    from ..lab.grid import Event
    from .lab_display import RunProgress

__all__ = ["Run", "run_and_report"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run with every choice made.

    Attributes:
        plans: one per claim.
        folder: for results and report.
        jobs: how many processes.
        data_dir: the folder of the data set's files.
        lang: the report's language.
        scheduler: the address of a Dask scheduler.
        tensorboard: the folder for TensorBoard's files.
        modules: the folder in which a reader's modules are found.
        until_decided: whether seeds are added until every claim is decided.
        minutes: how long cells are begun, then; ``None`` for no end.
    """

    plans: "Sequence[Plan]"
    folder: Path
    jobs: int
    data_dir: Path | None
    lang: str
    scheduler: str | None
    tensorboard: Path | None
    modules: str | None
    until_decided: bool = False
    minutes: float | None = None


def run_and_report(todo: Run) -> int:
    """Run the plans under a progress bar, then print tables, verdicts and the report's path."""
    from ..lab.processes import is_first
    from ..lab.tensorboard import check_tensorboard
    from ..report.language import language
    from ..report.page import write_report
    from .lab_display import RunProgress, print_entries, print_interrupted
    from .terminal import TOLD_INTERRUPT

    if todo.tensorboard is not None:
        check_tensorboard()
    if not is_first():
        _run(todo, None)
        return 0
    try:
        with RunProgress() as progress:
            _run(todo, progress)
    except KeyboardInterrupt:
        print_interrupted(todo.folder, sum(len(plan.cells()) for plan in todo.plans))
        return TOLD_INTERRUPT
    chosen = language(todo.lang)
    entries = write_report(todo.folder, chosen)
    _write_tensorboard(todo)
    print_entries(entries, todo.folder, chosen)
    return 0


def _run(todo: Run, progress: "RunProgress | None") -> None:
    from ..lab.grid import run
    from ..lab.tensorboard import write_cell
    from ..lab.until import run_until_decided

    def on_event(event: "Event") -> None:
        if progress is not None:
            progress.on_event(event)
        if event.kind == "cell" and todo.tensorboard is not None:
            write_cell(todo.tensorboard, event.rows)

    def run_plans(plans: "Sequence[Plan]", deadline: float) -> None:
        run(
            plans, todo.folder, jobs=todo.jobs, data_dir=todo.data_dir, on_event=on_event, scheduler=todo.scheduler,
            modules=todo.modules, deadline=deadline,
        )  # fmt: skip

    if todo.until_decided:
        run_until_decided(todo.plans, todo.folder, run_plans, minutes=todo.minutes)
    else:
        run_plans(todo.plans, math.inf)


def _write_tensorboard(todo: Run) -> None:
    """Write the cells that an earlier run finished; those of this run are written as they come."""
    from ..lab.results import read_cells
    from ..lab.tensorboard import write_cell

    if todo.tensorboard is not None:
        for rows in read_cells(todo.folder / "results.jsonl").cells.values():
            write_cell(todo.tensorboard, rows)
