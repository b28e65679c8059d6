"""The state of torch's older weight norm, ``weight_g`` and ``weight_v``, in a layer with WeightNorm."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import normkit
from tolerances import assert_close

LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), (3, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 3, 3), (2, 4, 7)),
}
REGISTER = {
    "ours": lambda layer, dim: normkit.WeightNorm.register(layer, dim=dim),
    "torch's": lambda layer, dim: parametrize.register_parametrization(layer, "weight", normkit.WeightNorm(dim)),
}


def older(layer: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """The layer under ``torch.nn.utils.weight_norm``, which torch calls deprecated, with lengths that are not v's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, name, dim)
    with torch.no_grad():
        getattr(layer, f"{name}_g").mul_(1.5)
    return layer


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("register", REGISTER)
@pytest.mark.parametrize("kind", LAYERS)
def test_older_names_load(kind, register, dim):
    make, shape = LAYERS[kind]
    x, old = torch.randn(shape), older(make(), dim=dim)
    state = old.state_dict()
    kept, names = copy.deepcopy(state), list(state)
    new = REGISTER[register](make(), dim)
    assert str(new.load_state_dict(state)) == "<All keys matched successfully>"
    assert_close(new(x).detach(), old(x).detach(), dtype=torch.float32)
    assert list(state) == names
    assert all(torch.equal(value, kept[name]) for name, value in state.items())
    torchs = parametrizations.weight_norm(make(), dim=dim)
    torchs.load_state_dict(new.state_dict())
    assert_close(torchs(x).detach(), old(x).detach(), dtype=torch.float32)


@pytest.mark.parametrize("register", REGISTER)
def test_older_names_load_below_a_prefix_and_into_a_copy(register):
    def net(wrap):
        return nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), wrap(nn.Linear(4, 5))), "b": wrap(nn.Linear(5, 2))})

    old = net(older)
    new = copy.deepcopy(net(lambda layer: REGISTER[register](layer, 0)))
    untouched = {name: value.clone() for name, value in net(lambda layer: layer).state_dict().items()}
    twin = copy.deepcopy(new)
    new.load_state_dict(old.state_dict(), assign=True)
    x = torch.randn(3, 4)
    assert_close(new["b"](new["a"](x)).detach(), old["b"](old["a"](x)).detach(), dtype=torch.float32)
    assert not torch.equal(twin["b"].weight, new["b"].weight)
    assert untouched.keys() == net(lambda layer: layer).state_dict().keys()


def test_older_names_of_several_tensors_load():
    old, new = nn.LSTM(3, 4), nn.LSTM(3, 4)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        older(old, name)
        parametrize.register_parametrization(new, name, normkit.WeightNorm())
    assert str(new.load_state_dict(old.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(2, 5, 3)
    assert_close(new(x)[0].detach(), old(x)[0].detach(), dtype=torch.float32)


def test_older_names_load_where_another_parametrization_follows():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    old, new = older(nn.Linear(4, 5)), normkit.WeightNorm.register(nn.Linear(4, 5))
    parametrize.register_parametrization(new, "weight", Halved())
    new.load_state_dict(old.state_dict())
    old(torch.randn(1, 4))  # its weight is computed in the forward
    assert_close(new.weight.detach(), old.weight.detach() / 2, dtype=torch.float32)


@pytest.mark.parametrize("fault", ["no length", "no direction", "both names", "another size", "plain"])
def test_strict_loading_still_names_what_is_wrong(fault):
    new = normkit.WeightNorm.register(nn.Linear(4, 5))
    before, state = copy.deepcopy(new.state_dict()), older(nn.Linear(4, 5)).state_dict()
    if fault == "no length":
        del state["weight_g"]
    elif fault == "no direction":
        del state["weight_v"]
    elif fault == "both names":
        state |= new.state_dict()
    elif fault == "another size":
        state["weight_g"] = torch.ones(4, 1)
    else:
        state = nn.Linear(4, 5).state_dict()
    said = {
        "no length": r"Missing key.*original0.*\n.*Unexpected key.*weight_v",
        "no direction": r"Missing key.*original0.*\n.*Unexpected key.*weight_g",
        "both names": r"Unexpected key.*weight_g",
        "another size": r"size mismatch for parametrizations.weight.original0",
        "plain": r"Missing key.*original0.*\n.*Unexpected key.*\"weight\"",
    }[fault]
    with pytest.raises(RuntimeError, match=said):
        new.load_state_dict(state)
    assert new.state_dict().keys() == before.keys()


def test_one_length_for_all_is_explained():
    """torch's -1 is None; ours is the last dimension."""
    new = normkit.WeightNorm.register(nn.Linear(4, 5), dim=-1)
    with pytest.raises(RuntimeError, match=r"weight_g is a single length.*register WeightNorm\(dim=None\)"):
        new.load_state_dict(older(nn.Linear(4, 5), dim=-1).state_dict())
    right = normkit.WeightNorm.register(nn.Linear(4, 5), dim=None)
    right.load_state_dict(older(nn.Linear(4, 5), dim=-1).state_dict())


def test_a_layer_whose_weight_norm_was_removed_takes_its_plain_state():
    layer = parametrize.remove_parametrizations(normkit.WeightNorm.register(nn.Linear(4, 5)), "weight")
    layer.load_state_dict(nn.Linear(4, 5).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_g"):
        layer.load_state_dict(older(nn.Linear(4, 5)).state_dict())


def test_a_parametrization_that_stands_alone_asks_for_no_layer():
    length, direction = normkit.WeightNorm().right_inverse(torch.randn(3, 2))
    assert length.shape == (3, 1)
    assert direction.shape == (3, 2)
