"""Norms and layers of other houses: folded where float64 shows that they can be, whatever they are called."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit
from normkit import fold
from normkit.anatomy import fingerprint, norm_layers
from normkit.errors import SurgeryError

from .networks import randomize

IMAGES = torch.linspace(-1, 2, 3 * 3 * 6 * 5).reshape(3, 3, 6, 5).sin()


def relative(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


def ready(*layers):
    torch.manual_seed(1)
    model = randomize(nn.Sequential(*layers))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("gamma", "moving_var", "running_var")):
            nn.init.uniform_(tensor, 0.5, 2.0)
        elif name.endswith(("beta", "moving_mean", "running_mean")):
            nn.init.normal_(tensor)
    return model.eval()


def folded(model, example=IMAGES):
    before = fingerprint(model)
    record = fold(model, example)
    assert fingerprint(model) == before
    assert record.verdict.exact <= 1e-9
    other = torch.randn(5, *example.shape[1:])
    with torch.no_grad():
        assert relative(model(other), record.model(other)) <= 1e-5
    assert not norm_layers(record.model)
    return record


class NormAct(nn.BatchNorm2d):
    """As image model libraries have it."""

    def __init__(self, channels, act=None, drop=None):
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act or nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.3)])
def test_norm_that_brings_an_activation_leaves_it_behind(act):
    record = folded(ready(nn.Conv2d(3, 4, 3), NormAct(4, act, nn.Dropout(0.3)), nn.Conv2d(4, 5, 1), NormAct(5, act)))
    assert record.into == {"1": "0", "3": "2"}
    assert [type(part) for part in record.model[1]] == [nn.Dropout, type(act)]
    assert [type(part) for part in record.model[3]] == [type(act)]
    assert record.model[3][0] is record.model[1][1] is not act
    alone = folded(ready(nn.Conv2d(3, 4, 3), NormAct(4, act)))
    assert type(alone.model[1]) is type(act)


def test_norm_that_brings_an_activation_is_not_folded_into_what_comes_after_it():
    with pytest.raises(SurgeryError, match="after it comes its own activation"):
        fold(ready(nn.ReLU(), NormAct(3), nn.Conv2d(3, 4, 1)), IMAGES)


class FrozenBatchNorm2d(nn.Module):
    """As detection libraries have it: four buffers."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class KerasNorm(nn.Module):
    """As tutorials have it: other names, other shapes, momentum the other way round."""

    def __init__(self, channels, momentum=0.9, epsilon=1e-3):
        super().__init__()
        shape = (1, channels, 1, 1)
        self.momentum, self.epsilon = momentum, epsilon
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.ones(shape))

    def forward(self, x):
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.moving_mean = self.momentum * self.moving_mean + (1 - self.momentum) * mean.detach()
            self.moving_var = self.momentum * self.moving_var + (1 - self.momentum) * var.detach()
        return self.gamma * (x - mean) / torch.sqrt(var + self.epsilon) + self.beta


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, KerasNorm])
def test_norms_of_other_houses_are_folded_on_both_sides(norm):
    assert folded(ready(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU())).into == {"1": "0"}
    assert folded(ready(nn.ReLU(), norm(3), nn.Conv2d(3, 4, 3))).into == {"1": "2"}


def test_frozen_norm_is_folded_whatever_its_mode():
    model = ready(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
    assert fold(model.train(), IMAGES).touched == ("1",)


OURS = [
    lambda c: normkit.BatchRenorm2d(c, r_max=3.0, d_max=5.0),
    lambda c: normkit.GhostBatchNorm2d(c, ghost_size=3),
    normkit.WhiteningBatchNorm2d,
    lambda c: normkit.WhiteningBatchNorm2d(c, num_groups=c // 2 if c % 2 == 0 else 1),
]


def used(*layers):
    """Layers whose statistics were measured, whitening's covariance included."""
    model = ready(*layers).train()
    for _ in range(4):
        model(torch.randn(8, *IMAGES.shape[1:]) + 0.3)
    return model.eval()


@pytest.mark.parametrize("norm", OURS)
@pytest.mark.parametrize("kind", ["convolution", "grouped", "transposed"])
def test_the_family_is_affine_in_evaluation_and_folds(norm, kind):
    layer = {
        "convolution": nn.Conv2d(3, 4, 3, padding=1),
        "grouped": nn.Conv2d(3, 6, 3, groups=3),
        "transposed": nn.ConvTranspose2d(3, 4, 2, stride=2),
    }[kind]
    if kind == "grouped" and norm is normkit.WhiteningBatchNorm2d:
        norm = OURS[-1]  # that mixes within the groups of the convolution
    assert folded(used(layer, norm(layer.out_channels), nn.ReLU())).into == {"1": "0"}


@pytest.mark.parametrize("norm", OURS[:3])
def test_the_family_folds_into_what_comes_after_it(norm):
    assert folded(used(nn.ReLU(), norm(3), nn.Conv2d(3, 4, 3))).into == {"1": "2"}


def test_what_mixes_channels_does_not_pass_where_they_are_moved():
    with pytest.raises(SurgeryError, match="it mixes channels, and what stands between moves them"):
        fold(used(nn.ReLU(), normkit.WhiteningBatchNorm2d(3), nn.Flatten(), nn.Linear(90, 2)), IMAGES)


def test_whitening_across_the_groups_of_a_convolution_is_refused():
    with pytest.raises(SurgeryError, match="mixes channels that are in different groups"):
        fold(used(nn.Conv2d(3, 6, 3, groups=3), normkit.WhiteningBatchNorm2d(6)), IMAGES)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 1), normkit.MaskedBatchNorm1d(4)

    def forward(self, x, mask=None):
        return self.bn(self.conv(x), mask) if mask is not None else self.bn(self.conv(x))


def test_masked_norm_is_folded_without_a_mask_and_left_with_one():
    torch.manual_seed(0)
    model, x = randomize(Masked()).eval(), torch.randn(2, 3, 7)
    assert fold(model, x).into == {"bn": "conv"}
    with pytest.raises(SurgeryError, match="called with more than its input"):
        fold(model, {"x": x, "mask": torch.ones(2, 7, dtype=torch.bool)})


class Mine(nn.Conv2d):
    """A subclass that changes nothing."""


class Conv2dSame(nn.Conv2d):
    """Pads as TensorFlow does, by the size of its input."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return functional.conv2d(functional.pad(x, pads), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """Standardizes its weight before use: what is scaled there is scaled back."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Transposed(nn.Module):
    """A linear layer with its weight the other way round, as GPT-2 has it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_layers_of_ones_own_that_are_linear_in_their_weight_keep_their_class(stride, bias):
    for cls in (Mine, Conv2dSame):
        record = folded(ready(cls(3, 4, 3, stride, bias=bias), nn.BatchNorm2d(4), nn.ReLU()))
        assert record.into == {"1": "0"}
        assert type(record.model[0]) is cls
    assert folded(ready(nn.ReLU(), nn.BatchNorm2d(3), Mine(3, 4, 3, stride, bias=bias))).into == {"1": "2"}


def test_layer_that_counts_its_outputs_in_another_axis():
    record = folded(ready(Transposed(5, 7), nn.BatchNorm1d(7)), torch.randn(4, 5))
    assert type(record.model[0]) is Transposed
    square = folded(ready(Transposed(5, 5), nn.BatchNorm1d(5)), torch.randn(4, 5))
    assert square.into == {"1": "0"}


@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_of_standardized_weights_becomes_a_plain_one(groups):
    layer = Standardized(3, 6, 3, 2, 1, groups=groups, bias=False)
    layer.weight.requires_grad_(False)
    record = folded(ready(layer, nn.BatchNorm2d(6)))
    assert type(record.model[0]) is nn.Conv2d
    assert not record.model[0].weight.requires_grad
    assert record.model[0].weight.dtype is torch.float32


class Saturates(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-2, 2)


class Limits(nn.Conv2d):
    """Saturates far from what the example gives it."""

    def forward(self, x):
        return super().forward(x).clamp(-500, 500)


class Sums(nn.Conv2d):
    """Two convolutions with one weight: linear in it, but the bias counts twice."""

    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(2))


class PadsInside(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize("cls", [Saturates, Limits, Sums])
def test_layer_of_ones_own_that_is_not_linear_is_refused_with_what_was_measured(cls):
    with pytest.raises(SurgeryError, match=rf"0 \({cls.__name__}\) has a forward of its own: .*float64"):
        fold(ready(cls(3, 4, 3), nn.BatchNorm2d(4)), IMAGES)


def test_padding_inside_a_layer_of_ones_own_is_noticed():
    assert folded(ready(PadsInside(3, 4, 3), nn.BatchNorm2d(4))).into == {"1": "0"}
    with pytest.raises(SurgeryError, match=r"2 \(PadsInside\) has a forward of its own"):
        fold(ready(nn.ReLU(), nn.BatchNorm2d(3), PadsInside(3, 4, 3)), IMAGES)
