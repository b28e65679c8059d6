"""How data of a room below is shown by a room above: who renders registers, who is shown asks by the form's name."""

from collections.abc import Callable

__all__ = ["register", "render"]

_RENDERERS: dict[str, Callable[..., str]] = {}


def register(form: str, renderer: Callable[..., str]) -> None:
    """Say who shows something in this form, such as ``"diagnosis as a page"``; a later one replaces an earlier."""
    _RENDERERS[form] = renderer


def render(form: str, *shown: object) -> str:
    """Return what the renderer of this form makes of what is shown.

    >>> register("number as words", lambda number: "one" if number == 1 else "many")
    >>> render("number as words", 3)
    'many'
    """
    return _RENDERERS[form](*shown)
