"""What the build of the site does besides: pages from outside docs/, formulas as MathML, and what must be there."""

import logging
import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any
from urllib.parse import unquote

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from public import PAGES, ROOT, every_identifier, identifiers

# Pages made of files that stand elsewhere, because that is where a reader of the repository looks for them.
OUTSIDE = {
    "index.md": "README.md",
    "zh/index.md": "README.zh-CN.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_SOURCE = re.compile(r'((?:src|srcset|href)=")(docs/[^"]+)(")')
_PICTURE = re.compile(
    r'<picture>\s*<source[^>]+srcset="(?P<dark>[^"]+)">\s*'
    r'<img src="(?P<light>[^"]+)" alt="(?P<alt>[^"]*)">\s*</picture>'
)
# Links by name, [`name`] with [`name`]: address at the end: this Markdown reads the code first and finds no name.
_NAMED = re.compile(r"^\[(`[^`]+`)\]: (\S+)\n", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ESCAPED = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


class _Known(logging.Filter):
    """Leaves out what griffe says of a function that has the name of the module it stands in; it finds both."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is shown."""
        return "CyclicAliasError" not in record.getMessage()


def on_startup(**_: Any) -> None:
    """Listen with griffe's own ears."""
    logging.getLogger("mkdocs.plugins.griffe").addFilter(_Known())


def on_files(files: Files, config: Any) -> Files:
    """Add the reference, the pages from outside, and what the pages link to in the repository."""
    for page in PAGES:
        files.append(File.generated(config, f"api/{page}.md", content=_reference_page(page)))
    files.append(File.generated(config, "api/index.md", content=_index_page()))
    for target, source in OUTSIDE.items():
        # The front page stands alone in its part of the menu: what the menu would take is left to its lines of code.
        head = "---\nhide:\n  - navigation\n---\n" if source.startswith("README") else ""
        files.append(File.generated(config, target, content=head + (ROOT / source).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        home = PurePosixPath(OUTSIDE.get(file.src_uri, f"docs/{file.src_uri}")).parent
        for match in _LINK.finditer(file.content_string):
            path = _in_repository(match[2], home)
            target = path and _target(path)
            if target and target.startswith("source/") and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages of the site: those of files outside docs/ are written for the repository."""
    home = PurePosixPath(OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    here = str(PurePosixPath(page.file.src_uri).parent)

    def pointed(path: str) -> str | None:
        found = _in_repository(path, home)
        target = found and _target(found)
        return relpath(target, here) if target else None

    def link(match: re.Match[str]) -> str:
        target = pointed(match[2])
        return match[0] if target is None else f"{match[1]}{target}{match[3] or ''}{match[4]}"

    def attribute(match: re.Match[str]) -> str:
        target = pointed(match[2])
        # Markdown does not look into HTML: the address is the page's own, beside which the files lie.
        return match[0] if target is None else f"{match[1]}{target}{match[3]}"

    named, markdown = _NAMED.findall(markdown), _NAMED.sub("", markdown)
    for name, address in named:
        markdown = markdown.replace(f"[{name}]", f"[{name}]({address})")
    # The reader's choice of light or dark counts here, and not only the system's.
    chosen = r'<img src="\g<light>#only-light" alt="\g<alt>"><img src="\g<dark>#only-dark" alt="\g<alt>">'
    return _PICTURE.sub(chosen, _SOURCE.sub(attribute, _LINK.sub(link, markdown)))


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Write formulas as MathML, which browsers draw themselves, and keep the ledger's contents to its claims."""
    if page.file.src_uri == "ledger/report.md":
        for title in page.toc:
            for claim in title.children:
                claim.children = []

    def drawn(match: re.Match[str]) -> str:
        formula = match[3]
        for escape, character in _ESCAPED.items():
            formula = formula.replace(escape, character)
        mathml = convert(formula.strip(), display="block" if match[2] == "[" else "inline")
        return f'<div class="formula">{mathml}</div>' if match[2] == "[" else mathml

    return _FORMULA.sub(drawn, html)


def on_post_build(config: Any) -> None:
    """Fail where a public object has no entry, a formula was left, or a page fetches from elsewhere."""
    site = Path(config.site_dir)
    entries = "\n".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    missing = [name for name in every_identifier() if f'id="{name}"' not in entries]
    if missing:
        raise PluginError(f"public objects without an entry in the reference: {', '.join(missing)}")
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        if 'class="arithmatex"' in text:
            raise PluginError(f"{path}: a formula was not drawn")
        if unlinked := re.search(r"\[<code>[a-z-]+</code>\]", text):
            raise PluginError(f"{path}: {unlinked[0]} leads nowhere")
        fetched = re.findall(r'<(?:script|link|img|source|iframe)[^>]+(?:src|href|srcset)="(https?:[^"]+)"', text)
        if fetched:
            raise PluginError(f"{path}: fetches {fetched[0]}")
    broken = _broken(site)
    if broken:
        raise PluginError(f"links to nothing: {', '.join(broken[:10])}")


def _broken(site: Path) -> list[str]:
    """Return the links of the site's pages that lead to no file or to no place in one, those in HTML among them."""
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    places = {path: set(re.findall(r'(?:id|name)="([^"]+)"', text)) for path, text in pages.items()}
    broken = []
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^":]+)"', text):
            path, _, place = unquote(link).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            known = not place or place in places.get(target, {place}) or place.startswith(("__", "only-"))
            if not target.exists() or not known:
                broken.append(f"{page.relative_to(site)} -> {link}")
    return broken


def _reference_page(page: str) -> str:
    title, words, modules = PAGES[page]
    shown = "\n\n".join(f"::: {identifier}" for identifier in identifiers(page))
    names = ", ".join(f"`{module.partition(':')[0]}`" for module in modules)
    return f"# {title}\n\n{words} From {names}.\n\n{shown}\n"


def _index_page() -> str:
    lines = [
        "# API reference",
        "",
        "Every public object, from its docstring. On the command line: `normkit --help`.",
        "",
    ]
    for page, (title, words, _) in PAGES.items():
        links = " · ".join(f"[`{identifier.rpartition('.')[2]}`][{identifier}]" for identifier in identifiers(page))
        lines += [f"## [{title}]({page}.md)", "", words, "", links, ""]
    return "\n".join(lines)


def _in_repository(link: str, home: PurePosixPath) -> str | None:
    """Return the path in the repository that a relative link means, or None where it is none."""
    if ":" in link or link.startswith("/"):
        return None
    path = normpath(str(home / link))
    return path if (ROOT / path).exists() else None


def _target(path: str) -> str | None:
    """Return the page or file of the site that shows a file of the repository."""
    for page, source in OUTSIDE.items():
        if path == source:
            return page
    if (
        path.startswith("docs/")
        and not path.endswith((".py", "ledger/README.md", ".jsonl"))
        and "notebooks" not in path
    ):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def _source_page(path: str) -> str:
    """Show a file, or name what a folder holds."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if entry.suffix in (".py", ".ipynb", ".json"))
        body = "\n".join(f"- `{path}/{name}`" for name in names)
    elif file.stat().st_size > 60_000:
        body = f"{file.stat().st_size:,} bytes; it stands in the repository."
    else:
        language = {".py": "python", ".json": "json"}.get(file.suffix, "text")
        body = f"````{language}\n{file.read_text(encoding='utf-8')}\n````"
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\nFrom the repository.\n\n{body}\n"
