"""Docstrings as Markdown: what they say in reStructuredText's words, for mkdocstrings. An extension of griffe."""

import re
import sys
from pathlib import Path
from typing import Any

from griffe import Extension, Object

sys.path.insert(0, str(Path(__file__).parent))
from public import every_identifier

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?([^`]+)`")
_RULE = re.compile(r"^\s*=+( +=+)+\s*$")


class Docstrings(Extension):
    """Turn roles into links, `::` into a colon, and simple tables into Markdown's."""

    def __init__(self) -> None:
        self.entries = every_identifier()
        self.by_name: dict[str, str] = {}
        for identifier in reversed(self.entries):
            self.by_name[identifier.rpartition(".")[2]] = identifier

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of each object as it is read."""
        if obj.docstring is not None:
            text = _ROLE.sub(self._link, obj.docstring.value)
            text = re.sub(r"::[ \t]*$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = "\n".join(_fenced(_tables(text.split("\n"))))

    def _link(self, match: re.Match[str]) -> str:
        name = match[1]
        target = name if name in self.entries else self.by_name.get(name.rpartition(".")[2], "")
        exact = target and (target == name or "." not in name or target.endswith(name.removeprefix("normkit")))
        return f"[`{name}`][{target}]" if exact else f"`{name}`"


def _fenced(lines: list[str]) -> list[str]:
    """Put fences around examples, which Markdown would read as quotations."""
    found: list[str] = []
    indent: str | None = None
    for line in [*lines, ""]:
        begins = line.lstrip().startswith(">>> ")
        if indent is None and begins:
            indent = line[: len(line) - len(line.lstrip())]
            found.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            found.append(f"{indent}```")
            indent = None
        found.append(line)
    return found


def _tables(lines: list[str]) -> list[str]:
    """Rewrite tables between rules of `=`, whose columns begin where the rule's do."""
    found: list[str] = []
    rules = [index for index, line in enumerate(lines) if _RULE.match(line)]
    if len(rules) < 3:
        return lines
    top, middle, bottom = rules[:3]
    starts = [match.start() for match in re.finditer(r"=+", lines[top])]
    found = lines[:top]
    for index in (*range(top + 1, middle), None, *range(middle + 1, bottom)):
        if index is None:
            found.append("|" + " --- |" * len(starts))
        else:
            cells = [lines[index][start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
            found.append("| " + " | ".join(cells) + " |")
    return [*found, *_tables(lines[bottom + 1 :])]
