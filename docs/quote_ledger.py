"""Quote the kept ledger in the pages that show it: READMEs, questions, and the article page, in both languages.

`python docs/quote_ledger.py`, after `normkit lab run all --data fashion-mnist --until-decided --out docs/ledger`.
"""

import re
from pathlib import Path

from normkit.lab.claims import all_claims
from normkit.lab.ledger import Entry, read_ledger
from normkit.report.language import language
from normkit.report.markdown import ledger_excerpt, ledger_sentences

ROOT = Path(__file__).parents[1]
READMES = {"README.md": "en", "README.zh-CN.md": "zh"}
# Pages whose names of claims lead to the ledger, and the ledger's folder from there.
LINKED = {
    "questions.md": "ledger",
    "questions.zh-CN.md": "ledger",
    "article.md": "ledger",
    "zh/article.md": "../ledger",
}
ARTICLES = {"article.md": "en", "zh/article.md": "zh"}
_OURS = re.compile(r"<!-- ours ([a-z-]+) -->\n.*?<!-- /ours -->", re.DOTALL)
WAITING = {
    "en": "*Ours*: not in the ledger yet.",
    "zh": "*我们的结果*：记录中还没有。",
}
COUNTED = {
    "en": "{judged} of {total} claims are judged, beside {formulas} formulas that are checked.",
    "zh": "{total} 条论断中已判定 {judged} 条，另有 {formulas} 条公式核对过。",
}
UNJUDGED = {
    "en": " Without a verdict yet, because their design changed after their last run or is new: {waiting}.",
    "zh": "设计改过或新加、还没有重新运行，因此暂无结论的：{waiting}。",
}


def quoted(entries: tuple[Entry, ...], code: str) -> str:
    """Return what stands between the marks of a README."""
    judged = {entry.claim.id for entry in entries}
    waiting = [f"`{claim.id}`" for claim in all_claims() if claim.id not in judged]
    sentence = COUNTED[code].format(
        judged=sum(entry.claim.kind == "empirical" for entry in entries),
        total=sum(claim.kind == "empirical" for claim in all_claims()),
        formulas=sum(entry.claim.kind == "formula" for entry in entries),
    )
    if waiting:
        sentence += UNJUDGED[code].format(waiting=(", " if code == "en" else "、").join(waiting))
    table = ledger_sentences(entries, "docs/ledger/report.md", language(code))
    return f"{sentence}\n\n{table}"


def linked(text: str, judged: list[str], folder: str) -> str:
    """Return a page with a link at every claim that has a verdict, and at no other."""
    text = re.sub(rf"(?m)^\[`[a-z-]+`\]: {re.escape(folder)}/report\.md#[a-z-]+\n?", "", text).rstrip("\n")
    for claim in all_claims():
        text = text.replace(f"[`{claim.id}`]", f"`{claim.id}`")
        if claim.id in judged:
            text = text.replace(f"`{claim.id}`", f"[`{claim.id}`]")
    named = [claim for claim in judged if f"[`{claim}`]" in text]
    return text + "\n\n" + "".join(f"[`{claim}`]: {folder}/report.md#{claim}\n" for claim in named)


def compared(text: str, entries: tuple[Entry, ...], code: str, folder: str) -> str:
    """Return an article page with the ledger's figures between its marks, `<!-- ours CLAIM -->`."""
    judged = {entry.claim.id: entry for entry in entries}

    def ours(mark: re.Match[str]) -> str:
        entry = judged.get(mark[1])
        words = WAITING[code] if entry is None else ledger_excerpt(entry, folder, language(code))
        return f"<!-- ours {mark[1]} -->\n\n{words}\n\n<!-- /ours -->"

    return _OURS.sub(ours, text)


def main() -> None:
    """Rewrite the pages."""
    entries = read_ledger(ROOT / "docs" / "ledger")
    for name, code in READMES.items():
        page = ROOT / name
        before, _, rest = page.read_text(encoding="utf-8").partition("<!-- ledger -->\n")
        _, _, after = rest.partition("<!-- /ledger -->")
        page.write_text(
            f"{before}<!-- ledger -->\n\n{quoted(entries, code)}\n\n<!-- /ledger -->{after}", encoding="utf-8"
        )
    judged = [entry.claim.id for entry in entries]
    for name, folder in LINKED.items():
        page = ROOT / "docs" / name
        text = page.read_text(encoding="utf-8")
        if name in ARTICLES:
            text = compared(text, entries, ARTICLES[name], folder)
        page.write_text(linked(text, judged, folder), encoding="utf-8")


if __name__ == "__main__":
    main()
