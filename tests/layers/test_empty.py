"""Inputs without values, over the whole catalog: an output of that shape, gradients of zero, and nothing moves."""

import copy
import itertools

import pytest
import torch
from torch import nn

import normkit
from normkit import functional
from normkit.errors import NormkitError, ShapeError
from normkit.layers.catalog import METHODS
from torch_versions import GROUP_NORM_REFUSES_NO_POSITIONS, NO_POSITIONS

# Every zero but that of the channels, which have no layer.
TAILS = {0: [()], 1: [(4,), (0,)], 2: [(4, 5), (0, 5), (4, 0), (0, 0)], 3: [(2, 3, 4), (0, 3, 4), (2, 3, 0)]}
LAYERS = {
    **{f"{row.name}, {d}": (lambda row=row, d=d: row.build(6, d), d) for row in METHODS for d in row.layers},
    "instance, tracked": (lambda: normkit.InstanceNorm2d(6, affine=True, track_running_stats=True), 2),
    "batch act": (lambda: normkit.BatchNormAct2d(6), 2),
    "average of all": (lambda: normkit.BatchNorm2d(6, momentum=None), 2),
    "whitening, groups": (lambda: normkit.WhiteningBatchNorm2d(6, num_groups=2, iterations=3), 2),
}


def shapes(dimensions: int):
    for samples, tail in itertools.product((0, 1, 3), TAILS[dimensions]):
        if samples == 0 or 0 in tail:
            yield (samples, 6, *tail)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_is_empty_gradients_are_zero_and_nothing_moves(name, training):
    make, dimensions = LAYERS[name]
    for shape, recorded in itertools.product(shapes(dimensions), (True, False)):
        layer = make().train(training)
        kept = copy.deepcopy(layer.state_dict())
        x = torch.zeros(shape, requires_grad=recorded)
        with torch.set_grad_enabled(recorded):
            y = layer(x)
        assert y.shape == x.shape
        assert y.dtype is x.dtype
        if recorded:
            leaves = [x, *layer.parameters()]
            for value, gradient in zip(leaves, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True):
                assert torch.equal(gradient, torch.zeros_like(value)), f"{shape}: {gradient}"
        for key, value in layer.state_dict().items():
            assert torch.equal(value, kept[key]), f"{shape} moved {key}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm", "LayerNorm", "RMSNorm", "LocalResponseNorm"]
)
def test_what_torch_takes_is_taken_or_refused_in_words(name, training):
    given = {"GroupNorm": (3, 6), "LayerNorm": ((4, 5),), "RMSNorm": ((4, 5),), "LocalResponseNorm": (3,)}
    for zeros in itertools.product((0, 1), repeat=4):
        shape = tuple(0 if zero else size for zero, size in zip(zeros, (2, 6, 4, 5), strict=True))
        ours, theirs = (getattr(library, name)(*given.get(name, (6,))).train(training) for library in (normkit, nn))
        x = torch.randn(shape)
        try:
            y = ours(x)
        except NormkitError:
            if shape[1]:
                with pytest.raises((RuntimeError, ValueError)):
                    theirs(x)
            continue
        assert y.shape == shape
        if name == "GroupNorm" and 0 in shape[2:] and GROUP_NORM_REFUSES_NO_POSITIONS:
            with pytest.raises(RuntimeError, match=NO_POSITIONS):
                theirs(x)
        else:
            assert theirs(x).shape == shape


def test_no_channels_are_refused_in_words():
    for make, dimensions in LAYERS.values():
        layer = make()
        if isinstance(layer, normkit.LocalResponseNorm):
            continue  # a window over no channels is empty, as in torch
        with pytest.raises(ShapeError, match=r"no channels|expected input with shape|expected 6 channels"):
            layer(torch.zeros(2, 0, *TAILS[dimensions][0]))


def test_a_batch_whose_mask_is_all_false_gives_gradients_of_zero():
    layer = normkit.MaskedBatchNorm1d(3)
    kept, x = copy.deepcopy(layer.state_dict()), torch.randn(2, 3, 4, requires_grad=True)
    y = layer(x, torch.zeros(2, 4, dtype=torch.bool))
    leaves = [x, *layer.parameters()]
    for value in [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]:
        assert not value.any()
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


def test_a_style_without_positions_has_no_mean_to_give():
    layer = normkit.AdaptiveInstanceNorm(3)
    kept = copy.deepcopy(layer.state_dict())
    for call in (lambda s: layer(torch.randn(2, 3, 4), s.expand(2, 3, 0)), layer.set_style):
        with pytest.raises(ShapeError, match="style has no positions"):
            call(torch.zeros(1, 3, 0))
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())
    assert layer(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5)).shape == (0, 3, 4)
    assert layer(torch.zeros(2, 3, 0), torch.randn(2, 3, 5)).shape == (2, 3, 0)


@pytest.mark.parametrize("call", [functional.weight_norm, functional.weight_standardization], ids=lambda f: f.__name__)
def test_weights_without_values_stay_empty(call):
    for shape in ((0, 3), (3, 0), (0, 3, 2)):
        v = torch.zeros(shape, requires_grad=True)
        length = (torch.ones(shape[0], *(1 for _ in shape[1:])),) if call is functional.weight_norm else ()
        w = call(v, *length)
        assert w.shape == shape
        w.sum().backward()
