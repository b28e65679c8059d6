"""The rows in short: geometric means over shapes, the worst shape, and whether the goal is met."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TABLE", "Group", "Row", "geometric_mean", "groups", "of_copy", "ratio"]

Row = Mapping[str, Any]

# How many times torch's speed normkit is meant to reach, by (work, chain, dtype, layout).
TABLE = {
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
        key: work, chain, dtype, layout; the set of tiny shapes stands apart, as a layout ``tiny, contiguous``.
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
        work, _, dtype, layout = self.key
        if dtype == "bfloat16" and work != "eval" and not layout.startswith("tiny"):
            return BFLOAT16_GOAL
        return TABLE.get(self.key)

    @property
    def met(self) -> bool | None:
        """Whether the mean over torch reaches the goal; None without a goal."""
        return None if self.goal is None else self.faster["torch"] >= self.goal


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
    """Return the groups, by work, chain, dtype and layout in this order."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        # The goals are means over the shapes of networks. On tiny ones a call's fixed cost decides.
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
