"""The settings of a run as names and values, for the reports."""

from collections.abc import Mapping
from typing import Any

from ..lab.ledger import Entry
from .language import ENGLISH, Language

__all__ = ["named_settings"]

# What variants call a setting of training by.
VARIED = {"learning_rate": "rate", "weight_decay": "decay"}
# What says nothing where no network is trained, or where the optimiser has no such thing.
MEANINGLESS = {
    "none": ("epochs", "optimizer", "learning_rate", "momentum", "weight_decay"),
    "adam": ("momentum",),
}


def named_settings(entry: Entry, lang: Language = ENGLISH) -> tuple[tuple[str, str], ...]:
    """Return the names and values of everything the numbers hang on.

    Args:
        entry: a claim of a folder.
        lang: the language of the names.
    """
    record, plan = entry.record, entry.record["plan"]
    settings = plan["settings"]
    named = [("data", lang.prose(record["data"])), ("norms", ", ".join(plan["norms"]))]
    named += [("seeds", lang.say("{first} to {last}", first=0, last=plan["seeds"][-1]))]
    if plan.get("network"):
        named.append(("network", plan["network"]))
    if settings["optimizer"] == "none":
        named.append(("optimizer", lang.say("none: no network is trained")))
    for name, value in settings.items():
        if name not in MEANINGLESS.get(settings["optimizer"], ()):
            said = lang.say("all") if value is None else str(value)
            if name in entry.claim.sets:
                said = lang.say("that of each variant")
            elif name in VARIED:
                said = _varied(VARIED[name], entry, lang) or (_rate(entry, lang) if name == "learning_rate" else said)
            named.append((name.replace("_", " "), said))
    named += [(name, version) for name, version in record["versions"].items()]
    named += [("machine", record["machine"]), ("commit", record["commit"] or lang.say("not known"))]
    return tuple((lang.say(name), value) for name, value in named)


def _varied(word: str, entry: Entry, lang: Language) -> str:
    """Return the values of what the variants call by this word, each once, or nothing."""
    variants = (dict(variant) for variant in entry.record["plan"]["variants"])
    values = dict.fromkeys(f"{variant[word]:g}" for variant in variants if word in variant)
    return lang.say("varied: {rates}", rates=", ".join(values)) if values else ""


def _rate(entry: Entry, lang: Language) -> str:
    """Return the learning rate that was set, or a search's grid and its choices."""
    if not entry.claim.rates:
        return str(entry.record["plan"]["settings"]["learning_rate"])
    grid = ", ".join(f"{rate:g}" for rate in entry.claim.rates)
    chosen = "; ".join(_choices(norm, entry) for norm in entry.record["plan"]["norms"])
    return lang.say("searched in {grid}; chosen: {chosen}", grid=grid, chosen=chosen)


def _choices(norm: str, entry: Entry) -> str:
    """Return a side's rate, with what else was varied where the rate hangs on it."""
    rates = {_variant(row, entry): f"{row['rate']:g}" for row in entry.rows if row["norm"] == norm}
    if len(set(rates.values())) < 2:
        return f"{norm} {next(iter(rates.values()), '?')}"
    return f"{norm} {', '.join(f'{rate} ({variant})' for variant, rate in rates.items())}"


def _variant(row: Mapping[str, Any], entry: Entry) -> str:
    names = dict.fromkeys(name for variant in entry.record["plan"]["variants"] for name, _ in variant)
    return ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in names)
