"""Models that are programs are refused in words, wrapped ones are looked into."""

import warnings

import pytest
import torch
from torch import nn

import normkit
from normkit.anatomy import fingerprint, norm_layers, unwrapped
from normkit.errors import ArgumentError

X = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()
OPERATIONS = {
    "norm_layers": norm_layers,
    "convert": lambda model: normkit.convert(model, "normkit", X),
    "freeze": normkit.freeze,
    "recalibrate": lambda model: normkit.recalibrate(model, X),
    "hold_statistics": lambda model: normkit.hold_statistics(model).__enter__(),
}


def network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model(X)
    return model.eval()


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will go
        return torch.jit.script(network())


def exported():
    return torch.export.export(network(), (X,))


PROGRAMS = {
    "the model is a ScriptModule": scripted,
    "0 in the model is a ScriptModule": lambda: nn.Sequential(scripted(), nn.BatchNorm2d(4)),
    "an exported program, whose layers have become operators": exported,
    "an exported program's module": lambda: exported().module(),
    "of type OrderedDict; a torch.nn.Module is needed": lambda: network().state_dict(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("words", PROGRAMS)
def test_a_program_is_refused_in_words(words, operation):
    with pytest.raises(ArgumentError, match=words):
        OPERATIONS[operation](PROGRAMS[words]())


def test_a_scripted_part_without_a_norm_is_no_hindrance():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will go
        part = torch.jit.script(nn.Linear(2, 3))
    model = nn.Sequential(part, nn.BatchNorm1d(3))
    assert [layer.path for layer in norm_layers(model)] == ["1"]


def test_a_scripted_model_has_its_parameter_groups():
    assert [len(group["params"]) for group in normkit.param_groups(scripted(), 0.1)] == [1, 3]


def test_a_traced_graph_with_layers_in_it_is_no_program():
    assert [layer.path for layer in norm_layers(torch.fx.symbolic_trace(network()))] == ["1"]


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (nn.DataParallel, "inside DataParallel"),
        (lambda model: torch.compile(model, backend="eager"), "inside torch.compile"),
        (lambda model: torch.compile(nn.DataParallel(model), backend="eager"), "inside DataParallel and torch.compile"),
    ],
)
def test_a_wrapped_model_is_looked_into(wrap, words):
    model, wrapped = network(), wrap(network())
    before = fingerprint(wrapped)
    record = normkit.convert(wrapped, "normkit", X)
    assert fingerprint(wrapped) == before
    assert words in record.notes[-1]
    assert type(record.model) is nn.Sequential
    torch.testing.assert_close(record.model(X), unwrapped(wrapped)[0](X))
    statistics = unwrapped(wrapped)[0][1].running_mean
    kept = statistics.clone()
    normkit.recalibrate(wrapped, X)
    assert not torch.equal(statistics, kept)
    kept = statistics.clone()
    normkit.freeze(wrapped)
    unwrapped(wrapped)[0].train()(X)
    assert torch.equal(statistics, kept)
    assert [len(group["params"]) for group in normkit.param_groups(wrap(model), 0.1)] == [1, 3]


def test_a_wrapped_model_is_converted_in_place():
    wrapped = nn.DataParallel(network())
    record = normkit.convert(wrapped, "normkit", inplace=True)
    assert record.model is wrapped
    assert isinstance(wrapped.module[1], normkit.BatchNorm2d)
    assert "in place; paths are those inside" in record.notes[-1]


def test_a_model_sharded_over_processes_is_refused():
    sharded = type("FullyShardedDataParallel", (nn.Sequential,), {})(nn.BatchNorm1d(2))
    with pytest.raises(ArgumentError, match="no process has its whole layers"):
        normkit.convert(sharded, "normkit")
