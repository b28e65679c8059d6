"""What would steer a terminal is shown, in every text that names from files reach."""

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError
from normkit.printable import printable

HOSTILE = {
    "escape": ("\x1b[31m", r"\x1b[31m"),
    "title": ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
    "backspace": ("a\b", r"a\x08"),
    "return": ("a\rb", r"a\rb"),
    "eight bits": ("\x9b2J", r"\x9b2J"),
    "right to left": ("\u202ecba", r"\u202ecba"),
    "isolate": ("\u2066x\u2069", r"\u2066x\u2069"),
    "no width": ("a\u200bb", r"a\u200bb"),
    "line": ("a\u2028b", r"a\u2028b"),
    "half a letter": ("\udcff", r"\udcff"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_steers_is_shown(name):
    text, shown = HOSTILE[name]
    assert printable(f"x{text}y\n") == f"x{shown}y\n"
    assert str(ArgumentError(text)) == shown
    assert str(ArgumentError(text).args[0]) == text


def test_words_of_every_language_stay():
    text = "批归一化 naïve Ωμέγα עברית 😀\tx\n"
    assert printable(text) == text
    assert printable("a\nb", keep="") == r"a\nb"


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_layers_are_shown(name):
    text, shown = HOSTILE[name]
    key = f"{text}\nhealthy"
    model = nn.Module()
    model.add_module(key, nn.BatchNorm1d(3))
    model.forward = lambda x: model._modules[key](x)
    model(torch.randn(8, 3))
    state = {f"{key}.running_mean": torch.zeros(3), f"{key}.running_var": torch.full((3,), -1.0)}
    for said in (
        str(normkit.diagnose(state)),
        str(normkit.explain(model, torch.randn(8, 3))),
        str(normkit.freeze(model)),
    ):
        assert rf"{shown}\nhealthy" in said
        assert text not in said
        assert "\nhealthy" not in said
