"""``waive=``: findings that are known and meant."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..errors import ArgumentError
from ..spelling import alternatives
from .findings import Finding

__all__ = ["Waiver", "parse_waivers", "set_aside"]


class Waiver(NamedTuple):
    """One check, a pattern of layers, and why their findings are meant to be."""

    check: str
    pattern: str
    reason: str


def parse_waivers(waive: Mapping[str, str] | None, known: Iterable[str]) -> list[Waiver]:
    """Split ``{"check:layer pattern": "the reason"}``.

    Raises:
        ArgumentError: a check is unknown, a reason is missing, or what came is no mapping.
    """
    parsed, names = [], tuple(known)
    if waive is not None and not isinstance(waive, Mapping):
        raise ArgumentError(
            f"waive= is a {type(waive).__name__}; every waived finding has its reason: give a dict, such as "
            'waive={"never-updated:*": "not trained yet"}'
        )
    for key, reason in (waive or {}).items():
        check, _, pattern = key.partition(":")
        if check not in names:
            raise ArgumentError(f"waive= names an unknown check {check!r}; {alternatives(check, names)}")
        if not isinstance(reason, str) or not reason.strip():
            raise ArgumentError(f"waive={{{key!r}: ...}} needs a reason: say why this finding is meant to be")
        parsed.append(Waiver(check, pattern or "*", reason))
    return parsed


def set_aside(found: Iterable[Finding], waivers: list[Waiver]) -> tuple[list[Finding], tuple[tuple[Finding, str], ...]]:
    """Part findings into those that stand and those that are waived, each with its reason."""
    kept, waived = [], []
    for finding in found:
        reason = next(
            (w.reason for w in waivers if w.check == finding.check and fnmatchcase(finding.layer, w.pattern)), None
        )
        if reason is None:
            kept.append(finding)
        else:
            waived.append((finding, reason))
    return kept, tuple(waived)
