"""The reports' languages. English stands in the code; another language is a table of translations beside it."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files

from ..errors import ArgumentError
from ..lab.claim import Claim
from ..lab.sequential import LEVEL
from ..lab.verdicts import Answer, Rule
from ..spelling import alternatives

__all__ = ["ENGLISH", "LANGUAGES", "Language", "confidence", "effect_in_words", "language", "rule_in_words", "signed"]

LANGUAGES = ("en", "zh")


@dataclass(frozen=True, kw_only=True)
class Language:
    """The words of one language.

    Attributes:
        code: its code in HTML.
        words: translations by the English words; what is missing stays English.
        titles: the claims' titles by the claims' ids.
    """

    code: str
    words: Mapping[str, str] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)

    def say(self, english: str, **values: object) -> str:
        """Return these words in this language, with values in the places of their names.

        >>> language("zh").say("{count} seeds", count=5)
        '5 个种子'
        """
        return self.words.get(english, english).format(**values) if values else self.words.get(english, english)

    def title(self, claim: Claim) -> str:
        """Return the claim's title."""
        return self.titles.get(claim.id, claim.title)


ENGLISH = Language(code="en")


@lru_cache
def language(code: str) -> Language:
    """Return a language by its code.

    Raises:
        ArgumentError: it is not one of `LANGUAGES`.
    """
    if code not in LANGUAGES:
        raise ArgumentError(f"--lang {code}: unknown language; {alternatives(code, LANGUAGES)}")
    if code == ENGLISH.code:
        return ENGLISH
    table = tomllib.loads((files("normkit.report") / "languages" / f"{code}.toml").read_text(encoding="utf-8"))
    return Language(code=code, words=table["words"], titles=table["titles"])


def effect_in_words(part: Answer, lang: Language = ENGLISH) -> str:
    """Return an effect with its interval and the number of seeds.

    >>> from normkit.lab.verdicts import Rule, single
    >>> rule = Rule(effect="gain", unit="nats", direction="above", line=0.0)
    >>> effect_in_words(single(rule, {0: 2.0, 1: 3.0}).answer([0, 1], level=0.05))
    '+2.5000 nats (interval -3.8531 to +8.8531, 2 seeds)'
    """
    if part.effect is None:
        return lang.say("no number: {note}", note=part.note)
    effect = f"{signed(part.effect)}{f' {part.rule.unit}' if part.rule.unit else ''}"
    one, many = lang.say("{count} seed", count=part.seeds), lang.say("{count} seeds", count=part.seeds)
    seeds = one if part.seeds == 1 else many
    if part.low is None or part.high is None:
        return lang.say("{effect} ({seeds}; no interval: {note})", effect=effect, seeds=seeds, note=part.note)
    low, high = signed(part.low), signed(part.high)
    return lang.say(
        "{effect} (interval {low} to {high}, {seeds})", effect=effect, low=low, high=high, seeds=seeds
    )  # fmt: skip


def rule_in_words(rule: Rule, lang: Language = ENGLISH) -> str:
    """Return the rule in one sentence.

    >>> rule_in_words(Rule(effect="gain", unit="", direction="above", line=0.5), language("zh"))
    'gain：区间整个高于 0.5 则成立，整个低于它则不成立，其余情况无法判断。'
    """
    other = "below" if rule.direction == "above" else "above"
    sentence = (
        f"supported if its whole interval lies {rule.direction} {{line}}, refuted if it lies {other}, inconclusive "
        "otherwise."
    )
    band = ""
    if rule.band is not None:
        low, high = (f"{end:g}" for end in rule.band)
        band = lang.say(
            "no difference worth having if its whole interval lies inside {low} to {high}; ", low=low, high=high
        )
    kinds = {
        "t": "",
        "share": lang.say("(exact interval of a share of seeds) "),
        "sign": lang.say("(sign test over the seeds in which the sides differ) "),
    }
    effect = f"{rule.effect[0].upper()}{rule.effect[1:]}" if lang is ENGLISH else rule.effect
    colon = ": " if lang is ENGLISH else "："
    return f"{effect}{colon}{kinds[rule.kind]}{band}{lang.say(sentence, line=f'{rule.line:g}')}"


def confidence() -> str:
    """Return the confidence of every interval, in percent.

    >>> confidence()
    '98.5 %'
    """
    return f"{100 * (1 - LEVEL):g} %"


def signed(number: float) -> str:
    """Return the number with its sign and four digits, also where it is so small that four decimals show none."""
    return f"{number:+.4f}" if number == 0 or abs(number) >= 0.001 else f"{number:+.1e}"
