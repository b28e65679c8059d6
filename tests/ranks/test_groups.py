"""What stands for a group of processes: what is taken, what is refused, and what becomes of it in a copy."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import normkit
from normkit.errors import ArgumentError

NO_GROUPS = ("x", [0], 3, torch.device("cpu"))


@pytest.mark.parametrize("wrong", NO_GROUPS, ids=repr)
def test_what_is_no_group_is_refused_with_what_is_allowed(wrong, one_process):
    model = nn.Sequential(nn.BatchNorm1d(3))
    match = f"must be a group of torch.distributed .* got {type(wrong).__name__}"
    for call in (
        lambda: normkit.SyncBatchNorm(3, process_group=wrong),
        lambda: normkit.convert(model, to="sync", process_group=wrong),
        lambda: normkit.functional.sync_batch_norm(torch.randn(4, 3), None, None, training=True, process_group=wrong),
        lambda: normkit.recalibrate(model, torch.randn(8, 3), group=wrong),
        lambda: normkit.diagnose(model, group=wrong),
    ):
        with pytest.raises(ArgumentError, match=match):
            call()
    layer = normkit.SyncBatchNorm(3)
    layer.process_group = wrong
    with pytest.raises(ArgumentError, match=match):
        layer(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == 0


def test_a_group_goes_with_synchronized_layers_only(one_process):
    with pytest.raises(ArgumentError, match="process_group goes with to='sync', not with 'ghost'"):
        normkit.convert(nn.Sequential(nn.BatchNorm1d(3)), to="ghost", process_group=distributed.group.WORLD)


def test_a_mesh_of_one_dimension_is_its_group(one_process):
    mesh = init_device_mesh("cpu", (1,))
    layer = normkit.SyncBatchNorm(3, process_group=mesh)
    assert layer.process_group is mesh.get_group()
    assert layer(torch.randn(4, 3)).shape == (4, 3)
    assert normkit.recalibrate(layer, torch.randn(8, 3), group=mesh).batches == 1
    grid = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
    with pytest.raises(ArgumentError, match=r"mesh of 2 dimensions.*mesh.get_group\('data'\), of \('data', 'model'\)"):
        normkit.SyncBatchNorm(3, process_group=grid)


def test_a_group_that_was_destroyed_is_refused(one_process):
    group = distributed.new_group([0])
    layer = normkit.SyncBatchNorm(3, process_group=group)
    layer(torch.randn(4, 3))
    assert "process_group=ranks [0]" in repr(layer)
    distributed.destroy_process_group(group)
    for match in ("is not known to torch.distributed: it was destroyed", "no process group is running"):
        with pytest.raises(ArgumentError, match=match):
            layer(torch.randn(4, 3))
        assert "process_group=a group that does not run" in repr(layer)
        if distributed.is_initialized():
            distributed.destroy_process_group()
    assert int(layer.num_batches_tracked) == 1
    layer.eval()(torch.randn(4, 3))
    layer.train().process_group = None
    layer(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == 2


def test_a_copy_shares_the_group_and_what_is_pickled_has_none(one_process):
    group = distributed.new_group([0])
    net = nn.Sequential(normkit.SyncBatchNorm(3, process_group=group, timeout=7))
    assert copy.deepcopy(net)[0].process_group is copy.copy(net[0]).process_group is group
    with pytest.warns(UserWarning, match="pickled without its process_group"):
        loaded = pickle.loads(pickle.dumps(net))
    assert (loaded[0].process_group, loaded[0].timeout) == (None, 7)
    assert net[0].process_group is group
    pickle.dumps(normkit.SyncBatchNorm(3))


def test_a_description_names_what_was_given(one_process):
    layer = normkit.SyncBatchNorm(3, timeout=7, half_life=9, process_group=distributed.group.WORLD)
    assert "half_life=9, " in repr(layer)
    assert repr(layer).endswith("process_group=ranks [0], timeout=7)")
    assert "timeout" not in layer.settings_of_all_ranks()
    layer.momentum = 0.5
    assert "momentum=0.5, " in repr(layer)
    for other in (normkit.BatchNorm2d(3, half_life=2.5), normkit.GhostBatchNorm2d(3, half_life=2.5)):
        assert "half_life=2.5, " in repr(other)
    assert "half_life=2.5, " in repr(normkit.LazyBatchNorm2d(half_life=2.5))
    assert "half_life=2.5, " in repr(normkit.InstanceNorm2d(3, half_life=2.5))
