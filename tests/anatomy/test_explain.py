"""What `explain` says is what runs: of every method, of torch's layers, and of every layer of a model."""

import copy

import pytest
import torch
from torch import nn

import normkit
from normkit import errors
from normkit.kernels.native import calls as native
from normkit.kernels.numba.channels import launch
from normkit.kernels.numba.samples import passes as sample_passes
from normkit.layers.catalog import METHODS

METHODS_WITH_IMAGES = [row for row in METHODS if 2 in row.layers]


@pytest.fixture
def launched(monkeypatch):
    """Note every kernel that is started, by either path."""
    noted = []
    for module in (launch, sample_passes):

        def parallel_for(*arguments, real=module.parallel_for):
            noted.append(arguments)
            real(*arguments)

        monkeypatch.setattr(module, "parallel_for", parallel_for)
    native.watch(lambda *which: noted.append(which))
    yield noted
    native.watch(None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("row", METHODS_WITH_IMAGES, ids=lambda row: row.name)
def test_every_method_runs_on_what_is_said(launched, row, training):
    layer, x = row.build(6, 2).train(training), torch.randn(4, 6, 5, 3)
    given = (x, x) if row.name == "adaptive" else (x,)
    found = normkit.explain(layer, given if len(given) > 1 else x)
    assert not launched
    layer(*given)
    assert (found.backend == "numba") == bool(launched)
    assert set(found.refused) == {"numba", "triton", "plain"} - {found.backend}


TORCHS = {
    "batch": lambda: nn.BatchNorm2d(6),
    "instance": lambda: nn.InstanceNorm2d(6),
    "group": lambda: nn.GroupNorm(2, 6),
    "layer": lambda: nn.LayerNorm(3),
    "rms": lambda: nn.RMSNorm(3),
    "response": lambda: nn.LocalResponseNorm(3),
}


@pytest.mark.parametrize("name", TORCHS)
def test_a_layer_of_torchs_runs_torchs_kernels(launched, name):
    layer, x = TORCHS[name](), torch.randn(4, 6, 5, 3)
    found = normkit.explain(layer, x)
    layer(x)
    assert found.backend == "torch"
    assert type(layer).__name__ in found.kernel
    assert not launched


@pytest.mark.parametrize("build", [normkit.BatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("track", [True, False])
def test_a_frozen_layer_runs_on_what_is_said(launched, build, track):
    layer, x = build(6), torch.randn(4, 6, 5, 3)
    layer(x)
    normkit.freeze(layer, track=track)
    layer.train()
    launched.clear()
    found = normkit.explain(layer, x)
    layer.eval().train()(x)
    assert found.backend == ("numba" if build is normkit.BatchNorm2d and not track else "torch")
    if not track:
        assert (found.backend == "numba") == bool(launched)


class Own(normkit.BatchNorm2d):
    def forward(self, input):
        return input


def test_a_forward_of_ones_own_is_not_explained():
    assert normkit.explain(Own(3), torch.randn(2, 3, 5, 5)).backend == "unknown"
    assert normkit.explain(type("Mine", (normkit.BatchNorm2d,), {})(3), torch.randn(2, 3, 5, 5)).backend == "numba"


BAD = {
    "rank": (torch.zeros(4, 6, 5), errors.ShapeError, "expected 4D input"),
    "channels": (torch.zeros(4, 5, 5, 3), errors.ShapeError, "expected 6 channels"),
    "type": (torch.zeros(4, 6, 5, 3, dtype=torch.int64), errors.DtypeError, "must be floating point"),
    "list": ([1.0], errors.ArgumentError, "input is a list"),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", BAD)
def test_a_wrong_input_is_told_in_the_layers_words(name, momentum):
    x, kind, words = BAD[name]
    layer = normkit.BatchNorm2d(6, momentum=momentum)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(kind, match=words):
        normkit.explain(layer, x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    if name != "list":
        with pytest.raises(kind, match=words):
            layer(x)


@pytest.mark.parametrize("name", ["rank", "channels"])
def test_a_wrong_input_is_told_in_torchs_words(name):
    with pytest.raises((ValueError, RuntimeError)) as said:
        nn.BatchNorm2d(6)(BAD[name][0])
    with pytest.raises(type(said.value)) as told:
        normkit.explain(nn.BatchNorm2d(6), BAD[name][0])
    assert str(told.value) == str(said.value)


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.BatchNorm2d(3), normkit.BatchNorm2d(3)

    def forward(self, x):
        return self.used(x)


def test_a_model_is_explained_layer_by_layer_and_stays_as_it_was():
    norms = [nn.BatchNorm2d(4), nn.ReLU(inplace=True), normkit.GroupNorm(2, 4), normkit.BatchNormAct2d(4)]
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), *norms, nn.Dropout())
    x = torch.randn(2, 3, 7, 5)
    given, before, random = x.clone(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = normkit.explain(model, x)
    assert {path: one.backend for path, one in found.layers.items()} == {"2": "torch", "4": "numba", "5": "numba"}
    assert found.backend == "torch, numba"
    assert str(found).startswith("3 of 3 normalization layers run\n2: torch: torch's own")
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_a_model_does_not_reach_is_said():
    found = normkit.explain(Skips(), torch.randn(2, 3, 5, 5))
    assert (found.layers["idle"].backend, found.backend) == ("none", "torch")


def test_layouts_inside_a_model_are_those_of_the_run():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), normkit.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    assert normkit.explain(model, x).layers["1"].kernel.startswith("channels_last")


def test_a_call_of_ones_own_and_refusals():
    model = nn.Sequential(normkit.BatchNorm2d(3))
    x = torch.randn(2, 3, 5, 5)
    assert normkit.explain(model, {"image": x}, call=lambda m, batch: m(batch["image"])).backend == "numba"
    with pytest.raises(errors.ShapeError, match="expected 3 channels"):
        normkit.explain(model, x[:, :2])
    with pytest.raises(errors.ArgumentError, match=r"fails on this input: RuntimeError.*call="):
        normkit.explain(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), x)
    with pytest.raises(errors.ArgumentError, match="no normalization layer"):
        normkit.explain(nn.Linear(2, 2), x)
    with pytest.raises(errors.ArgumentError, match="layer is a str"):
        normkit.explain("layer", x)
    with pytest.raises(errors.BackendError), normkit.use_backend("triton"):
        normkit.explain(normkit.BatchNorm2d(3), x[:0])
