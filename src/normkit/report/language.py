"""The reports' languages. English stands in the code; another language is two tables of translations beside it.

One holds the words of the reports themselves, the other those of the claims, sentence by sentence. A text of which a
sentence is missing stays English as a whole.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files

from ..errors import ArgumentError
from ..lab.charts import Chart
from ..lab.claim import Claim
from ..lab.sequential import LEVEL
from ..lab.verdicts import Answer, Rule
from ..spelling import alternatives

__all__ = [
    "ENGLISH", "LANGUAGES", "Language", "confidence", "effect_in_words", "language",
    "note_in_words", "rule_in_words", "signed", "text_of",
]  # fmt: skip

LANGUAGES = ("en", "zh")
_SENTENCE_ENDS = re.compile(r"(?<=[.])\s+(?=[A-Z0-9])")


@dataclass(frozen=True, kw_only=True)
class Language:
    """The words of one language.

    Attributes:
        code: its code in HTML.
        words: translations by the English words; what is missing stays English.
        titles: the claims' titles by the claims' ids.
        sentences: the sentences of claims.
        labels: the words of figures and tables; a key may hold ``{name}`` for words that change with the results, and
            ``{n}``, a single letter, for numbers.
        sources: what joins the names of sources, as regular expressions, replaced one after the other.
    """

    code: str
    words: Mapping[str, str] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    sentences: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def say(self, english: str, **values: object) -> str:
        """Return these words in this language, with values in the places of their names.

        >>> language("zh").say("{count} seeds", count=5)
        '5 个种子'
        """
        return self.words.get(english, english).format(**values) if values else self.words.get(english, english)

    def title(self, claim: Claim) -> str:
        """Return the claim's title."""
        return self.titles.get(claim.id, claim.title)

    def prose(self, english: str) -> str:
        """Return a text of a claim in this language, or as it is where one of its sentences is not translated.

        >>> language("zh").prose("The test data have no part in it. Nothing is trained.")
        '测试数据不参与选择。不训练任何网络。'
        """
        # Only what is a whole sentence may fit a key with places: a part of one fits a figure's words by chance.
        found = [
            self.sentences.get(sentence) or (self._fitting(sentence) if sentence.endswith(".") else None)
            for sentence in _SENTENCE_ENDS.split(english)
        ]
        known = [sentence for sentence in found if sentence is not None]
        return "".join(known) if len(known) == len(found) and self.sentences else english

    def label(self, english: str) -> str:
        """Return the words of a figure or a table in this language, or as they are.

        >>> language("zh").label("with batch norm"), language("zh").label("0.9000 ± 0.0010")
        ('有批归一化', '0.9000 ± 0.0010')
        """
        return self.labels.get(english) or self._fitting(english) or english

    def source(self, english: str) -> str:
        """Return where a claim comes from: papers keep their names.

        >>> language("zh").source("Wu and He 2018, arXiv:1803.08494, section 4.1, table 2; repeated in the source S2")
        'Wu and He 2018, arXiv:1803.08494, 第 4.1 节, 表 2; 又见于来源 S2'
        """
        for form, said in self.sources.items():
            english = re.sub(form, lambda found, said=said: _filled(found, said), english)  # type: ignore[misc]
        return english

    def covers(self, claim: Claim) -> bool:
        """Return whether all of a claim's own words are translated."""
        rules = (claim.question, *claim.premises, *claim.details)
        texts = [claim.statement, claim.prediction, claim.settings_rule, *claim.meaning.values()]
        texts += [rule.effect for rule in rules] + [rule.unit for rule in rules if rule.unit]
        return not self.sentences or all(self.prose(text) != text or not re.search("[a-z]{3}", text) for text in texts)

    def _fitting(self, english: str) -> str | None:
        """Return the translation of a key with places that these words fit, its places filled.

        A sentence fits sentences only. Of several keys it is the one that has most words of its own.
        """
        for form, said in _patterns(self.code).items():
            if form.pattern.endswith(".") == english.endswith(".") and (found := form.fullmatch(english)):
                return said.format(**{name: self.label(value) for name, value in found.groupdict().items()})
        return None


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
    claims = tomllib.loads((files("normkit.report") / "languages" / f"{code}-claims.toml").read_text(encoding="utf-8"))
    return Language(code=code, words=table["words"], titles=table["titles"], **claims)


@lru_cache
def _patterns(code: str) -> Mapping[re.Pattern[str], str]:
    """Return a language's keys with places as regular expressions, those with most words of their own first."""
    labels = language(code).labels if code != ENGLISH.code else {}
    keys = sorted((key for key in labels if "{" in key), key=lambda key: len(re.sub(r"{\w+}", "", key)), reverse=True)
    return {re.compile(re.sub(r"\\{(\w)(\w*)\\}", _place, re.escape(key))): labels[key] for key in keys}


def _place(found: re.Match[str]) -> str:
    """Return what a place takes: numbers where its name is one letter, else whatever stands there."""
    return f"(?P<{found[1]}{found[2]}>{'.+?' if found[2] else '[-+0-9.,%±e ]+?'})"


def _filled(found: re.Match[str], said: str) -> str:
    r"""Return a translation with the groups of a match in the places \1, \2 and so on; none for a group left out."""
    return re.sub(r"\\(\d)", lambda place: found[int(place[1])] or "", said)


def effect_in_words(part: Answer, lang: Language = ENGLISH) -> str:
    """Return an effect with its interval and the number of seeds.

    >>> from normkit.lab.verdicts import Rule, single
    >>> rule = Rule(effect="gain", unit="nats", direction="above", line=0.0)
    >>> effect_in_words(single(rule, {0: 2.0, 1: 3.0}).answer([0, 1], level=0.05))
    '+2.5000 nats (interval -3.8531 to +8.8531, 2 seeds)'
    """
    if part.effect is None:
        return lang.say("no number: {note}", note=lang.label(part.note))
    effect = f"{signed(part.effect)}{f' {lang.prose(part.rule.unit)}' if part.rule.unit else ''}"
    one, many = lang.say("{count} seed", count=part.seeds), lang.say("{count} seeds", count=part.seeds)
    seeds = one if part.seeds == 1 else many
    if part.low is None or part.high is None:
        note = lang.label(part.note)
        return lang.say("{effect} ({seeds}; no interval: {note})", effect=effect, seeds=seeds, note=note)
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
    effect = f"{rule.effect[0].upper()}{rule.effect[1:]}" if lang is ENGLISH else lang.prose(rule.effect)
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


def note_in_words(note: str, lang: Language = ENGLISH) -> str:
    """Return what stands below a table, sentence by sentence; as it is where a sentence is not translated.

    >>> note_in_words("Mean ± standard deviation over seeds. Rates tried: 0.1, 0.3.", language("zh"))
    '各种子的平均 ± 标准差。试过的学习率：0.1, 0.3。'
    """
    sentences = _SENTENCE_ENDS.split(note)
    said = [lang.label(sentence) for sentence in sentences]
    known = all(a != b for a, b in zip(said, sentences, strict=True))
    return "".join(said) if known else note


def text_of(chart: Chart, lang: Language = ENGLISH) -> str:
    """Return a chart's text alternative: its own, or in another language what its panels show, by name.

    The chart's own holds numbers in English sentences; in another language the table below has them.
    """
    if lang is ENGLISH:
        return chart.text
    panels = lang.say("; ").join(lang.label(panel.title) for panel in chart.panels)
    return lang.say(
        "{title}. Panels: {panels}. The table has the numbers.", title=lang.label(chart.title), panels=panels
    )
