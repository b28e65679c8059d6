"""Text from files and models, made fit for a terminal: what would steer it is shown and not sent."""

import unicodedata

__all__ = ["first_line", "printable"]

# Control, format (such as marks that turn the direction of writing), halves of characters, and separators of lines.
_SHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Return the text with every character that moves the cursor, hides or reorders others written as an escape.

    Args:
        text: anything.
        keep: the characters of these kinds that stay. A name that should stay on its line keeps none.

    >>> print(printable("bn\x1b[2J\u202e1"))
    bn\x1b[2J\u202e1
    >>> printable("a\r\nb", keep="")
    'a\\r\\nb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _SHOWN
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def first_line(error: BaseException) -> str:
    r"""Return the first line of what an error says.

    >>> first_line(ValueError("no such layer\nand a page of code"))
    'no such layer'
    """
    return str(error).strip().partition("\n")[0]
