"""What ``normkit bench`` shows in the terminal: progress to standard error, tables to standard output."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..bench.goals import Verdict, slower, verdicts
from ..bench.markdown import yes_or_no
from ..bench.summary import Group, groups, of_copy, ratio
from .terminal import Terminal

__all__ = ["BenchProgress", "print_document"]

# Wider than any table.
_WIDEST = 1000


class BenchProgress:
    """A bar with the time left; nothing where there is no terminal."""

    def __init__(self) -> None:
        self.console = Terminal(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("measured,"),
            TimeElapsedColumn(), TextColumn("so far,"), TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("left"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begin(self, what: str, total: int) -> None:
        """Start the bar of one section."""
        self.task = self.progress.add_task(what, total=total)
        if not self.console.is_terminal:
            self.console.print(f"measuring {total} {what}")

    def advance(self) -> None:
        """Count one more as measured."""
        assert self.task is not None
        self.progress.advance(self.task)


def print_document(document: dict[str, Any]) -> None:
    """Print what is slower than torch, and the tables of what was measured."""
    console = Terminal()
    if document["rows"] or document["training"]:
        found_slower = slower(document)
        console.print("Slower than torch:" if found_slower else "Nothing is slower than torch.")
        for one in found_slower:
            console.print(f"  {one}", soft_wrap=True, highlight=False)
    if document["rows"]:
        _print(console, _rows_table(document["rows"]))
        found = groups(document["rows"])
        _print(console, _groups_table(found))
        worst = min(found, key=lambda group: group.worst)
        console.print(f"worst: {worst.worst:.2f} times torch, {worst.worst_shape}, {', '.join(worst.key)}")
    for row in document["skipped"]:
        console.print(f"left out: {row['row']}: {row['reason']}", soft_wrap=True, highlight=False)
    if document["training"]:
        _print(console, _training_table(document["training"]))
    for found_imports in document["imports"]:
        seconds = found_imports["modules"]
        console.print(
            f"import torch {_range(seconds['torch'])}, import normkit {_range(seconds['normkit'])}: "
            f"{found_imports['overhead']:+.1%}"
        )
    judged = verdicts(document)
    if judged:
        _print(console, _verdicts_table(judged))
    for row in document["wrong"]:
        console.print(f"WRONG, not timed: {row['row']}: {row['reason']}", soft_wrap=True, highlight=False)


def _print(console: Terminal, table: Table) -> None:
    """Print a table as wide as it is: a narrow terminal breaks its lines, and no number is cut off."""
    width = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    Terminal(width=max(console.width, width)).print(table, crop=False)


def _range(timing: dict[str, Any]) -> str:
    """Return a median with its quantiles at 20 % and 80 %, in the unit that suits it.

    >>> _range({"median": 0.00125, "low": 0.0012, "high": 0.0021})
    '1.25 ms (1.2-2.1)'
    """
    unit, scale = next(
        ((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e3)) if timing["median"] * scale >= 1), ("us", 1e6)
    )
    median, low, high = (f"{float(f'{timing[name] * scale:.3g}'):g}" for name in ("median", "low", "high"))
    return f"{median} {unit} ({low}-{high})"


def _rows_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        "Time of one call: median (20 % to 80 %); error relative to the float64 reference",
        ["set", "shape", "type", "layout", "work", "layers"],
        ["torch", "normkit", "ns/element", "GB/s", "of copy", "error: torch", "normkit", "over torch"],
    )
    for row in rows:
        torch, ours = row["peers"]["torch"], row["peers"]["normkit"]
        table.add_row(
            row["set"], "x".join(map(str, row["shape"])), row["dtype"], row["layout"], row["work"], row["chain"],
            _range(torch), _range(ours), f"{ours['ns_per_element']:.3f}",
            f"{ours['gb_per_second']:.1f}", f"{of_copy(row):.2f}", _errors(torch), _errors(ours), f"{ratio(row):.2f}",
        )  # fmt: skip
    return table


def _errors(peer: dict[str, Any]) -> str:
    """Return the error of the output, and that of the gradients where there are any."""
    gradients = peer["gradient_error"]
    return f"{peer['error']:.0e}" + ("" if gradients is None else f" {gradients:.0e}")


def _groups_table(found: Sequence[Group]) -> Table:
    rivals = list(dict.fromkeys(name for group in found for name in group.faster))
    table = _table(
        "Geometric means over the shapes: how many times faster normkit is",
        ["work", "layers", "type", "layout"],
        ["shapes", *(f"over {name}" for name in rivals), "goal", "met", "of copy", "worst", "worst shape"],
    )
    for group in found:
        over = [f"{group.faster[name]:.2f}" if name in group.faster else "" for name in rivals]
        goal = "" if group.goal is None else f"{group.goal:g}"
        worst = [f"{group.worst:.2f}", group.worst_shape]
        table.add_row(*group.key, str(group.rows), *over, goal, yes_or_no(group.met), f"{group.of_copy:.2f}", *worst)
    return table


def _verdicts_table(found: Sequence[Verdict]) -> Table:
    table = _table("Goals", ["met", "goal", "found"], [])
    for verdict in found:
        table.add_row(yes_or_no(verdict.met), verdict.goal, verdict.found)
    return table


def _training_table(rows: Sequence[dict[str, Any]]) -> Table:
    peers = list(rows[0]["peers"])
    table = _table(
        "One training step: median (20 % to 80 %)", ["network", "batch", "layout"], [*peers, "normkit over torch"]
    )
    for row in rows:
        times = [_range(row["peers"][name]) for name in peers]
        table.add_row(row["network"], "x".join(map(str, row["batch"])), row["layout"], *times, f"{row['ratio']:.2f}")
    return table


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
