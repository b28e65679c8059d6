"""The site's reference holds every public object, each with a docstring; the build itself is `make docs`."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import normkit

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


public = load("public")


def found(identifier):
    module, _, name = identifier.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("identifier", public.every_identifier())
def test_an_entry_is_an_object_with_a_docstring(identifier):
    thing = found(identifier)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert (thing.__doc__ or "").strip(), identifier


def test_every_public_name_has_an_entry():
    entries = set(public.every_identifier())
    rooms = {"functional", "layers"}
    assert {f"normkit.{name}" for name in normkit.__all__ if name not in rooms} <= entries
    shown = [identifier for page in public.PAGES for identifier in public.identifiers(page)]
    assert len(shown) == len(set(shown))
    assert set(shown) == entries
    for room in ("doctor", "surgery", "training", "testing", "anatomy", "functional", "layers", "reference", "errors"):
        module = importlib.import_module(f"normkit.{room}")
        objects = {id(found(identifier)) for identifier in entries}
        assert not [name for name in module.__all__ if id(getattr(module, name)) not in objects]


def test_the_menu_holds_every_page():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r"([\w./-]+\.md)", menu))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"ledger/README.md"}
    made = {"index.md", "zh/index.md", "changelog.md", "contributing.md", "benchmarks.md", "api/index.md"}
    assert listed == pages | made | {f"api/{page}.md" for page in public.PAGES}
