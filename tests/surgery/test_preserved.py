"""What no operation may lose: types, modes, learning flags, hooks, modules in several places, parametrizations."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

import normkit
from normkit.errors import SurgeryError
from normkit.surgery.convert_classes import KINDS

from .networks import randomize

EXAMPLE = torch.linspace(-1, 1, 4 * 3 * 8 * 8, dtype=torch.float64).reshape(4, 3, 8, 8).sin()
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


class Rich(nn.Module):
    """A layer of each kind of tie: hooked, standing twice, parametrized, part of it fixed, part in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv2d(3, 8, 3))
        self.hooked = nn.BatchNorm2d(8)
        self.plain = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.shared = nn.BatchNorm2d(8)
        self.again = self.shared
        self.held = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.plain[1].bias.requires_grad_(False)
        self.held[0].requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.shared(self.plain(self.hooked(self.first(images))).relu())
        return self.held(self.again(hidden.relu()))


def rich() -> Rich:
    return randomize(Rich()).double()


def traits(model: nn.Module) -> dict[str, object]:
    """Name what is to stay; the norms' own classes and statistics may change."""
    found: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path} mode"] = module.training
        found[f"{path} hooks"] = [list(vars(module)[kind].values()) for kind in HOOKS]
        found[f"{path} is parametrized"] = is_parametrized(module)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{name} learns"] = parameter.requires_grad
        found[f"{name} type"] = (parameter.dtype, parameter.device, tuple(parameter.shape))
    found["shared"] = model.shared is model.again
    return found


def lost(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    return {name: (value, after[name]) for name, value in before.items() if name in after and after[name] != value}


@pytest.mark.parametrize("to", KINDS)
def test_convert_keeps_what_a_model_has_or_refuses_the_layer(to):
    source = {"torch": "normkit", "batch": "sync"}.get(to)
    model = rich() if source is None else normkit.convert(rich(), source, EXAMPLE, fuse=False).model
    before = traits(model)
    record = normkit.convert(model, to, EXAMPLE)
    assert traits(model) == before
    changed = lost(before, traits(record.model))
    if to == "frozen":  # which is what it is for
        changed = {name: value for name, value in changed.items() if not name.endswith(("learns", "mode"))}
    assert not changed
    assert not [name for name in before.keys() - traits(record.model).keys() if not _is_fused(name, record)]
    assert {"hooked", "plain.1", "held.1"} <= {*record.touched, *record.refused}


def _is_fused(name, record):
    return any(name.startswith(path) for path in getattr(record, "fused", {}))


def test_operations_on_the_state_keep_everything_else():
    model = rich()
    before = traits(model)
    normkit.recalibrate(model, EXAMPLE.split(2))
    normkit.recalibrate(model, EXAMPLE.split(2), layerwise=True)
    assert traits(model) == before
    model.shared.running_var[1] = torch.inf
    record = normkit.repair(model, EXAMPLE.split(2))
    assert record.touched == ("shared",)
    assert traits(model) == before
    normkit.freeze(model)
    assert model.shared is model.again
    normkit.unfreeze(model)
    assert traits(model) == before


def test_fold_keeps_what_a_model_has_and_refuses_what_it_would_lose():
    model = rich().eval()
    before = traits(model)
    record = normkit.fold(model, EXAMPLE)
    assert traits(model) == before
    assert record.touched == ("plain.1", "held.1")
    assert "hook" in record.refused["hooked"]
    assert "its input comes from relu" in record.refused["shared"]
    after = traits(record.model)
    kept = {name: value for name, value in lost(before, after).items() if not name.startswith(record.touched)}
    assert not kept


def test_parametrized_norm_is_refused_where_its_class_would_change():
    model = nn.Sequential(weight_norm(nn.BatchNorm2d(3), dim=None))
    for to in ("sync", "group", "normkit"):
        with pytest.raises(SurgeryError, match="parametriz"):
            normkit.convert(model, to)


class Stages(nn.Module):
    """Its forward goes through functions that were made around its layers."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        norm = self.norm
        if how == "over the model":
            self.stages = [lambda x: self.norm(self.conv(x))]
        elif how == "over a layer":
            self.stages = {"norm": lambda x: norm(self.conv(x))}
        elif how == "in private pairs":
            self._pairs = [("norm", lambda x: norm(self.conv(x)))]
            self.stages = ()
        elif how == "by a default":
            self.stages = (lambda x, layers=self: layers.norm(layers.conv(x)),)
        else:
            forward = self.norm.forward
            self.norm.forward = lambda x: forward(x)
            self.stages = ()

    def forward(self, x):
        stages = self.stages.values() if isinstance(self.stages, dict) else self.stages
        for stage in (*stages, *(stage for _, stage in getattr(self, "_pairs", ()))):
            return stage(x)
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    "how", ["over the model", "over a layer", "in private pairs", "by a default", "a wrapped forward"]
)
@pytest.mark.parametrize("operation", [normkit.fold, lambda model, x: normkit.convert(model, "group", x)])
def test_a_function_around_the_given_layers_is_refused_where_a_copy_would_call_it(operation, how):
    model, x = Stages(how).eval(), torch.randn(2, 3, 6, 6)
    named = {"a wrapped forward": "norm.forward", "in private pairs": "_pairs"}.get(how, "stages")
    with pytest.raises(SurgeryError, match=rf"{named} is a function made around the model's own layers"):
        operation(model, x)


def test_hooks_and_functions_of_their_own_are_no_obstacle():
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[0].register_forward_hook(lambda module, args, output: seen.append(model))
    model.scale = lambda value: 2 * value
    assert normkit.convert(model, "normkit", torch.randn(2, 3, 6, 6)).touched == ("1",)
