"""Statistics over the processes of a group: equal to one process, in every split, and an error where ranks differ."""

import pytest
import torch
from torch import nn

from tolerances import FORWARD_ULP, FORWARD_ULP_FLOAT64, assert_close

from . import jobs
from .cases import CASES, names, step
from .processes import run


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    return run("around", 3, tmp_path_factory.mktemp("around"))


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    return run("mistakes", 3, tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize("case", CASES, ids=names)
def test_ranks_equal_one_process_that_holds_all(case, matrix):
    alone = step(case, case.layer(sync=False), 0, sum(case.shares))
    ranks = [found[names(case)] for found in matrix[: case.ranks]]
    for name, whole in alone.items():
        parts = [rank[name] for rank in ranks]
        if name.startswith(("running", "num")):
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name}: the ranks differ in a bit"
            found = parts[0]
        elif whole.dim() > 1:
            found = torch.cat(parts)
        else:  # what data parallelism adds up
            found = torch.stack(parts).double().sum(0)
        if name.startswith(("y", "running")) and whole.is_floating_point():
            ulp = FORWARD_ULP_FLOAT64 if whole.dtype is torch.float64 else FORWARD_ULP
            unit = torch.finfo(whole.dtype).eps * whole.double().abs().clamp(min=1)
            assert ((found.double() - whole.double()).abs() <= ulp * unit).all(), name
        # Sums of gradients that a half precision activation has rounded are as exact as those.
        assert_close(found.double(), whole.double(), dtype=case.dtype, what=name)


def test_a_net_trains_alike_under_checkpointing_data_parallelism_and_compilation(around):
    net = jobs._net()
    data = torch.cat([jobs._share(rank, 3) for rank in range(3)])
    for place in (1, 4):
        plain = nn.BatchNorm1d(net[place].num_features)
        plain.load_state_dict(net[place].state_dict())
        net[place] = plain
    shares = [torch.linspace(-1, 1, 2 * size).reshape(-1, 2) + rank for rank, size in enumerate((3, 3, 5))]
    (net(data) * torch.cat(shares)).sum().backward()
    alone = jobs._state(net)
    for way in ("plain", "checkpoint False", "checkpoint True", "compiled", "no_sync"):
        for name, value in alone.items():
            parts = [rank[way][name] for rank in around]
            found = torch.stack(parts).sum(0) if name.startswith("grad") else parts[0]
            assert_close(found, value, dtype=torch.float32, what=f"{way}: {name}")
    for rank in around:
        # Two layers, forward and backward; what a backward runs again exchanges nothing.
        assert [rank["exchanges"], *(rank[f"exchanges of checkpoint {kind}"] for kind in (False, True))] == [4, 4, 4]
        assert rank["exchanges of evaluation"] == 0
        assert rank["copied"]
        for name, value in rank["sharded"].items():
            assert_close(value, alone[name], dtype=torch.float32, what=f"FSDP: {name}")
    # DistributedDataParallel averages: after no_sync it adds the second step's to the first's, and averages both.
    assert all(
        torch.equal(rank["parallel"]["grad 0.weight"], around[0]["parallel"]["grad 0.weight"]) for rank in around
    )


SAID = {
    "channels": ("SyncError: SyncBatchNorm(3): refused on rank 2", "ShapeError: SyncBatchNorm(3): expected 3 channels"),
    "types": ("SyncError: SyncBatchNorm(3): the ranks have inputs of different types", "rank 2: torch.bfloat16"),
    "rank of input": ("refused on rank 2", "expected at least 2D input"),
    "modes": ("some ranks record a gradient and some do not", "rank 2: not recorded"),
    "layers": ("the ranks are in different calls", "rank 2: forward of layer 1, SyncBatchNorm(3)"),
    "settings": ("the ranks have different settings", "rank 2: as here"),
    "sizes": ("the ranks called different layers", "rank 2: SyncBatchNorm(3), 3, eps"),
    "one value": ("got 1 on all ranks", "got 1 on all ranks"),
    "nothing": ("nothing", "nothing"),
    "transform": ("are not computed under torch.func", "are not computed under torch.func"),
    "ways": ("rank 0: backward of layer 0", "rank 2: forward of layer 0"),
    "outside": ("nothing", "process_group does not hold this process, rank 2"),
}


@pytest.mark.parametrize("mistake", SAID)
def test_a_mistake_is_an_error_on_every_rank_and_moves_no_buffer(mistake, mistakes):
    first, last = SAID[mistake]
    assert first in mistakes[0][mistake]
    assert last in mistakes[2][mistake]
    for rank in mistakes if mistake != "outside" else mistakes[1:]:
        assert rank[f"{mistake}: still"]
        assert rank["goes on"]


COLD = {
    "swapped": ("rank 0: SyncBatchNorm(3) at '0'; rank 1: SyncBatchNorm(3) at '1'",),
    "depth": ("rank 0: SyncBatchNorm(3) at 'blocks.1.1'; rank 1: SyncBatchNorm(3) at 'blocks.0.1'",),
    "mode": (
        "rank 0: SyncBatchNorm(3) at 'blocks.0.1', with all in training",
        "rank 1: SyncBatchNorm(3) at 'blocks.1.1', with 'blocks.0.1' in evaluation",
    ),
    "warm mode": (
        "forward of layer 1, SyncBatchNorm(3) at 'blocks.1.1', call ",
        "SyncBatchNorm(3) at 'blocks.2.1', call ",
        "with 'blocks.1.1' in evaluation; rank 2",
        "with all in training",
    ),
    "held otherwise": ("nothing",),
    "held twice": ("nothing",),
    "alone": ("nothing",),
}


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    return run("cold", 3, tmp_path_factory.mktemp("cold"))


@pytest.mark.parametrize("case", COLD)
def test_layers_of_equal_settings_are_told_apart_from_the_first_call_on(case, cold):
    for rank in cold:
        for words in COLD[case]:
            assert words in rank[case]
        assert rank.get(f"{case}: still", True)


def test_a_rank_that_does_not_come_is_named_within_the_timeout(tmp_path):
    first, second, third = run("late", 3, tmp_path)
    for rank in (first, second):
        assert "SyncBatchNorm(3), forward: rank 2 did not come" in rank["said"]
        assert rank["waited"] < 10
        assert rank["still"]
    assert third["said"] == "nothing"


def test_detailed_debugging_names_the_call_of_each_rank_whatever_the_sizes(tmp_path):
    for rank in run("detailed", 2, tmp_path, TORCH_DISTRIBUTED_DEBUG="DETAIL"):
        assert "rank 0: SyncBatchNorm(3), layer 0; rank 1: SyncBatchNorm(64), layer 1" in rank["said"]
        assert rank["exchanges"] == 2
        assert rank["still"]


def test_micro_batches_of_all_ranks_are_one_batch(tmp_path):
    torch.manual_seed(2)
    net = jobs._net().double()
    for place in (1, 4):
        net[place] = nn.BatchNorm1d(net[place].num_features).double()
    x = torch.cat([jobs._share(rank, 3) for rank in range(3)]).double()
    for _ in range(2):
        net.zero_grad()
        net(x).pow(3).mean().backward()
    alone = jobs._state(net)
    for rank in run("accumulated", 3, tmp_path):
        for name, value in alone.items():
            assert_close(rank[name], value, dtype=torch.float64, what=name)


def test_gradients_that_lie_in_the_memory_of_the_next_ones_are_added_once(tmp_path):
    for rank in run("buckets", 2, tmp_path):
        for kind in ("exact", "statistics"):
            own, views = rank[kind, False], rank[kind, True]
            assert all(map(torch.equal, own[-2], own[-1])), "a step that fails leaves gradients as they were"
            for place, (expected, found) in enumerate(zip(own, views, strict=True)):
                for one, other in zip(expected, found, strict=True):
                    assert_close(other, one, dtype=torch.float64, what=f"{kind}, step {place}")


def test_micro_batches_of_a_sharded_net_are_one_batch_or_refused(tmp_path):
    first, second = run("sharded", 2, tmp_path)
    net = jobs.blocks(lambda size: nn.BatchNorm1d(size))
    for _ in range(2):
        net(first["data"]).pow(3).mean().backward()
    alone = jobs._state(net)
    for rank in (first, second):
        for how in ("whole", "blocks", "layers"):
            for name, value in rank[f"exact {how}"].items():
                assert_close(value, alone[name], dtype=torch.float64, what=f"{how}: {name}")
        said, still = rank["exact let go"]
        assert said.startswith("ArgumentError: accumulate: 0 holds 0.norm (SyncBatchNorm) and lets its weights go")
        assert "reshard_after_forward=False" in said
        assert still
        for how in ("blocks", "layers", "let go"):
            for name, value in rank[f"statistics {how}"].items():
                assert_close(value, rank["statistics whole"][name], dtype=torch.float64, what=f"{how}: {name}")


def test_layers_of_other_sizes_are_an_error_on_every_rank_and_no_crash(tmp_path):
    for rank in run("sizes", 3, tmp_path):
        for name in ("apart", "new"):
            assert "in different calls" in rank[name]
            assert all(f"rank {place}: " in rank[name] for place in range(3))
        assert "forward of layer 0, SyncBatchNorm(3)" in rank["apart"]
        assert "forward of layer 1, SyncBatchNorm(64)" in rank["apart"]
        assert "of a new layer" in rank["new"]
        assert "bring different numbers" in rank["bare"] or "in different calls" in rank["bare"]
        assert rank["still"]
        assert rank["again"] == [5, 5, 0]
        # Once the order of the calls is known: one exchange a layer each way.
        assert rank["counts"][0] > 4
        assert rank["counts"][-1] == 4


def test_a_rank_that_dies_leaves_no_other_waiting(tmp_path):
    run("killed", 3, tmp_path)
