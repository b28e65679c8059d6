"""Folding in models whose code cannot be traced: block by block, and on recorded runs."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit
from normkit import fold
from normkit.anatomy import fingerprint, norm_layers
from normkit.errors import ArgumentError, SurgeryError

from .networks import randomize

IMAGES = torch.linspace(-1, 2, 2 * 3 * 6 * 5).reshape(2, 3, 6, 5).sin()


def relative(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


def ready(model):
    torch.manual_seed(1)
    return randomize(model).eval()


def folded(model, example=IMAGES, **settings):
    """Fold; the model is as before and the copy computes the same on the example and on another."""
    before = fingerprint(model)
    record = fold(model, example, **settings)
    assert fingerprint(model) == before
    assert record.verdict.exact <= 1e-9
    with torch.no_grad():
        assert relative(model(example), record.model(example)) <= 1e-5
    return record


def against(model, example=IMAGES, **settings):
    with pytest.raises(SurgeryError) as caught:
        fold(model, example, **settings)
    return str(caught.value)


class Block(nn.Module):
    def __init__(self, inputs=3, outputs=4):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return functional.leaky_relu(self.bn(self.conv(x)), 0.3)


class AsksForValues(nn.Module):
    """No trace goes through it; its blocks can be traced, and its own two layers are seen in the run."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = Block(), nn.ModuleList([Block(4, 4), Block(4, 4)])
        self.last, self.norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if float(x.detach().abs().max()) > 0:
                x = block(x) + x
        return self.norm(self.last(x))


def test_blocks_are_traced_one_by_one_and_the_rest_is_seen_in_runs():
    record = folded(ready(AsksForValues()))
    assert record.into == {
        "stem.bn": "stem.conv", "blocks.0.bn": "blocks.0.conv", "blocks.1.bn": "blocks.1.conv", "norm": "last",
    }  # fmt: skip
    assert record.known_from == {"stem.bn": "stem", "blocks.0.bn": "blocks.0", "blocks.1.bn": "blocks.1", "norm": None}
    said = str(record)
    assert "3 of 4 pairs stand in blocks that were traced one by one" in said
    assert "1 of 4 pairs were seen in 3 recorded runs alone (norm)" in said
    assert "twice the size and half the size" in said


class Head(nn.Module):
    """One head for several levels, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.head = Block(3, 3)

    def forward(self, x):
        levels = [x, functional.avg_pool2d(x, 2)]
        return [self.head(level) for level in levels]


def test_block_that_is_called_for_every_level_is_folded_once():
    model = ready(Head())
    record = fold(model, IMAGES)
    assert record.into == {"head.bn": "head.conv"}
    for first, second in zip(model(IMAGES), record.model(IMAGES), strict=True):
        assert relative(first.detach(), second.detach()) <= 1e-5


class OtherWay(nn.Module):
    """The traced code takes another way than the run: a stand-in is no tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if isinstance(x, torch.Tensor) else self.bn(y) + y


def test_what_another_way_through_the_code_needs_is_left():
    assert "its code gives the output of conv to 2 places" in against(ready(OtherWay()))


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
            self.scripted = torch.jit.script(nn.Sigmoid())

    def forward(self, x):
        if x.abs().sum() < 0:
            return x
        y = self.conv(x)
        return self.bn(y) * self.scripted(y)


def test_code_below_python_is_seen_to_read_a_tensor():
    assert "the output of conv has 2 consumers" in against(ready(Scripted()))


class Writes(nn.Module):
    """Writes in place into what the convolution gave, through a view, before the norm reads it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        y[:, 0] = 1.5
        return self.bn(y) if y.sum() > -1e9 else y


def test_tensor_that_is_written_before_the_norm_is_no_longer_the_convolutions():
    assert "the output of __setitem__ has 2 consumers" in against(ready(Writes()))


class Shared(nn.Module):
    def __init__(self, second):
        super().__init__()
        self.conv, self.bn, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), second

    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        return self.bn(self.conv(y)) if self.second else self.bn(self.conv(y).relu())


def test_pair_that_is_called_twice_together_is_folded_and_not_where_one_call_differs():
    assert folded(ready(Shared(True))).into == {"bn": "conv"}
    assert "its input comes from relu" in against(ready(Shared(False)))


class Passes(nn.Module):
    """A layer, something, a norm; or a norm, something, a layer."""

    def __init__(self, first, between, second):
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def conv():
    return nn.Conv2d(3, 4, 3)


WAYS = {
    "average pooling": (conv, nn.AvgPool2d(2), lambda: nn.BatchNorm2d(4), "second", "first"),
    "adaptive pooling": (conv, nn.AdaptiveAvgPool2d(2), lambda: nn.BatchNorm2d(4), "second", "first"),
    "dropout": (conv, nn.Dropout2d(0.5), lambda: nn.BatchNorm2d(4), "second", "first"),
    "mean": (conv, Called(lambda x: x.mean((2, 3))), lambda: nn.BatchNorm1d(4), "second", "first"),
    "pooled and flat": (
        conv, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), lambda: nn.BatchNorm1d(4), "second", "first",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(30, 7)), Called(lambda x: x.transpose(1, 2)),
        lambda: nn.BatchNorm1d(7), "second", "first.1",
    ),
    "resized": (
        conv, Called(lambda x: functional.interpolate(x, scale_factor=2)), lambda: nn.BatchNorm2d(4), "second", "first",
    ),
    "flat before linear": (
        lambda: nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(0.4), nn.Flatten()), lambda: nn.Linear(90, 4),
        "first", "second",
    ),
    "pooled before linear": (
        lambda: nn.BatchNorm2d(3), Called(lambda x: functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1)),
        lambda: nn.Linear(3, 4), "first", "second",
    ),
    "shuffled before convolution": (
        lambda: nn.BatchNorm2d(3), nn.PixelUnshuffle(1), lambda: nn.Conv2d(3, 4, 2), "first", "second",
    ),
    "reversed channels": (
        conv, Called(lambda x: x.flip(1)), lambda: nn.BatchNorm2d(4), "second", "first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_norm_reaches_its_neighbour_through(name):
    first, between, second, norm, layer = WAYS[name]
    model = ready(Passes(first(), between, second()))
    assert folded(model).into == {norm: layer}


BARRED = {
    "padding that counts": (conv, nn.AvgPool2d(3, padding=1), lambda: nn.BatchNorm2d(4), "channels do not stay"),
    "averaged channels": (
        lambda: nn.Conv2d(3, 5, 3), Called(lambda x: x.mean(1, keepdim=True)), lambda: nn.BatchNorm2d(1),
        "channels do not stay"),
    "positions as channels": (
        lambda: nn.Conv2d(3, 4, 3), nn.Flatten(), lambda: nn.BatchNorm1d(48), "several of its channels come from one"),
    "largest": (conv, nn.MaxPool2d(2), lambda: nn.BatchNorm2d(4), "its input comes from between (MaxPool2d)"),
    "dropout that drops": (
        conv, Called(lambda x: functional.dropout(x, 0.5, True)), lambda: nn.BatchNorm2d(4), "channels do not stay"),
}  # fmt: skip


@pytest.mark.parametrize("name", BARRED)
def test_norm_does_not_pass_through(name):
    first, between, second, why = BARRED[name]
    assert why in against(ready(Passes(first(), between, second())))


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        torch._assert(tuple(x.shape) == (2, 3, 6, 5), "one size")
        return self.bn(self.conv(x))


def test_model_of_one_size_is_verified_on_it_and_the_record_says_so():
    record = folded(ready(OneSize()))
    assert "on the size of the example alone" in str(record)


def test_weights_that_are_computed_are_refused_with_the_cure_and_the_others_folded():
    def build(wrapped):
        return ready(nn.Sequential(Block(), wrapped, nn.BatchNorm2d(5)))

    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Conv2d(4, 5, 1))
    record = folded(build(old))
    assert record.touched == ("0.bn",)
    assert "remove_weight_norm" in record.refused["2"]
    new = folded(build(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 1))))
    assert "remove_parametrizations" in new.refused["2"]
    assert str(new).startswith("fold: in part: 1 of 2 layers touched")


def test_wrapped_models_are_served_and_programs_refused():
    model = ready(Block())
    record = fold(nn.DataParallel(model), IMAGES)
    assert record.into == {"bn": "conv"}
    assert "the model inside DataParallel was taken" in str(record)
    with pytest.warns((DeprecationWarning, FutureWarning), match="trace"):
        traced = torch.jit.trace(model, IMAGES)
    with pytest.raises(ArgumentError, match=r"ScriptModule.*give the torch\.nn\.Module"):
        fold(traced, IMAGES)
    with pytest.raises(ArgumentError, match="exported program"):
        fold(torch.export.export(model, (IMAGES,)), IMAGES)


def test_wrong_pairs_are_found_by_halving_and_the_others_kept(monkeypatch):
    module = sys.modules["normkit.surgery.fold_build"]
    original, judged = module.absorb_after, []

    def wrong_in_one_place(layer, affine, axis=None):
        original(layer, affine, axis)
        if layer.out_channels == 7:
            layer.bias.data[0] += 1e-4

    def counted(self, changed, exactly=None, sites=()):
        judged.append(1)
        return verdict(self, changed, exactly, sites)

    verdict = module.Judge.__call__
    monkeypatch.setattr(module, "absorb_after", wrong_in_one_place)
    monkeypatch.setattr(module.Judge, "__call__", counted)
    blocks = [
        Block(3, 4),
        *(Block(4, 4) for _ in range(5)),
        Block(4, 7),
        *(Block(7 if n == 0 else 4, 4) for n in range(5)),
    ]
    model = ready(nn.Sequential(*blocks))
    record = fold(model, IMAGES)
    assert len(record.touched) == 11
    assert list(record.refused) == ["6.bn"]
    assert "with it folded, it changes the output by" in record.refused["6.bn"]
    assert len(judged) <= 13  # one for all, one for an unchanged copy, two for each halving, one for the result
    assert norm_layers(record.model)[0].path == "6.bn"


class Counts(nn.Module):
    """Every copy computes something else than the one before."""

    made = 0

    def __init__(self):
        super().__init__()
        self.block = Block()

    def __deepcopy__(self, memo):
        new = Counts()
        new.block = copy.deepcopy(self.block, memo)
        Counts.made += 1
        new.number = Counts.made
        return new.eval()

    def forward(self, x):
        return self.block(x) + getattr(self, "number", 0)


def test_model_that_differs_from_its_own_copy_is_refused():
    assert "an unchanged copy of the model differs from it" in against(ready(Counts()))


class HasAnAside(nn.Module):
    """As networks with an auxiliary classifier, which only training calls."""

    def __init__(self):
        super().__init__()
        self.main, self.aside = Block(), Block()

    def forward(self, x):
        return (self.main(x), self.aside(x)) if self.training else self.main(x)


def test_layers_that_the_example_does_not_reach_are_left():
    record = folded(ready(HasAnAside()))
    assert record.touched == ("main.bn",)
    assert "the example does not reach it" in record.refused["aside.bn"]


def test_pair_behind_a_dead_output_is_judged_at_its_own_place(monkeypatch):
    module = sys.modules["normkit.surgery.fold_build"]
    original = module.absorb_after

    def wrong(layer, affine, axis=None):
        original(layer, type(affine)(affine.scale * 1.01, affine.shift), axis)

    class Dead(nn.Module):
        def forward(self, x):
            return (x - 1e6).relu()

    model = ready(nn.Sequential(Block(), Dead()))
    assert not model(IMAGES).any()
    assert folded(nn.Sequential(model[0])).touched == ("0.bn",)
    monkeypatch.setattr(module, "absorb_after", wrong)
    assert "both are computed in float64" in against(model)


class LikeLevit(nn.Module):
    """A norm over positions and samples together, as LeViT has it; what lends its shape is no consumer."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 7), nn.BatchNorm1d(7)

    def forward(self, x):
        y = self.linear(x.flatten(1, 2))
        return self.bn(y.flatten(0, 1)).reshape_as(y)


def test_tensor_that_only_lends_its_shape_has_no_consumer_there():
    record = folded(ready(LikeLevit()))
    assert record.into == {"bn": "linear"}
    assert record.known_from == {"bn": ""}


class AsksItsNorm(nn.Module):
    """Its code reads what the norm stores."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.other, self.last = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x)) * self.norm.running_var.mean()
        return self.last(self.other(y))


def test_a_norm_whose_state_the_code_reads_is_left_and_the_others_are_folded():
    torch.manual_seed(0)
    model = AsksItsNorm()
    normkit.recalibrate(model, torch.randn(64, 3, 9, 9))
    record = normkit.fold(model.eval(), torch.randn(2, 3, 9, 9))
    assert record.into == {"last": "other"}
    assert "running_var" in record.refused["norm"]


def test_a_part_that_is_compiled_is_folded_as_the_code_that_it_was():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), torch.compile(part, backend="eager"), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )
    x = torch.randn(4, 3, 9, 9)
    normkit.recalibrate(model, x)
    record = normkit.fold(model.eval(), x)
    assert len(record.into) == 2
    with torch.no_grad():
        torch.testing.assert_close(record.model(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [None, "far", torch.ones(2)])
def test_a_comparison_that_gives_no_number_is_told(given):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ArgumentError, match="compare= gave a"):
        normkit.fold(model, torch.randn(2, 3, 9, 9), compare=lambda first, second: given)


def test_a_model_on_the_meta_device_is_refused_in_words():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 9, 9)
    for call in (
        lambda: normkit.fold(model, x),
        lambda: normkit.diagnose(model),
        lambda: normkit.diagnose(model, x),
        lambda: normkit.recalibrate(model, x),
        lambda: normkit.freeze(model),
        lambda: normkit.repair(model),
        lambda: normkit.convert(model, "normkit", x),
        lambda: normkit.watch(model).__enter__(),
    ):
        with pytest.raises(ArgumentError, match=r"0.weight is on the meta device .*to_empty"):
            call()
    assert type(normkit.convert(model, "normkit").model[1]) is normkit.BatchNorm2d
