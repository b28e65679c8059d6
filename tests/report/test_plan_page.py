"""The plan's page: what to do first, escaped, self-contained, and it fits a phone."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import normkit
from normkit.doctor import PlannedLayer, TrainingPlan

from .test_diagnosis_page import HOSTILE, measure


def layer(name="norm", **changes):
    fields = {
        "name": name, "kind": "batch", "samples": 4, "values": 4000, "last_values": 4000, "effective": 120.4,
        "mean_error": 0.05, "var_error": 0.1, "gap": 0.07, "samples_needed": 2, "advice": "",
    }  # fmt: skip
    return PlannedLayer(**fields | changes)


def plan(*layers, **changes):
    fields = {
        "layers": layers, "batch_size": 32, "ranks": 8, "micro_batches": 1, "gap": 0.1, "momentum": 0.03,
        "ghost_size": 2, "group": 1, "advice": ("every layer has data enough",),
    }  # fmt: skip
    return TrainingPlan(**fields | changes)


FINE, FEW = layer("fine"), layer("few", values=4, last_values=4, gap=0.5, effective=None, samples_needed=99)


def verdict(page):
    return re.search(r'<section class="verdict (\w+)">\s*<strong>(.+?)</strong>', page).groups()


def test_page_says_first_how_it_stands_and_then_what_to_do():
    for found, said in (
        (plan(FINE), ("healthy", "Every layer has data enough")),
        (plan(FINE, FEW), ("warning", "1 of 2 layers takes too little data")),
        (plan(FEW, FEW, FINE), ("warning", "2 of 3 layers take too little data")),
        (plan(replace(FINE, last_values=2)), ("warning", "The last batch of an epoch is too small")),
        (plan(replace(FINE, last_values=1)), ("error", "Training raises an error: one value has no variance")),
        (plan(replace(FEW, values=1)), ("error", "Training raises an error: one value has no variance")),
    ):
        page = found.to_html()
        assert verdict(page) == said
        assert page.index("What to do") < page.index('class="panels"') < page.index("<table")
    page = plan(FINE, FEW, advice=("the last batch is short", "momentum=0.02 keeps them"), group=None).to_html("A <b>")
    assert re.findall(r"<li>(.+?)</li>", page) == ["The last batch is short", "momentum=0.02 keeps them"]
    assert "no group of the 8 ranks has samples enough" in page
    assert "<h1>A &lt;b&gt;</h1>" in page
    assert "1 are past the gap of 0.1 that was asked for; the worst is few, with a gap of 0.5" in page


def test_page_has_the_numbers_of_the_table():
    page = plan(FINE, FEW).to_html()
    rows = [re.findall(r"<td[^>]*>(?:<b>)?([^<]*)", row) for row in re.findall(r"<tr><td.+?</tr>", page)]
    assert rows == [
        ["fine", "batch", "4", "4,000", "120", "5%", "10%", "0.07", "2 samples"],
        ["few", "batch", "4", "4", "", "5%", "10%", "0.50", "99 samples"],
    ]


def test_page_escapes_every_word_of_a_model_and_loads_nothing():
    found = plan(layer(HOSTILE, kind=HOSTILE, advice=HOSTILE), advice=(HOSTILE,))
    page = found.to_html(HOSTILE)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!#)', re.sub(r'xmlns(?::\w+)?="[^"]*"', "", page))
    held = json.loads(re.search(r'id="plan">(.+?)</script>', page).group(1))
    assert held == json.loads(json.dumps(found.to_dict()))


@pytest.fixture(scope="module")
def page():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
        nn.BatchNorm1d(8),
    )  # fmt: skip
    return normkit.plan(model, torch.randn(256, 3, 8, 8), batch_size=64, ranks=8, samples=1025).to_html()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_its_window(tmp_path, page, width):
    measured = measure(tmp_path, page, width)
    assert measured["scroll"] == measured["client"] == width
    assert max(measured["cells"]) <= width
    assert measured["headings"] == ["What to do", "What keeps to the gap", "All layers"]
    gaps, samples = measured["panels"]
    assert all(panel["width"] > 300 and panel["height"] > 200 for panel in (gaps, samples))
    assert (gaps["top"] == samples["top"]) == (width == 1280)


@pytest.mark.browser
def test_page_follows_the_reader_s_choice_of_dark(tmp_path, page):
    assert measure(tmp_path, page, 800, "--blink-settings=preferredColorScheme=0")["paper"] == "rgb(20, 23, 27)"
