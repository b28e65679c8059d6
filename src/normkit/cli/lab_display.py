"""What ``normkit lab`` shows in the terminal: progress to standard error, tables and verdicts to standard output."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from ..lab import charts
from ..lab.claim import Claim
from ..lab.compare import Comparison
from ..lab.grid import Event
from ..lab.ledger import Entry
from ..lab.results import read_cells
from ..lab.verdicts import Outcome
from ..report.language import ENGLISH, Language, effect_in_words, note_in_words, signed
from ..report.statement import needed
from .terminal import Terminal

__all__ = ["RunProgress", "print_claims", "print_comparisons", "print_entries", "print_interrupted"]

COLOURS = {
    "supported": "green", "refuted": "red", "no difference worth having": "cyan", "inconclusive": "yellow",
    "not testable here": "yellow",
}  # fmt: skip


class _Left(ProgressColumn):
    """The time left, once an epoch has told how long one takes."""

    def render(self, task: Task) -> Text:
        """Write the column."""
        if task.time_remaining is None:
            return Text("time left: after the first epochs")
        return Text(f"{timedelta(seconds=round(task.time_remaining))} left")


class RunProgress:
    """A bar over all epochs with the time left and counts of claims and cells; lines where there is no terminal."""

    def __init__(self) -> None:
        self.console = Terminal(stderr=True)
        # Until the data are read and the folder is looked through nothing can be counted, and nothing is.
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self.console,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("reading data and results", total=None, cells="")
        self.cells: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def on_event(self, event: Event) -> None:
        """Show what the grid reports."""
        if event.kind == "dropped":
            self.console.print(escape(event.text), soft_wrap=True)
        elif event.kind == "begin":
            if event.done:
                nothing = "; nothing is left to run" if event.done == event.steps else ""
                self.console.print(f"{event.done} of {event.steps} epochs were done before{nothing}")
            self.cells, self.left = Counter(event.cells), Counter(event.left)
            self.progress.columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs,"),
                TextColumn("{task.fields[cells]},"), TimeElapsedColumn(), TextColumn("so far,"), _Left(),
            )  # fmt: skip
            self.progress.update(
                self.task, total=event.steps, completed=event.done, cells=self._counts(), description="starting"
            )
        elif event.kind == "epoch":
            self.progress.update(self.task, advance=1, description=escape(event.cell))
        elif event.kind == "cell":
            self.left[str(event.rows[0]["claim"])] -= 1
            self.progress.update(self.task, cells=self._counts())
            if not self.console.is_terminal:
                self.console.print(f"done: {escape(event.cell)} ({self._counts()})", soft_wrap=True, highlight=False)

    def _counts(self) -> str:
        """Return how many cells and claims are done, in words."""
        cells, claims = self.cells.total() - self.left.total(), sum(self.left[claim] < 1 for claim in self.cells)
        return f"{cells} of {self.cells.total()} cells, {claims} of {len(self.cells)} claims"


def print_claims(claims: Sequence[Claim]) -> None:
    """Print one line per claim."""
    table = Table(box=None, pad_edge=False)
    for name in ("claim", "", "what is claimed", "data"):
        table.add_column(name)
    for claim in claims:
        data = [*claim.data, *(["your own (--settings)"] if claim.own_network else [])]
        table.add_row(claim.id, claim.number, escape(claim.title), ", ".join(data))
    Terminal().print(table)


def print_entries(entries: Sequence[Entry], folder: Path, lang: Language = ENGLISH) -> None:
    """Print each claim's tables and verdict, then where the report is."""
    console = Terminal()
    for entry in entries:
        for table in entry.shown:
            if isinstance(table, charts.Table):
                console.print(_table(table, lang))
        # In a terminal broken between words; a pipe gets each line whole.
        console.print(_verdict(entry, lang), soft_wrap=not console.is_terminal)
    report = f"{lang.say('Report')}{lang.say(': ')}{escape(str(folder / 'report.html'))}"
    console.print(report, soft_wrap=True, highlight=False)


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Print a table of every claim's effects and verdicts in two folders, and what the runs differ in."""
    console = Terminal()
    table = Table(box=None, pad_edge=False)
    for name in ("claim", "effect", "A", "B", "B minus A"):
        table.add_column(name)
    for comparison in comparisons:
        first, second = comparison.verdicts
        table.add_row(f"[bold]{comparison.claim}[/]", "", _coloured(first), _coloured(second), "")
        for part in comparison.parts:
            difference = "" if part.difference is None else signed(part.difference)
            effects = (escape(effect_in_words(side)) for side in (part.first, part.second))
            table.add_row("", escape(part.effect), *effects, difference)
    console.print(table)
    for comparison in comparisons:
        if comparison.rows:
            console.print(escape(f"{comparison.claim}: {comparison.rows}"), soft_wrap=True)
    for comparison in comparisons:
        for name, (first_value, second_value) in comparison.settings.items():
            console.print(escape(f"{comparison.claim}: {name} {first_value} in A, {second_value} in B"), soft_wrap=True)


def print_interrupted(folder: Path, total: int) -> None:
    """Say what is kept and how to go on."""
    kept = len(read_cells(folder / "results.jsonl").cells)
    Terminal(stderr=True).print(
        f"Interrupted. {kept} of {total} cells are done and kept in {escape(str(folder))}; the same command goes on "
        "from there.",
        soft_wrap=True,
    )


def _coloured(outcome: Outcome) -> str:
    return f"[bold {COLOURS[outcome]}]{outcome}[/]"


def _table(shown: charts.Table, lang: Language) -> Table:
    """Return the claim's table as rich draws it."""
    title, note = escape(lang.label(shown.title)), escape(note_in_words(shown.note, lang))
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    for name in shown.header:
        table.add_column(escape(lang.label(name)), justify="right")
    for row in shown.rows:
        table.add_row(*(escape(lang.label(cell)) for cell in row))
    return table


def _verdict(entry: Entry, lang: Language) -> str:
    """Return the verdict with each part's effect and interval."""
    outcome = entry.verdict.verdict
    primary, colon = entry.verdict.primary, lang.say(": ")
    lines = [f"[bold {COLOURS[outcome]}]{lang.say(outcome).upper()}[/]{colon}{escape(lang.title(entry.claim))}"]
    lines.append(f"  {escape(lang.prose(primary.rule.effect))}{colon}{escape(effect_in_words(primary, lang))}")
    if reason := needed(entry.verdict, lang):
        lines.append(f"  {escape(reason)}")
    lines += [
        f"  {lang.say('detail')}{colon}{escape(lang.prose(part.rule.effect))}{colon}"
        f"{escape(effect_in_words(part, lang))}{lang.say(', ')}{lang.say(part.outcome)}"
        for part in entry.verdict.details
    ]
    if entry.finished < entry.total:
        unfinished = "Unfinished: {finished} of {total} cells are done."
        lines.append(f"  {lang.say(unfinished, finished=entry.finished, total=entry.total)}")
    return "\n".join(lines)
