"""Folding: right to 1e-5, or refused with the reason."""

import copy
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm

import normkit
from normkit import fold, freeze
from normkit.anatomy import fingerprint, norm_layers
from normkit.errors import ArgumentError, SurgeryError

from .nets import NETS
from .networks import Failure, failing, leaves, randomize


def relative(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


def torchs_fuse(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch about itself
        from torch.fx.experimental.optimization import fuse
    return fuse(model)


def ready(*layers):
    return randomize(nn.Sequential(*layers)).eval()


def reason(model, example, path):
    """Fold a model with one more pair that can be folded, and return why the named norm was not."""
    before = fingerprint(model)
    with pytest.raises(SurgeryError) as caught:
        fold(model, example, where=path)
    assert fingerprint(model) == before
    return str(caught.value)


IMAGE = (2, 6, 9, 8)
BEFORE = [
    (lambda: nn.Conv2d(6, 4, 3), IMAGE),
    (lambda: nn.Conv2d(6, 4, 3, padding=1, bias=False), IMAGE),
    (lambda: nn.Conv2d(6, 4, (3, 2), stride=2, padding="valid", dilation=2), IMAGE),
    (lambda: nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"), IMAGE),
    (lambda: nn.Conv2d(6, 4, 3, groups=2), IMAGE),
    (lambda: nn.Conv2d(6, 12, 3, groups=6), IMAGE),
    (lambda: nn.ConvTranspose2d(6, 4, 3), IMAGE),
    (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False), IMAGE),
    (lambda: nn.ConvTranspose2d(6, 12, 2, stride=2, groups=6), IMAGE),
    (lambda: nn.Conv1d(6, 4, 3), (2, 6, 9)),
    (lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), (2, 6, 9)),
    (lambda: nn.Conv3d(6, 4, 2), (2, 6, 4, 5, 3)),
    (lambda: nn.ConvTranspose3d(6, 4, 2), (2, 6, 4, 5, 3)),
    (lambda: nn.Linear(6, 4), (3, 6)),
    (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
]
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
OUR_NORMS = {2: normkit.BatchNorm1d, 3: normkit.BatchNorm1d, 4: normkit.BatchNorm2d, 5: normkit.BatchNorm3d}


def width_out(layer):
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@pytest.mark.parametrize("norms", [NORMS, OUR_NORMS], ids=["torch", "normkit"])
@pytest.mark.parametrize(("build", "shape"), BEFORE)
def test_norm_after_a_layer_becomes_part_of_it(build, shape, norms):
    layer = build()
    model = ready(layer, norms[len(shape)](width_out(layer)))
    example, other = torch.randn(shape), torch.randn(5, *shape[1:])
    before = fingerprint(model)
    record = fold(model, example)
    assert fingerprint(model) == before
    assert record.into == {"1": "0"}
    assert not norm_layers(record.model)
    assert relative(model(other), record.model(other)) <= 1e-5
    assert not torch.equal(model[0].weight, record.model[0].weight)


AFTER = [
    (lambda: nn.Conv2d(6, 4, 3), IMAGE),
    (lambda: nn.Conv2d(6, 4, 3, bias=False, stride=2, dilation=2), IMAGE),
    (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), IMAGE),
    (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), IMAGE),
    (lambda: nn.Conv2d(6, 4, 3, padding=2, padding_mode="replicate"), IMAGE),
    (lambda: nn.Conv2d(6, 4, 1, padding="same"), IMAGE),
    (lambda: nn.Conv2d(6, 4, 3, groups=2), IMAGE),
    (lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False), IMAGE),
    (lambda: nn.Conv1d(6, 4, 3), (2, 6, 9)),
    (lambda: nn.Conv3d(6, 4, 2), (2, 6, 4, 5, 3)),
    (lambda: nn.Linear(6, 4), (3, 6)),
    (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
]


@pytest.mark.parametrize(("build", "shape"), AFTER)
def test_norm_before_a_layer_becomes_part_of_it(build, shape):
    model = ready(nn.ReLU(), NORMS[len(shape)](6), build())
    other = torch.randn(5, *shape[1:])
    record = fold(model, torch.randn(shape))
    assert record.into == {"1": "2"}
    assert relative(model(other), record.model(other)) <= 1e-5


PADDED = [
    lambda: nn.Conv2d(6, 4, 3, padding=1),
    lambda: nn.Conv2d(6, 4, 3, padding="same", groups=2),
    lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
]


@pytest.mark.parametrize("build", PADDED)
def test_norm_before_zero_padding_is_refused_unless_its_shift_is_zero(build):
    model, example = ready(nn.BatchNorm2d(6), build()), torch.randn(IMAGE)
    assert "pads with zeros" in reason(model, example, "0")
    with torch.no_grad():
        model[0].running_mean.zero_()
        model[0].bias.zero_()
    record = fold(model, example)
    other = torch.randn(5, 6, 7, 11)
    assert relative(model(other), record.model(other)) <= 1e-5


BORDERS = [
    # (layer, the taps that cannot lie on padding)
    (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (slice(1, 2), slice(1, 2))),
    (lambda: nn.Conv2d(6, 4, 5, padding=1), (slice(1, 4), slice(1, 4))),
    (lambda: nn.Conv2d(6, 4, 3, padding=(1, 0), stride=2), (slice(1, 2), slice(0, 3))),
    (lambda: nn.Conv2d(6, 4, 3, padding=1, dilation=2), (slice(1, 2), slice(1, 2))),
    (lambda: nn.Conv2d(6, 4, (3, 1), padding="same", dilation=(2, 1)), (slice(1, 2), slice(0, 1))),
]


@pytest.mark.parametrize(("build", "inner"), BORDERS)
@pytest.mark.parametrize("by", ["filters", "channels"])
def test_zero_padding_that_sees_nothing_of_the_shift_does_not_hinder(build, inner, by):
    model, example = ready(nn.BatchNorm2d(6), build()), torch.randn(IMAGE)
    conv = model[1]
    with torch.no_grad():
        if by == "filters":
            kept = torch.zeros_like(conv.weight)
            kept[:, :, inner[0], inner[1]] = conv.weight[:, :, inner[0], inner[1]]
            conv.weight.copy_(kept)
        else:  # only one channel is shifted, and only the inner taps read it
            model[0].bias.copy_(model[0].running_mean * model[0].weight / (model[0].running_var + model[0].eps).sqrt())
            model[0].running_mean[1:], model[0].bias[1:] = 0, 0
            model[0].running_mean[0] += 1
            read = conv.weight[: conv.out_channels // conv.groups, 0].clone()
            conv.weight[: conv.out_channels // conv.groups, 0] = 0
            conv.weight[: conv.out_channels // conv.groups, 0, inner[0], inner[1]] = read[:, inner[0], inner[1]]
    record = fold(model, example)
    assert record.into == {"0": "1"}
    other = torch.randn(5, 6, 7, 11)
    assert relative(model(other), record.model(other)) <= 1e-5
    # One tap more that can lie on padding, and it is refused again.
    row = 0 if inner[0].start > 0 else -1
    column = 0 if inner[1].start > 0 else -1
    with torch.no_grad():
        conv.weight[0, 0, row, column] = 1
    assert "pads with zeros" in reason(model, example, "0")


def test_norm_without_affine_and_norm_without_bias_are_folded():
    for norm in (nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, bias=False)):
        model, example = ready(nn.Conv2d(6, 4, 3), norm), torch.randn(IMAGE)
        assert relative(model(example), fold(model, example).model(example)) <= 1e-5


def test_norms_in_a_row_and_through_dropout_and_identity_all_go():
    model = ready(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Identity(), nn.BatchNorm2d(4))
    example = torch.randn(IMAGE)
    record = fold(model, example)
    assert record.into == {"1": "0", "4": "0"}
    assert relative(model(example), record.model(example)) <= 1e-5


def test_norm_between_two_layers_and_norm_on_both_sides():
    model = ready(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3))
    example = torch.randn(IMAGE)
    record = fold(model, example)
    assert record.into == {"0": "1", "2": "1"}
    assert relative(model(example), record.model(example)) <= 1e-5


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.last, self.bn3 = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.bn3(self.last(self.bn2(self.conv(self.bn1(self.conv(x)).relu())).relu()))


def test_convolution_called_twice_is_refused_where_torch_is_silently_wrong():
    model, example = randomize(CalledTwice()).eval(), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        torchs = torchs_fuse(model)(example)
        assert relative(model(example), torchs) > 0.1
        record = fold(model, example)
        assert relative(model(example), record.model(example)) <= 1e-5
    assert record.touched == ("bn3",)
    assert "conv is called 2 times" in record.refused["bn1"]
    assert "conv is called 2 times" in record.refused["bn2"]


def test_grouped_transposed_convolution_is_folded_where_torch_raises():
    model, example = ready(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)), torch.randn(IMAGE)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fuse_conv_bn_eval(model[0], model[1], transpose=True)
    assert relative(model(example), fold(model, example).model(example)) <= 1e-5


def test_large_mean_and_bias_cancel_in_float64_and_the_folded_model_is_the_better_one():
    model, example = ready(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model[0].bias.fill_(1e6 + 0.25)
        model[1].running_mean.fill_(1e6)
    exact = copy.deepcopy(model).double()(example.double())
    ours = fold(model, example).model(example)
    assert relative(exact, ours.double()) <= 1e-5
    assert relative(exact, model(example).double()) > 1e-3


class Tapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv2(self.bn(self.conv1(x))))


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.sum()


class OnTheLastAxis(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(7, 7), nn.BatchNorm1d(7)

    def forward(self, x):
        return self.bn(self.linear(x))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input).relu()


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


def untracked():
    return nn.BatchNorm2d(3, track_running_stats=False)


def with_tied_weights():
    model = ready(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[3].weight = model[0].weight
    return model


IMAGES = torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
REFUSALS = [
    (lambda: randomize(Tapped()).eval(), IMAGES, "bn", "output of conv has 2 consumers"),
    (lambda: randomize(Reused()).eval(), IMAGES, "bn", "called 2 times"),
    (lambda: randomize(ReadsWeight()).eval(), IMAGES, "bn", "parameters of conv are used elsewhere"),
    (with_tied_weights, IMAGES, "1", "parameters of 0 are used elsewhere"),
    (lambda: randomize(OnTheLastAxis()).eval(), torch.randn(2, 7, 7), "bn", "channels are not dimension 1"),
    (lambda: randomize(Branching()).eval(), -1 - IMAGES, "bn", "the example does not reach it"),
    (lambda: ready(nn.Conv2d(3, 3, 1), WithActivation(3)), IMAGES, "1", "WithActivation does not"),
    (lambda: ready(OwnConv(3, 3, 1), nn.BatchNorm2d(3)), IMAGES, "1", "0 (OwnConv) has a forward of its own"),
    (lambda: ready(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train(), IMAGES, "1", "call model.eval() first"),
    (
        lambda: ready(nn.Conv2d(3, 3, 1), untracked()),
        IMAGES,
        "1",
        "no running statistics",
    ),
    (lambda: ready(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), IMAGES, "2", "its input comes from 1 (ReLU)"),
    (lambda: ready(nn.BatchNorm2d(3)), IMAGES, "0", "the model's input"),
    (lambda: ready(nn.Conv2d(3, 3, 1), hooked(nn.BatchNorm2d(3))), IMAGES, "1", "it has hooks"),
    (lambda: ready(hooked(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), IMAGES, "1", "0 has hooks"),
    (lambda: ready(hooked(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), IMAGES, "1", "0 has hooks"),
    (
        lambda: ready(weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)),
        IMAGES,
        "1",
        "parametrization",
    ),
    (lambda: ready(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)), IMAGES, "1", "statistics from the input"),
    (lambda: ready(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout()), IMAGES[0], "1", "(3D|4D|dimension)"),
]


@pytest.mark.parametrize(("build", "example", "path", "why"), REFUSALS)
def test_what_cannot_be_folded_is_refused_with_the_reason(build, example, path, why):
    if why.startswith("("):
        with pytest.raises((SurgeryError, ValueError), match=why):
            fold(build(), example)
    else:
        assert why in reason(build(), example, path)


@pytest.mark.parametrize("name", NETS)
def test_networks_of_the_field_keep_their_function(name):
    build, kept = NETS[name]
    model, example, other = randomize(build()).eval(), torch.randn(2, 3, 16, 16), torch.randn(3, 3, 24, 8)
    before, norms = fingerprint(model), len(norm_layers(model))
    record = fold(model, example)
    assert fingerprint(model) == before
    assert len(record.touched) == norms - kept
    assert len(record.refused) == kept
    with torch.no_grad():
        for input in (example, other):
            assert relative(model(input), record.model(input)) <= 1e-5
    assert record.largest_change <= 1e-5
    assert type(record.model) is type(model)


@pytest.mark.parametrize("path", leaves(NETS["unet"][0]()))
def test_exception_in_any_layer_leaves_the_model_bit_identical(path):
    model = randomize(NETS["unet"][0]()).eval()
    example = torch.randn(1, 3, 8, 8)
    with failing(model.get_submodule(path)):
        before = fingerprint(model)
        with pytest.raises(Failure):
            fold(model, example)
        assert fingerprint(model) == before


def test_frozen_layer_is_folded_in_training_mode_too():
    model = ready(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    freeze(model)
    model.train()
    example = torch.randn(IMAGE)
    assert relative(model(example), fold(model, example).model(example)) <= 1e-5


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-14), (torch.bfloat16, 2e-2)])
def test_type_and_learning_flags_are_kept(dtype, allowed):
    model = ready(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)).to(dtype)
    model[0].weight.requires_grad_(False)
    record = fold(model, torch.randn(IMAGE, dtype=dtype))
    assert record.model[0].weight.dtype is dtype
    assert record.model[0].bias.dtype is dtype
    assert not record.model[0].bias.requires_grad
    assert record.largest_change <= allowed


def test_folding_again_finds_nothing_and_says_so():
    model, example = ready(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)), torch.randn(IMAGE)
    with pytest.raises(ArgumentError, match="no normalization layer at all"):
        fold(fold(model, example).model, example, where="*")
    with pytest.raises(SurgeryError, match="has no normalization layer"):
        fold(fold(model, example).model, example)


def test_model_that_differs_from_itself_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = ready(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
            self.calls = 0

        def forward(self, x):
            return self.body(x) + torch.rand(1)

    model, example = Noisy().eval(), torch.randn(IMAGE)
    record = fold(model, example)  # the random state is put back before each run, so that both see the same noise
    assert record.largest_change <= 1e-5


def test_pair_that_changes_too_much_is_left_out_and_the_others_are_folded():
    model = ready(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).half()
    with torch.no_grad():
        model[4].running_var.fill_(6e-8)
        model[4].weight.fill_(0.01)
        model[3].weight.mul_(1e-3)
        model[3].bias.mul_(1e-3)
        model[4].running_mean.copy_(model[3].bias)
    example = torch.randn(2, 3, 8, 8).half()
    record = fold(model, example, tolerance=1e-3)
    assert "1" in record.touched or "1" in record.refused
    assert record.largest_change <= 5e-3


def test_nothing_is_returned_that_was_not_verified(monkeypatch):
    module = sys.modules["normkit.surgery.fold_build"]
    original = module.absorb_after

    def slightly_wrong(layer, affine, axis=None):
        original(layer, type(affine)(affine.scale * 1.001, affine.shift), axis)

    monkeypatch.setattr(module, "absorb_after", slightly_wrong)
    model, example = ready(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)), torch.randn(IMAGE)
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match="changes the output by"):
        fold(model, example)
    assert fingerprint(model) == before


def test_second_size_is_chosen_by_the_model():
    conv = ready(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    assert "twice" in fold(conv, torch.randn(IMAGE)).notes[0]
    fixed = ready(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 7 * 6, 2))
    assert "two samples more" in fold(fixed, torch.randn(IMAGE)).notes[0]


def test_arguments_that_are_no_tensors_are_fixed_at_the_examples():
    class WithFlag(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = ready(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))

        def forward(self, image, twice=False):
            return self.body(image) * (2 if twice else 1)

    model, example = WithFlag().eval(), torch.randn(IMAGE)
    assert fold(model, {"image": example, "label": 3}).touched == ("body.1",)
    record = fold(model, example, call=lambda model, batch: model(batch, twice=True))
    assert relative(model(example, twice=True), record.model(example, twice=True)) <= 1e-5
