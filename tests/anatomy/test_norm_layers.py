"""Finding the normalization layers of a model."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import normkit
from normkit.anatomy import norm_layers
from normkit.anatomy.forms import NAMED_STATISTICS
from normkit.errors import ArgumentError


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class Renamed(nn.BatchNorm2d):
    """Adds nothing that changes a call."""


class OwnNorm(nn.Module):
    def __init__(self, mean="running_mean", variance="running_var"):
        super().__init__()
        self.register_buffer(mean, torch.zeros(3))
        self.register_buffer(variance, torch.ones(3))

    def forward(self, input):
        return input


class LooksFrozen(OwnNorm):
    """Has the state of a frozen batch norm and computes something else."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(3))
        self.register_buffer("bias", torch.zeros(3))


class OwnFrozen(LooksFrozen):
    def forward(self, input):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return input * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def only(module, where=None):
    (layer,) = norm_layers(nn.Sequential(nn.ReLU(), module), where)
    return layer


def test_a_module_in_two_places_is_listed_once(net):
    layers = norm_layers(net)
    assert [(layer.path, layer.aliases) for layer in layers] == [("bn", ("again",)), ("group", ()), ("head.2", ())]
    assert layers[0].module is net.again


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.BatchNorm1d(3), "batch"),
        (nn.BatchNorm3d(3), "batch"),
        (nn.LazyBatchNorm2d(), "batch"),
        (nn.SyncBatchNorm(3), "sync"),
        (nn.InstanceNorm2d(3), "instance"),
        (nn.GroupNorm(1, 3), "group"),
        (nn.LayerNorm(3), "layer"),
        (nn.RMSNorm(3), "rms"),
        (nn.LocalResponseNorm(3), "response"),
        (normkit.BatchNorm2d(3), "batch"),
        (WithActivation(3), "batch"),
        (OwnNorm(), "unknown"),
        (OwnFrozen(), "frozen"),
        (LooksFrozen(), "unknown"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_kind_is_that_of_the_nearest_known_class(module, kind):
    assert only(module).kind == kind


@pytest.mark.parametrize(("mean", "variance"), NAMED_STATISTICS)
def test_a_layer_that_cannot_be_read_is_known_by_any_name_of_its_statistics(mean, variance):
    layer = only(OwnNorm(mean, variance))
    assert layer.kind == "unknown"
    assert layer.unread


def test_a_forward_of_another_house_is_seen():
    assert only(WithActivation(3)).overridden
    assert only(OwnNorm()).overridden
    assert not only(Renamed(3)).overridden
    assert not only(normkit.BatchNorm2d(3)).overridden
    assert not only(nn.InstanceNorm2d(3)).overridden
    patched = nn.BatchNorm2d(3)
    patched.forward = torch.relu
    assert only(patched).overridden


def test_statistics_channels_and_laziness_are_told():
    assert only(nn.BatchNorm2d(3)).tracks
    assert not only(nn.BatchNorm2d(3, track_running_stats=False)).tracks
    assert not only(nn.InstanceNorm2d(3)).tracks
    assert only(nn.InstanceNorm2d(3, track_running_stats=True)).tracks
    switched_off = nn.BatchNorm2d(3)
    switched_off.track_running_stats = False
    assert only(switched_off).tracks  # evaluation uses what is there
    switched_off = nn.InstanceNorm2d(3, track_running_stats=True)
    switched_off.track_running_stats = False
    assert not only(switched_off).tracks
    assert only(OwnFrozen()).tracks
    assert only(nn.BatchNorm2d(3)).channels == 3
    assert only(nn.GroupNorm(2, 6)).channels == 6
    assert only(nn.LayerNorm(3)).channels is None
    lazy = only(nn.LazyBatchNorm2d())
    assert lazy.lazy
    assert lazy.channels is None
    assert not only(nn.BatchNorm2d(3)).lazy


def test_hooks_and_parametrizations_are_told():
    assert not only(nn.BatchNorm2d(3)).hooked
    assert not only(nn.BatchNorm2d(3)).parametrized
    hooked = nn.BatchNorm2d(3)
    hooked.register_forward_hook(lambda module, args, output: output)
    assert only(hooked).hooked
    scaled = nn.LayerNorm((3, 4))
    parametrizations.weight_norm(scaled)
    assert only(scaled).parametrized
    assert only(scaled, where=nn.LayerNorm).kind == "layer"


def test_the_model_itself_may_be_the_layer():
    (layer,) = norm_layers(nn.BatchNorm2d(3))
    assert layer.path == ""
    assert "the model itself" in str(layer)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ["bn", "group", "head.2"]),
        ("bn", ["bn"]),
        ("again", ["bn"]),
        ("head", ["head.2"]),
        ("head.*", ["head.2"]),
        ("*", ["bn", "group", "head.2"]),
        (nn.BatchNorm2d, ["bn"]),
        (nn.modules.batchnorm._BatchNorm, ["bn", "head.2"]),
        (lambda layer: layer.kind == "group", ["group"]),
        (lambda layer: False, []),
        (["head.*", nn.GroupNorm, "bn"], ["bn", "group", "head.2"]),
        (("bn", "again"), ["bn"]),
    ],
)
def test_where_selects_layers(net, where, expected):
    assert [layer.path for layer in norm_layers(net, where)] == expected


def test_where_takes_a_part_of_the_model(net):
    assert [layer.path for layer in norm_layers(net, net.head)] == ["head.2"]


def test_a_pattern_of_one_container_does_not_take_its_longer_neighbour():
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(11)))
    assert [layer.path for layer in norm_layers(model, "1")] == ["1"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("haed.2", "close names are head.2"),
        (["bn", "nowhere"], "nowhere"),
        (nn.InstanceNorm1d, "InstanceNorm1d"),
        (nn.ReLU(), "ReLU given holds no normalization layer"),
        (3, "where= is a int"),
    ],
)
def test_where_that_takes_nothing_is_refused(net, where, message):
    with pytest.raises(ArgumentError, match=message):
        norm_layers(net, where)


def test_where_on_a_model_without_norms_says_so():
    with pytest.raises(ArgumentError, match="no normalization layer at all"):
        norm_layers(nn.Linear(2, 2), "bn*")
