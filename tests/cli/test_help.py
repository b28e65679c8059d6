"""What the help shows can be typed: every example is run, every name is there, and a shell completes words."""

import io
import os
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

from normkit.cli import lab_display
from normkit.cli.examples import EXAMPLES
from normkit.cli.terminal import Terminal
from normkit.doctor.demos import DEMOS
from normkit.lab.claims import all_claims
from normkit.lab.grid import Event

APP = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

def batches():
    return [torch.randn(8, 3, 32, 32) for _ in range(2)]
"""
# Hours of training: that they are understood is all that is tried.
LONG = ("--data fashion-mnist",)
# What an example reads that another command wrote.
FIRST = {
    "normkit bench --summary rows.json": ("normkit bench --quick --shapes lenet --json rows.json",),
    "normkit lab report runs/identity --lang zh": (
        "normkit lab run identity --data digits --seeds 2 --out runs/identity",
    ),
    "normkit lab compare runs/identity runs/again": (
        "normkit lab run identity --data digits --seeds 2 --out runs/identity",
        "normkit lab run identity --data digits --seeds 2 --out runs/again",
    ),
}
SHORT = [line for lines in EXAMPLES.values() for line in lines if not any(word in line for word in LONG)]
# Those that go before another one are run there.
READY = [line for line in SHORT if not any(line in before for before in FIRST.values())]


@pytest.fixture
def app(tmp_path, monkeypatch):
    import torch
    from torch import nn

    (tmp_path / "app").mkdir()
    for name in ("__init__", "models", "data"):
        (tmp_path / "app" / f"{name}.py").write_text("" if name == "__init__" else APP)
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(), tmp_path / "model.pt")
    from normkit.anatomy.states import read_state, write_state

    write_state(tmp_path / "model.safetensors", read_state(tmp_path / "model.pt"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("app", "app.models", "app.data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("line", READY)
def test_an_example_of_the_help_runs(app, normkit, line):
    for command in (*FIRST.get(line, ()), line):
        code, out, err = normkit(*shlex.split(command)[1:])
        # The doctor leaves with 1 where it found an error; bench with 1 where a kernel is wrong.
        assert code == 0 or (code == 1 and "doctor" in command), err
        assert out


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines if line not in SHORT])
def test_an_example_that_trains_for_long_is_understood(normkit, monkeypatch, line):
    seen = []
    monkeypatch.setattr("normkit.cli.lab.run_and_report", lambda todo: seen.append(todo) or 0)
    code, _, err = normkit(*shlex.split(line)[1:])
    assert code == 0, err
    assert seen[0].plans[0].data == "fashion-mnist"


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_the_examples_and_the_names(normkit, command):
    code, out, _ = normkit(*command.split(), "--help")
    assert code == 0
    assert all(line in out for line in EXAMPLES[command])
    words = out.split("Examples:")[1]
    if command in ("doctor", "recalibrate", "fold", "convert", "repair"):
        assert all(demo.name in words for demo in DEMOS)
    if command == "lab run":
        assert all(claim.id in words for claim in all_claims())


def test_a_demo_without_its_prefix_is_offered(normkit):
    code, out, err = normkit("doctor", "stale")
    assert (code, out) == (2, "")
    assert "did you mean demo:stale?" in err


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("normkit do", "doctor"), ("normkit lab ru", "run"), ("normkit lab run conv", "convergence")],
)
def test_a_shell_completes_what_is_typed(typed, expected):
    environment = os.environ | {
        "_NORMKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-m", "normkit"], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert (done.stdout.split(), done.stderr) == ([expected], "")
    assert done.returncode == 0


def test_a_reader_that_leaves_is_told_nothing():
    process = subprocess.Popen(
        [sys.executable, "-m", "normkit", "doctor", "demo:forgotten"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(120) == 1


def test_progress_says_nothing_that_it_does_not_know(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        lab_display, "Terminal", lambda **_: Console(file=shown, force_terminal=True, width=200, color_system=None)
    )
    progress = lab_display.RunProgress()

    def seen() -> str:
        shown.truncate(0)
        progress.console.print(progress.progress.get_renderable())
        return shown.getvalue()

    first = seen()
    assert "reading data and results" in first
    assert not any(word in first for word in ("?", "epochs", ", ,", "left"))
    progress.on_event(Event(kind="begin", steps=8, done=2, cells={"identity": 4}, left={"identity": 3}))
    begun = seen()
    for words in ("2/8", "epochs, 1 of 4 cells, 0 of 1 claims", "time left: after the first epochs"):
        assert words in begun


def test_a_verdict_breaks_between_words_in_a_terminal(capsys):
    words = "accuracy averaged over the epochs " * 4
    console = Terminal(width=30, force_terminal=True, color_system=None)
    console.print(words, soft_wrap=not console.is_terminal)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert " ".join(line.strip() for line in lines).split() == words.split()
