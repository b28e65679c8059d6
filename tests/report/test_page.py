"""The page: everything from results escaped, nothing fetched, the text alternative present, partial runs said."""

import dataclasses
import html
import json
import re
from xml.etree import ElementTree

import pytest

from normkit.lab.charts import Bars, Chart, Line, Panel, Table
from normkit.lab.claims import get_claim
from normkit.lab.ledger import Entry, write_verdicts
from normkit.lab.sequential import LEVEL
from normkit.lab.verdicts import Rule, single
from normkit.report.figures import draw, draw_miniature, inline_panels
from normkit.report.page import effect_in_words, render

HOSTILE = "</script><script>alert('&amp; $x$')</script>\"<img src=x onerror=alert(1)>"


def rows_of(norms=("none", "batch"), seeds=5, epochs=2):
    return [
        {
            "claim": "convergence", "data": "digits", "norm": norm, "seed": seed, "epoch": epoch,
            "train_loss": 0.5 + 0.01 * seed - 0.1 * (norm != "none"),
            "test_accuracy": 0.8 + 0.01 * seed + (0.05 + 0.001 * seed) * (norm != "none"),
            "step_losses": [0.9, 0.8, 0.7],
        }
        for norm in norms for seed in range(seeds) for epoch in range(1, epochs + 1)
    ]  # fmt: skip


def entry_of(rows, **changes):
    claim = get_claim("convergence")
    record = {
        "plan": {
            "data": "digits", "norms": ["none", "batch"], "seeds": [0, 1, 2, 3, 4], "device": "cpu",
            "settings": {"epochs": 2, "optimizer": "adam", "learning_rate": 0.002, "momentum": 0.0},
            "variants": [[]],
        },
        "data": "a data set", "versions": {"torch": "2"}, "commit": None, "machine": "a machine",
    }  # fmt: skip
    fields = {
        "claim": claim, "record": record, "verdict": claim.judge(rows), "shown": claim.show(rows) if rows else (),
        "finished": 10, "total": 10, "rows": rows,
    }  # fmt: skip
    return Entry(**{**fields, **changes})


def test_page_opens_with_verdict_then_figure_then_table():
    page = render([entry_of(rows_of())])
    places = [page.index(mark) for mark in ("<strong>Supported", "<svg", "<table", "supported if", "normkit lab run")]
    assert places == sorted(places)
    assert "+0.0520" in page
    assert "0.9023" in page


def test_page_of_several_claims_opens_with_the_table_of_verdicts():
    first = entry_of(rows_of())
    second = dataclasses.replace(
        first, claim=dataclasses.replace(first.claim, id="other", number="E9", title="<Other>")
    )
    page = render([first, second])
    ledger = page[page.index("<header") : page.index("<main")]
    assert [ledger.count(words) for words in ("E1<", "E9<", "&lt;Other&gt;", 'href="#other"', "+0.0520")] == [
        1,
        1,
        1,
        2,
        4,
    ]
    assert 'id="other"' in page
    assert 'class="stack ledger"' not in render([first])


def test_settings_and_rule_are_folded_and_the_numbers_of_the_figure_are_its_alternative_text():
    entry = entry_of(rows_of())
    page = render([entry])
    folded = re.findall(r'<details class="(\w+)"( open)?>\n<summary><h2>(.*?)</h2>', page)
    assert [(name, bool(is_open)) for name, is_open, _ in folded] == [
        ("numbers", True),
        ("rule", False),
        ("how", False),
    ]
    assert page.count("<details") == page.count("</details>")
    text = html.escape(entry.shown[0].text, quote=False)
    assert page.count(text) == page.count(f'aria-label="{text}"') == 1


def test_each_claim_of_the_table_says_whose_it_is():
    first = entry_of(rows_of())
    other = dataclasses.replace(first, claim=dataclasses.replace(get_claim("small-batch"), rates=()), shown=())
    page = render([first, other])
    assert '<tr data-claim="small-batch" data-verdict="supported" data-sources="Wu and He 2018|S2">' in page
    choices = re.findall(r"<option(?: value=\"[^\"]*\")?>(.*?)</option>", page)
    assert choices == [
        "all", "supported", "all", "Batch normalization built from scratch", "Ioffe and Szegedy 2015", "Wu and He 2018",
        "S2",
    ]  # fmt: skip
    # A page of one claim has nothing to choose from.
    assert "<form" not in render([first])


@pytest.mark.parametrize(
    ("effect", "words"), [(2e-5, "+2.0e-05"), (-2e-5, "-2.0e-05"), (0.0, "+0.0000"), (1.5, "+1.5")]
)
def test_small_effects_keep_their_digits(effect, words):
    rule = Rule(effect="deviation", unit="", direction="below", line=1.0)
    assert effect_in_words(single(rule, {0: effect, 1: effect}).answer([0, 1], LEVEL)).startswith(words)


def test_page_fetches_nothing_and_says_so_to_the_browser():
    page = render([entry_of(rows_of())])
    assert "default-src 'none'" in page
    # Names of XML vocabularies are no addresses that anybody opens.
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r'(src|href)\s*=\s*["\']?(?!#)\w', without_names)
    assert "url(http" not in without_names
    assert "@import" not in without_names


def test_hostile_words_from_results_stay_words():
    rows = rows_of(norms=("none", HOSTILE))
    entry = entry_of(rows)
    record = {**entry.record, "data": HOSTILE, "machine": HOSTILE, "commit": HOSTILE}
    table = Table(title=HOSTILE, header=[HOSTILE], rows=[[HOSTILE]], note=HOSTILE)
    claim = dataclasses.replace(entry.claim, title=HOSTILE, statement=HOSTILE)
    page = render([dataclasses.replace(entry, record=record, shown=(*entry.shown, table), claim=claim)])
    assert "<img" not in page
    # The page's own script and the verdict's JSON.
    assert page.count("<script>") == 1
    assert page.count("</script>") == 2
    assert html.escape(HOSTILE, quote=False)[:30] in page


def test_embedded_verdict_is_json_without_markup():
    entry = entry_of(rows_of(norms=("none", HOSTILE)))
    page = render([entry])
    body = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL).group(1)
    assert not set("<>&") & set(body)
    assert json.loads(body) == json.loads(json.dumps(entry.verdict.record()))


def test_unfinished_run_is_said():
    assert "Unfinished: 3 of 10 cells" in render([entry_of(rows_of(seeds=1), finished=3)])
    assert "Unfinished" not in render([entry_of(rows_of())])


def test_run_without_a_finished_cell_makes_a_page():
    page = render([entry_of([], finished=0)])
    assert "Inconclusive" in page
    assert "no number: an interval needs two seeds or more; 0 measured" in page


def test_inline_svg_is_sound_xml_and_takes_the_page_s_colours():
    (chart, _) = entry_of(rows_of()).shown
    for panel in inline_panels(chart):
        root = ElementTree.fromstring(panel)
        assert root.get("viewBox")
        assert root.get("width") is None
        assert root.get("height") is None
        assert "currentColor" in panel
        assert "#1b1f24" not in panel


def test_drawn_files_repeat_byte_for_byte_and_carry_their_text(tmp_path):
    (chart, _) = entry_of(rows_of()).shown
    first, again = draw(chart, tmp_path / "a"), draw(chart, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert chart.text.encode() in first[0].read_bytes()
    assert chart.text.encode() in first[1].read_bytes()


def test_files_are_light_cards_or_dark_ones_as_the_reader_chose(tmp_path):
    (chart, _) = entry_of(rows_of()).shown
    draw_miniature(chart, tmp_path / "small.svg")
    for path in (draw(chart, tmp_path)[0], tmp_path / "small.svg"):
        markup = path.read_text()
        ElementTree.fromstring(markup)
        sheet = re.search(r"<style>@media \(prefers-color-scheme: dark\) {(.+?)}</style>", markup, re.DOTALL)[1]
        # Whatever is drawn in ink or on the card's white has a dark counterpart.
        drawn = set(re.findall(r"(?:fill|stroke): #(?:1b1f24|ffffff)", markup.replace(sheet, "")))
        assert {"fill: #ffffff", "stroke: #1b1f24"} <= drawn
        assert all(f'[style*="{colour}"]' in sheet for colour in drawn)


def test_bars_and_logarithmic_axes_are_drawn(tmp_path):
    bars = Bars(label=HOSTILE, categories=["a", "b"], heights=[1, 2], low=[0.5, 1], high=[2, 3])
    line = Line(label="", x=[1, 10], y=[1, 100])
    panels = [
        Panel(title="$x", x_label="", y_label="", marks=[bars, dataclasses.replace(bars, label="two", colour=1)]),
        Panel(title="", x_label="", y_label="", marks=[line], log_x=True, log_y=True),
    ]
    svg, _ = draw(Chart(name="c", title="t", panels=panels, text="d"), tmp_path)
    words = "".join(ElementTree.fromstring(svg.read_text()).itertext())
    assert HOSTILE[:35] + "…" in words
    assert "$x" in words


@pytest.mark.parametrize(("seeds", "expected"), [(1, "no interval: an interval needs two"), (3, "interval +")])
def test_effect_in_words_names_interval_or_why_there_is_none(seeds, expected):
    assert expected in effect_in_words(entry_of(rows_of(seeds=seeds)).verdict.primary)


def test_verdicts_file_maps_the_claim_to_its_verdict(tmp_path):
    write_verdicts(tmp_path, [entry_of(rows_of())])
    verdict = json.loads((tmp_path / "verdicts.json").read_text())["convergence"]
    assert verdict["verdict"] == "supported"
    assert verdict["primary"]["low"] < verdict["primary"]["effect"] < verdict["primary"]["high"]
    assert verdict["primary"]["seeds"] == 5


@pytest.mark.parametrize("low", [1e-15, 0.5])
def test_logarithmic_axes_have_labels_over_one_decade_and_over_many(low):
    bars = Bars(label="", categories=["a", "b"], heights=[low, 2.0])
    chart = Chart(
        name="c", title="t", panels=[Panel(title="", x_label="", y_label="", marks=[bars], log_y=True)], text="d"
    )
    (panel,) = inline_panels(chart)
    labels = [word for word in ElementTree.fromstring(panel).itertext() if re.fullmatch(r"[\d.e+-]+", word.strip())]
    assert len(labels) >= 2
