"""The report in a real browser, at desk and phone width, light and dark."""

import dataclasses
import json
import os
import re
import shutil
import subprocess

import pytest

from normkit.report.language import ENGLISH, language
from normkit.report.page import render

from .test_page import HOSTILE, entry_of, rows_of

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic",
    "--no-first-run", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip

# Headless windows are never narrower than 500 pixels; a frame is as narrow as it is told to be. The frame's page is of
# the same origin because it is handed over as text, without the policy that would forbid the frame's own script.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:3000px"></iframe><pre id="measured"></pre><script>
function outline(page) {{
  const details = page.querySelector(".contents details"), last = page.querySelector("main:last-of-type");
  last.scrollIntoView();
  const box = page.querySelector(".contents").getBoundingClientRect(), open = details.open;
  page.documentElement.scrollTo(0, 0);
  return {{ open, top: box.top, right: box.right, links: page.querySelectorAll(".contents li").length }};
}}
function filtered(page) {{
  const form = page.querySelector(".filter"), rows = [...page.querySelectorAll("tr[data-claim]")];
  rows[0].dataset.verdict = "refuted";
  const seen = () => ["tr", "main", ".contents li"].map(
    kind => [...page.querySelectorAll(kind + "[data-claim]")].filter(part => part.checkVisibility()).length);
  const found = {{}};
  for (const [verdict, source] of [["", ""], ["supported", ""], ["", "S4"], ["", "Ioffe and Szegedy 2015"]]) {{
    form.elements.verdict.value = verdict;
    form.elements.source.value = source;
    form.dispatchEvent(new Event("change"));
    found[verdict + "/" + source] = [...seen(), form.querySelector("output").textContent];
  }}
  return found;
}}
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const boxes = [...page.querySelectorAll(".panels svg")].map(svg => svg.getBoundingClientRect());
  const style = frame.contentWindow.getComputedStyle(page.body);
  const values = page.querySelectorAll("circle.value"), nearest = values[values.length - 1].getBoundingClientRect();
  const here = {{ bubbles: true, clientX: nearest.x + nearest.width / 2 + 3, clientY: nearest.y + nearest.height / 2 }};
  const svg = values[values.length - 1].ownerSVGElement, read = () => page.querySelector(".readout");
  svg.dispatchEvent(new PointerEvent("pointerdown", here));
  const said = read().textContent, bubble = read().getBoundingClientRect(), shown = !read().hidden;
  page.body.dispatchEvent(new PointerEvent("pointermove", {{ bubbles: true, clientX: 1, clientY: 1 }}));
  document.getElementById("measured").textContent = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth,
    panels: boxes.map(box => [box.left, box.top, box.width, box.height]),
    verdict: page.querySelector(".verdict").getBoundingClientRect().top, paper: style.backgroundColor, ink: style.color,
    read: shown && said, hidden: read().hidden, bubble: [bubble.left, bubble.right, bubble.height],
    ledger: [...page.querySelectorAll(".ledger td, .ledger svg")].map(part => part.getBoundingClientRect().right),
    contents: page.querySelector(".contents") && outline(page),
    filtered: page.querySelector(".filter") && filtered(page),
    tables: [...page.querySelectorAll("table")].map(table => table.getBoundingClientRect().right),
  }});
}};
frame.srcdoc = {page};
</script>"""


def open_in_browser(tmp_path, width, *flags, norm="batch", claims=1, lang=ENGLISH):
    """Lay the report out at this width and return what was measured."""
    if BROWSER is None:
        reason = "no chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("NORMKIT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    entry = entry_of(rows_of(norms=("none", norm), epochs=5))
    entries = [
        dataclasses.replace(entry, claim=dataclasses.replace(entry.claim, id=f"claim-{place}", number=f"E{place + 1}"))
        for place in range(claims)
    ]
    page = json.dumps(render(entries, lang)).replace("</", "<\\/")
    path = tmp_path / "frame.html"
    path.write_text(FRAME.format(width=width, page=page))
    arguments = [
        BROWSER, *FLAGS, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
        "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    measured = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout)
    assert measured, done.stdout[-500:]
    return json.loads(measured.group(1))


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 360])
def test_report_fits_its_window_and_shows_the_figure(tmp_path, width):
    measured = open_in_browser(tmp_path, width)
    assert measured["client"] == width
    assert measured["scroll"] == width
    assert max(measured["tables"]) <= width
    loss, accuracy = measured["panels"]
    # A tap beside the last point of the last curve reads its value; elsewhere there is nothing to read.
    assert re.fullmatch(r"with batch norm: 0\.\d+ \(0\.\d+ to 0\.\d+\) at epoch 5", measured["read"])
    assert measured["hidden"]
    left, right, height = measured["bubble"]
    assert 0 <= left < right <= width
    assert height > 10
    for left, top, panel_width, height in (loss, accuracy):
        assert top > measured["verdict"]
        assert left >= 0
        assert left + panel_width <= width
        assert panel_width > 300
        assert height > 200
    # Side by side on a desk, one above the other on a phone.
    assert (loss[1] == accuracy[1]) == (width == 1280)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "lang"), [(1280, "en"), (360, "zh")])
def test_table_of_verdicts_fits_its_window(tmp_path, width, lang):
    measured = open_in_browser(tmp_path, width, claims=3, lang=language(lang))
    assert measured["scroll"] == width
    # Three rows of five cells, a picture of the interval and one of the figure in each.
    assert len(measured["ledger"]) == 3 * 7
    assert max(measured["ledger"]) <= width


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_contents_stay_in_sight_and_the_filter_hides_the_other_claims(tmp_path, width):
    measured = open_in_browser(tmp_path, width, claims=3)
    assert measured["scroll"] == width
    contents = measured["contents"]
    # Beside the page where there is room, else a bar above it; at its last section too.
    assert contents["open"] == (width == 1280)
    assert contents["top"] == 0
    assert contents["right"] < 300 if width == 1280 else contents["right"] == width
    assert contents["links"] == 3
    shown = {name: found[:2] for name, found in measured["filtered"].items()}
    # "S4" is no source of these claims, and no choice: the form keeps what says nothing.
    assert shown == {"/": [3, 3], "supported/": [2, 2], "/S4": [3, 3], "/Ioffe and Szegedy 2015": [3, 3]}
    assert measured["filtered"]["supported/"][3] == "2 of 3 claims"
    assert measured["filtered"]["supported/"][2] == (2 if width == 1280 else 0)


@pytest.mark.browser
def test_report_follows_the_reader_s_choice_of_dark(tmp_path):
    light = open_in_browser(tmp_path, 800)
    dark = open_in_browser(tmp_path, 800, "--blink-settings=preferredColorScheme=0")
    assert brightness(light["paper"]) > 0.9 > 0.2 > brightness(light["ink"])
    assert brightness(dark["paper"]) < 0.2 < 0.8 < brightness(dark["ink"])


@pytest.mark.browser
def test_hostile_names_do_not_break_the_layout(tmp_path):
    measured = open_in_browser(tmp_path, 360, norm=HOSTILE)
    assert measured["scroll"] == 360


def brightness(colour):
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    return (red + green + blue) / 3
