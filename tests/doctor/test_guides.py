"""The commands of the guides print what the guides show, line by line and in that order."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from normkit import cli

GUIDES = sorted((Path(__file__).parents[2] / "docs" / "guides").glob("*.md"))
BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = [
    pytest.param(block, id=f"{guide.stem}-{index}")
    for guide in GUIDES
    for index, block in enumerate(BLOCK.findall(guide.read_text(encoding="utf-8")))
    if "normkit doctor" in block
]


@pytest.mark.parametrize("block", COMMANDS)
def test_command_of_a_guide_prints_what_is_shown(block, monkeypatch, capsys):
    command, *shown = block.splitlines()
    monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ ")))
    with pytest.raises(SystemExit):
        cli.main()
    printed = iter(capsys.readouterr().out.splitlines())
    for line in shown:
        assert line in printed, f"{line!r} is not printed, or not in this place"


def test_there_are_commands_to_test():
    assert len(COMMANDS) >= 2
