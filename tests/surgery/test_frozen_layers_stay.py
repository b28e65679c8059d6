"""A frozen layer survives every tool that handles batch norm by class, or refuses it and says the way out."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, replace_all_batch_norm_modules_
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.anatomy.frozen import is_frozen, moved
from normkit.errors import SurgeryError
from torch_versions import uses_torchscript

LAYERS = {
    "torch": lambda: nn.BatchNorm2d(4),
    "torch sync": lambda: nn.SyncBatchNorm(4),
    "ours": lambda: normkit.BatchNorm2d(4),
    "ours, biased": lambda: normkit.BatchNorm2d(4, unbiased=False, momentum=None),
    "with an activation": lambda: normkit.BatchNormAct2d(4, activation="leaky_relu"),
    "torch instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "our instance": lambda: normkit.InstanceNorm2d(4, affine=True, track_running_stats=True),
}
FAMILY = {
    "ghost": lambda: normkit.GhostBatchNorm2d(4, ghost_size=4),
    "renorm": lambda: normkit.BatchRenorm2d(4),
    "whitening": lambda: normkit.WhiteningBatchNorm2d(4, num_groups=2),
}
LAYERS |= FAMILY
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def frozen_network(make, **switches):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), make(), nn.ReLU())
    for value in model.parameters():
        nn.init.normal_(value)
    norm = normkit.anatomy.norm_layers(model)[0].module
    norm.running_mean.normal_()
    if isinstance(norm, normkit.WhiteningBatchNorm2d):
        norm.running_covariance.copy_(torch.tensor([[2.0, 0.3], [0.3, 1.5]]))
    else:
        norm.running_var.uniform_(0.5, 2.0)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(7)
    model.eval()
    normkit.freeze(model, **switches)
    return model, normkit.anatomy.norm_layers(model)[0].module


def bad_initialisation(module):
    if hasattr(module, "reset_parameters") and not isinstance(module, nn.Conv2d):
        module.reset_parameters()


def replaced(model, norm):
    return replace_all_batch_norm_modules_(model)


def through_pickle(model, norm):
    return pickle.loads(pickle.dumps(model))


def through_file(model, norm):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model, norm):
    average = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    return average.module


def loaded(model, norm, **how):
    model.load_state_dict(copy.deepcopy(model.state_dict()), **how)
    return model


def called_with_other_buffers(model, norm):
    other = {name: torch.ones_like(value) for name, value in model.state_dict().items() if "running" in name}
    functional_call(model, other, torch.randn(2, 3, 5, 5))
    return model


SURVIVED = {
    "train()": lambda model, norm: model.train(),
    "update_bn": lambda model, norm: update_bn([torch.randn(8, 3, 6, 6) * 5], model),
    "reset_running_stats": lambda model, norm: norm.reset_running_stats(),
    "reset_parameters": lambda model, norm: norm.reset_parameters(),
    "apply": lambda model, norm: model.apply(bad_initialisation),
    "momentum": lambda model, norm: setattr(norm, "momentum", 1.0),
    "deepcopy": lambda model, norm: copy.deepcopy(model),
    "pickle": through_pickle,
    "torch.save": through_file,
    "AveragedModel": averaged,
    "load_state_dict": loaded,
    "load_state_dict(assign=True)": lambda model, norm: loaded(model, norm, assign=True),
    "functional_call": called_with_other_buffers,
    "double and back": lambda model, norm: model.double().float(),
    "to(memory_format)": lambda model, norm: model.to(memory_format=torch.channels_last),
    "fx": lambda model, norm: torch.fx.symbolic_trace(model) and None,
    "trace": lambda model, norm: torch.jit.trace(model, torch.randn(2, 3, 6, 6), check_trace=False) and None,
    "requires_grad_(False)": lambda model, norm: model.requires_grad_(False),
}
SPEAKING = ("update_bn", "reset_running_stats", "reset_parameters", "apply")


@every_layer
@pytest.mark.parametrize("name", SURVIVED)
@uses_torchscript
def test_survives(make, name):
    model, norm = frozen_network(make)
    x = torch.randn(8, 3, 6, 6) * 3 + 1
    want, state, untouched = model(x), copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = SURVIVED[name](model, norm)
    words = [str(warning.message) for warning in said if "is frozen by normkit.freeze" in str(warning.message)]
    by_class = name != "update_bn" or isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert bool(words) == (name in SPEAKING and by_class), words
    assert all("normkit.unfreeze(model) first" in word for word in words)
    model = result if isinstance(result, nn.Module) and len(list(result.children())) == 3 else model
    assert is_frozen(normkit.anatomy.norm_layers(model)[0].module)
    if name == "to(memory_format)":  # a convolution adds in another order then, on some processors
        want = untouched.to(memory_format=torch.channels_last)(x)
    model.train()(x * 5)
    assert torch.equal(model.train()(x), want)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not moved(normkit.anatomy.norm_layers(model)[0].module)


def test_a_layer_that_holds_a_frozen_one_changes_nothing_either():
    model, norm = frozen_network(LAYERS["with an activation"])
    with pytest.raises(normkit.errors.SurgeryError, match="running_mean would be taken away"):
        model[1].running_mean = None
    assert model[1].running_mean is norm.running_mean is not None


def drop(norm, name):
    delattr(norm, name)


REFUSED = {
    "convert_sync_batchnorm": lambda model, norm: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    "replace_all_batch_norm_modules_": replaced,
    "running_mean = None": lambda model, norm: setattr(norm, "running_mean", None),
    "running_var = other": lambda model, norm: setattr(norm, "running_var", torch.ones(4)),
    "num_batches_tracked = other": lambda model, norm: setattr(norm, "num_batches_tracked", torch.tensor(0)),
    "track_running_stats = False": lambda model, norm: setattr(norm, "track_running_stats", False),
    "del running_mean": lambda model, norm: drop(norm, "running_mean"),
    "register_buffer": lambda model, norm: norm.register_buffer("running_mean", torch.zeros(4)),
    "script": lambda model, norm: torch.jit.script(model),
}


@every_layer
@pytest.mark.parametrize("name", REFUSED)
@uses_torchscript
def test_refuses_with_the_way_out_and_nothing_changed(make, name):
    model, norm = frozen_network(make)
    by_class = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if name in ("convert_sync_batchnorm", "replace_all_batch_norm_modules_") and not by_class:
        pytest.skip("the tool leaves instance norms alone")
    if name == "running_var = other" and isinstance(norm, normkit.WhiteningBatchNorm2d):
        pytest.skip("it has a covariance")
    x = torch.randn(8, 3, 6, 6) * 3 + 1
    want, state = model(x), copy.deepcopy(model.state_dict())
    words = r"is frozen by normkit.freeze.*normkit.unfreeze\(model\)"
    if name == "script" and isinstance(model[1], normkit.BatchNormAct2d):
        words = r"TorchScript cannot read BatchNormAct2d.*torch\.export"
    with pytest.raises(normkit.errors.NormkitError, match=words) as said:
        REFUSED[name](model, norm)
    assert name != "running_mean = None" or "running_mean would be taken away" in str(said.value)
    assert torch.equal(model.train()(x), want)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    normkit.unfreeze(model)
    if name == "convert_sync_batchnorm":
        assert nn.SyncBatchNorm in map(type, nn.SyncBatchNorm.convert_sync_batchnorm(model).modules())


@pytest.mark.parametrize("make", [LAYERS["torch"], LAYERS["ours"]], ids=["torch", "ours"])
def test_what_may_move_may_be_reset(make):
    _, norm = frozen_network(make, track=True, affine=True)
    norm.reset_parameters()
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.weight, torch.ones(4))
    _, norm = frozen_network(make, affine=True)
    with pytest.warns(UserWarning, match="its running statistics stay"):
        norm.reset_parameters()
    assert norm.num_batches_tracked == 7
    assert torch.equal(norm.weight, torch.ones(4))
    assert norm.running_mean.any()


@pytest.mark.parametrize("make", [LAYERS["torch"], LAYERS["ours"]], ids=["torch", "ours"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_frozen_layer_that_tracks_moves_once_under_checkpointing(make, reentrant):
    model, _ = frozen_network(make, track=True, affine=True)
    model.train()
    twin, x = copy.deepcopy(model), torch.randn(2, 6, 3, 6, 6, requires_grad=True)
    for called, run in ((model, lambda part: checkpoint(model, part, use_reentrant=reentrant)), (twin, twin)):
        y = torch.cat([run(part) for part in x.unbind()])
        y.pow(2).sum().backward()
        called.grads = [x.grad, *(value.grad for value in called.parameters())]
        x.grad = None
    for one, other in zip(model.grads, twin.grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)


class StartsAgain(nn.BatchNorm2d):
    """A class of the user's whose reset asks no other method."""

    def reset_parameters(self):
        with torch.no_grad():
            for value in (*self._parameters.values(), *self._buffers.values()):
                value.zero_()


def test_what_a_class_of_its_own_starts_again_is_put_back():
    model, norm = frozen_network(lambda: StartsAgain(4))
    state = copy.deepcopy(model.state_dict())
    norm.reset_parameters()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def wipe(norm):
    norm.running_mean.zero_()


def learn(norm):
    norm.requires_grad_(True)
    with torch.no_grad():
        norm.weight += 1


@every_layer
@pytest.mark.parametrize(("write", "name"), [(wipe, "running_mean"), (learn, "weight")])
def test_the_doctor_and_watch_tell_a_frozen_layer_that_moves(make, write, name):
    model, norm = frozen_network(make)
    assert not normkit.diagnose(model).of("freeze-leak")
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with normkit.watch(model) as ledger:
        for turn in range(2):
            model.train()(torch.randn(4, 3, 6, 6)).sum().backward()
            optimizer.step()
            if turn == 0:
                write(norm)
    for diagnosis in (normkit.diagnose(model), ledger.diagnosis()):
        found = [finding for finding in diagnosis.of("freeze-leak") if finding.severity == "error"]
        assert len(found) == 1
        assert re.fullmatch(rf"frozen by normkit.freeze, and {name} changed since", found[0].summary)
    normkit.freeze(model)
    assert not [finding for finding in normkit.diagnose(model).of("freeze-leak") if finding.severity == "error"]


def test_what_our_own_tools_write_is_no_leak():
    model, norm = frozen_network(LAYERS["ours"])
    normkit.recalibrate(model, torch.randn(16, 3, 6, 6), include_frozen=True)
    assert not moved(norm)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert not moved(norm)


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_relatives_are_frozen_with_their_running_statistics_alone(make):
    model = nn.Sequential(make())
    model(torch.randn(8, 4, 3, 3))
    for switches in ({"track": True}, {"statistics": "batch"}):
        with pytest.raises(normkit.errors.SurgeryError, match="frozen with its running statistics, held still"):
            normkit.freeze(model, **switches)
    model, norm = frozen_network(make)
    normkit.unfreeze(model)
    assert type(norm) is type(make())
    model.train()(torch.randn(8, 3, 6, 6))
    assert norm.num_batches_tracked == 8


def test_a_frozen_masked_norm_takes_its_mask():
    layer = normkit.MaskedBatchNorm1d(4)
    x, mask = torch.randn(6, 4, 7) + 1, torch.rand(6, 7) < 0.7
    layer(x, mask)
    want = layer.eval()(x, mask)
    normkit.freeze(layer)
    assert torch.equal(layer.train()(x, mask), want)


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_folding_a_frozen_relative_keeps_what_it_computes(make):
    model, _ = frozen_network(make)
    x = torch.randn(8, 3, 6, 6)
    want = model.eval()(x)
    try:
        folded = normkit.fold(model, x).model
    except normkit.errors.SurgeryError:
        return
    torch.testing.assert_close(folded.eval()(x), want, rtol=1e-5, atol=1e-5)


def test_unfreeze_refuses_a_class_that_came_between():
    model, norm = frozen_network(LAYERS["torch"])
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    with pytest.raises(normkit.errors.SurgeryError, match="made a ParametrizedFrozenBatchNorm2d by another library"):
        normkit.unfreeze(model)
    nn.utils.parametrize.remove_parametrizations(norm, "weight")
    normkit.unfreeze(model)
    assert type(norm) is nn.BatchNorm2d


def test_the_batchs_statistics_frozen_refuse_to_lose_the_stored_ones():
    model = nn.Sequential(nn.BatchNorm2d(3))
    normkit.freeze(model, statistics="batch")
    with pytest.raises(SurgeryError, match="track_running_stats=False"):
        model[0].track_running_stats = False
    normkit.unfreeze(model)
    assert model[0].track_running_stats
