"""What a name that nobody knows may have been meant to be: the same words wherever a name is refused."""

from collections.abc import Iterable

__all__ = ["alternatives", "nearest"]


def alternatives(given: object, known: Iterable[str]) -> str:
    """Say which known name is close to the given one, if one is, and which are known.

    >>> alternatives("stael", ["forgotten", "stale"])
    "did you mean 'stale'? Known are: forgotten, stale"
    >>> alternatives(3, ["adam", "sgd"])
    'known are: adam, sgd'
    """
    names = list(known)
    close = nearest(given, names)
    listed = f"nown are: {', '.join(names)}"
    return f"did you mean {close!r}? K{listed}" if close else f"k{listed}"


def nearest(given: object, known: Iterable[str]) -> str:
    """Return the known name that is closest to what was given, or an empty string where none is close.

    >>> nearest("Batch_norm", ["batch norm", "layer norm"])
    'batch norm'
    """
    import difflib

    if not isinstance(given, str):
        return ""
    folded = {name.lower(): name for name in reversed(list(known))}
    close = difflib.get_close_matches(given.lower(), folded, n=1, cutoff=0.7)
    return folded[close[0]] if close else ""
