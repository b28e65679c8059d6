"""The conformance kit finds every planted fault, names it, and finds nothing where nothing is wrong."""

import functools

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError
from normkit.layers.catalog import METHODS, METHODS_OF_WEIGHTS
from normkit.testing import Report, check_norm_layer
from normkit.testing.contracts import CONTRACTS

from .faulty_family import FAULTS as FAMILY_FAULTS
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
    ("response", lambda channels: normkit.LocalResponseNorm(3, alpha=2.0), 2),
    ("response", lambda channels: normkit.LocalResponseNorm(4, alpha=2.0), 1),
    ("adaptive", normkit.AdaptiveInstanceNorm, 2),
    ("renorm", normkit.BatchRenorm2d, 2),
    ("renorm", normkit.BatchRenorm1d, 0),
    ("ghost", lambda channels: normkit.GhostBatchNorm2d(channels, ghost_size=2), 2),
    ("ghost", lambda channels: normkit.GhostBatchNorm1d(channels, ghost_size=4), 1),
    ("masked", normkit.MaskedBatchNorm1d, 1),
    ("masked", normkit.MaskedBatchNorm1d, 0),
    ("whitening", lambda channels: normkit.WhiteningBatchNorm2d(channels, num_groups=2), 2),
    ("whitening", lambda channels: normkit.WhiteningBatchNorm1d(channels, num_groups=3, shrinkage=0.1), 0),
    ("whitening", lambda channels: normkit.WhiteningBatchNorm1d(channels, iterations=5, unbiased=False), 1),
]


def test_every_row_of_the_catalog_has_a_contract_and_conforms_to_it():
    rows = {row.name for row in METHODS}
    assert set(CONTRACTS) == rows
    assert {method for method, _, _ in OURS} == rows


@functools.cache
def report_of(k: int) -> Report:
    method, factory, dimensions = OURS[k]
    return check_norm_layer(factory, method, dimensions=dimensions)


@pytest.mark.parametrize("k", range(len(OURS)), ids=lambda k: f"{OURS[k][0]}-{k}")
def test_our_layers_conform(k):
    assert report_of(k).conforms, str(report_of(k))
    assert len(report_of(k).passed_checks) >= 14


def test_a_sound_layer_of_another_house_conforms():
    report = check_norm_layer(Sound)
    assert report.conforms, str(report)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_is_found_and_named(fault):
    report = check_norm_layer(fault)
    assert any(FAULTS[fault] in words for words in report.conventions), str(report)


@pytest.mark.parametrize(("method", "factory", "dimensions", "words"), FAMILY_FAULTS)
def test_planted_fault_of_the_family_is_found_and_named(method, factory, dimensions, words):
    report = check_norm_layer(factory, method, dimensions=dimensions)
    assert any(words in said for said in report.conventions), str(report)


def test_every_check_runs_or_is_skipped_with_a_reason():
    every = set(report_of(0).passed_checks)
    for k, (method, _, _) in enumerate(OURS):
        report = report_of(k)
        seen = set(report.passed_checks) | set(report.skipped)
        assert every - {"single value"} <= seen, method
        assert ("single value" in seen) != ("sample independence" in seen), method
        assert ("padding" in seen) == (method == "masked")
        assert all(report.skipped.values())


def test_weights_have_no_contract_and_the_refusal_says_so():
    for row in METHODS_OF_WEIGHTS:
        with pytest.raises(ArgumentError, match="Weights have none"):
            check_norm_layer(normkit.BatchNorm2d, row.name)


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
    with pytest.raises(
        ArgumentError, match=r"did you mean .batch.. Known are: adaptive, batch, ghost, group, instance"
    ):
        check_norm_layer(normkit.BatchNorm2d, "bach")


@pytest.mark.parametrize("build", [nn.LazyBatchNorm2d, lambda channels: nn.LazyBatchNorm2d()])
def test_a_lazy_layer_must_see_a_batch_first(build):
    layer = build() if build is nn.LazyBatchNorm2d else build
    call = r"LazyBatchNorm2d is lazy and has not seen a batch; call layer\(torch.randn\(5, 6, 7, 3\)\) once"
    with pytest.raises(ArgumentError, match=call):
        check_norm_layer(layer)
    layer = nn.LazyBatchNorm2d()
    layer(torch.randn(5, 6, 7, 3))
    assert check_norm_layer(layer).findings == check_norm_layer(nn.BatchNorm2d(6)).findings
