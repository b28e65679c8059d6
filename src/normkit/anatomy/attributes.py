"""What a module's code holds in plain attributes, which torch's own lists of parts do not show."""

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["leaves", "plain_attributes"]

# torch's own: parts and hooks, and what `module.compile()` leaves.
_OF_TORCH = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Give the attributes that are neither parameters, buffers, parts nor hooks.

    >>> layer = nn.Linear(2, 2)
    >>> layer.scales = [1.0, 2.0]
    >>> dict(plain_attributes(layer))["scales"]
    [1.0, 2.0]
    """
    return ((name, value) for name, value in vars(module).items() if name not in _OF_TORCH)


def leaves(value: Any) -> Iterator[Any]:
    """Give what a value holds in lists, tuples, sets and the values of dicts, however deep; itself where it is none.

    >>> list(leaves([1, ("a", {"b": 2})]))
    [1, 'a', 2]
    """
    return _leaves(value, set())


def _leaves(value: Any, seen: set[int]) -> Iterator[Any]:
    if not isinstance(value, dict | list | tuple | set):
        yield value
    elif id(value) not in seen:  # a list may hold itself
        seen.add(id(value))
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _leaves(entry, seen)
