"""The conformance kit finds every planted fault, names it, and finds nothing where nothing is wrong."""

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError
from normkit.testing import check_norm_layer

from .faulty_layers import FAULTS, InterleavedGroups, LeakyLayerNorm, Sound

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic:UserWarning")

OURS = [
    ("batch", normkit.BatchNorm2d, 2),
    ("batch", normkit.BatchNorm1d, 0),
    ("batch", normkit.BatchNorm1d, 1),
    ("batch", normkit.BatchNorm3d, 3),
    ("batch", normkit.GhostBatchNorm2d, 2),
    ("batch", lambda channels: normkit.BatchNorm2d(channels, decay=0.7, unbiased=False), 2),
    ("group", lambda channels: normkit.GroupNorm(3, channels), 2),
    ("instance", lambda channels: normkit.InstanceNorm2d(channels, affine=True, track_running_stats=True), 2),
    ("instance", normkit.InstanceNorm1d, 1),
    ("layer", lambda channels: normkit.LayerNorm((channels, 7, 3)), 2),
    ("layer", normkit.SampleLayerNorm, 1),
    ("rms", lambda channels: normkit.RMSNorm((channels, 7)), 1),
]


@pytest.mark.parametrize(("method", "factory", "dimensions"), OURS)
def test_our_layers_conform(method, factory, dimensions):
    report = check_norm_layer(factory, method, dimensions=dimensions)
    assert report.conforms, str(report)
    assert len(report.passed) >= 15


def test_a_sound_layer_of_another_house_conforms():
    report = check_norm_layer(Sound)
    assert report.conforms, str(report)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_is_found_and_named(fault):
    report = check_norm_layer(fault)
    assert any(FAULTS[fault] in words for words in report.conventions), str(report)


def test_interleaved_groups_are_found_and_named():
    report = check_norm_layer(lambda channels: InterleavedGroups(3, channels), "group")
    assert "takes every G-th channel into a group instead of neighbours" in report.conventions


def test_samples_that_see_each_other_are_found_and_named():
    report = check_norm_layer(lambda channels: LeakyLayerNorm((channels, 7)), "layer", dimensions=1)
    assert "lets samples of a batch see each other" in report.conventions


def test_a_layer_that_breaks_is_a_finding():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("nothing here")

    report = check_norm_layer(lambda channels: Broken())
    assert not report.conforms
    assert "it raised KeyError" in str(report)


def test_an_instance_is_copied_and_left_alone():
    layer = nn.BatchNorm2d(6)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    check_norm_layer(layer)
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


def test_a_batch_norm_is_not_a_group_norm():
    report = check_norm_layer(normkit.BatchNorm2d, "instance")
    assert "averages samples and positions, as batch normalization does" in report.conventions


def test_an_unknown_method_lists_the_known():
    with pytest.raises(ArgumentError, match="contract for batch, group, instance, layer, rms"):
        check_norm_layer(normkit.BatchNorm2d, "bach")
