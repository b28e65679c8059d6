"""The report in a real browser, at desk and phone width, light and dark."""

import json
import os
import re
import shutil
import subprocess

import pytest

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
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const boxes = [...page.querySelectorAll(".panels svg")].map(svg => svg.getBoundingClientRect());
  const style = frame.contentWindow.getComputedStyle(page.body);
  document.getElementById("measured").textContent = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth,
    panels: boxes.map(box => [box.left, box.top, box.width, box.height]),
    verdict: page.querySelector(".verdict").getBoundingClientRect().top, paper: style.backgroundColor, ink: style.color,
    tables: [...page.querySelectorAll("table")].map(table => table.getBoundingClientRect().right),
  }});
}};
frame.srcdoc = {page};
</script>"""


def open_in_browser(tmp_path, width, *flags, norm="batch"):
    """Lay the report out at this width and return what was measured."""
    if BROWSER is None:
        reason = "no chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("NORMKIT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    page = json.dumps(render([entry_of(rows_of(norms=("none", norm), epochs=5))])).replace("</", "<\\/")
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
    for left, top, panel_width, height in (loss, accuracy):
        assert top > measured["verdict"]
        assert left >= 0
        assert left + panel_width <= width
        assert panel_width > 300
        assert height > 200
    # Side by side on a desk, one above the other on a phone.
    assert (loss[1] == accuracy[1]) == (width == 1280)


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
