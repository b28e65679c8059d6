"""The page's table of contents: which sources a claim names, so that a reader can ask for those of one source alone."""

import re

from ..lab.claim import Claim

__all__ = ["named_sources"]

ARTICLE = "Batch normalization built from scratch"
# Names before a year: "Wu and He 2018", "Krizhevsky, Sutskever and Hinton 2012", "van Laarhoven 2017".
PAPER = re.compile(r"(?:van )?[A-Z][\w-]+(?:, [A-Z][\w-]+)*(?: et al\.| and [A-Z][\w-]+)? \d{4}")
RANGE = re.compile(r"S(\d) to S(\d)")
LETTERED = re.compile(r"\bS\d\b")


def named_sources(claim: Claim) -> tuple[str, ...]:
    """Return the names of the sources that make a claim, in the order in which it names them, each once.

    >>> from normkit.lab.claims import get_claim
    >>> named_sources(get_claim("small-batch"))
    ('Wu and He 2018', 'S2')
    >>> named_sources(get_claim("drift"))
    ('Ioffe and Szegedy 2015', 'S0', 'S1', 'S2', 'S3', 'S4')
    """
    words = RANGE.sub(
        lambda found: ", ".join(f"S{number}" for number in range(int(found[1]), int(found[2]) + 1)), claim.source
    )
    found = [(place.start(), place[0]) for form in (PAPER, LETTERED) for place in form.finditer(words)]
    if ARTICLE in words:
        found.append((words.index(ARTICLE), ARTICLE))
    return tuple(dict.fromkeys(name for _, name in sorted(found)))
