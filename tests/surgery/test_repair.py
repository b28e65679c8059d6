"""Repairing statistics, merging states, grouping parameters."""

import copy

import pytest
import torch
from torch import nn

import normkit
from foreign_layers import ArticleNorm, FrozenBatchNorm2d, KerasNorm
from normkit import merge_states, param_groups, repair
from normkit.anatomy import fingerprint
from normkit.errors import ArgumentError, SurgeryError
from tolerances import assert_close

from .networks import Failure, Small, failing, leaves, randomize

BAD = [("running_var", float("nan")), ("running_mean", float("inf")), ("running_var", -1.0)]


def sick(name="running_var", value=float("nan")):
    model = randomize(Small())
    model.bn1._buffers[name][2] = value
    return model


def batches():
    return [torch.randn(6, 3, 8, 8), torch.randn(5, 3, 8, 8)]


def test_overflow_poisons_torchs_layer_for_ever():
    norm = nn.BatchNorm1d(2)
    norm(torch.tensor([[1.0, float("inf")], [2.0, 3.0]]))
    for _ in range(200):
        norm(torch.randn(8, 2))
    assert not torch.isfinite(norm.running_mean[1])
    repair(norm, torch.randn(64, 2))
    assert torch.isfinite(norm.eval()(torch.randn(4, 2))).all()


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_channels_are_taken_from_the_donor_and_only_those(name, value):
    model, donor = sick(name, value), randomize(Small())
    before = copy.deepcopy(model.bn1.state_dict())
    record = repair(model, donor=donor)
    assert record.touched == ("bn1",)
    for key in ("running_mean", "running_var"):
        expected = before[key].clone()
        expected[2] = donor.bn1._buffers[key][2]
        assert torch.equal(model.bn1._buffers[key], expected)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_layers_are_measured_again_and_only_those(name, value):
    model, data = sick(name, value), batches()
    still = copy.deepcopy(model.bn0.state_dict())
    record = repair(model, data)
    assert record.touched == ("bn1",)
    assert torch.isfinite(model.bn1.running_var).all()
    assert (model.bn1.running_var >= 0).all()
    assert all(torch.equal(still[key], value) for key, value in model.bn0.state_dict().items())


@pytest.mark.parametrize(
    ("donor", "why"),
    [
        (None, "no donor was given"),
        (nn.Linear(2, 2), "the donor has no such layer"),
        (Small(channels=6), "the donor's layer has another shape"),
        (sick(), "the donor's statistics are bad in the same channels"),
    ],
)
def test_bad_channels_without_help_are_refused_by_name(donor, why):
    model = sick()
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match=rf"bn1: channels \[2\] of 5 \({why}"):
        repair(model, donor=donor)
    with pytest.raises(SurgeryError, match="bn1"):
        repair(model.state_dict(), donor=donor)
    assert fingerprint(model) == before


@pytest.mark.parametrize("path", leaves(Small()))
def test_exception_in_any_layer_leaves_the_model_bit_identical(path):
    model, data = sick(), batches()
    model.bn0.half()
    with failing(model.get_submodule(path)):
        before = fingerprint(model)
        with pytest.raises(Failure):
            repair(model, data)
        assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_statistics_are_lifted_and_move_again(dtype):
    torchs = nn.BatchNorm1d(1, momentum=0.01).to(dtype)
    torchs.running_mean.fill_(1.0)
    for _ in range(500):
        torchs(torch.tensor([[0.05], [2.05]], dtype=dtype))
    assert torchs.running_mean.item() < 1.04  # the true mean is 1.05
    parameters = [id(parameter) for parameter in torchs.parameters()]
    record = repair(torchs)
    assert record.exactness == "exact"
    assert torchs.running_var.dtype is torch.float32
    assert [id(parameter) for parameter in torchs.parameters()] == parameters
    for _ in range(500):
        output = torchs(torch.tensor([[0.05], [2.05]], dtype=dtype))
    assert output.dtype is dtype
    assert torchs.running_mean.item() == pytest.approx(1.05, abs=0.005)


def test_weights_that_are_not_finite_are_refused():
    model = sick()
    model.conv1.weight.data[0, 0, 0, 0] = float("nan")
    data = batches()
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match=r"conv1\.weight itself"):
        repair(model, data)
    assert fingerprint(model) == before


def test_state_is_copied_unwrapped_and_its_counters_are_put_right():
    state = {f"module.{name}": value for name, value in randomize(Small()).state_dict().items()}
    del state["module.bn0.num_batches_tracked"]
    state["module.gone.num_batches_tracked"] = torch.tensor(3)
    state["module.bn1.running_var"] = state["module.bn1.running_var"].half()
    before = {name: value.clone() for name, value in state.items()}
    record = repair(state, donor=randomize(Small()))
    assert state.keys() == before.keys()
    assert record.state.keys() == Small().state_dict().keys()
    assert record.state["bn0.num_batches_tracked"].item() == 100
    assert record.state["bn1.running_var"].dtype is torch.float32
    Small().load_state_dict(dict(record.state))
    assert any("prefix" in note for note in record.notes)


def test_batches_with_a_state_are_refused():
    with pytest.raises(ArgumentError, match="cannot be run"):
        repair(nn.BatchNorm1d(2).state_dict(), torch.randn(4, 2))


def test_healthy_model_is_left_as_it_is():
    model = randomize(Small())
    before = fingerprint(model)
    assert repair(model).touched == ()
    assert fingerprint(model) == before


def test_merged_statistics_are_those_of_the_pooled_data():
    parts = [torch.randn(300, 3) - 5, 2 * torch.randn(100, 3) + 5]
    states = []
    for part in parts:
        norm = normkit.BatchNorm1d(3, momentum=1.0, unbiased=False)
        norm(part)
        states.append(norm.double().state_dict())
    merged = merge_states(states, weights=[300, 100])
    data = torch.cat(parts).double()
    assert_close(merged["running_mean"], data.mean(0), dtype=torch.float32)
    assert_close(merged["running_var"], data.var(0, correction=0), dtype=torch.float32)
    averaged = 0.75 * states[0]["running_var"] + 0.25 * states[1]["running_var"]
    assert (merged["running_var"] > 5 * averaged).all()  # what plain averaging gives


def test_merge_averages_weights_and_takes_the_largest_counter():
    states = [nn.BatchNorm1d(2).state_dict() for _ in range(3)]
    for number, state in enumerate(states):
        state["weight"].fill_(number)
        state["num_batches_tracked"].fill_(10 * number)
    merged = merge_states(states, weights=[1, 1, 2])
    assert merged["weight"].tolist() == [1.25, 1.25]
    assert merged["num_batches_tracked"].item() == 20
    assert merged["num_batches_tracked"].dtype is torch.int64
    assert list(merged) == list(states[0])


def test_merge_refuses_what_cannot_be_merged():
    state = nn.BatchNorm1d(2).state_dict()
    broken = copy.deepcopy(state)
    broken["running_var"][0] = float("nan")
    negative = copy.deepcopy(state)
    negative["running_var"][0] = -1
    for second, why in [
        (nn.BatchNorm1d(3).state_dict(), "and"),
        (nn.BatchNorm1d(2, affine=False).state_dict(), "other names"),
        (broken, "not finite in state 1"),
        (negative, "negative in state 1"),
    ]:
        with pytest.raises(SurgeryError, match=why):
            merge_states([state, second])
    for weights in ([1], [1, -1], [0, 0], [1, float("nan")]):
        with pytest.raises(ArgumentError, match="weights"):
            merge_states([state, state], weights)
    with pytest.raises(ArgumentError, match="two or more"):
        merge_states([state])


def test_every_learning_parameter_is_in_one_group_once():
    model = Small()
    model.again = model.conv1
    model.conv2.bias.requires_grad_(False)
    decayed, kept = param_groups(model, 0.1)
    grouped = [id(parameter) for group in (decayed, kept) for parameter in group["params"]]
    learning = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(learning)
    assert {id(parameter) for parameter in decayed["params"]} == {
        id(layer.weight) for layer in (model.conv1, model.conv2, model.fc)
    }
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_decay_of_zero_gradients_moves_the_weights_and_no_norm():
    model = randomize(Small())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(param_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"conv1.weight", "conv2.weight", "fc.weight"}


def test_layer_norm_of_two_dimensions_is_known_as_a_norm():
    (group,) = param_groups(nn.LayerNorm((3, 4)), 0.1)
    assert group["weight_decay"] == 0.0


def test_groups_refuse_what_has_no_parameters_to_group():
    with pytest.raises(SurgeryError, match="lazy"):
        param_groups(nn.LazyLinear(2), 0.1)
    with pytest.raises(SurgeryError, match="no parameter"):
        param_groups(nn.ReLU(), 0.1)
    with pytest.raises(ArgumentError, match="-1"):
        param_groups(nn.Linear(2, 2), -1)


HOUSES = [(ArticleNorm, "moving_mean", "moving_var"), (KerasNorm, "moving_mean", "moving_variance")]
HOUSES += [(FrozenBatchNorm2d, "running_mean", "running_var")]


@pytest.mark.parametrize(("cls", "mean", "var"), HOUSES)
@pytest.mark.parametrize("way", ["donor", "batches", "state"])
def test_layers_of_other_houses_are_repaired_under_their_own_names(cls, mean, var, way):
    model, donor = (nn.Sequential(nn.Conv2d(3, 4, 1), cls(4)).eval() for _ in range(2))
    for name in (mean, var):
        donor[1].get_buffer(name).copy_(torch.rand(4).reshape(donor[1].get_buffer(name).shape) + 0.5)
    model[1].get_buffer(var).flatten()[2] = float("nan")
    kept = model[1].get_buffer(var).flatten()[[0, 1, 3]].clone()
    if way == "state":
        found = repair(model.state_dict(), donor=donor.state_dict())
        values = found.state[f"1.{var}"].flatten()
        assert set(found.state) == set(model.state_dict())  # no counter that this house does not have
        assert not torch.isfinite(model[1].get_buffer(var)).all()
    else:
        data = batches()
        found = repair(model, data if way == "batches" else None, donor if way == "donor" else None)
        values = model[1].get_buffer(var).flatten()
    assert found.touched == ("1",)
    if way == "batches":
        given = torch.cat([model[0](batch).detach().double().movedim(1, 0).flatten(1) for batch in data], 1)
        correction = 0 if cls is ArticleNorm else 1
        if cls is not KerasNorm:
            assert_close(values, given.var(1, correction=correction), dtype=torch.float32)
        assert torch.isfinite(values).all()
    else:
        assert values[2] == donor[1].get_buffer(var).flatten()[2]
        assert torch.equal(values[[0, 1, 3]], kept)


@pytest.mark.parametrize(("cls", "mean", "var"), HOUSES)
def test_bad_statistics_of_other_houses_without_help_are_refused(cls, mean, var):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), cls(4)).eval()
    model[1].get_buffer(mean).flatten()[1] = float("inf")
    with pytest.raises(SurgeryError, match=r"1: channels \[1\] of 4"):
        repair(model)
