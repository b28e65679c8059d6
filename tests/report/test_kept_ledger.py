"""The ledger kept in the documentation: finished, judged by today's rules, and quoted as it is."""

import json
import re
from pathlib import Path

import pytest
from scipy import stats

from normkit.lab.charts import NORM_COLOURS, Bars, Chart
from normkit.lab.claims import all_claims
from normkit.lab.curves import norm_label
from normkit.lab.ledger import read_ledger
from normkit.report.language import language, note_in_words
from normkit.report.markdown import ledger_excerpt, ledger_sentences, render_markdown
from normkit.report.page import render

from .test_ledger import english_words

ROOT = Path(__file__).parents[2]
LEDGER = ROOT / "docs" / "ledger"


@pytest.fixture(scope="module")
def entries():
    return read_ledger(LEDGER)


def test_every_claim_of_the_ledger_is_finished_by_its_design_of_today(entries):
    assert all(entry.finished == entry.total for entry in entries)
    assert all(len(entry.record["plan"]["seeds"]) >= 5 for entry in entries)
    assert all(entry.record["plan"].get("design", 1) == entry.claim.design for entry in entries)


def test_each_norm_has_its_colour_in_every_figure(entries):
    for entry in entries:
        for mark in (
            mark for chart in entry.shown if isinstance(chart, Chart) for p in chart.panels for mark in p.marks
        ):
            for norm, colour in NORM_COLOURS.items():
                if mark.label.startswith(norm_label(norm)):
                    assert mark.colour == colour, (entry.claim.id, mark.label)


def test_figures_and_tables_are_said_in_chinese(entries):
    zh = language("zh")
    for entry in entries:
        words = set()
        for shown in entry.shown:
            words.add(shown.title)
            if isinstance(shown, Chart):
                words |= {text for panel in shown.panels for text in (panel.title, panel.x_label, panel.y_label)}
                marks = [mark for panel in shown.panels for mark in panel.marks]
                words |= {mark.label for mark in marks}
                words |= {text for mark in marks if isinstance(mark, Bars) for text in mark.categories}
            else:
                words |= {*shown.header, *(cell for row in shown.rows for cell in row)}
                assert not english_words(note_in_words(shown.note, zh)), entry.claim.id
        assert not {text for text in words if english_words(zh.label(text))}, entry.claim.id


def test_verdicts_follow_from_their_numbers_by_scipy_alone(entries):
    rows = {entry.claim.id: (entry.claim, entry.rows) for entry in entries}
    for claim, verdict in json.loads((LEDGER / "verdicts.json").read_text()).items():
        primary, looks = verdict["primary"], verdict["looks"]
        values = [verdict["per_seed"][str(seed)] for seed in range(len(verdict["per_seed"]))]
        assert [look["seeds"] for look in looks] == [5, 10, 20, 40][: len(looks)], claim
        assert looks[-1]["seeds"] == len(values)
        for look in looks:
            low, high = interval(values[: look["seeds"]], primary["kind"], 1 - look["level"])
            assert (look["low"], look["high"]) == pytest.approx((low, high), rel=1e-9, abs=1e-15), claim
        holds = all(
            premise["low"] > premise["line"] if premise["direction"] == "above" else premise["high"] < premise["line"]
            for premise in verdict["premises"]
        )
        assert holds == all(premise["holds"] for premise in verdict["premises"])
        # Every look before the last has left it open: the interval did, or a premise was not shown by then.
        *before, last = [outcome(look["low"], look["high"], primary) for look in looks]
        for look, word in zip(looks, before, strict=False):
            if word != "inconclusive" and holds:
                judge, all_rows = rows[claim]
                then = judge.judge([row for row in all_rows if row["seed"] < look["seeds"]])
                assert then.verdict == "not testable here", claim
        assert verdict["verdict"] == (last if holds else "not testable here"), claim
        for number in verdict["reproduced"]:
            if number["ours"] is not None:
                assert number["holds"] == (abs(number["ours"] - number["source"]) <= number["within"])


def interval(values, kind, confidence):
    if kind == "t":
        found = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
        return found.low, found.high
    counted = [value for value in values if value] if kind == "sign" else values
    test = stats.binomtest(sum(value > 0 for value in counted), len(counted))
    found = test.proportion_ci(confidence, method="exact")
    return found.low, found.high


def outcome(low, high, rule):
    if not high > low:
        return "inconclusive"
    if rule["band"] and rule["band"][0] < low and high < rule["band"][1]:
        return "no difference worth having"
    above, below = low > rule["line"], high < rule["line"]
    if rule["direction"] == "below":
        above, below = below, above
    return "supported" if above else "refuted" if below else "inconclusive"


def test_verdicts_are_those_that_the_rules_give_today(entries):
    kept = json.loads((LEDGER / "verdicts.json").read_text())
    assert kept == json.loads(json.dumps({entry.claim.id: entry.verdict.record() for entry in entries}))


def test_markdown_report_is_that_of_the_rows(entries):
    assert (LEDGER / "report.md").read_text() == render_markdown(entries)
    for picture in {part.split(")")[0] for part in (LEDGER / "report.md").read_text().split("](figures/")[1:]}:
        assert (LEDGER / "figures" / picture).exists()


def test_page_names_the_norm_once_where_the_comparison_has_more_words(entries):
    assert "norm norm" not in render(entries)


@pytest.mark.parametrize(("page", "code"), [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_readme_quotes_the_table(entries, page, code):
    text = (ROOT / page).read_text()
    assert ledger_sentences(entries, "docs/ledger/report.md", language(code)) in text
    assert text.count("| **") == len(entries)
    # What has no verdict is named as waiting.
    judged = {entry.claim.id for entry in entries}
    (sentence,) = re.findall(r"<!-- ledger -->\n\n(.+)\n", text)
    waiting = set(re.findall("`([a-z-]+)`", sentence)) if sentence.count("`") else set()
    assert waiting == {claim.id for claim in all_claims()} - judged


@pytest.mark.parametrize("page", ["questions.md", "questions.zh-CN.md"])
def test_every_claim_of_the_ledger_is_led_to_from_the_questions(entries, page):
    text, report = (ROOT / "docs" / page).read_text(), (LEDGER / "report.md").read_text()
    led = dict(re.findall(r"^\[`([a-z-]+)`\]: ledger/report\.md#([a-z-]+)$", text, re.MULTILINE))
    judged = {entry.claim.id for entry in entries}
    assert led == {claim: claim for claim in judged}
    named = set(re.findall(r"(\[?)`([a-z-]+)`(?!\]:)", text))
    assert {name for bracket, name in named if not bracket}.isdisjoint(judged)
    assert judged == {name for bracket, name in named if bracket}
    # Every other claim is named too, and has no verdict to lead to yet.
    assert {claim.id for claim in all_claims()} <= {name for _, name in named}
    assert all(f'<a id="{claim}"></a>' in report for claim in judged)


@pytest.mark.parametrize(
    ("page", "code", "folder"), [("article.md", "en", "ledger"), ("zh/article.md", "zh", "../ledger")]
)
def test_article_page_shows_the_ledgers_figures_and_numbers(entries, page, code, folder):
    text, judged = (ROOT / "docs" / page).read_text(), {entry.claim.id: entry for entry in entries}
    marks = dict(re.findall(r"<!-- ours ([a-z-]+) -->\n\n(.*?)\n\n<!-- /ours -->", text, re.DOTALL))
    assert set(marks) == {"convergence", "distributions", "learning-rate", "generalization", "outlier"}
    for claim, words in marks.items():
        if claim in judged:
            assert words == ledger_excerpt(judged[claim], folder, language(code)), claim
        else:
            assert words in ("*Ours*: not in the ledger yet.", "*我们的结果*：记录中还没有。")
    for figure in re.findall(rf"\({re.escape(folder)}/figures/([^)]+)\)", text):
        assert (LEDGER / "figures" / figure).exists()
    # Each claim that the sources make is led to where it has a verdict.
    led = set(re.findall(rf"^\[`([a-z-]+)`\]: {re.escape(folder)}/report\.md#", text, re.MULTILINE))
    assert led <= judged.keys()
    assert not set(re.findall(r"(?<!\[)`([a-z-]+)`(?!\])", text)) & judged.keys()


@pytest.mark.parametrize("page", ["questions.md", "questions.zh-CN.md"])
def test_every_question_points_at_code_and_at_a_verdict(page):
    _, *questions = (ROOT / "docs" / page).read_text().split("\n### ")
    assert len(questions) == 10
    for question in questions:
        paragraph = re.split(r"\n\[`[a-z-]+`\]: ledger/", question)[0]
        assert {claim.id for claim in all_claims()} & set(re.findall(r"`([a-z-]+)`", paragraph)), question
        files = re.findall(r"\]\(\.\./(src/[^)]+)\)", paragraph)
        assert files, question
        assert all((ROOT / name).exists() for name in files)
