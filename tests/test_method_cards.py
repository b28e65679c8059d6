"""Every row of the catalog has its card, and every card its parts."""

import re
from pathlib import Path

import pytest

from normkit import functional, reference
from normkit.layers.catalog import METHODS, METHODS_OF_WEIGHTS

CARDS = Path(__file__).parents[1] / "docs" / "methods"
ROWS = (*METHODS, *METHODS_OF_WEIGHTS)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def card(name: str) -> str:
    return (CARDS / f"{name}.md").read_text(encoding="utf-8")


def part(name: str, title: str) -> str:
    """The paragraphs of one part of a card, up to the next one."""
    found = re.search(
        rf"^\*\*{title}\.\*\*(.*?)(?=^\*\*[A-Z][^*]*\.\*\*|^```python|\Z)", card(name), re.DOTALL | re.MULTILINE
    )
    assert found, f"{name}.md has no part {title!r}"
    return found.group(1)


def test_there_is_one_card_for_every_row_and_no_other():
    assert {path.stem for path in CARDS.glob("*.md")} == {row.name for row in ROWS} | {"README"}


@every_row
def test_card_is_named_as_the_row_and_listed(row):
    assert card(row.name).startswith(f"# {row.title}\n")
    assert re.search(rf"^\| \[[^]]+\]\({row.name}\.md\) \|.*`{row.stem}`", card("README"), re.MULTILINE)


@every_row
def test_card_has_a_formula_and_a_picture_of_the_axes(row):
    head = card(row.name).partition("**Gradient.**")[0]
    formula, _, rest = head.partition("```\n")
    assert re.search(r"\$\$.*?\\(frac|hat|mu|sigma|alpha|lVert|overline).*?\$\$", formula, re.DOTALL)
    picture = rest.partition("```")[0].splitlines()
    assert len(picture) >= 2
    # Cells, and words that say what their letters mean.
    assert any(re.search(r"(\b[a-f.x]\b\s+){2,}", line) or "[   x   ]" in line for line in picture)
    assert re.search(r"[a-z]{4,}", "\n".join(picture))


@every_row
@pytest.mark.parametrize("title", ["When to use", "When not", "Cost"])
def test_card_says_when_and_when_not_and_what_it_costs(row, title):
    assert len(part(row.name, title).split()) >= 3


@every_row
def test_card_derives_the_gradient(row):
    derived = part(row.name, "Gradient")
    own = re.search(r"d(x|v|s_j|X|D|\\gamma|g)\b|dx_c", derived)
    shared = re.search(r"\]\((\.\./)?([\w-]+)\.md\)", derived)
    assert own or shared
    if shared:
        page = (CARDS / f"{shared.group(1) or ''}{shared.group(2)}.md").resolve()
        assert re.search(r"dx", page.read_text(encoding="utf-8"))


@every_row
def test_card_names_source_function_and_reference(row):
    source = " ".join(part(row.name, "Source").split())
    number = re.search(r"arXiv:\d+\.\d+", row.paper)
    assert (number.group() if number else row.paper.rpartition(", ")[2]) in source
    assert row.paper.split(",")[0].split(" and ")[0] in source
    assert f"Function: `{row.stem}`" in source
    assert f"Reference: `normkit.reference.{row.stem}`" in source
    assert row.stem in functional.__all__
    assert row.stem in reference.__all__
