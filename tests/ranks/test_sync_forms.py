"""Masked and ghost batches over ranks: as one process has them, and an error on every rank where they are none."""

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError, SurgeryError
from normkit.functional import batch_norm, ghost_batch_norm, masked_batch_norm
from tolerances import FORWARD_ULP, FORWARD_ULP_FLOAT64, assert_close

from .forms import FORMS, GHOST_SIZE, names, of_rank


def compare(name, found, whole, dtype):
    if name.startswith(("y", "running")) and whole.is_floating_point():
        ulp = FORWARD_ULP_FLOAT64 if whole.dtype is torch.float64 else FORWARD_ULP
        unit = torch.finfo(whole.dtype).eps * whole.double().abs().clamp(min=1)
        assert ((found.double() - whole.double()).abs() <= ulp * unit).all(), name
    assert_close(found.double(), whole.double(), dtype=dtype, what=name)


def joined(parts, whole):
    """Return what ranks have as the whole batch: samples in a row, and gradients of parameters added up."""
    return torch.cat(parts) if whole.dim() > 1 else torch.stack(parts).double().sum(0)


@pytest.mark.parametrize("form", FORMS, ids=names)
def test_forms_equal_one_process(form, forms):
    ranks = [found[names(form)] for found in forms[: form.ranks]]
    alone = form.alone(0, sum(form.shares))
    divides = form.masked or all(share % GHOST_SIZE == 0 for share in form.shares)
    for name, whole in alone.items():
        parts = [rank[name] for rank in ranks]
        if name.startswith(("running", "num")):
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name}: the ranks differ in a bit"
            compare(name, parts[0], whole, form.dtype)
        elif divides:
            compare(name, joined(parts, whole), whole, form.dtype)


@pytest.mark.parametrize("form", [form for form in FORMS if not form.masked], ids=names)
def test_ghost_batches_are_those_of_each_ranks_own_batch(form, forms):
    low = 0
    for rank, share in enumerate(form.shares):
        own = form.alone(low, low + share)
        for name, value in own.items():
            if not name.startswith(("running", "num")):
                compare(name, forms[rank][names(form)][name], value, form.dtype)
        low += share


@pytest.mark.parametrize("form", FORMS, ids=names)
def test_the_simulator_equals_processes_in_every_bit(form, forms):
    simulation = normkit.simulate(form.layer(), ranks=form.ranks)
    found = simulation.run(lambda layer, rank: of_rank(form, layer, rank), range(form.ranks))
    for rank, values in enumerate(found):
        for name, expected in forms[rank][names(form)].items():
            assert torch.equal(values[name], expected), f"rank {rank}: {name}"


def test_ghost_batches_exchange_once_and_masks_no_more_than_without(forms):
    for rank in forms:
        assert rank["exchanges of masked"] == [2, 2, 0]
        assert rank["exchanges of ghost"] == [1, 1, 0]
        assert rank["batches of masked"] == rank["batches of ghost"] == 2


SAID = {
    "mask shape": (
        "SyncError: SyncBatchNorm(3): refused on rank 3",
        "ShapeError: SyncBatchNorm(3): the mask has shape",
    ),
    "mask type": (
        "SyncError: SyncBatchNorm(3): refused on rank 3",
        "the mask must be a boolean tensor, got torch.int32",
    ),
    "one valid": ("got 1 on all ranks", "got 1 on all ranks"),
    "none valid": ("nothing", "nothing"),
    "part of one": ("SyncError: SyncBatchNorm(3): refused on rank 3", "so a part has one value per channel"),
    "sizes": ("the ranks have different settings", "ghost_size"),
    "both": ("a mask and a ghost_size were both given", "a mask and a ghost_size were both given"),
}


@pytest.mark.parametrize("mistake", SAID)
def test_a_mistake_is_an_error_on_every_rank_and_moves_no_buffer(mistake, forms):
    first, last = SAID[mistake]
    for rank in forms[:3]:
        assert first in rank[mistake]
    assert last in forms[3][mistake]
    assert all(rank[f"{mistake}: still"] for rank in forms)


def test_accumulated_ghost_batches_and_masks_are_those_of_all_ranks(forms):
    data = torch.cat([rank["accumulated"][0] for rank in forms])
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    batch_norm(data, mean, var, training=True, momentum=1.0)
    for rank in forms:
        assert_close(rank["accumulated"][1], var, dtype=torch.float64)
        assert rank["accumulated"][2] == 1
        parts = [
            ghost_batch_norm(part, None, None, training=True, ghost_size=2)
            for part in rank["accumulated"][0].split([5, 3])
        ]
        assert_close(torch.as_tensor(rank["accumulated"][3]), torch.cat(parts).pow(3).mean(), dtype=torch.float64)
        assert "the large batch is cut elsewhere" in rank["accumulated exactly"]
    masks = torch.cat([rank["accumulated masked"][0] for rank in forms])
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = masked_batch_norm(data, masks, mean, var, weight, None, training=True, momentum=1.0)
    y.pow(3).mean().backward()
    found = sum(rank["accumulated masked"][2] for rank in forms) / len(forms)
    assert_close(found, weight.grad, dtype=torch.float64)
    for rank in forms:
        assert_close(rank["accumulated masked"][1], var, dtype=torch.float64)


def test_in_one_process_and_in_evaluation_they_are_the_masked_and_the_ghost_layer():
    x, mask = torch.randn(6, 3, 5), torch.rand(6, 5) < 0.7
    pairs = [
        (normkit.SyncBatchNorm(3), normkit.MaskedBatchNorm1d(3), (mask,)),
        (normkit.SyncBatchNorm(3, ghost_size=4), normkit.GhostBatchNorm1d(3, ghost_size=4), ()),
        (
            normkit.SyncBatchNorm(3, ghost_size=4, track_running_stats=False),
            normkit.GhostBatchNorm1d(3, ghost_size=4, track_running_stats=False),
            (),
        ),
        (
            normkit.SyncBatchNorm(3, track_running_stats=False),
            normkit.MaskedBatchNorm1d(3, track_running_stats=False),
            (mask,),
        ),
    ]
    for layer, other, given in pairs:
        for training in (True, False):
            layer.train(training), other.train(training)
            assert_close(layer(x, *given), other(x, *given), dtype=torch.float32)
        for (name, value), expected in zip(layer.named_buffers(), other.buffers(), strict=True):
            assert_close(value, expected, dtype=torch.float32, what=name)
    act = normkit.BatchNormAct1d(3, activation="relu")
    act.norm = normkit.SyncBatchNorm(3, ghost_size=4)
    other = normkit.GhostBatchNorm1d(3, ghost_size=4)
    assert_close(act(x, x), torch.relu(other(x) + x), dtype=torch.float32)
    for wrong in (0, 2.0, True):
        with pytest.raises(ArgumentError, match="ghost_size must be an integer of at least 1"):
            normkit.SyncBatchNorm(3, ghost_size=wrong)
    with pytest.raises(ArgumentError, match="a mask and a ghost_size were both given"):
        pairs[1][0].train()(x, mask)
    assert repr(pairs[1][0]).endswith("ghost_size=4)")
    functional = normkit.functional.sync_batch_norm
    found = functional(x, torch.zeros(3), torch.ones(3), mask=mask, activation="silu", residual=x)
    assert_close(found, torch.nn.functional.silu(x / (1 + 1e-5) ** 0.5 + x) * mask[:, None], dtype=torch.float32)


def test_a_graph_keeps_the_mask():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = normkit.SyncBatchNorm(3)

        def forward(self, x, mask):
            return self.norm(x, mask)

    net, x, mask = Net(), torch.randn(6, 3, 5), torch.rand(6, 5) < 0.7
    traced = torch.fx.symbolic_trace(net)
    expected = normkit.MaskedBatchNorm1d(3)(x, mask)
    assert_close(traced(x, mask), expected, dtype=torch.float32)
    exported = torch.export.export(net.eval(), (x, mask)).module()
    assert_close(exported(x, mask), net(x, mask), dtype=torch.float32)


@pytest.mark.parametrize(
    "make",
    [lambda: normkit.MaskedBatchNorm1d(3), lambda: normkit.GhostBatchNorm2d(3, ghost_size=5, average="debiased")],
    ids=["masked", "ghost"],
)
def test_conversion_goes_both_ways(make, one_process):
    model = nn.ModuleDict({"norm": make(), "other": nn.BatchNorm2d(3)})
    group = torch.distributed.group.WORLD
    there = normkit.convert(model, to="sync", process_group=group, inplace=True).model
    norm = there["norm"]
    assert type(norm) is normkit.SyncBatchNorm
    assert norm.process_group is group
    assert (norm.ghost_size, norm.average) == (getattr(make(), "ghost_size", None), make().average)
    with pytest.raises(SurgeryError, match="it computes what a batch norm does not"):
        normkit.convert(nn.Sequential(norm), to="torch")
    back = normkit.convert(there, to="batch", inplace=True).model
    assert (type(back["norm"]), type(back["other"])) == (type(make()), nn.BatchNorm2d)
    assert repr(back["norm"]) == repr(make())
    assert not set(vars(back["norm"])) - set(vars(make()))


def test_ghost_batches_that_were_synchronized_from_the_start_go_back_where_the_dimensions_are_known():
    model = nn.Sequential(normkit.SyncBatchNorm(3, ghost_size=2))
    with pytest.raises(SurgeryError, match="give example="):
        normkit.convert(model, to="batch")
    back = normkit.convert(model, to="batch", example=torch.randn(4, 3, 5, 5)).model[0]
    assert type(back) is normkit.GhostBatchNorm2d
    assert back.ghost_size == 2


def test_what_has_no_synchronized_form_is_named():
    model = nn.Sequential(nn.BatchNorm1d(3), normkit.BatchRenorm1d(3), normkit.WhiteningBatchNorm1d(3))
    refused = normkit.convert(model, to="sync").refused
    assert set(refused) == {"1", "2"}
    assert all("has no synchronized form: each rank would go on" in reason for reason in refused.values())


def test_masked_padding_is_handed_to_synchronized_layers_and_recalibrated_without_it():
    data = torch.randn(8, 3, 6)
    data[:, :, 4:] = 0
    model = normkit.convert(nn.Sequential(nn.BatchNorm1d(3)), to="sync").model
    normkit.mask_padding(model, lambda x: (x != 0).any(1))
    assert type(model[0]) is normkit.SyncBatchNorm
    y = model(data)
    assert_close(y[..., :4], normkit.BatchNorm1d(3)(data[..., :4]), dtype=torch.float32)
    assert not y[..., 4:].any()
    normkit.recalibrate(model, [data])
    assert_close(model[0].running_var, data[..., :4].movedim(1, 2).flatten(0, 1).var(0), dtype=torch.float32)
    alone = normkit.convert(model, to="batch").model
    assert type(alone[0]) is normkit.MaskedBatchNorm1d
    assert_close(alone.eval()(data), model.eval()(data), dtype=torch.float32)
    refused = normkit.mask_padding(
        nn.Sequential(nn.BatchNorm1d(3), normkit.SyncBatchNorm(3, ghost_size=2)), lambda x: (x != 0).any(1)
    ).refused
    assert "no ghost batches of valid positions" in refused["1"]


def test_the_plan_counts_the_ghost_batches_of_one_rank():
    model = nn.Sequential(nn.Linear(3, 4), normkit.SyncBatchNorm(4, ghost_size=4))
    found = normkit.plan(model, torch.randn(64, 3), batch_size=32, ranks=4)
    assert [layer.samples for layer in found.layers] == [4]


def test_frozen_forms_hold_still_and_take_no_other_mode():
    x, mask = torch.randn(6, 3, 5), torch.rand(6, 5) < 0.7
    masked = normkit.convert(nn.ModuleList([normkit.MaskedBatchNorm1d(3)]), to="sync").model
    ghost = nn.ModuleList([normkit.SyncBatchNorm(3, ghost_size=2)])
    for model, given in ((masked, (mask,)), (ghost, ())):
        model[0](x, *given)
        for asked in ({"statistics": "batch"}, {"track": True}):
            with pytest.raises(SurgeryError, match="a SyncBatchNorm is frozen with its running statistics, held still"):
                normkit.freeze(model, **asked)
        expected = model.eval()[0](x, *given)
        normkit.freeze(model)
        assert torch.equal(model.train()[0](x, *given), expected)
    either = nn.ModuleList([normkit.SyncBatchNorm(3)])
    either[0](x)
    normkit.freeze(either, track=True)
    before = either[0].running_mean.clone()
    with pytest.raises(ArgumentError, match=r"frozen by normkit.freeze\(track=True\), which takes no mask"):
        either.train()[0](x, mask)
    assert torch.equal(either[0].running_mean, before)
