"""Other ways into a model's code than the one that its example takes: a fold keeps what they give, or is not made."""

import inspect
import re

import pytest
import torch
from torch import nn

import normkit
from normkit import fold
from normkit.errors import ArgumentError, SurgeryError

X = torch.linspace(-1, 1, 4 * 3 * 12 * 10).reshape(4, 3, 12, 10).mul(9).sin()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.n = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
        with torch.no_grad():
            for norm in (self.n, self.head[1]):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        self.eval()


class Switch(Pair):
    def forward(self, x, features=False):
        y = self.c(x)
        return y if features else self.head(self.n(y))


class Method(Pair):
    def features(self, x):
        return self.c(x)

    def forward(self, x):
        return self.head(self.n(self.features(x)))


class Behind(Pair):
    """The method holds the norm, and not the layer before it."""

    def classify(self, x):
        return self.head(self.n(x))

    def forward(self, x):
        return self.classify(self.c(x))


class Harmless(Pair):
    """Both ways take the norm behind the convolution."""

    def features(self, x, scale=2.0):
        return self.n(self.c(x)) * scale

    def forward(self, x, relu=True, mode="sum"):
        y = self.head(self.features(x))
        return y.relu() if relu else y

    def never_called(self, x):
        raise AssertionError


class Untraceable(Switch):
    def forward(self, x, features=False):
        y = super().forward(x, features)
        return y + 1 if float(x.sum()) > 1e9 else y


class InABlock(nn.Sequential):
    def __init__(self, block):
        super().__init__(nn.Conv2d(3, 3, 1), block)
        self.eval()


class Through(InABlock):
    """Calls the method from outside of its block."""

    def forward(self, x):
        block = self[1]
        return block.head(block.n(block.features(self[0](x))))


PARTED = [
    (Switch(), "n", r"what forward\(features=True\) gives", lambda m: m(X, features=True)),
    (Untraceable(), "n", r"what forward\(features=True\) gives", lambda m: m(X, features=True)),
    (Method(), "n", "what features gives", lambda m: m.features(X)),
    (Behind(), "n", "what classify gives", lambda m: m.classify(X.repeat(1, 3, 1, 1)[:, :8])),
    (InABlock(Switch()), "1.n", r"what 1\.forward\(features=True\) gives", lambda m: m[1](X, True)),
    (Through(Method()), "1.n", r"what 1\.features gives", lambda m: m[1].features(X)),
]


@pytest.mark.parametrize("call", [None, lambda model, batch: model(batch)], ids=["plain", "call"])
@pytest.mark.parametrize(("model", "norm", "words", "other"), PARTED, ids=lambda value: type(value).__name__)
def test_a_pair_that_another_way_shows_apart_is_not_folded(model, norm, words, other, call):
    record = fold(model, X, call=call)
    assert len(record.into) == 1  # the pair in the head
    assert list(record.refused) == [norm]
    assert re.search(words, record.refused[norm])
    torch.testing.assert_close(other(record.model), other(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(record.model(X), model(X), rtol=1e-5, atol=1e-5)


class Named(Method):
    def forward(this, x):
        return this.head(this.n(this.features(x)))


class Within(Method):
    def forward(self, x):
        return torch.cat([self.head(self.n(self.features(part))) for part in x.split(2)])


@pytest.mark.parametrize("block", [Method, Named, Within])
def test_a_method_that_only_its_own_block_calls_is_a_step_inside_and_told(block):
    """As torchvision's DenseNet calls ``bn_function``, which ends before the norm behind."""
    model = InABlock(block())
    record = fold(model, X)
    assert sorted(record.into) == ["1.head.1", "1.n"]
    assert "steps inside of blocks, which may give other values now: 1.features" in record.notes
    torch.testing.assert_close(record.model(X), model(X), rtol=1e-5, atol=1e-5)


def test_ways_that_keep_a_pair_together_are_told():
    model = Harmless()
    record = fold(model, X)
    assert sorted(record.into) == ["head.1", "n"]
    said = "\n".join(record.notes)
    assert "verified also by what these give: features, forward(relu=False)" in said
    assert "other values may take other ways, and were not tried: forward(mode='sum')" in said
    for other in (lambda m: m.features(X), lambda m: m(X, relu=False)):
        torch.testing.assert_close(other(record.model), other(model), rtol=1e-5, atol=1e-5)
    assert "features" not in vars(model)


def test_a_switch_that_cannot_be_set_is_told():
    class Fails(Switch):
        def forward(self, x, features=False):
            if features:
                raise NotImplementedError
            return super().forward(x)

    record = fold(Fails(), X)
    assert sorted(record.into) == ["head.1", "n"]
    assert any("not tried: forward(features=True), which fails" in note for note in record.notes)


def test_a_model_in_single_precision_alone_is_tried_likewise():
    class Single(Switch):
        def forward(self, x, features=False):
            return super().forward(x.float(), features)

    record = fold(Single(), X)
    assert list(record.refused) == ["n"]
    assert "what forward(features=True) gives" in record.refused["n"]


def test_a_model_that_writes_into_its_input_is_folded_and_the_example_stays():
    class Writes(Pair):
        def forward(self, x):
            x.sub_(1.0).div_(2.0)
            return self.head(self.n(self.c(x)))

    model, example = Writes(), X.clone()
    record = fold(model, example)
    assert sorted(record.into) == ["head.1", "n"]
    assert torch.equal(example, X)
    normkit.convert(model, "normkit", example)
    assert torch.equal(example, X)


@pytest.mark.parametrize("example", [X[:0], (X[:0],), {"x": X[:0]}])
def test_an_example_without_samples_shows_nothing(example):
    for operation in (fold, lambda model, example: normkit.convert(model, "normkit", example)):
        with pytest.raises(ArgumentError, match=r"the example holds no sample, but a tensor of shape \(0, 3, 12, 10\)"):
            operation(Method(), example)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf"), "a", True])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    for operation in (fold, lambda *given, **said: normkit.convert(given[0], "normkit", given[1], **said)):
        with pytest.raises(ArgumentError, match=r"tolerance=.*: a number is needed that is finite and not negative"):
            operation(Harmless(), X, tolerance=tolerance)


@pytest.mark.parametrize("tolerance", [1e-12, 0.0])
def test_a_tolerance_tightens_too(tolerance):
    model = Harmless()
    assert 1e-9 < fold(model, X).largest_change < 1e-5
    with pytest.raises(SurgeryError, match=f"tolerance={tolerance:.3g} is allowed: that is the model's own rounding"):
        fold(model, X, tolerance=tolerance)
    with pytest.raises(SurgeryError, match="should keep the function, and changes"):
        normkit.convert(model, "normkit", X, tolerance=tolerance)
    assert fold(model.double(), X.double(), tolerance=1e-12).largest_change < 1e-12


class AskedFor(Pair):
    """Asks for the signature of its own method before it calls it, as transformers' chunked forwards do."""

    def features(self, x):
        return self.n(self.c(x))

    def forward(self, x):
        assert len(inspect.signature(self.features).parameters) == 1
        return self.head(self.features(x))


def test_a_model_that_asks_for_the_signature_of_its_methods_is_folded():
    record = fold(AskedFor(), X)
    assert set(record.into) == {"n", "head.1"}
    assert "features" not in vars(record.model)


class Raw(Pair):
    def features(self, x, raw=False):
        return self.c(x) if raw else self.n(self.c(x))

    def forward(self, x):
        return self.head(self.features(x))


def test_a_setting_of_a_method_that_was_not_varied_is_named():
    assert any("not tried" in note and "features(raw=False)" in note for note in fold(Raw(), X).notes)


class TwoViews(nn.Module):
    """One norm behind two convolutions, each with the norm in a container of its own; the view chooses."""

    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        norm, layer = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3)
        norm.running_mean.normal_()
        if shared == "norm":
            self.a = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
            self.b = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
        else:
            self.a = nn.Sequential(layer, norm)
            self.b = nn.Sequential(layer, nn.ReLU())
        self.eval()

    def forward(self, x, view=0):
        return self.a(x) if view == 0 else self.b(x)


@pytest.mark.parametrize("shared", ["norm", "layer"])
def test_a_layer_that_a_container_holds_which_is_not_reached_stays(shared):
    with pytest.raises(SurgeryError, match=r"it stands in b \(Sequential\) too, which the example does not reach"):
        fold(TwoViews(shared), X)


def test_an_example_that_went_in_by_call_is_not_exported_as_if_it_went_in_alone(tmp_path):
    record = fold(Method(), [X, X], call=lambda m, batch: [m(x) for x in batch], where="head.*")
    with pytest.raises(ArgumentError, match="through call=, which a program does not hold"):
        record.export(tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
    assert record.export(tmp_path / "m.pt2", X).exists()
