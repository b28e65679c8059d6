"""What was measured as Markdown: the tables of a report or a README."""

from collections.abc import Mapping, Sequence
from typing import Any

from .goals import Verdict, slower, verdicts
from .summary import FORMS, Group, groups

__all__ = ["markdown", "yes_or_no"]


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of some documents in Markdown, with the machine above each document's."""
    return "\n\n".join("\n\n".join(_sections(document)) for document in documents)


def _sections(document: Mapping[str, Any]) -> list[str]:
    sections = [_heading(document)]
    if document["rows"] or document["training"]:
        sections.append(_slower(document))
    if document["rows"]:
        sections.append(_rows_table(groups(document["rows"])))
    for name, words in (("wrong", "Wrong, and not timed"), ("skipped", "Left out")):
        if document[name]:
            sections.append(f"{words}: " + "; ".join(f"{row['row']} ({row['reason']})" for row in document[name]) + ".")
    if document["training"]:
        sections.append(_training_table(document["training"]))
    judged = verdicts(document)
    if judged:
        sections.append(_verdicts_table(judged))
    sections += [
        f"`import normkit` takes {found['overhead']:+.1%} over `import torch` "
        f"({found['modules']['torch']['median']:.2f} s)."
        for found in document["imports"]
    ]
    return sections


def _heading(document: Mapping[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    unfinished = "" if document["complete"] else " The run was not finished."
    memory = "kept by the process" if document["settings"].get("reuse_memory") else "as the system gives it"
    return (
        f"{machine['cpu']} ({machine['vectors']}), {machine['threads']} of {machine['cores']} cores, load "
        f"{machine['load']:.1f} at the start; torch {versions['torch']}, numba {versions['numba']}, normkit "
        f"{(document.get('commit') or versions['normkit'])[:12]}; memory {memory}; {document['date'][:10]}.{unfinished}"
    )


def _slower(document: Mapping[str, Any]) -> str:
    found = slower(document)
    if not found:
        return "Nothing is slower than torch."
    return "\n".join(["Slower than torch:", "", *(f"- {one}" for one in found)])


def _rows_table(found: Sequence[Group]) -> str:
    rivals = list(dict.fromkeys(name for group in found for name in group.faster))
    if FORMS[1] not in rivals:  # the better form is the only one
        rivals.remove(FORMS[0])
    header = ["work", "layers", "type", "layout", "shapes", "over torch's better form", "goal", "met"]
    header += [*(f"over {name}" for name in rivals), "of a copy", "worst shape", "error", "torch's error"]
    lines = [_line(header), _line(["---"] * len(header))]
    for group in found:
        over = [f"{group.faster[name]:.2f}" if name in group.faster else "" for name in rivals]
        goal = "" if group.goal is None else f"{group.goal:g}"
        worst = f"{group.worst:.2f} ({group.worst_shape})"
        errors = [f"{group.error:.1e}", f"{group.torch_error:.1e}"]
        numbers = [f"{group.over_torch:.2f}", goal, yes_or_no(group.met), *over, f"{group.of_copy:.2f}", worst, *errors]
        lines.append(_line([*group.key, str(group.rows), *numbers]))
    return "\n".join(lines)


def _verdicts_table(found: Sequence[Verdict]) -> str:
    lines = [_line(["goal", "found", "met"]), _line(["---"] * 3)]
    lines += [_line([verdict.goal, verdict.found, yes_or_no(verdict.met)]) for verdict in found]
    return "\n".join(lines)


def _training_table(rows: Sequence[Mapping[str, Any]]) -> str:
    peers = list(rows[0]["peers"])
    header = ["training step", "batch", "layout", *(f"{name}, ms" for name in peers), "over torch"]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        times = [f"{row['peers'][name]['median'] * 1e3:.2f}" for name in peers]
        lines.append(
            _line([row["network"], "x".join(map(str, row["batch"])), row["layout"], *times, f"{row['ratio']:.2f}"])
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def yes_or_no(met: bool | None) -> str:
    """Return whether a goal is met in a word; nothing where there is no goal.

    >>> yes_or_no(True), yes_or_no(None)
    ('yes', '')
    """
    return "" if met is None else "yes" if met else "no"
