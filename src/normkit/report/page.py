"""The report: one self-contained HTML file that opens with the verdict and the figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..lab.charts import Chart, Line, Table
from ..lab.ledger import Entry, read_ledger, write_verdicts
from ..lab.results import atomic_write
from ..lab.verdicts import Part
from .figures import draw, inline_panels

__all__ = ["effect_in_words", "render", "write_report"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One claim as the template takes it."""

    entry: Entry
    charts: tuple[tuple[Chart, tuple[Markup, ...]], ...]
    tables: tuple[Table, ...]
    settings: tuple[tuple[str, str], ...]


def write_report(folder: Path) -> tuple[Entry, ...]:
    """Judge a folder's results and write ``verdicts.json``, ``figures/`` and ``report.html`` into it.

    Raises:
        ArgumentError: the folder does not exist or holds no run.
        ResultsError: its files are damaged.
        OSError: the folder cannot be written.
    """
    entries = read_ledger(folder)
    write_verdicts(folder, entries)
    for entry in entries:
        for chart in entry.shown:
            if isinstance(chart, Chart):
                draw(chart, folder / "figures")
    atomic_write(folder / "report.html", render(entries).encode())
    return entries


def render(entries: Sequence[Entry]) -> str:
    """Return the page. Everything that comes from results or settings is escaped."""
    environment = Environment(
        loader=PackageLoader("normkit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["effect"] = effect_in_words
    environment.tests["banded"] = _has_bands
    return environment.get_template("report.html.j2").render(sections=[_section(entry) for entry in entries])


def effect_in_words(part: Part) -> str:
    """Return an effect with its interval and the number of seeds.

    >>> from normkit.lab.verdicts import Rule, judge
    >>> rule = Rule(effect="gain", unit="nats", direction="above", threshold=0.0)
    >>> effect_in_words(judge(rule, {0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}))
    '+1.0000 nats (95 % interval +1.0000 to +1.0000, 2 seeds)'
    """
    if part.effect is None:
        return f"no number: {part.note}"
    unit = f" {part.rule.unit}" if part.rule.unit else ""
    seeds = f"{part.seeds} seed{'' if part.seeds == 1 else 's'}"
    if part.low is None or part.high is None:
        return f"{_signed(part.effect)}{unit} ({seeds}; no interval: {part.note})"
    return f"{_signed(part.effect)}{unit} (95 % interval {_signed(part.low)} to {_signed(part.high)}, {seeds})"


def _signed(number: float) -> str:
    """Return the number with its sign and four digits, also where it is so small that four decimals show none."""
    return f"{number:+.4f}" if number == 0 or abs(number) >= 0.001 else f"{number:+.1e}"


def _has_bands(chart: Chart) -> bool:
    """Return whether the caption must say what a band is."""
    return any(isinstance(mark, Line) and mark.low for panel in chart.panels for mark in panel.marks)


def _section(entry: Entry) -> Section:
    """Gather what the template shows of one claim."""
    charts = [chart for chart in entry.shown if isinstance(chart, Chart)]
    return Section(
        entry=entry,
        # The only markup that is not escaped is what matplotlib drew, which escapes every word itself.
        charts=tuple((chart, tuple(Markup(panel) for panel in inline_panels(chart))) for chart in charts),  # noqa: S704
        tables=tuple(table for table in entry.shown if isinstance(table, Table)),
        settings=tuple(_settings(entry.record)),
    )


def _settings(record: Any) -> list[tuple[str, str]]:
    """Return the names and values of everything the numbers hang on."""
    plan = record["plan"]
    named = [("data", record["data"]), ("norms", ", ".join(plan["norms"])), ("seeds", f"0 to {plan['seeds'][-1]}")]
    named += [
        (name.replace("_", " "), "all" if value is None else str(value)) for name, value in plan["settings"].items()
    ]
    named += [(name, version) for name, version in record["versions"].items()]
    named += [("machine", record["machine"]), ("commit", record["commit"] or "not known")]
    return named
