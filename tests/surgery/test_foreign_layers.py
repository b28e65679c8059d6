"""Surgery on layers of other libraries and of tutorials: the function is kept, tails and all, or the reason is told."""

import copy
import pickle

import pytest
import torch
from torch import nn

import foreign_layers as foreign
import normkit
from normkit import convert, freeze, recalibrate
from normkit.anatomy import fingerprint, norm_layers
from normkit.anatomy.tails import TAILED
from normkit.errors import ArgumentError, SurgeryError
from tolerances import assert_close

from .networks import Failure, failing

FROZEN = [foreign.FrozenBatchNorm2d, foreign.FrozenBatchNormAct2d]
SYNC = [foreign.SyncBatchNormAct, foreign.MmcvSyncBatchNorm]
BIASED = [foreign.KerasNorm, foreign.ArticleNorm]
ALL = [foreign.BatchNormAct2d, foreign.ABN, foreign.InPlaceABN, *FROZEN, *SYNC, *BIASED]
EXACT = ["normkit", "torch", "batch", "sync", "frozen"]
X = torch.linspace(-1, 1, 6 * 3 * 9 * 7, dtype=torch.float64).reshape(6, 3, 9, 7).mul(9).sin()


def network(cls, seed=0):
    """Give two convolutions, each with a layer of the class whose state is that of no fresh layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), cls(5), nn.Conv2d(5, 4, 3, bias=False), cls(4)).double()
    with torch.no_grad():
        for layer in norm_layers(model):
            layer.weight.copy_(torch.rand_like(layer.weight) + 0.5)
            layer.bias.copy_(torch.randn_like(layer.bias))
            layer.mean.copy_(torch.randn_like(layer.mean))
            layer.var.copy_(torch.rand_like(layer.var) + 0.5)
    return model.eval()


def step(model):
    """Return what a training step gives: output, gradient of the input, stored statistics."""
    work, x = copy.deepcopy(model).train(), X.clone().requires_grad_()
    y = work(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).double())
    layers = norm_layers(work)
    return [y, gradient, *(layer.mean.flatten() for layer in layers), *(layer.var.flatten() for layer in layers)]


def tails(model):
    return [[type(part).__name__ for part in layer.tail] for layer in norm_layers(model)]


@pytest.mark.parametrize("to", EXACT)
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_exact_conversions_keep_the_function_in_evaluation_and_in_training(cls, to):
    model = network(cls)
    before = fingerprint(model)
    if cls in BIASED and to in ("torch", "batch"):
        with pytest.raises(SurgeryError, match="biased variance, which torch's layers cannot"):
            convert(model, to, X)
        assert fingerprint(model) == before
        return
    already = {foreign.BatchNormAct2d: ("torch", "batch")}
    if to in already.get(cls, ()):
        with pytest.raises(SurgeryError, match="already"):
            convert(model, to, X)
        return
    record = convert(model, to, X)
    assert fingerprint(model) == before
    assert record.touched == ("1", "3")
    assert not record.refused
    assert_close(record.model(X), model(X), dtype=torch.float64)
    assert tails(record.model) == tails(model)
    if to != "frozen":
        for given, expected in zip(step(record.model), step(model), strict=True):
            assert_close(given, expected, dtype=torch.float64)
        kind = {"normkit": normkit.BatchNorm2d, "sync": normkit.SyncBatchNorm}.get(to, nn.BatchNorm2d)
        assert all(isinstance(record.model[place], kind) for place in (1, 3))
    if to == "frozen" or cls in FROZEN:
        assert_close(record.model.train()(X), model(X), dtype=torch.float64)


@pytest.mark.parametrize("to", ["group", "layer", "instance", "ghost", "renorm"])
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_other_forms_keep_the_tail_and_what_was_learnt(cls, to):
    model = network(cls)
    model.register_parameter("unused", None)
    record = convert(model, to, X)
    assert record.touched == ("1", "3")
    assert tails(record.model) == tails(model)
    assert all(parameter.requires_grad for parameter in record.model.parameters())
    for place in (1, 3):
        (layer,) = norm_layers(model[place])
        new = record.model[place]
        assert_close(new.weight, layer.effective_weight.flatten(), dtype=torch.float64)
        assert_close(new.bias, layer.bias.flatten(), dtype=torch.float64)
        assert new.eps == layer.eps
    if to in ("ghost", "renorm"):
        assert_close(record.model(X), model(X), dtype=torch.float64)
        assert record.model[1].momentum == norm_layers(model)[0].momentum or cls in FROZEN
        assert record.model[1].unbiased is (cls not in BIASED)
    record.model.train()(X).sum().backward()


def test_the_state_keeps_its_names_and_the_way_back_is_the_identity():
    model = network(foreign.BatchNormAct2d)
    there = convert(model, "normkit", X).model
    assert list(there.state_dict()) == list(model.state_dict())
    assert [name for name, _ in there.named_modules()] == [name for name, _ in model.named_modules()]
    back = convert(there, "torch", X).model
    assert type(back[1]) is foreign.BatchNormAct2d
    assert vars(back[1]).keys() == vars(model[1]).keys()
    assert torch.equal(back(X), model(X))
    synced = convert(model, "sync", X).model
    assert isinstance(synced[1], normkit.SyncBatchNorm)
    assert type(convert(synced, "batch", X).model[1]) is foreign.BatchNormAct2d


def test_names_that_are_others_now_are_told():
    record = convert(network(foreign.KerasNorm), "normkit", X)
    for path in ("1", "3"):
        words = "gamma is weight, beta is bias, moving_mean is running_mean, moving_variance is running_var now"
        assert f"names in the state of {path}: {words}" in record.notes
    assert sorted(record.model[1].state_dict()) == [
        "bias", "num_batches_tracked", "running_mean", "running_var", "weight",
    ]  # fmt: skip
    assert (record.model[1].momentum, record.model[1].unbiased, record.model[1].eps) == (0.01, False, 1e-3)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.PReLU, nn.Identity])
def test_the_activation_that_a_layer_brings_is_computed(act):
    model = nn.Sequential(foreign.BatchNormAct2d(3, act=act)).double().eval()
    model.train()(X)
    record = convert(model, "normkit", X)
    for mode in (True, False):
        given, expected = (copy.deepcopy(kind).train(mode)(X) for kind in (record.model, model))
        assert_close(given, expected, dtype=torch.float64)
    assert type(record.model[0]) is (normkit.BatchNorm2d if act is nn.Identity else TAILED[normkit.BatchNorm2d])


def test_a_hook_on_the_activation_still_sees_it():
    model = network(foreign.BatchNormAct2d)
    seen = []
    model[1].act.register_forward_hook(lambda module, args, output: seen.append(output))
    record = convert(model, "normkit")
    record.model(X)
    assert len(seen) == 1


def test_dropout_in_the_tail_is_dropout_in_training_alone():
    model = nn.Sequential(foreign.BatchNormAct2d(3)).double()
    model[0].drop = nn.Dropout(0.5)
    record = convert(model.eval(), "normkit", X)
    torch.manual_seed(0)
    expected = model.train()(X)
    torch.manual_seed(0)
    assert_close(record.model.train()(X), expected, dtype=torch.float64)
    assert (expected == 0).double().mean() > 0.6


@pytest.mark.parametrize("cls", [foreign.BatchNormAct2d, foreign.ABN, foreign.FrozenBatchNormAct2d])
def test_what_came_of_it_can_be_saved_copied_and_converted_on(cls):
    record = convert(network(cls), "normkit", X)
    loaded = pickle.loads(pickle.dumps(record.model))
    assert torch.equal(loaded(X), record.model(X))
    assert torch.equal(copy.deepcopy(record.model)(X), record.model(X))
    if cls not in FROZEN:
        on = convert(record.model, "frozen").model
        assert_close(on.train()(X), record.model(X), dtype=torch.float64)


def test_hooks_modes_and_shared_places_are_carried_over():
    shared = foreign.KerasNorm(3)
    model = nn.Sequential(shared, nn.ReLU(), shared).double()
    seen = []
    shared.register_forward_hook(lambda *_: seen.append(1))
    new = convert(model, "normkit", X).model
    assert new[0] is new[2]
    assert new[0].training
    seen.clear()
    new(X)
    assert len(seen) == 2


@pytest.mark.parametrize("cls", [foreign.Clipped, foreign.Scaled, foreign.Deviation, foreign.OutsideTheRoot])
@pytest.mark.parametrize("do", [lambda m: convert(m, "normkit"), freeze, lambda m: recalibrate(m, X)])
def test_an_impostor_is_left_alone_with_the_reason(cls, do):
    model = nn.Sequential(cls(3)).double()
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match=r"does not compute|does not normalize"):
        do(model)
    assert fingerprint(model) == before


def test_a_subclass_whose_methods_somebody_may_call_is_refused():
    class Asked(nn.BatchNorm2d):
        def confidence(self):
            return 1

    with pytest.raises(SurgeryError, match="its methods would be lost: confidence"):
        convert(nn.Sequential(Asked(3)), "normkit")


def test_dimensions_that_nobody_says_are_asked_for():
    model = nn.Sequential(foreign.ABN(3)).double()
    with pytest.raises(SurgeryError, match="give example="):
        convert(model, "normkit")
    assert isinstance(convert(model, "normkit", X).model[0], normkit.BatchNorm2d)
    assert isinstance(convert(model, "normkit", X[..., 0]).model[0], normkit.BatchNorm1d)


def test_a_frozen_layer_becomes_one_that_can_be_thawed():
    model = convert(network(foreign.FrozenBatchNormAct2d), "torch").model
    assert not any(parameter.requires_grad for parameter in model[1].parameters())
    normkit.unfreeze(model)
    assert all(parameter.requires_grad for parameter in model[1].parameters())
    assert isinstance(model[1], nn.BatchNorm2d)
    before = model[1].running_mean.clone()
    model.train()(X)
    assert not torch.equal(model[1].running_mean, before)


# Freezing and recalibrating


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls not in FROZEN], ids=lambda cls: cls.__name__)
def test_freezing_holds_what_train_would_move(cls):
    model = network(cls)
    expected, names = model(X), list(model.state_dict())
    record = freeze(model)
    assert record.touched == ("1", "3")
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(model.train()(X), expected)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == names
    assert not any(parameter.requires_grad for place in (1, 3) for parameter in model[place].parameters())
    normkit.unfreeze(model)
    assert type(model[1]) is cls
    assert model[1].training


def test_freezing_what_cannot_be_frozen_is_refused():
    with pytest.raises(SurgeryError, match="frozen layer of another library already"):
        freeze(network(foreign.FrozenBatchNorm2d))
    with pytest.raises(SurgeryError, match="does not heed a frozen mode"):
        freeze(network(foreign.ArticleNorm), statistics="batch")
    with pytest.raises(SurgeryError, match="only torch's and our own go on tracking"):
        freeze(network(foreign.BatchNormAct2d), track=True)
    with pytest.raises(SurgeryError, match="initial 0 and 1"):
        freeze(nn.Sequential(foreign.KerasNorm(3)))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_recalibration_measures_the_population(cls, layerwise):
    model = network(cls)
    batches = [X[:4], X[4:]]
    record = recalibrate(model, batches, layerwise=layerwise)
    assert record.touched == ("1", "3")
    divisor = 0 if cls in BIASED else 1
    for place in (1, 3):
        (layer,) = norm_layers(model[place])
        given = model[:place](X) if layerwise or place == 1 else _as_in_training(model, batches)
        assert_close(layer.mean.flatten(), given.mean((0, 2, 3)), dtype=torch.float64)
        assert_close(layer.var.flatten(), given.var((0, 2, 3), correction=divisor), dtype=torch.float64)
        shape = (1, -1, 1, 1) if cls is foreign.ArticleNorm else (-1,)
        assert layer.mean.shape == layer.mean.reshape(shape).shape
    assert model.training is False


def _as_in_training(model, batches):
    """Return what the second norm sees where the first normalizes each batch by itself."""
    (layer,) = norm_layers(model[1])
    seen = []
    for batch in batches:
        x = model[0](batch)
        wide = (1, -1, 1, 1)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + layer.eps).sqrt()
        x = x * layer.effective_weight.view(wide) + layer.bias.view(wide)
        for part in layer.tail:
            x = part(x)
        seen.append(model[2](x))
    return torch.cat(seen).detach()


def test_param_groups_leave_every_known_norm_without_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), foreign.ArticleNorm(4), nn.Conv2d(4, 4, 1, bias=False))
    groups = {group["name"]: group["params"] for group in normkit.param_groups(model, 0.1)}
    assert [id(value) for value in groups["norms and biases"]] == [id(model[1].gamma), id(model[1].beta)]


def test_port_state_reads_a_layer():
    layer = network(foreign.KerasNorm)[1]
    ported = normkit.port_state(layer, target="torch")
    assert sorted(ported.state) == ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]
    assert ported.settings == {"num_features": 5, "eps": 1e-3, "affine": True, "momentum": 0.01, "unbiased": False}
    assert (ported.state["running_var"] == layer.moving_variance.numpy()).all()
    back = normkit.port_state(foreign.BatchNormAct2d(3, momentum=0.1), target="keras")
    assert back.settings["momentum"] == 0.9
    assert "the ReLU after the layer is no part of it" in back.changes
    assert normkit.port_state(foreign.ArticleNorm(3), target="flax").state["scale"].shape == (3,)
    assert normkit.port_state(foreign.GroupNormAct(4), target="keras").settings["groups"] == 2


def test_port_state_refuses_what_cannot_be_read():
    with pytest.raises(ArgumentError, match="cannot be ported: Deviation does not compute"):
        normkit.port_state(foreign.Deviation(3), target="torch")
    with pytest.raises(ArgumentError, match="no normalization layer that is known"):
        normkit.port_state(nn.Linear(2, 2), target="torch")
    with pytest.raises(ArgumentError, match="no channels yet"):
        normkit.port_state(nn.LazyBatchNorm1d(), target="keras")
    with pytest.raises(ArgumentError, match="a layer says them itself"):
        normkit.port_state(nn.BatchNorm1d(2), source="torch", target="keras")
    with pytest.raises(ArgumentError, match="source is None"):
        normkit.port_state({}, target="keras")


@pytest.mark.parametrize("names", [("moving_mean", "moving_var"), ("moving_mean", "moving_variance")])
def test_merged_states_pool_the_variance_under_keras_names_too(names):
    mean, var = names
    states = [{mean: torch.tensor([value]), var: torch.tensor([1.0])} for value in (-5.0, 5.0)]
    merged = normkit.merge_states(states)
    assert merged[var].item() == 26.0


def test_inplace_keeps_the_parameters_and_the_optimizer_goes_on():
    model, twin = network(foreign.BatchNormAct2d), network(foreign.BatchNormAct2d)
    names = {name: id(value) for name, value in model.named_parameters()}
    optimizer, other = (torch.optim.SGD(kind.parameters(), 0.1, momentum=0.9) for kind in (model, twin))
    record = convert(model, "normkit", X, inplace=True)
    assert record.model is model
    assert {name: id(value) for name, value in model.named_parameters()} == names
    for kind, steps in ((model, optimizer), (twin, other)):
        kind.train()
        for _ in range(3):
            steps.zero_grad()
            kind(X).square().mean().backward()
            steps.step()
    for given, expected in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert_close(given, expected, dtype=torch.float64)


def test_a_conversion_in_place_that_is_refused_leaves_no_trace(monkeypatch):
    model = network(foreign.BatchNormAct2d)
    before = fingerprint(model)
    monkeypatch.setattr(TAILED[normkit.BatchNorm2d], "forward", lambda self, x: nn.BatchNorm2d.forward(self, x))
    with pytest.raises(SurgeryError, match="should keep the function"):
        convert(model, "normkit", X, inplace=True)
    assert fingerprint(model) == before


def test_tolerance_and_compare_decide():
    class Sorted(nn.Module):
        """Outputs in an order that the last bit decides, as a detector has them, and of varying number."""

        def __init__(self):
            super().__init__()
            self.body, self.odd = network(foreign.BatchNormAct2d).float(), False

        def forward(self, x):
            y = self.body(x).flatten(1).sum(1).sort().values
            shorter = isinstance(self.body[1], normkit.BatchNorm2d)
            return y[1:] if shorter else y

    model = Sorted().eval()
    with pytest.raises(SurgeryError, match="give compare="):
        convert(model, "normkit", X.float())
    given = convert(model, "normkit", X.float(), compare=lambda one, other: abs(one[-1] - other[-1]) / other[-1].abs())
    assert given.largest_change < 1e-5

    def apart(one, other):
        return 0.0 if len(one) == len(other) else 1e-3

    with pytest.raises(SurgeryError, match="should keep the function"):
        convert(model, "normkit", X.float(), compare=apart)
    assert convert(model, "normkit", X.float(), tolerance=1e-2, compare=apart).largest_change == 1e-3


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("to", ["normkit", "frozen", "group"])
def test_an_exception_in_any_layer_leaves_a_model_converted_in_place_bit_identical(place, to):
    model = network(foreign.BatchNormAct2d)
    with failing(model[place]):
        before = fingerprint(model)
        with pytest.raises(Failure):
            convert(model, to, X, inplace=True)
        assert fingerprint(model) == before


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, foreign.BatchNormAct2d])
def test_a_frozen_layer_is_converted_there_and_back_and_stays_frozen(cls):
    model = network(cls)
    freeze(model, affine=True, statistics="batch")
    freeze(model, where="3")
    with pytest.raises(SurgeryError, match="unfreeze it first"):
        convert(model, "group", X)
    there = convert(model, "normkit", X).model
    assert isinstance(there[1], normkit.BatchNorm2d)
    back = convert(there, "torch", X).model
    for changed in (there, back):
        assert [layer.kind for layer in norm_layers(changed)] == ["frozen", "frozen"]
        assert_close(changed.train()(X), model.train()(X), dtype=torch.float64)
        assert changed[3].weight.requires_grad is False
        assert changed[1].weight.requires_grad is True
    assert type(back[1]) is type(model[1])
    normkit.unfreeze(back)
    assert type(back[1]) is cls
    assert back[3].weight.requires_grad is True


@pytest.mark.parametrize("decay", ["0.1", None, True, -0.1, float("nan"), float("inf")])
def test_a_weight_decay_that_is_no_number_is_refused(decay):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ArgumentError, match=r"^weight_decay=.*; a number is needed that is finite"):
        normkit.param_groups(model, decay)
    with pytest.raises(ArgumentError, match=r"^norm_weight_decay=.*; a number is needed that is finite"):
        normkit.param_groups(model, 0.1, norm_weight_decay=decay)
