"""Whose values a value was computed from, as autograd's graph tells it."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError

__all__ = ["Lineage"]


class Lineage:
    """Which of several parts, that take turns, computed what: each may use its own values only.

    The parts have one kind of node in common, that of a norm over all of them, whose output of number i is part i's.
    From what a part brings, the graph is walked back to such nodes; every node on the way must be the part's own.
    Autograd numbers its nodes in the order in which a thread makes them, so that parts in one thread are told apart by
    when they computed. In threads of their own, a node that two parts come to belongs to whoever came first.

    What carries no gradient is in no graph, and is not seen.

    Args:
        parts: how many they are.
        ordered: whether they compute in one thread.
    """

    def __init__(self, parts: int, ordered: bool) -> None:
        self._parts, self._ordered = parts, ordered
        self.begin()

    def begin(self) -> None:
        """Forget all nodes. What is computed before the first turn is nobody's."""
        self._seen: list[set[Any]] = [set() for _ in range(self._parts)]
        self._joint: set[Any] = set()
        self._starts, self._turns = [_number()], [self._parts]

    def turn(self, part: int) -> None:
        """Note that a part computes from now on."""
        self._starts.append(_number())
        self._turns.append(part)

    def join(self, outputs: Sequence[Tensor]) -> None:
        """Note that these, one for each part, come from one node."""
        self._joint.update(y.grad_fn for y in outputs if y.grad_fn is not None)

    def check(self, part: int, values: Iterable[Tensor | None]) -> None:
        """Refuse what a part computed from another's values.

        Raises:
            ArgumentError: it did.
        """
        seen, joint = self._seen[part], self._joint
        open_edges = [(value.grad_fn, value.output_nr) for value in values if value is not None]
        while open_edges:
            node, number = open_edges.pop()
            if node is None or node in seen:
                continue
            if node in joint:
                if number != part:
                    _refuse(part, f"micro-batch {number} computed")
                continue
            seen.add(node)
            edges = node.next_functions
            # A parameter, or made before the first turn: nobody's.
            if not edges or (self._ordered and node._sequence_nr() < self._starts[0]):
                continue
            owner = self._owner(node, part)
            if owner != part and not _is_cast(node, edges):
                before = "" if self._ordered else ", or what was computed before and greenlet would tell apart"
                _refuse(part, f"micro-batch {owner} computed{before}")
            open_edges.extend(edges)

    def _owner(self, node: Any, part: int) -> int:
        if self._ordered:
            return self._turns[bisect_right(self._starts, node._sequence_nr()) - 1]
        return next((other for other, seen in enumerate(self._seen) if other != part and node in seen), part)


def _number() -> int:
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def _is_cast(node: Any, edges: Sequence[tuple[Any, int]]) -> bool:
    """Tell whether this is a parameter in another type, of which autocast keeps one for all."""
    return node.name() == "ToCopyBackward0" and all(inner is None or not inner.next_functions for inner, _ in edges)


def _refuse(part: int, used: str) -> None:
    raise ArgumentError(
        f"accumulate: micro-batch {part} used what {used}: something is kept between norms outside "
        "the modules (in a hook's dict, a list, a global), where the micro-batches, which take turns at every "
        "norm, come upon each other's. Keep it on a module of the model (self.features = ...), make the dict anew in "
        'every call of loss, or return it from forward; or use kind="statistics"'
    )
