"""Conversions carry everything over, or refuse; the given model is never touched."""

import functools
import sys

import pytest
import torch
from torch import nn

import normkit
from normkit import convert, freeze
from normkit.anatomy import fingerprint, norm_layers
from normkit.errors import ArgumentError, SurgeryError
from normkit.layers.catalog import METHODS
from normkit.surgery.convert_check import Before
from normkit.surgery.convert_classes import KINDS
from tolerances import assert_close

from .networks import Failure, Small, failing, leaves, randomize

EXAMPLE = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()
NAMES = {row.name for row in METHODS}


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def equal_states(first, second):
    one, two = first.state_dict(), second.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def classes(model):
    return [type(layer.module) for layer in norm_layers(model)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("to", "back"), [("normkit", "torch"), ("sync", "batch")])
def test_there_and_back_is_the_identity_bit_for_bit(to, back, training):
    model = randomize(Small()).train(training)
    model.bn0.eps, model.bn1.momentum = 1e-3, None
    model.bn1.weight.requires_grad_(False)
    before = fingerprint(model)
    there = convert(model, to, EXAMPLE)
    again = convert(there.model, back, EXAMPLE)
    assert fingerprint(model) == before
    assert there.exactness == "exact"
    assert there.largest_change <= 1e-5
    assert equal_states(there.model, model)
    assert equal_states(again.model, model)
    assert classes(again.model) == classes(model)
    for path in ("bn0", "bn1", "bn2"):
        old, new = model.get_submodule(path), again.model.get_submodule(path)
        plain = {name: value for name, value in vars(old).items() if isinstance(value, int | float | str | None)}
        assert plain == {name: vars(new)[name] for name in plain}
        assert vars(new).keys() == vars(old).keys()
        assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in old.parameters()]


def test_our_layers_train_like_torchs_after_conversion():
    model = randomize(Small()).double().train()
    ours = convert(model, "normkit").model
    assert classes(ours)[0] is normkit.BatchNorm2d
    model.drop.p = ours.drop.p = 0.0
    for _ in range(3):
        input = torch.randn(4, 3, 8, 8).double()
        assert_close(ours(input), model(input), dtype=torch.float64)
    assert_close(ours.bn2.running_var, model.bn2.running_var, dtype=torch.float64)


def test_hooks_sharing_and_subclasses_survive_where_torchs_sync_conversion_loses_them():
    def build():
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        model.append(model[0])
        model.append(WithActivation(3))
        model[0].register_forward_hook(lambda module, args, output: output + 1)
        return randomize(model)

    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(SurgeryError, match="lazy and cannot be copied"):
        convert(lazy, "sync")
    assert nn.SyncBatchNorm.convert_sync_batchnorm(lazy)[0].num_features == 0
    assert not torchs[0]._forward_hooks
    assert torchs[0] is not torchs[2]
    assert type(torchs[3]) is nn.SyncBatchNorm  # its activation is gone
    record = convert(build(), "sync")
    ours = record.model
    assert len(ours[0]._forward_hooks) == 1
    assert ours[0] is ours[2]
    assert type(ours[0]) is normkit.SyncBatchNorm
    assert type(ours[3]) is WithActivation
    assert record.touched == ("0",)
    assert "subclass" in record.refused["3"]


def test_sync_without_an_example_cannot_become_batch():
    model = nn.Sequential(randomize(nn.SyncBatchNorm(3)))
    with pytest.raises(SurgeryError, match="give example="):
        convert(model, "batch")
    ours = convert(model, "sync").model
    assert type(ours[0]) is normkit.SyncBatchNorm
    with pytest.raises(SurgeryError, match="give example="):
        convert(ours, "batch")
    for shape, cls in [((4, 3), nn.BatchNorm1d), ((4, 3, 5), nn.BatchNorm1d), ((2, 3, 2, 2, 2), nn.BatchNorm3d)]:
        assert type(convert(model, "batch", torch.randn(shape)).model[0]) is cls


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm3d, normkit.BatchNorm2d, normkit.BatchNormAct2d])
def test_a_synchronized_layer_goes_back_to_what_it_was_without_an_example(cls, one_process):
    model = nn.Sequential(randomize(cls(3, momentum=0.3)), nn.ReLU())
    group = torch.distributed.group.WORLD
    synced = convert(model, "sync", process_group=group).model
    held = getattr(synced[0], "norm", synced[0])
    assert type(held) is normkit.SyncBatchNorm
    assert held.process_group is group
    back = convert(synced, "batch").model
    assert type(back[0]) is cls
    norm, given = getattr(back[0], "norm", back[0]), getattr(model[0], "norm", model[0])
    assert type(norm) is type(given)
    assert vars(norm).keys() == vars(given).keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())
    ours = getattr(convert(synced, "normkit").model[0], "norm", None) or convert(synced, "normkit").model[0]
    assert isinstance(ours, normkit.BatchNorm1d | normkit.BatchNorm2d | normkit.BatchNorm3d)


@pytest.mark.parametrize("cls", [nn.SyncBatchNorm, normkit.SyncBatchNorm])
@pytest.mark.parametrize("to", ["normkit", "torch", "ghost"])
def test_a_layer_that_is_no_longer_synchronized_is_named(cls, to):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomize(cls(4)), nn.ReLU())
    notes = "; ".join(convert(model, to, torch.randn(2, 3, 8, 8)).notes)
    assert "no longer synchronized over ranks: 1; convert(..., to='sync')" in notes
    assert "no longer" not in "; ".join(convert(model, "batch", torch.randn(2, 3, 8, 8)).notes)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), randomize(nn.BatchNorm2d(4)), nn.ReLU())
    assert "no longer" not in "; ".join(convert(plain, "normkit", torch.randn(2, 3, 8, 8)).notes)


def test_the_biased_variance_stays_biased_where_it_is_synchronized():
    model = nn.Sequential(normkit.BatchNorm2d(3, unbiased=False))
    assert not convert(model, "sync").model[0].unbiased
    assert not convert(convert(model, "sync").model, "batch").model[0].unbiased


def test_frozen_is_the_evaluation_function_of_a_copy():
    model = randomize(Small()).train()
    before = fingerprint(model)
    record = convert(model, "frozen", EXAMPLE)
    assert fingerprint(model) == before
    assert record.largest_change <= 1e-5
    assert [layer.kind for layer in norm_layers(record.model)] == ["frozen", "frozen", "group", "frozen"]
    assert convert(model, "frozen", where="bn1").touched == ("bn1",)


@pytest.mark.parametrize("to", ["group", "layer", "instance"])
def test_batch_free_forms_carry_the_affine_and_say_retrain(to):
    norms = nn.BatchNorm2d(16, eps=1e-3), nn.BatchNorm2d(16, affine=False)
    model = randomize(nn.Sequential(nn.Conv2d(3, 16, 3), *norms))
    model[1].register_forward_hook(lambda module, args, output: None)
    model[1].bias.requires_grad_(False)
    before = fingerprint(model)
    record = convert(model.eval(), to, EXAMPLE)
    model.train()
    assert fingerprint(model) == before
    new = record.model[1]
    assert record.exactness == "retrain"
    assert "train" in str(record)
    assert record.largest_change > 0
    assert torch.equal(new.weight, model[1].weight)
    assert not new.bias.requires_grad
    assert new.eps == 1e-3
    assert len(new._forward_hooks) == 1
    assert not new.training
    assert record.model[2].weight is None
    alone, together = torch.randn(3, 16, 6, 6), slice(0, 1)
    assert_close(new(alone)[together], new(alone[together]), dtype=torch.float32)


def test_groups_hold_eight_channels_or_what_is_asked_for():
    model = nn.Sequential(nn.BatchNorm2d(96))
    assert convert(model, "group").model[0].num_groups == 12
    assert convert(model, "group", groups=6).model[0].num_groups == 6
    assert convert(model, "layer").model[0].num_groups == 1
    with pytest.raises(ArgumentError, match=r"groups=5 does not divide the 96.*1, 2, 3, 4, 6, 8"):
        convert(model, "group", groups=5)
    with pytest.raises(ArgumentError, match="goes with to='group'"):
        convert(model, "layer", groups=5)


def test_forms_that_erase_vectors_are_refused_where_torch_gives_zeros():
    vectors, model = torch.randn(5, 4), nn.Sequential(nn.BatchNorm1d(4))
    assert nn.GroupNorm(4, 4)(vectors).abs().max() < 1e-4
    with pytest.raises(SurgeryError, match="erase vectors"):
        convert(model, "group", vectors, groups=4)
    with pytest.raises(SurgeryError, match="erases them"):
        convert(model, "instance", vectors)
    assert convert(model, "instance", torch.randn(5, 4, 7)).model[0].num_features == 4


@pytest.mark.parametrize("to", ["ghost", "renorm"])
def test_methods_of_the_family_come_from_the_catalog_or_are_refused(to):
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3)))
    if to not in NAMES:
        with pytest.raises(SurgeryError, match=f"catalog has no '{to}'"):
            convert(model, to)
        return
    record = convert(model, to, EXAMPLE)
    assert record.exactness == "approximate"
    assert record.largest_change <= 1e-5
    assert torch.equal(record.model[1].running_mean, model[1].running_mean)
    assert record.model[1].eps == 1e-3


def test_layers_that_would_lose_something_are_refused():
    frozen = randomize(nn.BatchNorm2d(3))
    freeze(frozen)
    for module, why in [
        (WithActivation(3), "subclass"),
        (frozen, "already"),
        (nn.LazyBatchNorm2d(), "lazy"),
        (normkit.BatchNorm2d(3, unbiased=False), "biased variance"),
        (nn.BatchNorm2d(3), "already"),
    ]:
        model = nn.Sequential(module)
        before = fingerprint(model)
        with pytest.raises(SurgeryError, match=why):
            convert(model, "torch")
        assert fingerprint(model) == before
    with pytest.raises(SurgeryError, match="a GroupNorm is none of the batch norms"):
        convert(nn.Sequential(nn.GroupNorm(1, 3)), "torch", where="0")
    with pytest.raises(ArgumentError, match=r"to='pytorch' is no form of a layer; did you mean 'torch'. Known"):
        convert(nn.Sequential(nn.BatchNorm2d(3)), "pytorch")


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("path", leaves(Small()))
def test_exception_in_any_layer_leaves_the_model_bit_identical(path, to):
    model = randomize(Small())
    if to in ("torch", "batch"):  # what has nothing to convert never runs
        model = convert(model, {"torch": "normkit", "batch": "sync"}[to], EXAMPLE).model
    with failing(model.get_submodule(path)):
        before = fingerprint(model)
        with pytest.raises(Failure):
            convert(model, to, EXAMPLE)
        assert fingerprint(model) == before


def test_exact_conversion_that_is_not_is_refused(monkeypatch):
    class Wrong(normkit.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) * 1.001

    monkeypatch.setitem(sys.modules["normkit.surgery.convert"].OURS, 2, Wrong)
    model = randomize(Small())
    before = fingerprint(model)
    for example in (None, EXAMPLE):  # each layer by itself, before anything is run on an example
        with pytest.raises(SurgeryError, match=r"and changes what bn0 \(.* gives in evaluation by 0\.001"):
            convert(model, "normkit", example)
        assert fingerprint(model) == before
    monkeypatch.setattr(Before, "changed_to", lambda self, now: None)
    with pytest.raises(SurgeryError, match="should keep the function, and changes the output by"):
        convert(model, "normkit", EXAMPLE)
    assert fingerprint(model) == before


@pytest.mark.parametrize("to", ["ghost", "renorm"])
def test_a_form_that_keeps_evaluation_is_held_to_it(monkeypatch, to):
    cls = {"ghost": normkit.GhostBatchNorm2d, "renorm": normkit.BatchRenorm2d}[to]
    wrong = type("Wrong", (cls,), {"forward": lambda self, x: cls.forward(self, x) * 1.001})
    made = {2: wrong, 1: {"ghost": normkit.GhostBatchNorm1d, "renorm": normkit.BatchRenorm1d}[to]}
    monkeypatch.setattr("normkit.surgery.convert_layers.family_class", lambda name, dimensions: made[dimensions])
    model = randomize(Small())
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match="should keep the function, and changes what bn0"):
        convert(model, to)
    monkeypatch.setattr(Before, "changed_to", lambda self, now: None)
    with pytest.raises(SurgeryError, match="should keep the function in evaluation, and changes the output by"):
        convert(model, to, EXAMPLE)
    assert fingerprint(model) == before


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, normkit.BatchNorm2d, normkit.SyncBatchNorm])
def test_without_running_statistics_a_form_that_needs_them_is_refused_and_the_others_run(norm):
    x = torch.randn(6, 3, 9, 7)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, track_running_stats=False))
    for example in (None, x):
        with pytest.raises(SurgeryError, match=r"1: it keeps no running statistics .*convert it to 'ghost'"):
            convert(model, "renorm", example)
    ghost = convert(model, "ghost", x).model
    for training in (True, False):
        torch.testing.assert_close(ghost.train(training)(x), model.train(training)(x), rtol=0, atol=1e-5)


REFUSED = [
    *((functools.partial(cls, 4), cls.__name__, "none of the batch norms") for cls in (
        normkit.GhostBatchNorm2d, normkit.BatchRenorm2d, normkit.WhiteningBatchNorm2d, nn.InstanceNorm2d)),
    (functools.partial(nn.GroupNorm, 2, 4), "GroupNorm", "none of the batch norms"),
    (functools.partial(normkit.MaskedBatchNorm1d, 4), "MaskedBatchNorm1d", "none of the batch norms"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "name", "words"), REFUSED, ids=[row[1] for row in REFUSED])
def test_where_nothing_qualifies_each_layer_is_named_with_its_reason(build, name, words):
    with pytest.raises(SurgeryError, match=f"1: a {name} is {words}"):
        convert(nn.Sequential(nn.ReLU(), build()), "torch")
    with pytest.raises(SurgeryError, match=r"no layer to work on\. The model has no normalization layer$"):
        convert(nn.Sequential(nn.ReLU()), "torch")


OPERATIONS = [
    functools.partial(convert, to="group"),
    freeze,
    normkit.unfreeze,
    functools.partial(normkit.recalibrate, batches=[EXAMPLE]),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: getattr(one, "func", one).__name__)
@pytest.mark.parametrize("where", [[], lambda layer: False], ids=["none", "no to each"])
def test_a_choice_of_nothing_is_called_that(operation, where):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ArgumentError, match=r"takes none of the model's normalization layers; they are 1 \(Batch"):
        operation(model, where=where)
    with pytest.raises(SurgeryError, match="has no normalization layer"):
        operation(model[:1], where=where)


class Paired(nn.Module):
    """The forward reads its layers from a plain list, which torch is not shown."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.pairs = [(self.conv, self.norm)]

    def forward(self, x):
        for conv, norm in self.pairs:
            x = norm(conv(x)).relu()
        return x


@pytest.mark.parametrize("example", [None, EXAMPLE])
@pytest.mark.parametrize("to", ["group", "ghost"])
def test_a_layer_that_the_code_holds_unseen_is_not_replaced_behind_its_back(to, example):
    with pytest.raises(SurgeryError, match="norm: the model's code holds it in pairs too"):
        convert(Paired(), to, example)
    assert convert(Paired(), "normkit", EXAMPLE).touched == ("norm",)


class ReadsVariance(Paired):
    def __init__(self):
        super().__init__()
        del self.pairs

    def forward(self, x):
        return self.norm(self.conv(x)) * self.norm.running_var.mean()


def test_code_that_asks_the_layer_for_what_the_new_one_lacks_is_a_refusal_in_words():
    model = ReadsVariance()
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match=r"the model fails on the example: AttributeError: .*running_var"):
        convert(model, "group", EXAMPLE, inplace=True)
    assert fingerprint(model) == before
    assert type(model.norm) is nn.BatchNorm2d


def test_the_model_itself_may_be_the_layer():
    norm = randomize(nn.BatchNorm2d(3))
    assert type(convert(norm, "normkit").model) is normkit.BatchNorm2d
    with pytest.raises(SurgeryError, match="model itself"):
        convert(norm, "group")
