"""The ledger kept in the documentation: finished, judged by today's rules, and quoted as it is."""

import json
import re
from pathlib import Path

import pytest

from normkit.lab.claims import all_claims
from normkit.lab.ledger import read_ledger
from normkit.report.language import language
from normkit.report.markdown import ledger_table, render_markdown
from normkit.report.page import render

ROOT = Path(__file__).parents[2]
LEDGER = ROOT / "docs" / "ledger"


@pytest.fixture(scope="module")
def entries():
    return read_ledger(LEDGER)


def test_every_claim_of_the_ledger_is_finished(entries):
    assert all(entry.finished == entry.total for entry in entries)
    assert all(len(entry.record["plan"]["seeds"]) >= 3 for entry in entries)


def test_verdicts_are_those_that_the_rules_give_today(entries):
    kept = json.loads((LEDGER / "verdicts.json").read_text())
    assert kept == json.loads(json.dumps({entry.claim.id: entry.verdict.record() for entry in entries}))


def test_markdown_report_is_that_of_the_rows(entries):
    assert (LEDGER / "report.md").read_text() == render_markdown(entries)
    for picture in {part.split(")")[0] for part in (LEDGER / "report.md").read_text().split("](figures/")[1:]}:
        assert (LEDGER / "figures" / picture).exists()


def test_page_names_the_norm_once_where_the_comparison_has_more_words(entries):
    page = render([entry for entry in entries if entry.claim.id == "generalization"])
    assert "the norm without dropout" in page
    assert "norm norm" not in page


@pytest.mark.parametrize(("page", "code"), [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_readme_quotes_the_table(entries, page, code):
    assert ledger_table(entries, language(code), "docs/ledger/report.md") in (ROOT / page).read_text()


@pytest.mark.parametrize("page", ["questions.md", "questions.zh-CN.md"])
def test_every_claim_of_the_ledger_is_led_to_from_the_questions(entries, page):
    text, report = (ROOT / "docs" / page).read_text(), (LEDGER / "report.md").read_text()
    led = dict(re.findall(r"^\[`([a-z-]+)`\]: ledger/report\.md#([a-z-]+)$", text, re.MULTILINE))
    judged = {entry.claim.id for entry in entries}
    assert led == {claim: claim for claim in judged}
    named = set(re.findall(r"(\[?)`([a-z-]+)`(?!\]:)", text))
    assert {name for bracket, name in named if not bracket}.isdisjoint(judged)
    assert judged <= {name for bracket, name in named if bracket}
    # Every other claim is named too, and has no verdict to lead to yet.
    assert {claim.id for claim in all_claims()} <= {name for _, name in named}
    assert all(f'<a id="{claim}"></a>' in report for claim in judged)


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
