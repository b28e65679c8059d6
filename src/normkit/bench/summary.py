"""The rows in short: geometric means over shapes, the worst shape, and the tables of the README."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["GOALS", "Group", "geometric_mean", "groups", "markdown", "ratio"]

Row = Mapping[str, Any]

# How many times torch's speed normkit is meant to reach, by (work, chain, dtype, layout).
GOALS = {
    ("forward", "bn", "float32", "contiguous"): 4.0,
    ("forward", "bn", "float32", "channels_last"): 2.0,
    ("forward+backward", "bn", "float32", "contiguous"): 2.5,
    ("forward+backward", "bn", "float32", "channels_last"): 2.0,
    ("forward+backward", "bn+relu", "float32", "contiguous"): 3.0,
    ("forward+backward", "bn+relu", "float32", "channels_last"): 2.5,
    ("forward+backward", "bn+add+relu", "float32", "contiguous"): 3.5,
    ("forward+backward", "bn+add+relu", "float32", "channels_last"): 3.0,
}
BFLOAT16_GOAL = 2.0


@dataclass(frozen=True)
class Group:
    """The rows of one kind of work, one chain, one type and one layout.

    Attributes:
        key: work, chain, dtype, layout.
        rows: how many.
        faster: geometric mean over the rows of each peer's time over normkit's; peers that were not timed are absent.
        of_copy: geometric mean of normkit's time over that of copying the same number of bytes.
        worst: the smallest ratio to torch.
        worst_shape: where it is.
        error: normkit's largest error of an output.
        torch_error: torch's.
    """

    key: tuple[str, str, str, str]
    rows: int
    faster: dict[str, float]
    of_copy: float
    worst: float
    worst_shape: str
    error: float
    torch_error: float

    @property
    def goal(self) -> float | None:
        """The ratio to torch that was aimed at, if any."""
        work, _, dtype, _ = self.key
        if dtype == "bfloat16" and work != "eval":
            return BFLOAT16_GOAL
        return GOALS.get(self.key)


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers.

    >>> round(geometric_mean([1.0, 4.0]), 12)
    2.0
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def ratio(row: Row, peer: str = "torch") -> float:
    """Return how many times faster normkit is than a peer."""
    peers = row["peers"]
    return float(peers[peer]["median"] / peers["normkit"]["median"])


def of_copy(row: Row, copy: str = "copy") -> float:
    """Return normkit's time over that of copying the same number of bytes."""
    # A throughput each: the same bytes at the speed of the copy.
    return float(row["peers"][copy]["gb_per_second"] / row["peers"]["normkit"]["gb_per_second"])


def groups(rows: Sequence[Row]) -> list[Group]:
    """Return the groups in the order in which their first rows come."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["work"], row["chain"], row["dtype"], row["layout"]), []).append(row)
    return [_group(key, members) for key, members in sorted(found.items(), key=lambda item: _order(item[0]))]


def _order(key: tuple[str, str, str, str]) -> tuple[int, ...]:
    known = (
        ("eval", "forward", "forward+backward"),
        ("bn", "bn+relu", "bn+add+relu"),
        ("float32", "bfloat16", "float16"),
        ("contiguous", "channels_last", "sliced", "permuted"),
    )
    return tuple(words.index(word) if word in words else len(words) for words, word in zip(known, key, strict=True))


def _group(key: tuple[str, str, str, str], rows: list[Row]) -> Group:
    rivals = [name for name in rows[0]["peers"] if name not in ("normkit", "copy", "clone")]
    worst = min(rows, key=ratio)
    return Group(
        key=key,
        rows=len(rows),
        faster={
            name: geometric_mean(ratio(row, name) for row in rows)
            for name in rivals
            if all(name in row["peers"] for row in rows)
        },
        of_copy=geometric_mean(of_copy(row) for row in rows),
        worst=ratio(worst),
        worst_shape=f"{worst['set']} {'x'.join(map(str, worst['shape']))}",
        error=max(_error(row, "normkit") for row in rows),
        torch_error=max(_error(row, "torch") for row in rows),
    )


def _error(row: Row, peer: str) -> float:
    return float(row["peers"][peer]["error"])


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of some documents in Markdown, with the machine above each document's."""
    return "\n\n".join("\n\n".join(_sections(document)) for document in documents)


def _sections(document: Mapping[str, Any]) -> list[str]:
    sections = [_heading(document)]
    if document["rows"]:
        sections.append(_rows_table(groups(document["rows"])))
        sections += _beside_copies(document)
    if document["skipped"]:
        sections.append(
            "Left out: " + "; ".join(f"{row['row']} ({row['reason']})" for row in document["skipped"]) + "."
        )
    if document["training"]:
        sections.append(_training_table(document["training"]))
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


def _rows_table(found: Sequence[Group]) -> str:
    rivals = list(dict.fromkeys(name for group in found for name in group.faster))
    header = ["work", "layers", "type", "layout", "shapes", *(f"over {name}" for name in rivals), "goal", "of a copy"]
    header += ["worst shape", "error", "torch's error"]
    lines = [_line(header), _line(["---"] * len(header))]
    for group in found:
        over = [f"{group.faster[name]:.2f}" if name in group.faster else "" for name in rivals]
        goal = "" if group.goal is None else f"{group.goal:g}"
        worst = f"{group.worst:.2f} ({group.worst_shape})"
        errors = [f"{group.error:.1e}", f"{group.torch_error:.1e}"]
        lines.append(_line([*group.key, str(group.rows), *over, goal, f"{group.of_copy:.2f}", worst, *errors]))
    return "\n".join(lines)


def _beside_copies(document: Mapping[str, Any]) -> list[str]:
    """Say how near a large training forward comes to a copy: where no cache holds the tensor."""
    cache = document["machine"].get("last_level_cache")
    large = [
        row
        for row in document["rows"]
        if (row["work"], row["chain"]) == ("forward", "bn") and cache and row["bytes"] / 2 > cache
    ]
    if not large:
        return []
    reused, fresh = (geometric_mean(of_copy(row, copy) for row in large) for copy in ("copy", "clone"))
    return [
        f"Training forward of the {len(large)} rows whose tensor is larger than the last cache: {reused:.2f} times "
        f"`copy_` into memory that is there, {fresh:.2f} times `clone`."
    ]


def _training_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [_line(["training step", "batch", "layout", "torch, ms", "normkit, ms", "over torch"]), _line(["---"] * 6)]
    for row in rows:
        times = [f"{row['peers'][name]['median'] * 1e3:.2f}" for name in ("torch", "normkit")]
        lines.append(
            _line([row["network"], "x".join(map(str, row["batch"])), row["layout"], *times, f"{row['ratio']:.2f}"])
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
