"""``where=``: which layers a call is about."""

import difflib
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

from torch import nn

from ..errors import ArgumentError

__all__ = ["Where", "select"]

# A pattern, a class, a module, a question about a layer, or several of these. The last two are Any because a type
# alias cannot name itself.
Where = str | type[nn.Module] | nn.Module | Callable[[Any], bool] | Collection[Any] | None


class _Named(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def module(self) -> nn.Module: ...


Layer = TypeVar("Layer", bound=_Named)


def select(layers: Sequence[Layer], where: Where) -> list[Layer]:
    """Return the layers that ``where`` takes, in their order.

    Raises:
        ArgumentError: one of its patterns, classes or modules takes none.
    """
    if where is None:
        return list(layers)
    chosen = {id(layer) for layer in _taken(layers, where)}
    return [layer for layer in layers if id(layer) in chosen]


def _taken(layers: Sequence[Layer], where: Where) -> list[Layer]:
    if isinstance(where, str):
        taken = [layer for layer in layers if any(_matches(name, where) for name in layer.names)]
        return taken or _refuse(f"no normalization layer matches the pattern {where!r}", layers, where)
    if isinstance(where, type):
        taken = [layer for layer in layers if isinstance(layer.module, where)]
        return taken or _refuse(f"no normalization layer is a {where.__name__}", layers)
    if isinstance(where, nn.Module):
        below = {id(module) for module in where.modules()}
        taken = [layer for layer in layers if id(layer.module) in below]
        return taken or _refuse(f"the {type(where).__name__} given holds no normalization layer of the model", layers)
    if callable(where):
        return [layer for layer in layers if where(layer)]
    if isinstance(where, Collection):
        return [layer for entry in where for layer in _taken(layers, entry)]
    raise ArgumentError(
        f"where= is a {type(where).__name__}; allowed are None, a pattern such as 'backbone.*', a class, a module, "
        "a function of a layer, or a list of these"
    )


def _matches(name: str, pattern: str) -> bool:
    """Match the path or one of the containers above it, so that ``"backbone"`` takes all of ``backbone.*``."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _refuse(problem: str, layers: Sequence[Layer], pattern: str | None = None) -> list[Layer]:
    names = [name for layer in layers for name in layer.names]
    if not names:
        raise ArgumentError(f"{problem}: the model has no normalization layer at all")
    close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) if pattern else []
    shown, rest = (close, 0) if close else (names[:5], len(names) - 5)
    more = f" and {rest} more" if rest > 0 else ""
    raise ArgumentError(f"{problem}; {'close names are' if close else 'its layers are'} {', '.join(shown)}{more}")
