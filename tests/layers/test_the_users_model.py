"""Tools that read or rebuild a model leave the user's own as it was: TorchScript, tracers, exporters, torch.ao."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import normkit
from normkit.layers.catalog import METHODS
from tolerances import assert_close
from torch_versions import uses_torchscript

pytestmark = [uses_torchscript, pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")]

DIMENSIONS = {
    f"{row.name} {dimensions}": (row, dimensions)
    for row in METHODS
    for dimensions in row.layers
    if not (row.name == "masked" and dimensions > 1)
}
MORE = {
    "batch, biased": lambda: normkit.BatchNorm2d(8, unbiased=False),
    "batch, plain average": lambda: normkit.BatchNorm2d(8, momentum=None),
    "batch, no statistics": lambda: normkit.BatchNorm2d(8, track_running_stats=False),
    "batch, no affine": lambda: normkit.BatchNorm2d(8, affine=False),
    "batch, no bias": lambda: normkit.BatchNorm2d(8, bias=False),
    "batch and activation": lambda: normkit.BatchNormAct2d(8),
    "instance, tracking": lambda: normkit.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "weight norm": lambda: normkit.WeightNorm.register(nn.Conv2d(8, 8, 1)),
    "weight standardization": lambda: normkit.WeightStandardization.register(nn.Conv2d(8, 8, 1)),
}


def model_of(name):
    """A layer between others, twice in the model, in a list and in a dict."""
    if name in MORE:
        layer, dimensions = MORE[name](), 2
    else:
        row, dimensions = DIMENSIONS[name]
        layer = row.build(8, dimensions)
    x = torch.randn(4, 8, *(3,) * dimensions)
    return nn.Sequential(nn.Identity(), nn.Sequential(layer, nn.ReLU()), layer), x


every_layer = pytest.mark.parametrize("name", [*DIMENSIONS, *MORE])
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def everything(model):
    """All that makes a model: its modules and tensors by identity, their classes, modes and contents."""
    return (
        [(path, id(module), type(module), module.training) for path, module in model.named_modules()],
        [(name, id(value)) for name, value in [*model.named_parameters(), *model.named_buffers()]],
    )


def assert_untouched(model, before, state, tool):
    assert everything(model) == before, tool
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{tool}: {key}"


_BATCH, _INSTANCE = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
SCRIPTED = (_BATCH, _INSTANCE, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


@every_layer
@both_modes
def test_script_leaves_the_model_alone_and_runs_torchs_layer_or_is_refused(name, training):
    model, x = model_of(name)
    model.train(training)
    before, state = everything(model), copy.deepcopy(model.state_dict())
    biased = name == "batch, biased" and training
    if isinstance(model[2], SCRIPTED) and not biased:
        scripted = torch.jit.script(model)
        assert_untouched(model, before, state, "script")
        assert_close(scripted(x).detach(), copy.deepcopy(model)(x).detach(), dtype=torch.float32)
        assert not training or name != "batch 2" or model[2].num_batches_tracked == 2
        # torch's local response norm takes what it is given.
        if not isinstance(model[2], nn.LocalResponseNorm):
            with pytest.raises(Exception, match=r"(?i)expected|dimension|shape|channels"):
                scripted(torch.randn(3, 1, 1, 1, 1, 1))
    else:
        with pytest.raises(normkit.errors.ArgumentError, match=r"TorchScript.*torch\.export"):
            torch.jit.script(model)
        assert_untouched(model, before, state, "script")


def test_a_scripted_layer_cannot_be_put_back_into_a_training_that_it_would_do_wrong():
    scripted = torch.jit.script(normkit.BatchNorm2d(4, unbiased=False).eval())
    scripted(torch.randn(2, 4, 3, 3))
    with pytest.raises(torch.jit.Error, match="cannot store these statistics"):
        scripted.train()(torch.randn(2, 4, 3, 3))


def test_a_refusal_half_way_leaves_the_layers_before_it():
    model = nn.Sequential(normkit.BatchNorm2d(4), normkit.GroupNorm(2, 4), normkit.BatchRenorm2d(4))
    before, state = everything(model), copy.deepcopy(model.state_dict())
    with pytest.raises(normkit.errors.ArgumentError, match=r"BatchRenorm2d.*torch\.export"):
        torch.jit.script(model)
    assert_untouched(model, before, state, "script")


TOOLS = {
    "trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)),
    "compile": lambda model, x: torch.compile(model, backend="eager")(x),
    "swap": lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
}
TRACED = [name for name in DIMENSIONS if name.split()[0] in ("batch", "group", "instance", "layer", "rms")]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", TRACED)
def test_other_tools_leave_the_model_alone(name, tool):
    model, x = model_of(name)
    model.eval()
    before, state = everything(model), copy.deepcopy(model.state_dict())
    TOOLS[tool](model, x)
    assert_untouched(model, before, state, tool)


@pytest.mark.parametrize("training", [False, True])
def test_torch_ao_works_on_its_own_copy(training):
    fuse = torch.ao.quantization.fuse_modules_qat if training else torch.ao.quantization.fuse_modules
    for make in (normkit.BatchNorm2d, nn.BatchNorm2d):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), make(4), nn.ReLU()).train(training)
        before, state = everything(model), copy.deepcopy(model.state_dict())
        with contextlib.suppress(NotImplementedError, AssertionError):
            fuse(model, [["0", "1"]])
        assert_untouched(model, before, state, "fuse_modules")
