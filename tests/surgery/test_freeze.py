"""Three switches that train() does not reach."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn

import normkit
from normkit import freeze, unfreeze
from normkit.anatomy import fingerprint, norm_layers
from normkit.errors import ArgumentError, SurgeryError
from tolerances import assert_close

from .networks import Small, randomize

LAYERS = [
    (nn.BatchNorm1d, (6, 3)),
    (nn.BatchNorm2d, (4, 3, 5, 2)),
    (nn.BatchNorm3d, (2, 3, 2, 3, 2)),
    (normkit.BatchNorm1d, (6, 3, 7)),
    (normkit.BatchNorm2d, (4, 3, 5, 2)),
    (normkit.BatchNorm3d, (2, 3, 2, 3, 2)),
    (nn.SyncBatchNorm, (4, 3, 5, 2)),
]


class Renamed(nn.BatchNorm2d):
    """A user's subclass without a forward of its own."""


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def are_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
def test_frozen_layer_gives_the_evaluation_output_in_any_mode(cls, shape):
    norm = randomize(cls(3))
    input = torch.randn(shape)
    expected = norm.eval()(input)
    freeze(norm)
    for mode in (True, False):
        assert torch.equal(norm.train(mode)(input), expected)
        assert norm.training is False


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, normkit.BatchNorm2d, Renamed])
def test_training_steps_with_train_before_each_move_no_frozen_buffer_or_affine(cls):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), cls(4), nn.ReLU(), nn.Conv2d(4, 2, 3), cls(2))
    randomize(model)
    freeze(model, "1")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before, affine = buffers(model[1]), [parameter.clone() for parameter in model[1].parameters()]
    moving, weight = buffers(model[4]), model[0].weight.clone()
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(4, 3, 9, 9)).square().sum().backward()
        optimizer.step()
    assert are_equal(buffers(model[1]), before)
    assert all(torch.equal(a, b) for a, b in zip(model[1].parameters(), affine, strict=True))
    assert not are_equal(buffers(model[4]), moving)
    assert not torch.equal(model[0].weight, weight)


def test_torchs_own_ways_do_not_hold():
    by_grad, by_mode = randomize(nn.BatchNorm1d(3)), randomize(nn.BatchNorm1d(3))
    by_grad.requires_grad_(False)
    by_mode.eval()
    for norm in (by_grad, by_mode):
        before = buffers(norm)
        norm.train()(torch.randn(8, 3))
        assert not are_equal(buffers(norm), before)


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, normkit.BatchNorm2d])
def test_every_combination_of_the_switches_does_what_it_says(statistics, track, affine, cls):
    norm, twin = randomize(cls(3)), None
    twin = copy.deepcopy(norm)
    freeze(norm, statistics=statistics, track=track, affine=affine)
    input = torch.randn(5, 3, 4, 4, requires_grad=True)
    own = input.detach().clone().requires_grad_()
    expected = twin.train(statistics == "batch")(own)
    before = buffers(norm)
    output = norm.train()(input)
    assert_close(output, expected, dtype=torch.float32)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected.backward(cotangent)
    assert_close(input.grad, own.grad, dtype=torch.float32)
    assert (norm.weight.grad is not None) == affine
    if track:
        moved = copy.deepcopy(twin)
        moved.load_state_dict(before, strict=False)
        moved.train()(input.detach())
        assert are_equal(buffers(norm), buffers(moved))
    else:
        assert are_equal(buffers(norm), before)
    still = buffers(norm)
    norm.eval()(input)
    assert are_equal(buffers(norm), still)


def test_layer_keeps_identity_hooks_isinstance_and_names():
    model = randomize(Small())
    norm, calls = model.bn1, []
    norm.register_forward_hook(lambda module, args, output: calls.append(1))
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    record = freeze(model)
    assert record.touched == ("bn0", "bn1", "bn2")
    assert model.bn1 is norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters
    model(torch.randn(4, 3, 8, 8))
    assert calls == [1]
    assert [layer.kind for layer in norm_layers(model)] == ["frozen", "frozen", "group", "frozen"]


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, normkit.BatchNorm2d, Renamed])
def test_freeze_survives_deepcopy_and_pickle(cls):
    model = nn.Sequential(randomize(cls(3)))
    freeze(model, statistics="running")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    input = torch.randn(4, 3, 5, 5)
    copies = [
        copy.deepcopy(model),
        copy.copy(model[0]),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for again in copies:
        before = buffers(again)
        assert torch.equal(again.train()(input), model(input))
        assert are_equal(buffers(again), before)
        unfreeze(again)
        assert type(next(iter(again.children()), again)) is cls
    assert type(model[0]) is not cls


def test_freeze_survives_a_state_dict_round_trip():
    model, other = nn.Sequential(randomize(nn.BatchNorm2d(3))), nn.Sequential(randomize(nn.BatchNorm2d(3)))
    freeze(model)
    model.load_state_dict(other.state_dict())
    before = buffers(model)
    model.train()(torch.randn(4, 3, 5, 5))
    assert are_equal(buffers(model), before)
    assert are_equal(buffers(model), buffers(other))
    plain = nn.Sequential(nn.BatchNorm2d(3))
    plain.load_state_dict(model.state_dict())
    assert are_equal(buffers(plain), buffers(other))


def test_freeze_survives_a_distributed_wrap(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Conv2d(3, 3, 1), randomize(nn.BatchNorm2d(3)))
        freeze(model)
        before = buffers(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.train()(torch.randn(4, 3, 5, 5)).sum().backward()
        assert are_equal(buffers(model), before)
        assert model[0].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_freeze_survives_compilation():
    model = nn.Sequential(randomize(nn.BatchNorm2d(3)))
    freeze(model)
    input, before = torch.randn(4, 3, 5, 5), buffers(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled.train()(input), model.eval()(input))
    assert are_equal(buffers(model), before)


def test_freeze_is_seen_in_repr():
    norm = randomize(nn.BatchNorm2d(3))
    freeze(norm, statistics="batch", track=True, affine=True)
    assert repr(norm) == (
        "FrozenBatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        "frozen: statistics=batch, buffers moving, affine learning)"
    )


def test_freeze_and_unfreeze_is_the_identity_bit_for_bit():
    for training in (True, False):
        model = randomize(Small()).train(training)
        model.bn1.bias.requires_grad_(False)
        before = fingerprint(model)
        freeze(model)
        freeze(model, statistics="batch", track=True)
        unfreeze(model)
        assert fingerprint(model) == before


def test_unfreeze_gives_the_mode_that_was_last_asked_for():
    norm = randomize(nn.BatchNorm2d(3))
    freeze(norm)
    norm.eval()
    unfreeze(norm)
    assert norm.training is False
    freeze(norm)
    norm.train()
    unfreeze(norm, affine=False)
    assert norm.training is True
    assert not norm.weight.requires_grad


def test_layers_that_cannot_be_frozen_are_left_with_a_reason():
    model = nn.ModuleDict(
        {
            "good": randomize(nn.BatchNorm2d(3)),
            "fresh": nn.BatchNorm2d(3),
            "poisoned": randomize(nn.BatchNorm2d(3)),
            "untracked": nn.BatchNorm2d(3, track_running_stats=False),
            "own": randomize(WithActivation(3)),
            "lazy": nn.LazyBatchNorm2d(),
        }
    )
    model["poisoned"].running_var[1] = float("nan")
    before = fingerprint(model)
    record = freeze(model)
    after = fingerprint(model)
    changed = {name for name in after if after[name] != before.get(name)} - {"._modules.good"}
    assert record.touched == ("good",)
    assert all(name.startswith("good") for name in changed)
    for path, word in [
        ("fresh", "initial"),
        ("poisoned", "not finite"),
        ("untracked", "off"),
        ("own", "forward of its own"),
        ("lazy", "lazy"),
    ]:
        assert word in record.refused[path], path


def test_freezing_nothing_is_refused_and_changes_nothing():
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.BatchNorm2d(3))
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match="initial 0 and 1"):
        freeze(model)
    with pytest.raises(SurgeryError, match="GroupNorm keeps no running statistics"):
        freeze(model, "0")
    with pytest.raises(SurgeryError, match="0: a GroupNorm keeps no running statistics; stop its weight"):
        freeze(nn.Sequential(nn.GroupNorm(1, 3)))
    with pytest.raises(SurgeryError, match="1: it was not frozen by"):
        unfreeze(model)
    with pytest.raises(SurgeryError, match="not frozen by"):
        unfreeze(model, "1")
    with pytest.raises(ArgumentError, match="'moving'"):
        freeze(model, statistics="moving")
    with pytest.raises(ArgumentError, match="nowhere"):
        freeze(model, "nowhere")
    assert fingerprint(model) == before


def test_failure_half_way_leaves_the_model_bit_identical(monkeypatch):
    operation = sys.modules["normkit.surgery.freeze"]  # the package's attribute of this name is the function
    for failing_call in range(3):
        model, calls = randomize(Small()), []
        original = operation.frozen_class

        def explode(cls, calls=calls, original=original, failing_call=failing_call):
            calls.append(cls)
            if len(calls) > failing_call:
                raise MemoryError
            return original(cls)

        before = fingerprint(model)
        with monkeypatch.context() as patch:
            patch.setattr(operation, "frozen_class", explode)
            with pytest.raises(MemoryError):
                freeze(model)
        assert fingerprint(model) == before


def test_failure_half_way_leaves_a_frozen_model_bit_identical(monkeypatch):
    operation = sys.modules["normkit.surgery.freeze"]
    for failing_call in range(3):
        model, calls = randomize(Small()), []
        freeze(model)
        original = operation.thaw

        def explode(module, calls=calls, original=original, failing_call=failing_call):
            calls.append(module)
            if len(calls) > failing_call:
                raise MemoryError
            original(module)

        before = fingerprint(model)
        with monkeypatch.context() as patch:
            patch.setattr(operation, "thaw", explode)
            with pytest.raises(MemoryError):
                unfreeze(model)
        assert fingerprint(model) == before


def test_tracking_instance_norm_is_frozen_too():
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    norm(torch.randn(4, 3, 5, 5))
    input = torch.randn(4, 3, 5, 5)
    expected, before = norm.eval()(input), buffers(norm)
    freeze(norm)
    assert torch.equal(norm.train()(input), expected)
    assert are_equal(buffers(norm), before)
