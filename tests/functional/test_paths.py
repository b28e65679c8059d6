"""The name of a layer in the model, which it does not know itself."""

import copy

from torch import nn

import normkit
from normkit.functional.agreement import _PATH
from normkit.functional.paths import asleep_beside, may_be_one, path_of


def net():
    return nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), normkit.SyncBatchNorm(3)), "b": normkit.SyncBatchNorm(3)})


def test_a_layer_has_the_name_that_it_has_in_the_state():
    model = net()
    copied = copy.deepcopy(model)
    for held in (model, copied):
        assert [path_of(held["a"][1]), path_of(held["b"])] == ["a.1", "b"]
    wrapped = nn.ModuleList([copied])
    assert may_be_one([path_of(wrapped[0]["a"][1]), path_of(model["a"][1])])
    assert path_of(normkit.SyncBatchNorm(3)) == ""


def test_what_is_known_follows_the_model():
    model = net()
    layer = model["a"][1]
    assert path_of(layer) == "a.1"
    model["c"] = model.pop("a")
    model["c"][1], model["c"][0] = model["c"][0], model["c"][1]
    assert path_of(layer) == "c.0"
    del model
    assert path_of(layer) in {"", "0"}  # whoever held it may be gone


def test_a_layer_in_the_place_of_one_that_is_gone_is_another():
    for _ in range(20):  # some of them lie where the one before lay
        assert path_of(normkit.SyncBatchNorm(3)) == ""
        model = nn.Sequential(normkit.SyncBatchNorm(3))
        assert path_of(model[0]) == "0"
        del model


def test_the_name_ends_where_several_modules_hold_a_layer():
    model = net()
    other = nn.ModuleDict({"x": model["a"]})
    assert path_of(model["a"][1]) == "1"
    del other
    fresh = normkit.SyncBatchNorm(3)
    holders = nn.ModuleDict({"n": fresh}), nn.ModuleDict({"m": fresh})
    assert path_of(fresh) == ""
    assert len(holders) == 2
    twice = nn.Sequential(normkit.SyncBatchNorm(3))
    same = nn.ModuleList([nn.ModuleList([twice]), nn.ModuleList([twice])])
    assert path_of(twice[0]) == "0.0"
    assert len(same) == 2
    circle = nn.Sequential(normkit.SyncBatchNorm(3))
    circle.append(circle)
    assert path_of(circle[0]).endswith("0")


def test_layers_in_evaluation_are_named():
    model = net()
    assert asleep_beside(model["b"]) == []
    model["a"].eval()
    assert asleep_beside(model["b"]) == ["a.1"]


def test_names_that_may_be_one():
    assert may_be_one(["m.a.1", "a.1", "", "1"])
    assert not may_be_one(["a.1", "b.1"])
    assert not may_be_one(["m.a.1", "x.a.1", "a.1"])
    assert not may_be_one(["11", "1"])
    assert _PATH > 64
