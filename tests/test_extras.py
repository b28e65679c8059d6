"""What needs an extra says which, and the package's metadata names what is imported."""

import tomllib
from pathlib import Path

import pytest

import normkit
from normkit import extras

ROOT = Path(__file__).parents[1]
# Distributions that are imported by another name, and one that another brings.
IMPORTED = {"scikit-learn": "sklearn"}
BROUGHT = {"markupsafe"}


def test_the_modules_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {line.partition(">")[0] for line in project["optional-dependencies"]["lab"]}
    assert {IMPORTED.get(name, name) for name in named} | BROUGHT == set(extras.LAB_MODULES)


def test_a_room_without_its_extra_says_which(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("jinja2", "rich") else object())
    with pytest.raises(ModuleNotFoundError, match=r'^normkit.lab needs jinja2, rich: pip install "normkit\[lab\]"$'):
        extras.require_lab("normkit.lab")


def test_the_version_is_that_of_the_changelog():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert f"## {normkit.__version__}" in {heading.partition(" - ")[0] for heading in headings}
