"""Quote the kept ledger in the pages that show it: the tables of both READMEs, the links of both pages of questions.

`python docs/quote_ledger.py`, after `normkit lab run all --data fashion-mnist --until-decided --out docs/ledger`.
"""

import re
from pathlib import Path

from normkit.lab.claims import all_claims
from normkit.lab.ledger import Entry, read_ledger
from normkit.report.language import language
from normkit.report.markdown import ledger_sentences

ROOT = Path(__file__).parents[1]
READMES = {"README.md": "en", "README.zh-CN.md": "zh"}
QUESTIONS = ("questions.md", "questions.zh-CN.md")
SENTENCES = {
    "en": "{judged} of {total} claims are judged so far. Without a verdict yet, because their design changed after "
    "their last run or is new: {waiting}.",
    "zh": "{total} 条论断中已判定 {judged} 条。设计改过或新加、还没有重新运行，因此暂无结论的：{waiting}。",
}


def quoted(entries: tuple[Entry, ...], code: str) -> str:
    """Return what stands between the marks of a README."""
    judged = {entry.claim.id for entry in entries}
    waiting = [f"`{claim.id}`" for claim in all_claims() if claim.id not in judged]
    sentence = SENTENCES[code].format(
        judged=len(judged), total=len(all_claims()), waiting=", ".join(waiting) if code == "en" else "、".join(waiting)
    )
    table = ledger_sentences(entries, "docs/ledger/report.md", language(code))
    return f"{sentence}\n\n{table}" if waiting else table


def linked(text: str, judged: list[str]) -> str:
    """Return a page of questions with a link at every claim that has a verdict, and at no other."""
    text = re.sub(r"(?m)^\[`[a-z-]+`\]: ledger/report\.md#[a-z-]+\n?", "", text).rstrip("\n")
    for claim in all_claims():
        text = text.replace(f"[`{claim.id}`]", f"`{claim.id}`")
        if claim.id in judged:
            text = text.replace(f"`{claim.id}`", f"[`{claim.id}`]")
    return text + "\n\n" + "".join(f"[`{claim}`]: ledger/report.md#{claim}\n" for claim in judged)


def main() -> None:
    """Rewrite the four pages."""
    entries = read_ledger(ROOT / "docs" / "ledger")
    for name, code in READMES.items():
        page = ROOT / name
        before, _, rest = page.read_text(encoding="utf-8").partition("<!-- ledger -->\n")
        _, _, after = rest.partition("<!-- /ledger -->")
        page.write_text(
            f"{before}<!-- ledger -->\n\n{quoted(entries, code)}\n\n<!-- /ledger -->{after}", encoding="utf-8"
        )
    for name in QUESTIONS:
        page = ROOT / "docs" / name
        page.write_text(
            linked(page.read_text(encoding="utf-8"), [entry.claim.id for entry in entries]), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
