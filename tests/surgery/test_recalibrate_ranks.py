"""Processes that each hold a share of the data get the statistics of all of it; relatives of batch norm get theirs."""

import json

import pytest
import torch
from torch import nn

import normkit
from normkit import recalibrate
from normkit.errors import ArgumentError, SurgeryError
from normkit.surgery.moments import InstanceMoments, Moments
from ranks.processes import run_program
from tolerances import assert_close

from .networks import Small, randomize

PROGRAM = """
import json, sys
import torch
from torch import distributed, nn

import normkit
from normkit.anatomy import fingerprint
from normkit.errors import NormkitError, SurgeryError
from ranks.processes import leave

torch.set_num_threads(1)
rank, path = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
world = distributed.group.WORLD

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2))

def state(net):
    return {name: buffer.tolist() for name, buffer in net.named_buffers()}

data = 5 + 3 * torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
share = data[:13].split(5) if rank == 0 else data[13:].split(20)
seen = {}
with normkit.use_backend("plain"):
    for layerwise in (False, True):
        net = model()
        record = normkit.recalibrate(net, list(share), group=world, layerwise=layerwise)
        low = record.intervals["1"].variance_low.tolist()
        seen[f"layerwise {layerwise}"] = [state(net), record.batches, record.samples, low]
    net = model()
    record = normkit.recalibrate(net, [data] if rank == 0 else [], group=world)
    seen["one rank has all"] = [state(net), record.batches]
    seen["note"] = normkit.recalibrate(net, data).notes[-1]

    def broken():
        yield data[:5]
        if rank == 1:
            raise OSError("the disk is gone")

    net, before = model(), None
    before = fingerprint(net)
    try:
        normkit.recalibrate(net, broken(), group=world)
    except (OSError, SurgeryError) as error:
        seen["failed"] = [type(error).__name__, str(error), fingerprint(net) == before]

    for kind in (normkit.SyncBatchNorm, nn.SyncBatchNorm):
        net = model()
        for place in (1, 4):
            net[place] = kind(net[place].num_features)
        calls = distributed.all_gather
        distributed.all_gather = None  # of the layers, which a rank with more batches would call alone
        record = normkit.recalibrate(net, list(share), group=world)
        seen[f"recalibrated {kind.__module__}"] = [state(net), record.batches, record.samples]
        before = fingerprint(net)
        try:
            normkit.recalibrate(net, broken(), group=world)
        except (OSError, SurgeryError) as error:
            seen[f"failed {kind.__module__}"] = [type(error).__name__, fingerprint(net) == before]
        if rank == 0:
            normkit.recalibrate(net, data)
            seen["planned"] = len(normkit.plan(net, data, batch_size=8, ranks=2).layers)
        distributed.all_gather = calls
    for name, given in {
        "aggregate": {"aggregate": ("pooled", "average")[rank]},
        "wrong": {"aggregate": ("pooled", "mean")[rank]},
        "layers": {"where": (None, "4")[rank]},
        "layerwise": {"layerwise": True},
    }.items():
        net = model()
        before = fingerprint(net)
        batches = iter([data]) if name == "layerwise" and rank == 1 else [data]
        try:
            normkit.recalibrate(net, batches, group=world, **given)
        except NormkitError as error:
            seen[f"differing {name}"] = [f"{type(error).__name__}: {error}", fingerprint(net) == before]

    seen["sync"] = type(normkit.convert(model(), "sync").model[1]).__name__
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm(model()).train()(data)
    except ValueError as error:
        seen["torch sync"] = str(error)

    net = model().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with normkit.watch(net, group=world) as ledger:
        for batch in list(data.split(10))[: 2 + rank]:  # one rank takes a step more, on data of its own
            optimizer.zero_grad()
            net(batch + 50 * rank).square().mean().backward()
            optimizer.step()
    found = ledger.diagnosis().of("rank-agreement")
    seen["watched"] = [(finding.layer, finding.severity) for finding in found]
print(json.dumps(seen))
leave(rank, 2)
"""


_AGGREGATE = "have different aggregate. rank 0: 'pooled'; rank 1: 'average'"
_LAYERS = "have different layers. rank 0: ['1', '4']; rank 1: ['4']"
DIFFERING = {
    "aggregate": (_AGGREGATE, _AGGREGATE),
    "wrong": ("failed on rank 1", "ArgumentError: aggregate is 'mean'"),
    "layers": (_LAYERS, _LAYERS),
    "layerwise": ("failed on rank 1", "these can be read only once"),
}


def both_ranks(tmp_path):
    return [json.loads(said) for said in run_program(PROGRAM, tmp_path)]


def alone(batches, layerwise=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    return net, recalibrate(net, batches, layerwise=layerwise)


def test_ranks_with_unequal_shares_get_the_statistics_of_all_data(tmp_path):
    first, second = both_ranks(tmp_path)
    data = 5 + 3 * torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    batches = [*data[:13].split(5), *data[13:].split(20)]
    for layerwise in (False, True):
        name = f"layerwise {layerwise}"
        assert first[name] == second[name], "the ranks differ in a bit"
        net, record = alone(batches, layerwise)
        buffers, count, samples, low = first[name]
        assert (count, samples) == (len(batches), 60)
        assert_close(torch.tensor(low), record.intervals["1"].variance_low, dtype=torch.float32)
        for key, buffer in net.named_buffers():
            assert_close(torch.tensor(buffers[key]), buffer, dtype=torch.float32, what=key)

    assert first["one rank has all"] == second["one rank has all"]
    assert first["one rank has all"][1] == 1
    assert "group= pools over it and the 1 other processes" in first["note"]

    assert first["failed"][0] == "SurgeryError"
    assert "failed on rank 1" in first["failed"][1]
    assert second["failed"][:2] == ["OSError", "the disk is gone"]
    assert first["failed"][2]
    assert second["failed"][2]

    for kind in ("normkit.layers.sync", "torch.nn.modules.batchnorm"):
        assert first[f"recalibrated {kind}"] == second[f"recalibrated {kind}"]
        assert first[f"recalibrated {kind}"][1:] == [len(batches), 60]
        assert [rank[f"failed {kind}"] for rank in (first, second)] == [["SurgeryError", True], ["OSError", True]]
        for key, buffer in alone(batches)[0].named_buffers():
            assert_close(torch.tensor(first[f"recalibrated {kind}"][0][key]), buffer, dtype=torch.float32, what=key)
    assert first["planned"] == 2
    for name, words in DIFFERING.items():
        for rank, said in zip((first, second), words, strict=True):
            assert said in rank[f"differing {name}"][0]
            assert rank[f"differing {name}"][1]

    # torch converts without a word, and refuses in the first step without naming a layer; ours runs on a CPU.
    assert "GPU" in first["torch sync"]
    assert first["sync"] == second["sync"] == "SyncBatchNorm"

    assert first["watched"] == second["watched"]
    assert ["1", "error"] in first["watched"]
    assert ["", "warning"] in first["watched"]  # the ranks took different numbers of steps


def test_group_without_a_process_group_is_refused():
    with pytest.raises(ArgumentError, match="init_process_group first"):
        recalibrate(nn.BatchNorm1d(2), torch.randn(8, 2), group="world")


@pytest.mark.parametrize("cls", [Moments, InstanceMoments])
def test_pooled_moments_are_those_of_all_data_and_so_are_their_intervals(cls):
    parts = [torch.randn(sizes, 3, 5) + 10 * index for index, sizes in enumerate((4, 1, 9))]
    pooled, whole = cls(3), cls(3)
    for part in parts:
        own = cls(3)
        own.add(part)
        pooled.pool(own)
    pooled.pool(cls(3))  # a process without data
    whole.add(torch.cat(parts))
    assert pooled.count == whole.count
    assert_close(pooled.mean, whole.mean, dtype=torch.float64)
    assert_close(pooled.variance(unbiased=True), whole.variance(unbiased=True), dtype=torch.float64)
    for name, value in vars(whole.intervals()).items():
        assert_close(getattr(pooled.intervals(), name), value, dtype=torch.float64, what=name)


INSTANCES = [
    (nn.InstanceNorm1d, (5, 3, 7)), (nn.InstanceNorm2d, (5, 3, 4, 2)), (nn.InstanceNorm3d, (5, 3, 2, 3, 2)),
    (normkit.InstanceNorm2d, (5, 3, 4, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "shape"), INSTANCES)
def test_tracking_instance_norm_gets_what_an_endless_average_would_hold(cls, shape):
    batches = [torch.randn(shape) * 2 + 3, torch.randn(2, *shape[1:]) - 1]
    norm = cls(3, track_running_stats=True)
    recalibrate(norm, batches)
    flat = torch.cat(batches).double().flatten(2)
    assert_close(norm.running_mean, flat.mean(2).mean(0), dtype=torch.float32)
    assert_close(norm.running_var, flat.var(2).mean(0), dtype=torch.float32)
    once = cls(3, track_running_stats=True, momentum=1.0)
    once(torch.cat(batches))  # one step of weight 1 over everything is the same
    assert_close(norm.running_var, once.running_var, dtype=torch.float32)


def test_instance_norm_of_one_position_is_refused_by_name():
    norm = nn.InstanceNorm2d(3, track_running_stats=True)
    with pytest.raises(SurgeryError, match="one value in a channel"):
        recalibrate(norm, torch.randn(6, 3, 1, 1))


def test_instance_norm_takes_a_sample_without_a_batch():
    norm = nn.InstanceNorm1d(3, track_running_stats=True)
    sample = torch.randn(3, 11)
    recalibrate(norm, [sample])
    assert_close(norm.running_mean, sample.double().mean(1), dtype=torch.float32)


@pytest.mark.parametrize("to", ["ghost", "renorm"])
def test_relatives_get_the_population_where_it_is_exact(to):
    model, data = randomize(Small()), torch.randn(40, 3, 8, 8) * 2 + 1
    relative = normkit.convert(model, to).model
    if to == "renorm":
        with pytest.raises(SurgeryError, match="say layerwise=True"):
            recalibrate(relative, data, where="bn0")
    recalibrate(relative, data.split(16), layerwise=True)
    recalibrate(model, data.split(16), layerwise=True)
    for name in ("bn0", "bn1", "bn2"):
        ours, expected = relative.get_submodule(name), model.get_submodule(name)
        assert_close(ours.running_var, expected.running_var, dtype=torch.float32)
        assert_close(ours.running_mean, expected.running_mean, dtype=torch.float32)
