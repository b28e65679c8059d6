"""The simulator: the numbers of processes, bit for bit, and their mistakes named."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.errors import ArgumentError, SyncError
from normkit.functional.exchange import merge_moments
from tolerances import assert_close

from .cases import CASES, names, of_rank


@pytest.mark.parametrize("case", CASES, ids=names)
def test_the_simulator_equals_processes_in_every_bit(case, matrix):
    simulation = normkit.simulate(case.layer(sync=True), ranks=case.ranks)
    found = simulation.run(lambda layer, rank: of_rank(case, layer, rank), range(case.ranks))
    for rank, values in enumerate(found):
        for name, expected in matrix[rank][names(case)].items():
            assert torch.equal(values[name], expected), f"rank {rank}: {name}"


def test_ranks_that_call_otherwise_are_named():
    net = torch.nn.ModuleList([normkit.SyncBatchNorm(3), normkit.SyncBatchNorm(64)])
    inputs = [torch.randn(4, 3), torch.randn(4, 64)]

    def once_more(net, rank):
        for _ in range(2 + rank):
            net[0](inputs[0])

    with pytest.raises(SyncError, match=r"SyncBatchNorm\(3\): rank 0 did not come: its step has ended"):
        normkit.simulate(net, ranks=2).run(once_more, range(2))
    simulation = normkit.simulate(net, ranks=2)
    simulation.run(lambda net, rank: [layer(x) for layer, x in zip(net, inputs, strict=True)], range(2))
    with pytest.raises(
        SyncError, match=r"rank 0: SyncBatchNorm\(3\), layer 0 at '0'; rank 1: SyncBatchNorm\(64\), layer 1"
    ):
        simulation.run(lambda net, rank: net[rank](inputs[rank]), range(2))
    with pytest.raises(ArgumentError, match="2 ranks need as many parts"):
        simulation.run(lambda net, rank: None, range(3))
    with pytest.raises(ArgumentError, match="at least 1"):
        normkit.simulate(net, ranks=0)


def test_layers_of_equal_settings_are_told_apart_from_the_first_call_on():
    net = torch.nn.Sequential(normkit.SyncBatchNorm(3), normkit.SyncBatchNorm(3))
    with pytest.raises(SyncError, match=r"rank 0: SyncBatchNorm\(3\) at '0'; rank 1: SyncBatchNorm\(3\) at '1'"):
        normkit.simulate(net, ranks=2).run(lambda net, rank: net[rank](torch.randn(4, 3)), range(2))


def test_groups_of_ranks_have_statistics_of_their_own():
    x = torch.randn(12, 3, dtype=torch.float64)
    layer, shares = normkit.SyncBatchNorm(3).double(), list(x.split((1, 2, 5, 4)))
    groups = normkit.simulate(layer, ranks=4, group_size=2)
    outputs = groups.run(lambda layer, x: layer(x), shares)
    for first, whole in ((0, x[:3]), (2, x[3:])):
        alone = normkit.BatchNorm1d(3).double()
        assert_close(torch.cat(outputs[first : first + 2]), alone(whole), dtype=torch.float64)
        for rank in (first, first + 1):
            assert_close(groups.models[rank].running_var, alone.running_var, dtype=torch.float64)
    draws = groups.run(lambda layer, x: (layer(x), torch.rand(()))[1], shares)
    assert len({draw.item() for draw in draws}) == 4
    with pytest.raises(SyncError, match=r"rank 1 did not come"):
        groups.run(lambda layer, rank: layer(x) if rank != 3 else None, range(4))
    for wrong in (3, 0, True):
        with pytest.raises(ArgumentError, match="group_size must divide the 4 ranks"):
            normkit.simulate(layer, ranks=4, group_size=wrong)


def test_each_rank_draws_random_numbers_of_its_own_and_the_caller_goes_on_with_the_first():
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), normkit.SyncBatchNorm(3))
    x = torch.ones(8, 3)

    def step(net, x):
        return net[0](x), (net(x), torch.rand(3))[1]

    torch.manual_seed(4)
    dropped = torch.nn.functional.dropout(x)
    first = normkit.simulate(net, ranks=3)
    torch.manual_seed(4)
    found = first.run(step, [x] * 3)
    after = torch.rand(3)
    assert torch.equal(found[0][0], dropped)
    for kind in (0, 1):
        assert len({tuple(values[kind].flatten().tolist()) for values in found}) == 3
    torch.manual_seed(4)
    again = normkit.simulate(net, ranks=3).run(step, [x] * 3)
    assert all(torch.equal(a, b) for one, two in zip(found, again, strict=True) for a, b in zip(one, two, strict=True))
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(4)
    (net[0](x), net(x), torch.rand(3))
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(4)
    normkit.simulate(net, ranks=3, group_size=1).run(step, [x] * 3)
    assert torch.equal(after, torch.rand(3))
    # As processes do, each seeded by its rank.
    seeded = first.run(lambda net, rank: (torch.manual_seed(9 + rank), net(x), torch.rand(3))[2], range(3))
    for rank, values in enumerate(seeded):
        torch.manual_seed(9 + rank)
        net[0](x)
        assert torch.equal(values, torch.rand(3))


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ArgumentError, match=r"simulate takes a model, an nn\.Module, got NoneType None"):
        normkit.simulate(None)
    run = normkit.simulate(normkit.SyncBatchNorm(3), ranks=2).run
    with pytest.raises(ArgumentError, match=r"step must be a function .* got NoneType"):
        run(None, range(2))
    for wrong in (None, 3, {0: 1, 1: 2}, iter(range(2))):
        with pytest.raises(ArgumentError, match=f"is a {type(wrong).__name__}; pass a list or tensor of 2 parts"):
            run(lambda net, part: part, range(2), wrong)


def test_a_thousand_ranks_merge_as_exactly_as_one_sum():
    x = torch.randn(1000, 7, 5, dtype=torch.float64) + 1e4
    means = x.mean(1)
    mean, squares = merge_moments(
        torch.full((1000,), 7.0, dtype=torch.float64), means, (x - means[:, None]).square().sum(1)
    )
    assert (mean - x.flatten(0, 1).mean(0)).abs().max() < 1e-11
    var = x.flatten(0, 1).var(0, correction=0)
    assert ((squares / 7000 - var) / var).abs().max() < 1e-12


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_backwards_of_one_layer_in_another_order_are_an_error_and_no_mixture(create_graph, checkpointed):
    def step(layer, x, turned):
        forward = functools.partial(checkpoint, layer, use_reentrant=False) if checkpointed else layer
        inputs = [x.clone().requires_grad_(), (x + x.square()).requires_grad_()]
        losses = [forward(x).pow(3).sum() for x in inputs]
        order = (1, 0) if turned else (0, 1)
        return [torch.autograd.grad(losses[place], inputs[place], create_graph=create_graph)[0] for place in order]

    shares = torch.randn(8, 3).double().split(4)
    run = normkit.simulate(normkit.SyncBatchNorm(3).double(), ranks=2).run
    for first, second in zip(run(step, shares, [True, True]), run(step, shares, [False, False]), strict=True):
        assert torch.equal(first[0], second[1])
    with pytest.raises(SyncError, match="in the backward of different forwards of this layer"):
        run(step, shares, [True, False])


def test_a_backward_behind_the_simulation_is_told_so():
    shares = torch.randn(2, 4, 3, requires_grad=True)
    outputs = normkit.simulate(normkit.SyncBatchNorm(3), ranks=2).run(lambda layer, x: layer(x), shares)
    with pytest.raises(SyncError, match="backward: the simulation is over; call backward inside the step"):
        outputs[0].sum().backward()
