"""A forward that a backward runs again moves no statistics: activation checkpointing of every layer that keeps some."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import normkit
from normkit.functional import first_forward
from ranks.processes import leave
from tolerances import assert_close

CHANNELS = 6


def whitening(momentum):
    return normkit.WhiteningBatchNorm2d(CHANNELS, momentum=momentum, num_groups=3)


class Masked(nn.Module):
    """A masked norm between layers that pass one tensor: the padding is where the first channel is large."""

    def __init__(self, momentum):
        super().__init__()
        self.norm = normkit.MaskedBatchNorm1d(CHANNELS, momentum=momentum)

    def forward(self, x):
        rows = x.flatten(2)
        return self.norm(rows, rows[:, 0] < 1.5).view_as(x)


MAKERS = {
    "batch": lambda momentum: normkit.BatchNorm2d(CHANNELS, momentum=momentum),
    "batch, biased": lambda momentum: normkit.BatchNorm2d(CHANNELS, momentum=momentum, unbiased=False),
    "batch and activation": lambda momentum: normkit.BatchNormAct2d(CHANNELS, momentum=momentum, activation="silu"),
    "batch in place": lambda momentum: normkit.BatchNormAct2d(
        CHANNELS, momentum=momentum, activation="leaky_relu", inplace=True
    ),
    "ghost": lambda momentum: normkit.GhostBatchNorm2d(CHANNELS, momentum=momentum, ghost_size=4),
    "renorm": lambda momentum: normkit.BatchRenorm2d(CHANNELS, momentum=momentum, r_max=1.5, d_max=0.5),
    "renorm, scheduled": lambda momentum: normkit.BatchRenorm2d(
        CHANNELS, momentum=momentum, schedule=lambda step: (1.0 + step, 1.0 * step)
    ),
    "masked": Masked,
    "whitening": whitening,
    "instance": lambda momentum: normkit.InstanceNorm2d(
        CHANNELS, momentum=momentum or 0.1, affine=True, track_running_stats=True
    ),
}
every_layer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
both_kinds = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
both_momenta = pytest.mark.parametrize("momentum", [0.3, None])


def network(make, momentum, dropout=False):
    """A block that ends in another layer, so that a recomputation that stops early does not end in the norm."""
    between = nn.Sequential(nn.SiLU(), nn.Dropout(0.4)) if dropout else nn.SiLU()
    block = nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 1), make(momentum), between, make(momentum), nn.Conv2d(CHANNELS, CHANNELS, 1)
    )
    for value in block.parameters():
        nn.init.normal_(value, std=0.7)
    return block.double()


def step(block, called, x, weights):
    """Two steps of two batches each, all forwards before the backwards; return gradients and state."""
    torch.manual_seed(3)
    gradients = []
    for _ in range(2):
        leaves = [value.clone().requires_grad_() for value in x]
        total = sum((called(leaf) * weight).sum() for leaf, weight in zip(leaves, weights, strict=True))
        total.backward()
        gradients += [leaf.grad for leaf in leaves]
    return [*gradients, *(value.grad for value in block.parameters())], [value.clone() for value in block.buffers()]


def batches(dtype=torch.float64):
    return [(torch.randn(8, CHANNELS, 3, 5) * scale + shift).to(dtype) for scale, shift in ((1, 0), (2, 3))]


def assert_equal_to_twin(block, called, x=None, wrap=lambda function: function):
    x = batches() if x is None else x
    weights = [torch.randn_like(value) for value in x]
    twin = copy.deepcopy(block)
    compare(step(block, wrap(called(block)), x, weights), step(twin, wrap(twin), x, weights))


def compare(found, expected, compiled=False):
    """Gradients of parameters are added up in another order; the state is the same in every bit, but of a graph's."""
    for index, (one, other) in enumerate(zip(found[0], expected[0], strict=True)):
        assert_close(one, other, dtype=torch.float32 if compiled else other.dtype, what=f"gradient {index}")
    for index, (one, other) in enumerate(zip(found[1], expected[1], strict=True)):
        if compiled:
            assert_close(one, other, dtype=torch.float64, what=f"buffer {index}")
        else:
            assert torch.equal(one, other), f"buffer {index}: {one} for {other}"


@every_layer
@both_kinds
@both_momenta
def test_statistics_counter_and_gradients_are_those_without_checkpointing(make, reentrant, momentum):
    block = network(make, momentum)
    assert_equal_to_twin(block, lambda block: lambda x: checkpoint(block, x, use_reentrant=reentrant))


@every_layer
@both_kinds
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_nested(make, reentrant):
    def nested(block):
        inner = lambda x: checkpoint(block[:3], x, use_reentrant=reentrant)  # noqa: E731
        return lambda x: checkpoint(lambda y: block[3:](inner(y)), x, use_reentrant=reentrant)

    assert_equal_to_twin(network(make, 0.3), nested)


@every_layer
@both_kinds
def test_with_dropout_under_autocast(make, reentrant):
    def under_autocast(function):
        def run(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(x).float()

        return run

    if make is MAKERS["batch in place"]:
        pytest.skip("autocast's half precision is refused in place")
    block, x = network(make, None, dropout=True).float(), batches(torch.float32)
    called = lambda block: lambda x: checkpoint(block, x, use_reentrant=reentrant)  # noqa: E731
    assert_equal_to_twin(block, called, x, under_autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["batch", "batch and activation"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_type_and_layout(name, dtype, memory_format):
    block = network(MAKERS[name], 0.3).to(dtype)
    x = [value.to(memory_format=memory_format) for value in batches(dtype)]
    assert_equal_to_twin(block, lambda block: lambda x: checkpoint(block, x, use_reentrant=False), x)


@both_kinds
def test_plain_operations(reentrant):
    def plainly(function):
        def run(x):
            with normkit.use_backend("plain"):
                return function(x)

        return run

    with normkit.use_backend("plain"):
        block = network(MAKERS["batch"], None)
        assert_equal_to_twin(block, lambda block: lambda x: checkpoint(block, x, use_reentrant=reentrant))


def test_sequential_segments_and_the_wrapper():
    from torch.distributed._composable import checkpoint as composable
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    block = network(MAKERS["renorm"], 0.3)
    assert_equal_to_twin(block, lambda block: lambda x: checkpoint_sequential(block, 2, x, use_reentrant=False))
    assert_equal_to_twin(network(MAKERS["renorm"], None), checkpoint_wrapper)
    assert_equal_to_twin(network(MAKERS["renorm"], None), lambda block: composable(block))


def test_a_graph_that_is_kept_may_be_run_backward_often():
    for name in ("batch", "renorm"):
        block = network(MAKERS[name], 0.3)
        x = batches()[1].requires_grad_()
        y = checkpoint(block, x, use_reentrant=False)
        dy, kept = torch.randn_like(y), [value.clone() for value in block.buffers()]
        first = torch.autograd.grad(y, x, dy, retain_graph=True)
        second = torch.autograd.grad(y, x, dy)
        assert torch.equal(first[0], second[0])
        assert all(map(torch.equal, kept, block.buffers()))


def test_the_function_alone():
    x, weight = batches(torch.float32)[1], torch.randn(CHANNELS, requires_grad=True)
    kept = {}
    for use in (True, False):
        mean, var, count = torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.tensor(0)

        def run(weight, state=(mean, var, count)):
            return normkit.functional.batch_norm(
                x, state[0], state[1], weight, None, True, None, num_batches_tracked=state[2]
            ).tanh()

        y = checkpoint(run, weight, use_reentrant=False) if use else run(weight)
        y.pow(3).sum().backward()
        kept[use] = (mean, var, count)
    assert all(map(torch.equal, kept[True], kept[False]))


class Reversible(torch.autograd.Function):
    """What checkpoints of other libraries do: a forward without a graph, and the same again in the backward."""

    @staticmethod
    def forward(ctx, x, run):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, dy)
        return x.grad, None


@every_layer
def test_autograd_functions_that_compute_again(make):
    block = network(make, None)
    assert_equal_to_twin(block, lambda block: lambda x: Reversible.apply(x, block))


@every_layer
def test_a_first_forward_in_a_hook_moves_as_everywhere(make):
    """Of torch's layers too: nobody has run it before, so it is not run again."""
    layer = make(0.3)
    twin, (x, other) = copy.deepcopy(layer), batches()

    def hook(gradient):
        layer(other.clone())
        checkpoint(layer, other.clone(), use_reentrant=False)

    layer, twin = layer.double(), twin.double()
    leaf = x.requires_grad_()
    leaf.register_hook(hook)
    checkpoint(lambda value: value.sin(), leaf, use_reentrant=False).sum().backward()
    twin(other.clone()), twin(other.clone())
    for one, expected in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, expected)


def test_a_hook_inside_the_backward_of_a_checkpoint_is_no_repetition():
    layer, x = normkit.BatchNorm2d(CHANNELS).double(), batches()[0].requires_grad_()

    def run(value):
        y = value.sin()
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient + 0 * layer(gradient).detach())
        return y.cos()

    checkpoint(run, x, use_reentrant=True).sum().backward()
    assert layer.num_batches_tracked == 1


@every_layer
def test_a_function_whose_backward_calls_a_layer_first_says_so(make):
    x, moved = batches()[1], []
    for say in (False, True):
        layer = make(0.3).double()

        class Late(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dy, layer=layer, say=say):
                if say:
                    with first_forward():
                        layer(x)
                elif not isinstance(layer, normkit.BatchRenorm2d):
                    layer(x)
                return dy

        before = [value.clone() for value in layer.buffers()]
        Late.apply(x.clone().requires_grad_()).sum().backward()
        moved.append(any(not torch.equal(*pair) for pair in zip(before, layer.buffers(), strict=True)))
    assert moved == [False, True]


def test_renorm_says_when_the_first_run_is_lost():
    layer, x = normkit.BatchRenorm2d(CHANNELS).double(), batches()[1].requires_grad_()
    noise = iter((0.0, 1.0))
    y = checkpoint(
        lambda value: layer(value + next(noise) * torch.randn(CHANNELS, 1, 1).double()), x, use_reentrant=False
    )
    kept = [value.clone() for value in layer.buffers()]
    with pytest.raises(normkit.errors.StatisticsError, match=r"runs this forward again .* of its first run are lost"):
        y.sum().backward()
    assert all(map(torch.equal, kept, layer.buffers()))


def test_renorm_of_one_batch_twice_cannot_tell_which():
    layer, x = normkit.BatchRenorm2d(CHANNELS, r_max=1.1).double(), batches()[1].requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False) + checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(normkit.errors.StatisticsError, match=r"2 first runs had this very batch.*backward before"):
        y.sum().backward()


def train_a_rank(rank, world, store):
    """One process of a job: a network with every kind of layer, with checkpointing and without, in step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    names = ("batch", "renorm") if world > 1 else set(MAKERS) - {"batch in place"}
    layers = [module for name in sorted(names) for module in (MAKERS[name](0.3), nn.SiLU())]
    block = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), *layers).double()
    twin = nn.parallel.DistributedDataParallel(copy.deepcopy(block))
    torch.manual_seed(1 + rank)
    for value in batches():
        plain = twin(value)
        plain.sin().sum().backward()
    for reentrant in (True, False):
        torch.manual_seed(1 + rank)
        again = copy.deepcopy(block)
        model = nn.parallel.DistributedDataParallel(Checkpointed(again, reentrant))
        for value in batches():
            model(value.requires_grad_()).sin().sum().backward()
        compare(
            ([value.grad for value in again.parameters()], list(again.buffers())),
            ([value.grad for value in twin.parameters()], list(twin.module.buffers())),
        )
    if world > 1:
        leave(rank, world)
    dist.destroy_process_group()


class Checkpointed(nn.Module):
    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("world", [1, 2])
def test_data_parallel_processes(world, tmp_path):
    if world == 1:
        train_a_rank(0, 1, tmp_path / "store")
    else:
        torch.multiprocessing.spawn(train_a_rank, (world, tmp_path / "store"), nprocs=world)


compiled_in_tests = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:<class 'torch.autograd.function.Function'>"
)


def one_batch_a_step(block, called, x):
    twin = copy.deepcopy(block)
    for value in x:
        weights = [torch.randn_like(value)]
        compare(step(block, called, [value], weights), step(twin, twin, [value], weights), compiled=True)
        for parameter in [*block.parameters(), *twin.parameters()]:
            parameter.grad = None


@pytest.mark.parametrize("name", ["batch and activation", "ghost", "masked", "instance"])
@compiled_in_tests
def test_a_compiled_function_that_checkpoints(name):
    """The graph holds both runs, and one movement. Two forwards before a backward torch refuses, of its layers too."""
    block = network(MAKERS[name], 0.3)
    called = torch.compile(lambda value: checkpoint(block, value, use_reentrant=False), backend="aot_eager")
    one_batch_a_step(block, called, batches())


@pytest.mark.parametrize(
    ("name", "reentrant"), [("batch", True), *((name, False) for name in ("batch", "ghost", "whitening", "instance"))]
)
@compiled_in_tests
def test_a_compiled_block_that_is_checkpointed(name, reentrant):
    """The graph itself is run again."""
    block = network(MAKERS[name], 0.3)
    compiled = torch.compile(block, backend="aot_eager")
    one_batch_a_step(block, lambda value: checkpoint(compiled, value, use_reentrant=reentrant), batches())


def test_a_compiled_renorm_that_is_checkpointed_is_refused():
    for compile_inside in (True, False):
        layer = normkit.BatchRenorm2d(CHANNELS).double()
        if compile_inside:
            compiled = torch.compile(layer, backend="aot_eager")
            y = checkpoint(compiled, batches()[0].requires_grad_(), use_reentrant=False)
        else:
            function = lambda value, layer=layer: checkpoint(layer, value, use_reentrant=False)  # noqa: E731
            y = torch.compile(function, backend="aot_eager")(batches()[0].requires_grad_())
        with pytest.raises(normkit.errors.StatisticsError, match=r"this compiled forward again .* Leave the layer"):
            y.sum().backward()
