"""What the table of verdicts says as a whole: how many of each word, by kind, and how sure all of them are together."""

import re
from collections import Counter
from collections.abc import Sequence

from ..lab.ledger import Entry
from ..lab.sequential import LOOKS
from ..lab.verdicts import OUTCOMES, Verdict
from .language import ENGLISH, Language, confidence, signed

__all__ = ["counted", "family", "in_one_sentence", "needed", "number"]

DECIDED = OUTCOMES[:3]


_SENTENCES = {
    "supported": "With {seeds} seeds the whole interval, {low} to {high}, lies on the claim's side of the line.",
    "refuted": "With {seeds} seeds the whole interval, {low} to {high}, lies on the other side of the line.",
    "no difference worth having": "With {seeds} seeds the whole interval, {low} to {high}, lies inside the band that "
    "was set beforehand.",
    "inconclusive": "With {seeds} seeds the interval, {low} to {high}, still holds the line.",
}


def counted(entries: Sequence[Entry], lang: Language = ENGLISH) -> tuple[str, ...]:
    """Return one sentence for the empirical claims and one for the formulas: how many of each word."""
    sentences = []
    for kind, words in (
        ("empirical", lang.say("Claims put to the test on {data}: ", data=_data(entries))),
        ("formula", lang.say("Formulas checked: ")),
    ):
        mine = [entry for entry in entries if entry.claim.kind == kind]
        counts = Counter(entry.verdict.verdict for entry in mine)
        listed = lang.say(", ").join(
            f"{counts[outcome]} {lang.say(outcome)}" for outcome in OUTCOMES if counts[outcome]
        )
        if mine:
            sentences.append(f"{words}{listed}{lang.say('.')}")
    return tuple(sentences)


def family(entries: Sequence[Entry], lang: Language = ENGLISH) -> str:
    """Return what the whole table promises: each verdict's error, and which verdicts stand for all at once."""
    decided = [entry for entry in entries if entry.verdict.verdict in DECIDED]
    stand = [entry.claim.number for entry in decided if entry.verdict.stands_among(len(entries))]
    return lang.say(
        "Each verdict is wrong with a probability of 5 % at most, over all its looks (at {looks} seeds, each with an "
        "interval of {confidence}). Of {decided} verdicts that decide, {stand} stand at a level that keeps 5 % for the "
        "whole table: {numbers}.",
        looks=", ".join(map(str, LOOKS)),
        confidence=confidence(),
        decided=len(decided),
        stand=len(stand),
        numbers=", ".join(stand) or lang.say("none"),
    )


def needed(verdict: Verdict, lang: Language = ENGLISH) -> str:
    """Return how many seeds an inconclusive verdict would need, or why it is not testable; else nothing."""
    failing = verdict.failing
    if verdict.verdict == "not testable here" and failing is not None:
        side = lang.say(failing.rule.direction)
        measured = "" if failing.effect is None else signed(failing.effect)
        return lang.say(
            "The premise is not shown: {what} ({measured}; its interval should lie {side} {line}).",
            what=lang.prose(failing.rule.effect),
            measured=measured,
            side=side,
            line=f"{failing.rule.line:g}",
        )
    if verdict.verdict != "inconclusive":
        return ""
    if verdict.primary.note:
        return lang.say("Nothing is decided: {note}.", note=lang.label(verdict.primary.note))
    if verdict.needs is None:
        return lang.say("No number of seeds would decide it: the effect lies on the line.")
    return lang.say(
        "An effect of the size measured would be shown by {needs} seeds, with a power of 80 %.", needs=verdict.needs
    )


def in_one_sentence(entry: Entry, lang: Language = ENGLISH) -> str:
    """Return what a verdict means, in the claim's own words; where these are not translated, what its interval says."""
    verdict, primary = entry.verdict.verdict, entry.verdict.primary
    if lang is ENGLISH:
        return re.split(r"(?<=[.;])\s", entry.claim.means(verdict))[0].rstrip(";").rstrip(".") + "."
    if (said := lang.prose(entry.claim.means(verdict))) != entry.claim.means(verdict):
        return re.split("[。；]", said)[0] + "。"
    if verdict == "not testable here" or primary.low is None or primary.high is None:
        return needed(entry.verdict, lang)
    return lang.say(_SENTENCES[verdict], low=signed(primary.low), high=signed(primary.high), seeds=primary.seeds)


def number(value: float | None, lang: Language = ENGLISH) -> str:
    """Return a number of the lines on what was reproduced."""
    return lang.say("not run") if value is None else f"{value:.4g}"


def _data(entries: Sequence[Entry]) -> str:
    return ", ".join(dict.fromkeys(entry.record["plan"]["data"] for entry in entries))
