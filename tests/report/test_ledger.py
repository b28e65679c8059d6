"""The ledger's other forms and its parts: Markdown, Chinese, the interval's picture, values over a figure."""

import base64
import dataclasses
import hashlib
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import normkit.report
from normkit.errors import ArgumentError
from normkit.lab.charts import Bars, Chart, Line, Panel, Table
from normkit.lab.claims import all_claims, get_claim
from normkit.lab.sequential import LEVEL
from normkit.lab.verdicts import OUTCOMES, Rule, conclude, single
from normkit.report.figures import inline_miniature, inline_panels
from normkit.report.language import ENGLISH, LANGUAGES, effect_in_words, language, rule_in_words
from normkit.report.markdown import ledger_table, render_markdown
from normkit.report.miniature import interval_picture
from normkit.report.page import render
from normkit.report.readout import MOST_POINTS
from normkit.report.settings import named_settings
from normkit.report.statement import counted, family, needed

from .test_page import HOSTILE, entry_of, rows_of

# What Chinese texts keep: names of code, of networks, data and functions, and the field's words that have no other.
KEPT_WORDS = {
    "epoch", "dropout", "gamma", "beta", "alpha", "eps", "sqrt", "var", "torch", "logits", "ghost", "digits", "decay",
    "sigmoid", "tanh", "ReLU", "log", "float", "Adam", "AdaIN", "LeNet", "AlexNet", "ResNet", "FashionMNIST",
    "ImageNet", "Wasserstein", "conv",
}  # fmt: skip
TEMPLATES = Path(normkit.report.__file__).parent / "templates"
# What `say("...")` is called with, in templates and code.
SAID = re.compile(r"say\(\s*([\"'])(.+?)\1[,)]")


def english_words(text):
    """Return the English words that a Chinese text holds besides names."""
    for claim in all_claims():
        text = text.replace(f"论断 {claim.id}", "").replace(f"、{claim.id}）", "")
    return {word for word in re.findall(r"[A-Za-z]{3,}", text) if re.search("[a-z]{2}", word)} - KEPT_WORDS


def part_of(values, direction="above", line=0.0, band=None):
    rule = Rule(effect="gain", unit="", direction=direction, line=line, band=band)
    return single(rule, dict(enumerate(values))).answer(range(len(values)), LEVEL)


def test_every_word_of_the_report_is_said_in_chinese():
    zh = language("zh")
    code = (TEMPLATES / "report.html.j2").read_text() + (TEMPLATES.parent / "language.py").read_text()
    code += "".join(
        (TEMPLATES.parent / name).read_text() for name in ("markdown.py", "settings.py", "statement.py", "readout.py")
    )
    said = {words for _, words in SAID.findall(code)}
    assert len(said) > 20
    assert said <= zh.words.keys()
    assert set(OUTCOMES) <= zh.words.keys()
    # Every place for a value is in the translation too.
    for english, chinese in zh.words.items():
        assert set(re.findall(r"{\w+}", english)) == set(re.findall(r"{\w+}", chinese)), english


def test_every_claim_is_said_in_chinese_as_a_whole():
    zh = language("zh")
    for claim in all_claims():
        assert zh.covers(claim), claim.id
        rules = (claim.question, *claim.premises, *claim.details)
        texts = [claim.statement, claim.prediction, claim.settings_rule, *claim.meaning.values()]
        texts += [text for rule in rules for text in (rule.effect, rule.unit)]
        for text in texts:
            assert not english_words(zh.prose(text)), (claim.id, text)
        # Papers keep their titles.
        joining = r"\b(sections?|figures?|tables?|repeated|sources?|abstract|whose|after|follows|on population)\b"
        assert not re.search(joining, zh.source(claim.source)), claim.id


def test_translations_keep_numbers_and_the_ends_of_sentences():
    zh = language("zh")
    for english, chinese in [*zh.words.items(), *zh.sentences.items(), *zh.labels.items()]:
        numbers = [sorted(re.findall(r"\d(?:[\d.,]*\d)?", text)) for text in (english, chinese)]
        assert numbers[0] == numbers[1], english
        assert english.endswith(".") == chinese.endswith("。"), english


def test_sentence_without_translation_leaves_its_text_whole_and_is_said_so():
    zh = language("zh")
    known = "Nothing is trained."
    assert zh.prose(known) == "不训练任何网络。"
    assert zh.prose(f"{known} Nothing of this is known.") == f"{known} Nothing of this is known."
    claim = dataclasses.replace(get_claim("convergence"), statement="Nothing of this is known.")
    assert not zh.covers(claim)
    assert "尚未译出" in render([entry_of(rows_of(), claim=claim)], zh)


def test_labels_keep_what_changes_and_translate_what_stands_in_it():
    zh = language("zh")
    assert zh.label("with group norm, Wu and He") == "有组归一化，Wu 和 He"
    assert zh.label("rate 0.25") == "学习率 0.25"
    assert zh.label(HOSTILE) == HOSTILE


@pytest.mark.parametrize(
    "english",
    [
        "Beside it: it is higher than without a norm, and lower than with two.",
        "test loss, with the norm, mates that change minus mates that stay",
    ],
)
def test_words_of_a_figure_do_not_stand_for_a_sentence_that_they_fit(english):
    # "{norm} norm, {dropout}" names a net in a figure.
    assert language("zh").prose(english) == english


def test_label_is_taken_from_the_key_that_has_most_of_its_words():
    # "rate {value}" fits too, and would leave half of it in English.
    assert language("zh").label("rate 0.2, decay 0.02") == "学习率 0.2，衰减 0.02"


def test_figures_of_a_chinese_page_have_chinese_words_and_values():
    chart = entry_of(rows_of()).shown[0]
    panels = [
        *chart.panels,
        Panel(title="<b>" * 30, x_label="epoch", y_label="accuracy", marks=[Line(label="chance", x=[1], y=[1])]),
    ]
    pictures = inline_panels(dataclasses.replace(chart, panels=panels), language("zh"))
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert all(
        words in pictures[0]
        for words in (">训练损失<", ">交叉熵<", ">有批归一化<", "有批归一化：0.8（0.8 到 0.8），在 epoch ")
    )
    assert not any("norm" in picture for picture in pictures)
    # A title of two lines becomes one.
    long = Panel(
        title="Time per training step, and test accuracy after the last epoch", x_label="", y_label="", marks=[]
    )
    (picture,) = inline_panels(dataclasses.replace(chart, panels=[long]), language("zh"))
    assert "每步训练的时间，与最后一个 epoch 之后的测试准确率" in picture
    assert "accuracy" not in picture


def test_every_claim_has_a_chinese_title():
    assert {claim.id for claim in all_claims()} <= language("zh").titles.keys()


@pytest.mark.parametrize("direction", ["above", "below"])
@pytest.mark.parametrize("kind", ["t", "share", "sign"])
def test_rules_are_said_in_both_languages(direction, kind):
    rule = Rule(effect="gain", unit="", direction=direction, line=0.5, band=(0.25, 0.75), kind=kind)
    assert rule_in_words(rule).startswith("Gain: ")
    assert f"lies {direction} 0.5" in rule_in_words(rule)
    assert ("exact" in rule_in_words(rule)) == (kind == "share")
    said = rule_in_words(rule, language("zh"))
    assert not re.search("[a-z]{3}", said.removeprefix("gain"))
    assert all(number in said for number in ("0.25", "0.75", " 0.5 "))


def test_effects_are_said_in_chinese_with_and_without_interval():
    assert effect_in_words(part_of([1.0, 1.0]), language("zh")) == "+1.0000（区间 +1.0000 到 +1.0000，2 个种子）"
    assert effect_in_words(part_of([1.0]), language("zh")).startswith("+1.0000（1 个种子；没有区间：")


def test_unknown_language_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="--lang fr: unknown language; known are: en, zh"):
        language("fr")


def test_page_in_chinese_says_so_and_keeps_the_numbers():
    page = render([entry_of(rows_of())], language("zh"))
    assert '<html lang="zh">' in page
    assert "成立" in page
    assert "前五个 epoch 的测试准确率更高" in page
    assert "尚未译出" not in page
    assert "+0.0520" in page
    several = render([entry_of(rows_of()), entry_of(rows_of())], language("zh"))
    assert '<option value="Batch normalization built from scratch">《从零实现批归一化》</option>' in several
    assert "\n\n**成立。** 在这份数据" in render_markdown([entry_of(rows_of())], language("zh"))


@pytest.mark.parametrize("code", LANGUAGES)
def test_markdown_has_the_table_then_a_section_per_claim(code):
    first = entry_of(rows_of())
    second = dataclasses.replace(first, claim=dataclasses.replace(first.claim, id="other", number="E9", title="Other"))
    text = render_markdown([first, second], language(code))
    table, *sections = re.split(r"\n## ", text)
    assert table.count("\n| E") == 2
    assert "(#other)" in table
    assert '<a id="other"></a>' in text
    assert len(sections) == 2
    for section in sections:
        assert "](figures/convergence.svg)" in section
        assert "normkit lab run" in section
        assert "+0.0520" in section
        # Every line of a table has the cells of its header.
        for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            assert len({line.count(" | ") for line in block.splitlines()}) == 1


def test_markdown_takes_hostile_words_for_words():
    table = Table(title=HOSTILE, header=["a|b"], rows=[[f"{HOSTILE}|\n# x"]], note="[a](javascript:b)")
    entry = entry_of(rows_of())
    text = render_markdown([dataclasses.replace(entry, shown=(*entry.shown, table))])
    assert not re.search(r"(?<!\\)<(script|img)", text)
    assert "\n# x" not in text
    assert r"a\|b" in text
    assert r"\[a\](javascript:b)" in text


def test_ledger_table_for_another_file_points_into_this_one():
    table = ledger_table([entry_of(rows_of())], ENGLISH, "docs/ledger/README.md")
    assert "(docs/ledger/README.md#convergence)" in table
    assert "(docs/ledger/figures/small-convergence.svg)" in table


@pytest.mark.parametrize(("direction", "side"), [("above", "right"), ("below", "left")])
def test_interval_picture_puts_the_bar_where_the_numbers_are(direction, side):
    root = ElementTree.fromstring(interval_picture(part_of([2.0, 3.0, 4.0], direction, line=1.5)))
    shapes = {shape.get("class"): shape for shape in root}
    line = float(shapes["threshold"].get("x1"))
    dot, low = float(shapes["dot"].get("cx")), float(shapes["bar"].get("x"))
    high = low + float(shapes["bar"].get("width"))
    assert low < dot < high
    # 3 ± 4.66: the line lies within.
    assert low < line < dot
    shaded = float(shapes["holds"].get("x"))
    assert shaded == (line if side == "right" else 0)
    assert "interval -1.6608 to +7.6608" in root.get("aria-label")


def test_interval_picture_shows_the_band_where_there_is_one():
    shapes = [shape.get("class") for shape in ElementTree.fromstring(interval_picture(part_of([1.0, 2.0])))]
    assert "band" not in shapes
    banded = interval_picture(part_of([1.0, 2.0], band=(-1.0, 1.0)))
    (band,) = [shape for shape in ElementTree.fromstring(banded) if shape.get("class") == "band"]
    assert float(band.get("width")) > 0


@pytest.mark.parametrize(
    ("values", "verdict", "reason"),
    [
        ([1.0, 2.0, 1.5, 1.4, 1.6], "supported", ""),
        ([0.1, -0.1, 0.2, -0.2, 0.1], "inconclusive", "would be shown by"),
        ([1.0] * 5, "inconclusive", "Nothing is decided: all seeds gave the same number"),
        ([1.0], "inconclusive", "Nothing is decided"),
    ],
)
def test_reason_says_the_power_that_is_missing(values, verdict, reason):
    rule = Rule(effect="gain", unit="", direction="above", line=0.0)
    found = conclude(single(rule, dict(enumerate(values))), compared="")
    assert found.verdict == verdict
    assert reason in needed(found)
    assert bool(reason) == bool(needed(found))


def test_reason_names_the_premise_that_is_not_shown():
    rule = Rule(effect="gain", unit="", direction="above", line=0.0)
    values = dict(enumerate([1.0, 2.0, 1.5, 1.4, 1.6]))
    premise = single(dataclasses.replace(rule, effect="help"), {seed: -value for seed, value in values.items()})
    found = conclude(single(rule, values), compared="", premises=[premise])
    assert needed(found).startswith("The premise is not shown: help (-1.5000; its interval should lie above 0)")


def test_table_as_a_whole_says_what_it_promises():
    entries = [entry_of(rows_of()), entry_of(rows_of())]
    assert counted(entries) == ("Claims put to the test on digits: 2 supported.",)
    formula = dataclasses.replace(entries[0], claim=dataclasses.replace(entries[0].claim, kind="formula"))
    assert len(counted([entries[0], formula])) == 2
    assert "Of 2 verdicts that decide, 2 stand at a level that keeps 5 % for the whole table: E1, E1." in family(
        entries
    )
    assert "98.5 %" in family(entries)


@pytest.mark.parametrize("values", [[], [1.0], [float("nan"), 1.0], [1.0, 1.0]])
def test_interval_picture_of_missing_numbers_is_sound(values):
    assert ElementTree.fromstring(interval_picture(part_of(values, line=1.0))) is not None


def test_values_lie_on_the_curve_and_say_what_they_are():
    line = Line(label="<a>", x=[0, 1, 2], y=[0, 10, 20], low=[0, 9, 19], high=[1, 11, 21])
    (panel,) = inline_panels(chart_of([line]))
    circles = [node for node in ElementTree.fromstring(panel).iter() if node.get("class") == "value"]
    places = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in circles]
    assert [circle[0].text for circle in circles] == [
        "<a>: 0 (0 to 1) at epoch 0", "<a>: 10 (9 to 11) at epoch 1", "<a>: 20 (19 to 21) at epoch 2"
    ]  # fmt: skip
    # The drawn curve goes through the same places.
    (drawn,) = [
        node.get("d") for node in ElementTree.fromstring(panel).iter() if "stroke: #d55e00" in node.get("style", "")
        and node.get("clip-path")
    ]  # fmt: skip
    ends = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", drawn)]
    assert ends == [pytest.approx(place, abs=0.11) for place in places]


def test_long_curves_have_few_values_with_both_ends():
    line = Line(label="a", x=range(1000), y=range(1000))
    (panel,) = inline_panels(chart_of([line]))
    words = re.findall(r"<title>(a: .*?)</title>", panel)
    assert len(words) == MOST_POINTS
    assert (words[0], words[-1]) == ("a: 0 at epoch 0", "a: 999 at epoch 999")


def test_bars_have_values():
    bars = [Bars(label=name, categories=["x", "y"], heights=[1, 2], low=[0.5, 1], high=[2, 3]) for name in "ab"]
    (panel,) = inline_panels(chart_of(bars))
    assert re.findall(r"<title>(.*?)</title>", panel) == [
        "a: 1 (0.5 to 2) at x", "a: 2 (1 to 3) at y", "b: 1 (0.5 to 2) at x", "b: 2 (1 to 3) at y"
    ]  # fmt: skip


def test_miniature_has_a_curve_and_no_words():
    miniature = inline_miniature(chart_of([Line(label="words", x=[0, 1], y=[0, 1])]))
    words = "".join(ElementTree.fromstring(miniature).itertext())
    assert re.sub(r"\*{.*?}", "", words).strip() == ""
    assert "#d55e00" in miniature


def test_only_the_page_s_own_script_may_run():
    page = render([entry_of(rows_of())])
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    allowed = re.search(r"script-src 'sha256-([^']+)'", page).group(1)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed
    assert page.count("script-src") == 1


def chart_of(marks):
    return Chart(name="c", title="t", panels=[Panel(title="p", x_label="epoch", y_label="y", marks=marks)], text="d")


def entry_with(variants=((),), rates=(), rows=(), sets=(), **settings):
    entry = entry_of(rows_of())
    plan = entry.record["plan"]
    plan = {**plan, "norms": ["none", "batch"], "variants": variants, "settings": {**plan["settings"], **settings}}
    claim = dataclasses.replace(entry.claim, rates=rates, sets=sets)
    return dataclasses.replace(entry, claim=claim, record={**entry.record, "plan": plan}, rows=rows)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"learning_rate": 0.002}, "0.002"),
        ({"variants": [[["rate", 0.1]], [["rate", 0.5]], [["rate", 0.1]]]}, "varied: 0.1, 0.5"),
        ({"sets": ("learning_rate",)}, "that of each variant"),
        (
            {
                "rates": (0.03, 0.3),
                "rows": [{"norm": "none", "rate": 0.03}, {"norm": "batch", "rate": 0.3}] * 2,
            },
            "searched in 0.03, 0.3; chosen: none 0.03; batch 0.3",
        ),
        (
            {
                "rates": (0.03, 0.3),
                "variants": [[["at_most", 1]], [["at_most", 2]]],
                "rows": [
                    {"norm": "none", "rate": 0.03, "at_most": 1}, {"norm": "none", "rate": 0.3, "at_most": 2},
                    {"norm": "batch", "rate": 0.3, "at_most": 1},
                ],
            },
            "searched in 0.03, 0.3; chosen: none 0.03 (at most 1), 0.3 (at most 2); batch 0.3",
        ),
        ({"rates": (0.03, 0.3)}, "searched in 0.03, 0.3; chosen: none ?; batch ?"),
    ],
)  # fmt: skip
def test_learning_rate_is_said_as_it_was_set_varied_or_searched(given, expected):
    assert dict(named_settings(entry_with(**given)))["learning rate"] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"weight_decay": 0.0}, "0.0"),
        ({"variants": [[["decay", 0.0]], [["decay", 0.01]]]}, "varied: 0, 0.01"),
        ({"sets": ("learning_rate", "weight_decay")}, "that of each variant"),
    ],
)
def test_weight_decay_is_said_as_it_was_set_or_varied(given, expected):
    assert dict(named_settings(entry_with(**{"weight_decay": 0.0, **given})))["weight decay"] == expected


def test_every_claim_that_trains_says_where_its_rate_comes_from():
    for claim in all_claims():
        varied = any(name == "rate" for variant in claim.variants for name, _ in variant)
        for settings in claim.settings.values():
            assert settings.optimizer == "none" or settings.learning_rate or claim.rates or varied or claim.sets, (
                claim.id
            )


def test_settings_of_training_are_left_out_where_nothing_is_trained():
    names = dict(named_settings(entry_with(optimizer="none")))
    assert names["optimizer"] == "none: no network is trained"
    assert not {"learning rate", "epochs", "momentum", "weight decay"} & names.keys()
    assert "momentum" in dict(named_settings(entry_with(optimizer="sgd")))
    assert "momentum" not in dict(named_settings(entry_with(optimizer="adam")))
