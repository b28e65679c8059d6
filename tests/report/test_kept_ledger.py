"""The ledger kept in the documentation: finished, judged by today's rules, and quoted as it is."""

import json
from pathlib import Path

import pytest

from normkit.lab.ledger import read_ledger
from normkit.report.language import language
from normkit.report.markdown import ledger_table, render_markdown

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


@pytest.mark.parametrize(("page", "code"), [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_readme_quotes_the_table(entries, page, code):
    assert ledger_table(entries, language(code), "docs/ledger/report.md") in (ROOT / page).read_text()
