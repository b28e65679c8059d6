"""The report as Markdown, for a repository: the same table and sections, with the figures as files beside it."""

from collections.abc import Sequence

from ..lab.charts import Chart, Table
from ..lab.ledger import Entry
from .language import ENGLISH, Language, effect_in_words, note_in_words, rule_in_words, text_of
from .settings import named_settings
from .statement import counted, family, in_one_sentence, needed, number

__all__ = ["ledger_excerpt", "ledger_sentences", "ledger_table", "render_markdown"]


def render_markdown(entries: Sequence[Entry], lang: Language = ENGLISH) -> str:
    """Return the report. Its pictures are those that `report.page.write_report` draws into ``figures/``."""
    say = lang.say
    opening = [
        f"# {say('Claims made for batch normalization')}",
        " ".join(counted(entries, lang)),
        family(entries, lang),
    ]
    if not all(lang.covers(entry.claim) for entry in entries):
        opening.append(say("The words of some claims are in English."))
    return "\n\n".join([*opening, ledger_table(entries, lang), *(_section(entry, lang) for entry in entries)]) + "\n"


def ledger_table(entries: Sequence[Entry], lang: Language = ENGLISH, sections: str = "") -> str:
    """Return the table of all verdicts.

    Args:
        entries: the claims.
        lang: the language.
        sections: the address of the file that holds the claims' sections, for a table that stands in another file.
    """
    folder = sections.rpartition("/")[0]
    figures = f"{folder}/figures" if folder else "figures"
    lines = []
    for entry in entries:
        claim, part = entry.claim, entry.verdict.primary
        verdict = f"**{lang.say(entry.verdict.verdict)}**"
        if entry.finished < entry.total:
            verdict += f" ({lang.say('unfinished')})"
        picture = f"![]({figures}/small-{claim.id}.svg)" if any(isinstance(it, Chart) for it in entry.shown) else ""
        title = f"[{_cell(lang.title(claim))}]({sections}#{claim.id})"
        colon = ": " if lang is ENGLISH else "："
        effect = f"{_cell(lang.prose(part.rule.effect))}{colon}{_cell(effect_in_words(part, lang))}"
        reason = needed(entry.verdict, lang)
        if reason:
            effect += f" · {_cell(reason)}"
        lines.append([claim.number, title, verdict, effect, picture])
    header = ["", *(lang.say(name) for name in ("claim", "verdict", "effect", "picture"))]
    return _table(header, lines)


def ledger_sentences(entries: Sequence[Entry], sections: str, lang: Language = ENGLISH) -> str:
    """Return the table of all verdicts in words: claim, verdict, one sentence. For a page that is no report."""
    lines = [
        [
            f"[{_cell(lang.title(entry.claim))}]({sections}#{entry.claim.id})",
            f"**{lang.say(entry.verdict.verdict)}**",
            _cell(in_one_sentence(entry, lang)),
        ]
        for entry in entries
    ]
    return _table([lang.say(name) for name in ("claim", "verdict", "in one sentence")], lines)


def ledger_excerpt(entry: Entry, folder: str, lang: Language = ENGLISH) -> str:
    """Return a claim's figures, its verdict in one sentence, and whether the source's numbers come out.

    Args:
        entry: the claim.
        folder: the address of the ledger's folder, from the page that the excerpt stands in.
        lang: the language.
    """
    parts = [
        f"![{_text(text_of(shown, lang))}]({folder}/figures/{shown.name}.svg)"
        for shown in entry.shown
        if isinstance(shown, Chart)
    ]
    title = f"[{_text(lang.title(entry.claim))}]({folder}/report.md#{entry.claim.id})"
    verdict = lang.say(entry.verdict.verdict)
    parts.append(f"{title}: **{verdict}**{lang.say('.')} {_text(in_one_sentence(entry, lang))}")
    if entry.verdict.reproduced:
        parts.append(_reproduced(entry, lang))
    return "\n\n".join(parts)


def _section(entry: Entry, lang: Language) -> str:
    claim, say = entry.claim, lang.say
    # An anchor of its own: the one that is made of a heading follows its words, which change with the language.
    parts = [f'<a id="{claim.id}"></a>\n\n## {claim.number}. {_text(lang.title(claim))}']
    parts.append(f"**{say(entry.verdict.verdict)}{say('.')}** {_text(lang.prose(claim.means(entry.verdict.verdict)))}")
    if reason := needed(entry.verdict, lang):
        parts.append(_text(reason))
    if entry.finished < entry.total:
        unfinished = say(
            "Unfinished: {finished} of {total} cells are done.", finished=entry.finished, total=entry.total
        )
        parts.append(f"**{unfinished}** {say('The verdict may still change.')}")
    for shown in entry.shown:
        parts += _chart(shown, lang) if isinstance(shown, Chart) else _shown_table(shown, lang)
    parts += [f"### {say('What is claimed, and by whom')}", _text(lang.prose(claim.statement))]
    parts.append(f"{_text(lang.source(claim.source))}{say('.')}")
    parts += [
        f"### {say('Prediction and rule, written before the data were seen')}",
        _text(lang.prose(claim.prediction)),
    ]
    verdict = entry.verdict
    judged = [
        *((say("premise"), answer, say("shown") if shown else say("not shown")) for answer, shown in verdict.premises),
        (say("the question"), verdict.primary, f"**{say(verdict.verdict)}**"),
        *((say("detail"), answer, say(answer.outcome)) for answer in verdict.details),
    ]
    rules = [
        [role, _cell(rule_in_words(answer.rule, lang)), _cell(effect_in_words(answer, lang)), outcome]
        for role, answer, outcome in judged
    ]
    parts.append(_table(["", say("rule"), say("measured"), say("verdict")], rules))
    if verdict.reproduced:
        title = say("Does the source's number come out?")
        parts += [f"### {title}", _reproduced(entry, lang)]
    parts += [f"### {say('Settings')}", f"{say('The same on both sides.')} {_text(lang.prose(claim.settings_rule))}"]
    parts.append("\n".join(f"- {_text(name)}: {_text(value)}" for name, value in named_settings(entry, lang)))
    parts += [f"### {say('Repeat it')}", f"```sh\n{entry.command}\n```"]
    return "\n\n".join(parts)


def _reproduced(entry: Entry, lang: Language) -> str:
    say = lang.say
    words = {True: say("reproduced"), False: say("not reproduced"), None: say("not run on the source's data")}
    numbers = [
        [_cell(lang.label(it.what)), number(it.source), number(it.ours, lang), f"{it.within:g}", words[it.holds]]
        for it in entry.verdict.reproduced
    ]
    return _table([say("number"), say("source"), say("ours"), say("to within"), ""], numbers)


def _chart(chart: Chart, lang: Language) -> list[str]:
    title = f"*{_text(lang.label(chart.title))}{lang.say('.')}*"
    return [f"![{_text(text_of(chart, lang))}](figures/{chart.name}.svg)", title]


def _shown_table(table: Table, lang: Language) -> list[str]:
    rows = [[_cell(lang.label(cell)) for cell in row] for row in table.rows]
    header = [_cell(lang.label(name)) for name in table.header]
    return [f"**{_text(lang.label(table.title))}**", _table(header, rows), _text(note_in_words(table.note, lang))]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Return words that stand in one cell of a table."""
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """Return words without what Markdown would read as markup, on one line."""
    for character in "\\`*_[]<>#":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
