"""Every example in the documentation runs and prints what it says."""

import doctest
import re
from pathlib import Path

import pytest

from torch_versions import uses_torchscript

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


# torch compiles its forward derivatives the first time, with what it itself calls deprecated.
@uses_torchscript
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page_print_what_they_say(page: Path) -> None:
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    plain = [block for block in blocks if not block.startswith(">>>")]
    assert not plain, f"write examples as >>> sessions, so that their results are tested: {plain[0][:60]!r}"
    if blocks:
        session = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        runner.run(session, out=report.append)
        assert runner.failures == 0, "".join(report)


def test_there_are_pages_to_test() -> None:
    assert PAGES
