"""The rows in short: geometric means over shapes, the worst shape, and whether the goal is met."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FORMS", "TABLE", "Group", "Row", "best_form", "geometric_mean", "groups", "of_copy", "ratio"]

Row = Mapping[str, Any]

# How torch's own layers may be written: a sum and an activation as operations of their own, or in place.
FORMS = ("torch", "torch in place")
# How many times the speed of the better of torch's forms normkit is meant to reach, by (work, chain, dtype, layout).
TABLE = {
    ("eval", "bn", "float32", "contiguous"): 1.1,
    ("eval", "bn", "float32", "channels_last"): 1.2,
    ("forward", "bn", "float32", "contiguous"): 4.0,
    ("forward", "bn", "float32", "channels_last"): 2.0,
    ("forward+backward", "bn", "float32", "contiguous"): 2.5,
    ("forward+backward", "bn", "float32", "channels_last"): 1.6,
    ("forward+backward", "bn+relu", "float32", "contiguous"): 3.0,
    ("forward+backward", "bn+relu", "float32", "channels_last"): 2.5,
    ("forward+backward", "bn+add+relu", "float32", "contiguous"): 3.0,
    ("forward+backward", "bn+add+relu", "float32", "channels_last"): 2.0,
    ("forward+backward", "bn", "bfloat16", "contiguous"): 2.0,
    ("forward+backward", "bn", "bfloat16", "channels_last"): 1.7,
    # On tiny shapes a call's fixed cost decides.
    **{
        (work, "bn", "float32", f"tiny, {layout}"): goal
        for work, goal in (("eval", 1.3), ("forward", 2.0), ("forward+backward", 1.3))
        for layout in ("contiguous", "channels_last")
    },
}


@dataclass(frozen=True)
class Group:
    """The rows of one kind of work, one chain, one type and one layout.

    Attributes:
        key: work, chain, dtype, layout; the set of tiny shapes stands apart, as a layout ``tiny, contiguous``.
        rows: how many.
        over_torch: geometric mean over the rows of the time of torch's better form over normkit's.
        faster: the same for each peer; peers that were not timed are absent.
        of_copy: geometric mean of normkit's time over that of copying the same number of bytes.
        worst: the smallest ratio to torch's better form.
        worst_shape: where it is.
        error: normkit's largest error of an output.
        torch_error: torch's.
    """

    key: tuple[str, str, str, str]
    rows: int
    over_torch: float
    faster: dict[str, float]
    of_copy: float
    worst: float
    worst_shape: str
    error: float
    torch_error: float

    @property
    def goal(self) -> float | None:
        """The ratio to torch's better form that was aimed at, if any."""
        return TABLE.get(self.key)

    @property
    def met(self) -> bool | None:
        """Whether the mean over torch's better form reaches the goal; None without a goal."""
        return None if self.goal is None else self.over_torch >= self.goal


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers.

    >>> round(geometric_mean([1.0, 4.0]), 12)
    2.0
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def best_form(peers: Row) -> str:
    """Return the form of torch's layers that was quickest."""
    return min((form for form in FORMS if form in peers), key=lambda form: peers[form]["median"])


def ratio(row: Row, peer: str | None = None) -> float:
    """Return how many times faster normkit is than a peer, by default than the better of torch's forms."""
    peers = row["peers"]
    return float(peers[peer or best_form(peers)]["median"] / peers["normkit"]["median"])


def of_copy(row: Row, copy: str = "copy") -> float:
    """Return normkit's time over that of copying the same number of bytes."""
    # A throughput each: the same bytes at the speed of the copy.
    return float(row["peers"][copy]["gb_per_second"] / row["peers"]["normkit"]["gb_per_second"])


def groups(rows: Sequence[Row]) -> list[Group]:
    """Return the groups, by work, chain, dtype and layout in this order."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        layout = f"tiny, {row['layout']}" if row["set"] == "tiny" else row["layout"]
        found.setdefault((row["work"], row["chain"], row["dtype"], layout), []).append(row)
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
        over_torch=geometric_mean(map(ratio, rows)),
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
