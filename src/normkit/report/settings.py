"""The settings of a run as names and values, for the reports."""

from collections.abc import Mapping
from typing import Any

from .language import ENGLISH, Language

__all__ = ["named_settings"]


def named_settings(record: Mapping[str, Any], lang: Language = ENGLISH) -> tuple[tuple[str, str], ...]:
    """Return the names and values of everything the numbers hang on.

    Args:
        record: what ``run.json`` holds of a claim.
        lang: the language of the names.
    """
    plan = record["plan"]
    named = [("data", record["data"]), ("norms", ", ".join(plan["norms"]))]
    named += [("seeds", lang.say("{first} to {last}", first=0, last=plan["seeds"][-1]))]
    if plan.get("network"):
        named.append(("network", plan["network"]))
    named += [
        (name.replace("_", " "), lang.say("all") if value is None else str(value))
        for name, value in plan["settings"].items()
    ]
    named += [(name, version) for name, version in record["versions"].items()]
    named += [("machine", record["machine"]), ("commit", record["commit"] or lang.say("not known"))]
    return tuple((lang.say(name), value) for name, value in named)
