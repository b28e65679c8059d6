"""A fused layer has torch's names, whoever asks, and one tensor for each."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import normkit
from normkit import convert, fold, repair
from normkit.anatomy import norm_layers
from normkit.errors import ArgumentError
from tolerances import assert_close

from .networks import randomize

EXAMPLE = torch.linspace(-3, 5, 3 * 4 * 6 * 5).reshape(3, 4, 6, 5).sin()


def plain():
    torch.manual_seed(2)
    return randomize(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())).eval()


def fused(model=None):
    record = convert(plain() if model is None else model, "normkit", EXAMPLE)
    assert record.fused == {"1": "relu"}
    return record.model


def names(model):
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


def one_tensor_each(layer):
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(layer, name) is getattr(layer.norm, name), name


def moved(model):
    return {key: value + 0.5 if value.is_floating_point() else value for key, value in model.state_dict().items()}


def test_parameters_buffers_and_state_have_torchs_names():
    model, layer = plain(), fused()
    assert names(layer) == names(model)
    assert list(layer.state_dict()) == list(model.state_dict())
    assert [name for name, _ in layer.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [found.path for found in norm_layers(layer)] == ["1.norm"]
    one_tensor_each(layer[1])


def test_functional_call_takes_the_norms_part_of_a_state():
    model = plain()
    state = moved(model)
    first, second = (torch.func.functional_call(each, state, EXAMPLE) for each in (model, fused()))
    assert_close(second.detach(), first.detach(), dtype=torch.float32)
    layer = fused()
    torch.func.functional_call(layer, state, EXAMPLE)
    assert_close(layer(EXAMPLE).detach(), model(EXAMPLE).detach(), dtype=torch.float32)


def test_distributed_checkpoints_and_exports_have_torchs_names():
    model, layer = plain(), fused()
    assert list(get_model_state_dict(layer)) == list(model.state_dict())
    set_model_state_dict(layer, moved(model))
    assert torch.equal(layer[1].norm.weight, model[1].weight + 0.5)
    assert list(layer.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_torchs_own_export_has_torchs_names_alone(strict, training):
    model, layer = plain().train(training), fused().train(training)
    given = torch.export.export(model, (EXAMPLE,), strict=strict)
    program = torch.export.export(layer, (EXAMPLE,), strict=strict)
    assert program.state_dict.keys() == given.state_dict.keys() == model.state_dict().keys()
    assert program.graph_signature.parameters == given.graph_signature.parameters
    assert set(program.graph_signature.buffers) <= set(model.state_dict())
    expected = model(EXAMPLE).detach()
    for module in (program.module(), layer):
        assert_close(module(EXAMPLE).detach(), expected, dtype=torch.float32)
    if training:
        written = program.module()
        written(EXAMPLE)
        assert_close(written.state_dict()["1.running_mean"], layer[1].running_mean, dtype=torch.float32)
    one_tensor_each(layer[1])


def test_names_of_every_place_have_each_tensor_once():
    model, layer = plain(), fused()
    for name in ("named_parameters", "named_buffers"):
        found, expected = (list(dict(getattr(each, name)(remove_duplicate=False))) for each in (layer, model))
        assert found == expected
    assert "1.norm" in dict(layer.named_modules())


def test_part_that_torch_put_in_is_listed_until_its_tensors_are_shared():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(fused())
    state = moved(plain())
    torch.func.functional_call(layer, state, EXAMPLE)  # what is given reaches what runs
    names_of_all = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    assert ("1.norm.weight" in names_of_all) == (layer[1]._parameters is not layer[1].norm._parameters)
    expected = torch.func.functional_call(plain(), state, EXAMPLE)
    assert_close(torch.func.functional_call(layer, state, EXAMPLE).detach(), expected.detach(), dtype=torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.double(),
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.to("meta").to_empty(device="cpu"),
        lambda layer: nn.SyncBatchNorm.convert_sync_batchnorm(layer),
        lambda layer: layer.load_state_dict(moved(plain()), assign=True) and layer,
        lambda layer: layer.load_state_dict(moved(plain())) and layer,
        lambda layer: repair(layer.bfloat16()).model,
    ],
    ids=["double", "copy", "pickle", "empty", "sync", "assign", "load", "repair"],
)
def test_there_is_one_tensor_for_each_name_after(change):
    layer = change(fused())
    one_tensor_each(layer[1])
    assert names(layer) == names(plain())


def test_new_tensor_and_new_part_are_taken_over():
    layer = fused()
    layer[1].weight = nn.Parameter(torch.full((6,), 2.0))
    one_tensor_each(layer[1])
    layer[1].norm = nn.GroupNorm(2, 6)
    assert names(layer)[2:] == ["1.weight", "1.bias"]
    layer[1].norm = nn.Identity()
    assert names(layer) == ["0.weight", "0.bias"]


def test_plain_state_without_a_counter_loads_as_into_torchs():
    state = {name: value for name, value in plain().state_dict().items() if not name.endswith("tracked")}
    for model in (plain(), fused()):
        assert str(model.load_state_dict(dict(state))) == "<All keys matched successfully>"
    del state["1.running_var"]
    with pytest.raises(RuntimeError, match=r"1\.running_var"):
        fused().load_state_dict(state)


def test_optimizer_meets_each_parameter_once():
    layer = fused().train()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before = layer[1].norm.weight.detach().clone()
    layer(EXAMPLE).square().sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert not torch.equal(layer[1].norm.weight, before)


@pytest.mark.parametrize("affine", [True, False])
def test_program_of_a_converted_model_has_torchs_names_alone(tmp_path, affine):
    given = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=affine), nn.ReLU(), nn.Conv2d(6, 2, 1))
    model = randomize(given).train()
    record = convert(model, "normkit", EXAMPLE)
    assert record.fused == {"1": "relu"}
    program = torch.export.load(record.export(tmp_path / "net.pt2"))
    assert program.state_dict.keys() == model.state_dict().keys()
    assert len(program.graph_signature.parameters) == len(list(model.parameters()))
    assert_close(program.module()(EXAMPLE), model.eval()(EXAMPLE).detach(), dtype=torch.float32)
    # The model of the record is as it was, its mode too.
    assert record.model.training
    assert isinstance(record.model[1], normkit.BatchNormAct2d)


def test_record_exports_what_the_command_line_exports(tmp_path):
    record = fold(plain(), EXAMPLE)
    with torch.no_grad():
        expected = record.model(EXAMPLE)
    written = record.export(tmp_path / "net.pt2")
    assert_close(torch.export.load(written).module()(EXAMPLE), expected, dtype=torch.float32)
    with pytest.raises(ArgumentError, match="there already"):
        record.export(tmp_path / "net.pt2")
    record.export(tmp_path / "net.pt2", force=True)
    with pytest.raises(ArgumentError, match=r"ends in \.onnx or \.pt2"):
        record.export(tmp_path / "net.bin")
    with pytest.raises(ArgumentError, match="give example="):
        normkit.freeze(plain()).export(tmp_path / "other.pt2")
    with pytest.raises(ArgumentError, match="holds no model"):
        repair(plain().state_dict()).export(tmp_path / "other.pt2", EXAMPLE)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]
