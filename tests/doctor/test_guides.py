"""The commands of the guides run, one after another in one folder, and print what the guides show, in that order."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from normkit import cli
from normkit.anatomy.states import write_state

ROOT = Path(__file__).parents[2]
GUIDES = [*sorted((ROOT / "docs" / "guides").glob("*.md")), ROOT / "README.md", ROOT / "README.zh-CN.md"]
GUIDES += sorted((ROOT / "docs" / "zh").glob("*.md"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")
BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
SESSIONS = {
    str(guide.relative_to(ROOT)): [
        line for block in BLOCK.findall(guide.read_text(encoding="utf-8")) for line in block.splitlines()
    ]
    for guide in GUIDES
}

# What a reader of the guides has: a package with a model and data, and the weights of a training on other data.
MODELS = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )
"""
DATA = """
import torch

def batches():
    generator = torch.Generator().manual_seed(1)
    return [3 + 3 * torch.randn(64, 3, 16, 16, generator=generator) for _ in range(16)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "app").mkdir()
    for name, text in (("__init__", ""), ("models", MODELS), ("data", DATA)):
        (tmp_path / "app" / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("app", "app.models", "app.data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import app.models

    model = app.models.build()
    for _ in range(60):
        model(torch.randn(16, 3, 16, 16))
    write_state(tmp_path / "model.safetensors", model.state_dict())
    return tmp_path


def says(shown, line):
    """Whether a line has the guide's words, and its numbers to a tenth: nets of the guides are trained, and a processor
    that adds in another order comes to other weights.
    """
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (shown, line)]
    return NUMBER.split(shown) == NUMBER.split(line) and numbers[0] == pytest.approx(numbers[1], rel=0.1)


@pytest.mark.filterwarnings("ignore")  # of the exporter to ONNX about its own parts
@pytest.mark.parametrize("guide", [name for name, lines in SESSIONS.items() if lines])
def test_commands_of_a_guide_print_what_is_shown(guide, folder, monkeypatch, capsys):
    printed = iter(())
    for line in SESSIONS[guide]:
        if not line.startswith("$ "):
            assert any(says(shown, line) for shown in printed), f"{line!r} is not printed, or not in this place"
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(line.removeprefix("$ ")))
        with pytest.raises(SystemExit) as left:
            cli.main()
        written = capsys.readouterr()
        assert left.value.code in (0, 1), written.err
        printed = iter(written.out.splitlines())
    for name in re.findall(r"^\$ .*--out (\S+)", "\n".join(SESSIONS[guide]), re.MULTILINE):
        assert (folder / name).stat().st_size > 0


def test_there_are_commands_to_test():
    assert sum(line.startswith("$ normkit ") for lines in SESSIONS.values() for line in lines) >= 7
