"""The doctor's page: worst first, escaped, self-contained, and it fits a phone."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

import normkit
from normkit.doctor import Diagnosis, Finding, LayerRow
from normkit.doctor.demos import build

from .test_browser import BROWSER, FLAGS

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'

FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:3000px"></iframe><pre id="measured"></pre><script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const style = frame.contentWindow.getComputedStyle(page.body);
  document.getElementById("measured").textContent = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth, paper: style.backgroundColor,
    panels: [...page.querySelectorAll(".panels svg")].map(svg => svg.getBoundingClientRect().toJSON()),
    headings: [...page.querySelectorAll("h2")].map(heading => heading.textContent),
    targets: [...new Set([...page.querySelectorAll("circle.value")].map(
      circle => frame.contentWindow.getComputedStyle(circle).fill))],
    cells: [...page.querySelectorAll("td")].map(cell => cell.getBoundingClientRect().right),
  }});
}};
frame.srcdoc = {page};
</script>"""


def finding(**changes):
    fields = {
        "check": "drift", "layer": "features.1", "severity": "error", "summary": "the numbers differ",
        "evidence": {"z": 1.5}, "causes": ("first", "second"), "remedy": "normkit.recalibrate(model, batches)",
        "proof": "True",
    }  # fmt: skip
    return Finding(**fields | changes)


def row(name="features.1", worst="error"):
    return LayerRow(name=name, kind="batch", channels=3, numbers={"z": 1.5, "training": False}, worst=worst)


def test_page_escapes_every_word_of_a_model():
    hostile = finding(
        layer=HOSTILE, summary=HOSTILE, evidence={HOSTILE: HOSTILE}, causes=(HOSTILE,), remedy=HOSTILE, proof=HOSTILE
    )
    info = finding(layer=HOSTILE, summary=HOSTILE, severity="info")
    diagnosis = Diagnosis(
        findings=(hostile, info), layers=(row(HOSTILE),), waived=((hostile, HOSTILE),), notes=(HOSTILE,), samples=3
    )
    for page in (diagnosis.to_html(HOSTILE), diagnosis._repr_html_()):
        assert "<script>alert" not in page
        assert "<img" not in page


def test_page_of_a_model_with_a_hostile_layer_name_is_escaped():
    model = nn.Sequential()
    model.add_module("<img src=x onerror=alert(1)>", nn.BatchNorm1d(3).eval())
    assert "<img" not in normkit.diagnose(model, torch.randn(32, 3)).to_html()


def test_page_puts_errors_before_warnings_and_layers_in_trouble_first():
    diagnosis = Diagnosis(
        findings=(finding(layer="worst"), finding(layer="bad", severity="warning", check="ema-window")),
        layers=(row("fine", None), row("bad", "warning"), row("worst")),
    )
    page = diagnosis.to_html()
    assert re.findall(r"<h2>(.+?)</h2>", page)[:2] == ["Layer worst", "Layer bad"]
    assert re.findall(r'class="layer"><b>(.+?)</b>', page) == ["worst", "bad", "fine"]


def test_page_loads_nothing_and_holds_the_diagnosis_as_data():
    diagnosis = Diagnosis(findings=(finding(),), layers=(row(),))
    page = diagnosis.to_html()
    # The policy forbids it, and nothing asks for it; xmlns are names, not addresses.
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!#)', re.sub(r'xmlns(?::\w+)?="[^"]*"', "", page))
    held = re.search(r'id="diagnosis">(.+?)</script>', page)
    assert json.loads(held.group(1)) == diagnosis.to_dict()


def test_page_says_so_when_nothing_is_wrong():
    page = Diagnosis(findings=(), layers=(row(worst=None),), samples=1000).to_html()
    assert "No error and no warning." in page


def many(count=60, spoilt=30):
    """A network of which the second half has statistics of something else."""
    torch.manual_seed(0)
    layers = [[nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, momentum=None), nn.ReLU()] for _ in range(count)]
    model, batches = nn.Sequential(*(layer for part in layers for layer in part)), torch.randn(512, 8).split(32)
    for batch in batches:
        model(batch)
    for place in range(spoilt, count):
        model[3 * place + 1].running_var *= 100 + place
    return model.eval(), batches


def test_page_opens_with_the_whole_network_and_marks_the_worst():
    model, batches = many(12, 6)
    diagnosis = normkit.diagnose(model, batches)
    page = diagnosis.to_html()
    picture = page[page.index('<figure class="network">') : page.index("</figcaption>")]
    assert page.index(picture) < page.index('<section class="finding">')
    assert "6 are past a limit; the worst is 34" in picture
    assert picture.count("the worst: 34</text>") == 2  # in the legend of each panel
    factor = max(2.0 ** row.numbers["log2_ratio"] for row in diagnosis.layers)
    assert f"by a factor of {factor:.3g}" in picture
    assert '<figure class="network">' not in normkit.diagnose(model).to_html()  # nothing was measured


def test_page_of_sixty_layers_is_small():
    model, batches = many()
    assert len(normkit.diagnose(model, batches).to_html()) < 500_000
    wide = finding(channels={name: tuple(range(2048)) for name in ("population_mean", "running_mean", "a", "b", "c")})
    wide.channels["population_var"] = wide.channels["running_var"] = tuple(range(1, 2049))
    page = Diagnosis(findings=tuple(wide for _ in range(20)), layers=(row(),)).to_html()
    assert json.loads(re.search(r'id="diagnosis">(.+?)</script>', page).group(1))["findings"][0]["channels"] == {}


@pytest.fixture(scope="module")
def page():
    patient = build("short-window")
    return normkit.diagnose(patient.model, patient.batches).to_html()


def measure(tmp_path, page, width, *flags):
    if BROWSER is None or shutil.which(BROWSER) is None:
        reason = "no chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("NORMKIT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    path = tmp_path / "frame.html"
    path.write_text(FRAME.format(width=width, page=json.dumps(page).replace("</", "<\\/")))
    arguments = [
        BROWSER, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
        "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(re.search(r'<pre id="measured">(.+?)</pre>', done.stdout).group(1))


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 360])
def test_page_fits_its_window_and_shows_running_against_true(tmp_path, page, width):
    measured = measure(tmp_path, page, width)
    assert measured["scroll"] == measured["client"] == width
    assert max(measured["cells"]) <= width
    assert measured["headings"][0] == "Layer 4 (BatchNorm2d)"
    network, _, means, variances, *_, residue = measured["panels"]
    assert network["top"] < means["top"]  # the page opens with the whole network
    assert all(panel["width"] > 300 and panel["height"] > 200 for panel in (means, variances, residue))
    assert (means["top"] == variances["top"]) == (width == 1280)
    assert measured["targets"] == ["rgba(0, 0, 0, 0)"]  # what a value is read off by is not seen


@pytest.mark.browser
def test_page_follows_the_reader_s_choice_of_dark(tmp_path, page):
    assert measure(tmp_path, page, 800, "--blink-settings=preferredColorScheme=0")["paper"] == "rgb(20, 23, 27)"
