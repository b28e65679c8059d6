"""The CPU kernels among torch's other citizens: threads, forks, autocast, checkpointing, copies, memory."""

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.functional import batch_norm
from normkit.kernels import threads
from normkit.kernels.numba.channels import passes as channel_passes
from tolerances import assert_close

from .shapes import WAYS, tensor

DEADLOCK = 60  # seconds after which a call that hangs has failed

SOME_WAYS = ["contiguous", "contiguous, few channels", "channels_last, folded", "channels_last, few"]


@pytest.fixture(autouse=True)
def kept_thread_count() -> Iterator[None]:
    """Leave the number of threads as it was."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def step(x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> list[Tensor]:
    """One training step: output, running statistics and every gradient."""
    channels = x.shape[1]
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(channels, generator=generator).to(x.dtype).requires_grad_()
    bias = torch.randn(channels, generator=generator).to(x.dtype).requires_grad_()
    dy = torch.empty_like(x).normal_(generator=generator)
    leaves = [x.detach().requires_grad_(), weight, bias]
    if residual is not None:
        leaves.append(residual.detach().requires_grad_())
    mean, var = torch.zeros(channels, dtype=x.dtype), torch.ones(channels, dtype=x.dtype)
    y = batch_norm(
        leaves[0], mean, var, weight, bias, True, activation=activation, residual=leaves[3] if leaves[3:] else None
    )
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy)]


def assert_identical(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert not one.isnan().any(), f"result {index} holds NaN"
        assert torch.equal(one, other), f"result {index} differs by {(one - other).abs().max().item():.3g}"


@pytest.mark.parametrize("way", WAYS)
def test_results_are_the_same_in_every_bit_for_any_number_of_threads(way):
    x = tensor(way)
    assert normkit.explain(normkit.BatchNorm2d(x.shape[1]), x).backend == "numba"
    torch.set_num_threads(1)
    expected = step(x)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert_identical(step(x), expected)


@pytest.mark.parametrize("way", SOME_WAYS)
def test_activation_and_residual_are_the_same_for_any_number_of_threads(way):
    x, residual = tensor(way), tensor(way)
    torch.set_num_threads(1)
    expected = step(x, "relu", residual)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert_identical(step(x, "relu", residual), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_the_same_for_any_number_of_threads(dtype):
    x = tensor("contiguous", dtype)
    torch.set_num_threads(1)
    expected = step(x)
    torch.set_num_threads(8)
    assert_identical(step(x), expected)


@pytest.mark.parametrize("way", ["contiguous, few channels", "channels_last, many"])
def test_python_threads_at_once_each_get_their_own_result(way):
    inputs = [tensor(way) for _ in range(4)]
    expected, found = [step(x) for x in inputs], [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def work(index):
        start.wait()
        for _ in range(3):
            found[index].append(step(inputs[index]))

    workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(DEADLOCK)
    assert not any(worker.is_alive() for worker in workers), "the calls wait for each other"
    for results, wanted in zip(found, expected, strict=True):
        assert len(results) == 3
        for result in results:
            assert_identical(result, wanted)


@pytest.mark.parametrize("way", ["contiguous", "channels_last, many"])
def test_thread_count_changed_between_forward_and_backward(way):
    x = tensor(way)
    dy, gradients = torch.randn_like(x), []
    for before, after in ((1, 1), (8, 2), (2, 3)):
        leaf = x.clone().requires_grad_()
        torch.set_num_threads(before)
        y = batch_norm(leaf, None, None, training=True)
        torch.set_num_threads(after)
        gradients.append([y.detach(), torch.autograd.grad(y, leaf, dy)[0]])
    for found in gradients[1:]:
        assert_identical(found, gradients[0])


def kernels_alone(x: Tensor, dy: Tensor) -> list[Tensor]:
    """Forward and backward without autograd, which torch refuses in a child whose parent has used it."""
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    layout = channel_passes.layout_of(x)
    y, saved = channel_passes.forward(x, layout, None, None, mean, var, 0.1, 1e-5, True)
    dx, dweight, dbias, _ = channel_passes.backward(dy, x, layout, None, None, saved)
    return [y, mean, var, dx, dweight, dbias, batch_norm(x, mean, var)]


def _in_the_child(x, dy, connection):
    # Filling memory is torch's own loop over its threads, which would wait for ever here.
    torch.utils.deterministic.fill_uninitialized_memory = False
    connection.send([result.numpy() for result in kernels_alone(x, dy)])


# Python itself warns of a fork beside running threads, which is what this test is about.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("way", SOME_WAYS)
def test_forked_child_gets_the_same_result_and_ends(way):
    torch.set_num_threads(3)
    x, dy = tensor(way), tensor(way)
    expected = kernels_alone(x, dy)  # the pool has run in the parent
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_the_child, args=(x, dy, sender), daemon=True)
    child.start()
    try:
        assert receiver.poll(DEADLOCK), "the child waits for threads that the fork did not take along"
        assert_identical([torch.from_numpy(result) for result in receiver.recv()], expected)
        child.join(DEADLOCK)
        assert child.exitcode == 0
    finally:
        if child.is_alive():
            child.kill()
            child.join()
    assert not threads._forked, "the parent lost its threads too"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant, with_residual):
    x = torch.randn(4, 17, 9, 7)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        layer = normkit.BatchNormAct2d(17)
        torch.nn.init.normal_(layer.norm.weight)
        leaf = x.clone().requires_grad_()
        shortcut = (leaf * 2) if with_residual else None

        def block(given, layer=layer, shortcut=shortcut):
            return torch.sigmoid(layer(given, shortcut))

        y = checkpoint(block, leaf, use_reentrant=reentrant) if checkpointed else block(leaf)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
        y.backward(dy)
        gradients.append([leaf.grad, *(value.grad for value in layer.parameters())])
    assert_identical(*gradients)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_runs_the_fused_layer_in_bfloat16_with_float32_state(memory_format):
    x = torch.randn(4, 3, 17, 11).to(memory_format=memory_format)
    conv, layer = nn.Conv2d(3, 16, 3), normkit.BatchNormAct2d(16)
    with torch.autocast("cpu", torch.bfloat16):
        z = conv(x)
        y = layer(z)
        assert normkit.explain(layer.norm, z).backend == "numba"
    assert y.dtype is z.dtype is torch.bfloat16
    y.backward(torch.randn_like(y))
    expected = torch.relu(
        batch_norm(z.detach().float(), None, None, layer.norm.weight, layer.norm.bias, True)
    ).bfloat16()
    assert torch.equal(y, expected)
    assert layer.norm.running_mean.dtype is layer.norm.weight.grad.dtype is torch.float32
    assert conv.weight.grad.dtype is torch.float32


def test_copies_and_pickles_of_a_model_that_ran_go_on_alike():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), normkit.BatchNormAct2d(16, activation="silu", decay=0.75))
    x = torch.randn(4, 3, 9, 9)
    model(x).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        original = copy.deepcopy(model)
        assert repr(twin) == repr(model)
        assert twin[1].activation == "silu"
        assert torch.equal(twin(x), original(x))
        assert torch.equal(twin[1].norm.running_var, original[1].norm.running_var)
        assert twin[1].norm.num_batches_tracked == 2


def test_distributed_data_parallel_gives_the_gradients_of_one_process(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), normkit.BatchNormAct2d(16), nn.Flatten(), nn.Linear(16 * 49, 2))
    alone, x = copy.deepcopy(model), torch.randn(4, 3, 9, 9)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        # Twice before the backward, as with accumulated gradients: buffers are broadcast between.
        for net in (wrapped, alone):
            (net(x).square().mean() + net(x * 2).square().mean()).backward()
    finally:
        dist.destroy_process_group()
    for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(found.grad, expected.grad, dtype=torch.float32)
    for found, expected in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(found, expected)


def saved_by(function) -> tuple[Tensor, list[Tensor]]:
    """Return what a function returns, and every tensor that autograd keeps for its backward."""
    kept: list[Tensor] = []

    def pack(value):
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = function()
    return y, kept


@pytest.mark.parametrize("way", ["contiguous", "channels_last, many"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_training_forward_saves_only_its_input_and_seven_numbers_per_channel(way, activation):
    x = tensor(way).requires_grad_()
    weight, bias = torch.ones(x.shape[1], requires_grad=True), torch.zeros(x.shape[1], requires_grad=True)
    y, kept = saved_by(lambda: batch_norm(x, None, None, weight, bias, True, activation=activation))
    large = [value for value in kept if value.numel() >= x.numel()]
    assert [value.data_ptr() for value in large] == [x.data_ptr()]
    small = [value for value in kept if value.numel() < x.numel() and value is not weight and value is not bias]
    assert [(value.shape, value.dtype) for value in small] == [((7 * x.shape[1],), torch.float64)]
    assert y.grad_fn is not None


@pytest.mark.parametrize(("activation", "other"), [("relu", "output"), ("silu", "residual"), (None, None)])
def test_residual_costs_at_most_one_tensor_that_exists_anyway(activation, other):
    x, residual = tensor("contiguous").requires_grad_(), tensor("contiguous").requires_grad_()
    y, kept = saved_by(lambda: batch_norm(x, None, None, training=True, activation=activation, residual=residual))
    expected = {x.data_ptr()} | ({{"output": y, "residual": residual}[other].data_ptr()} if other else set())
    large = [value.data_ptr() for value in kept if value.numel() >= x.numel()]
    assert len(large) == len(expected)
    assert set(large) == expected
