"""The report: one self-contained HTML file that opens with the verdicts and their figures."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..lab.charts import Chart, Line, Table
from ..lab.ledger import Entry, read_ledger, write_verdicts
from ..lab.results import atomic_write
from ..lab.verdicts import OUTCOMES
from ..printable import printable
from .contents import named_sources
from .figures import draw, draw_miniature, inline_miniature, inline_panels
from .language import ENGLISH, Language, effect_in_words, note_in_words, rule_in_words, text_of
from .markdown import render_markdown
from .miniature import interval_picture
from .settings import named_settings
from .statement import counted, family, needed, number

__all__ = ["effect_in_words", "render", "write_report"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One claim as the template takes it."""

    entry: Entry
    miniature: Markup
    interval: Markup
    charts: tuple[tuple[Chart, tuple[Markup, ...]], ...]
    tables: tuple[Table, ...]
    settings: tuple[tuple[str, str], ...]
    sources: tuple[str, ...]


def write_report(folder: Path, lang: Language = ENGLISH) -> tuple[Entry, ...]:
    """Judge a folder's results and write ``verdicts.json``, ``figures/``, ``report.html`` and ``report.md`` into it.

    Raises:
        ArgumentError: the folder does not exist or holds no run.
        ResultsError: its files are damaged.
        OSError: the folder cannot be written.
    """
    entries = read_ledger(folder)
    write_verdicts(folder, entries)
    for entry in entries:
        charts = [chart for chart in entry.shown if isinstance(chart, Chart)]
        for chart in charts:
            draw(chart, folder / "figures")
        if charts:
            draw_miniature(charts[0], folder / "figures" / f"small-{entry.claim.id}.svg")
    atomic_write(folder / "report.html", printable(render(entries, lang)).encode())
    atomic_write(folder / "report.md", printable(render_markdown(entries, lang)).encode())
    return entries


def render(entries: Sequence[Entry], lang: Language = ENGLISH) -> str:
    """Return the page. Everything that comes from results or settings is escaped."""
    environment = Environment(
        loader=PackageLoader("normkit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["effect"] = lambda part: effect_in_words(part, lang)
    environment.filters["rule"] = lambda rule: rule_in_words(rule, lang)
    environment.filters["needed"] = lambda verdict: needed(verdict, lang)
    environment.filters["note"] = lambda note: note_in_words(note, lang)
    environment.filters["text"] = lambda chart: text_of(chart, lang)
    environment.filters["number"] = lambda value: number(value, lang)
    environment.filters["slug"] = lambda outcome: outcome.replace(" ", "-")
    environment.tests["banded"] = _has_bands
    folder = files("normkit.report") / "templates"
    script = "".join((folder / name).read_text(encoding="utf-8") for name in ("readout.js", "page.js"))
    found = {entry.verdict.verdict for entry in entries}
    named = {name for entry in entries for name in named_sources(entry.claim)}
    return environment.get_template("report.html.j2").render(
        sections=[_section(entry, lang) for entry in entries],
        lang=lang,
        say=lang.say,
        colon=": " if lang is ENGLISH else "：",
        counted=counted(entries, lang),
        family=family(entries, lang),
        foreign=not all(lang.covers(entry.claim) for entry in entries),
        outcomes=[outcome for outcome in OUTCOMES if outcome in found],
        # The article and the papers first, then the sources that have a letter.
        sources=sorted(named, key=lambda name: (re.fullmatch(r"S\d", name) is not None, name.casefold())),
        # Our own file, which the page's policy names by its sum: no other script runs, wherever it came from.
        script=Markup(script),  # noqa: S704
        script_sum=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _has_bands(chart: Chart) -> bool:
    """Return whether the caption must say what a band is."""
    return any(isinstance(mark, Line) and mark.low for panel in chart.panels for mark in panel.marks)


def _section(entry: Entry, lang: Language) -> Section:
    """Gather what the template shows of one claim."""
    charts = [chart for chart in entry.shown if isinstance(chart, Chart)]
    # The only markup that is not escaped is what matplotlib drew and what miniature and readout made, which escape
    # every word themselves.
    return Section(
        entry=entry,
        miniature=Markup(inline_miniature(charts[0])) if charts else Markup(),  # noqa: S704
        interval=Markup(interval_picture(entry.verdict.primary, lang)),  # noqa: S704
        charts=tuple((chart, tuple(Markup(panel) for panel in inline_panels(chart, lang))) for chart in charts),  # noqa: S704
        tables=tuple(table for table in entry.shown if isinstance(table, Table)),
        settings=named_settings(entry, lang),
        sources=named_sources(entry.claim),
    )
