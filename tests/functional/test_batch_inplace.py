"""Batch normalization in place where a gradient is recorded: its gradients, and what it refuses."""

import copy
import itertools

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError, BackendError
from normkit.functional import batch_norm
from tolerances import assert_close

# Every way to cut the work.
SHAPES = ((4, 3, 5, 7), (33, 5), (3, 3, 117, 113), (8, 520, 7, 7), (2, 5, 3, 4, 2))


def parameters(channels, dtype):
    """A weight of both signs and not near zero, and a bias."""
    weight = (torch.rand(channels, dtype=dtype) + 0.5) * torch.where(torch.randn(channels) < 0, -1.0, 1.0)
    return weight.to(dtype), torch.randn(channels, dtype=dtype)


def gradients(x, dy, weight, bias, inplace, **settings):
    """Y, the gradients of x, weight and bias, and the running statistics."""
    leaf, weight, bias = x.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone(), bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    running = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
    # A product whose backward needs neither its input nor its output, so that it may be overwritten.
    held = leaf * 1
    y = batch_norm(held, *running, weight, bias, inplace=inplace, **settings)
    assert (y is held) == inplace
    y.backward(dy)
    return y.detach(), leaf.grad, weight.grad, bias.grad, *running


@pytest.mark.parametrize("activation", [None, "leaky_relu"], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_out_of_place(shape, activation, kernels_ran):
    dtype = torch.float32
    for channels_last, training in itertools.product((False, True), (True, False)):
        x, dy = torch.randn(shape, dtype=dtype) * 2 + 3, torch.randn(shape, dtype=dtype)
        if channels_last:
            x, dy = (value.movedim(1, -1).contiguous().movedim(-1, 1) for value in (x, dy))
        settings = {"activation": activation, "training": training}
        weight_and_bias = parameters(shape[1], dtype)
        expected = gradients(x, dy, *weight_and_bias, False, **settings)
        kernels_ran.clear()
        found = gradients(x, dy, *weight_and_bias, True, **settings)
        assert kernels_ran.served(dtype, backward=True)
        assert torch.equal(found[0], expected[0])
        for one, other, what in zip(found, expected, ("y", "dx", "dweight", "dbias", "mean", "var"), strict=True):
            assert_close(one, other, dtype=dtype, what=what)


def test_gradcheck_passes_in_place():
    x, (weight, bias) = torch.randn(5, 3, 2, dtype=torch.float64), parameters(3, torch.float64)

    def call(x, weight, bias):
        return batch_norm(x * 1, None, None, weight, bias, training=True, activation="leaky_relu", inplace=True)

    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    assert torch.autograd.gradcheck(call, leaves)


def test_network_trains_alike_and_keeps_one_tensor_less():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), normkit.BatchNormAct2d(8, activation="leaky_relu"), nn.Conv2d(8, 4, 3))
    twin = copy.deepcopy(net)
    twin[1].inplace = True
    assert "inplace=True" in repr(twin[1])
    x, kept = torch.randn(4, 3, 9, 9), {}
    for name, model in (("out of place", net), ("in place", twin)):
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            held.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
        kept[name] = sum(held.values())
    assert kept["out of place"] - kept["in place"] == 4 * 8 * 7 * 7 * 4
    for one, other in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert_close(one.float(), other.float(), dtype=torch.float32)


REFUSED = {
    "an activation without an inverse": (lambda x, w, b: (x, w, b, {"activation": "relu"}), "relu has no inverse"),
    "a residual": (lambda x, w, b: (x, w, b, {"residual": x.detach()}), "input and the residual apart"),
    "half precision": (lambda x, w, b: (x.bfloat16(), w, b, {}), "too coarse"),
    "a leaf": (lambda x, w, b: (x.detach().requires_grad_(), w, b, {}), "leaf that requires a gradient"),
    "a view": (lambda x, w, b: (x[1:], w, b, {}), "the input is a view"),
    "a strided input": (lambda x, w, b: ((x.transpose(0, 2) * 1), w, b, {}), "the input is strided"),
    "a weight of zero": (lambda x, w, b: (x, w * torch.tensor([1, 0.0, 1]), b, {}), "the weight of channel 1 is 0"),
    "a weight too near zero": (
        lambda x, w, b: (x, w * torch.tensor([1, 1, 1e-4]), b * 0 + 1, {}),
        r"the weight of channel 2 is 0.0001, beside a bias of 1: too near zero",
    ),
    "a weight that is NaN": (lambda x, w, b: (x, w * torch.nan, b, {}), "the weight of channel 0 is nan"),
    "a bias too large without a weight": (lambda x, w, b: (x, None, b * 0 + 2e3, {}), "a bias of 2e"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_backward_is_refused_and_nothing_changes(case):
    build, message = REFUSED[case]
    leaf, (weight, bias) = torch.randn(4, 3, 3), parameters(3, torch.float32)
    x, weight, bias, settings = build(leaf.requires_grad_() * 1, weight.abs().clamp(0.5, 1), bias)
    running, count = (torch.zeros(3), torch.ones(3)), torch.tensor(0)
    before = x.detach().clone()
    with pytest.raises(ArgumentError, match=message) as raised:
        batch_norm(x, *running, weight, bias, True, inplace=True, num_batches_tracked=count, **settings)
    assert "leave inplace=True out" in str(raised.value)
    assert torch.equal(x, before)
    assert torch.equal(running[0], torch.zeros(3))
    assert torch.equal(running[1], torch.ones(3))
    assert count == 0
    with torch.no_grad():
        batch_norm(x.clone(), *running, weight, bias, True, inplace=True, **settings)


def test_other_backends_refuse_and_change_nothing():
    x, running = torch.randn(4, 3, requires_grad=True) * 1, torch.zeros(3)
    before = x.detach().clone()
    with normkit.use_backend("plain"), pytest.raises(BackendError, match="numba kernels alone"):
        batch_norm(x, running, torch.ones(3), training=True, inplace=True)
    assert torch.equal(x, before)
    assert torch.equal(running, torch.zeros(3))


def test_second_derivative_is_refused_with_the_reason():
    leaf = torch.randn(4, 3, requires_grad=True)
    y = batch_norm(leaf * 1, None, None, training=True, inplace=True)
    with pytest.raises(ArgumentError, match="cannot itself be differentiated"):
        torch.autograd.grad(y.square().sum(), leaf, create_graph=True)


def test_overwritten_input_that_another_backward_needs_is_noticed():
    leaf = torch.randn(4, 3, requires_grad=True)
    held = leaf.exp()
    y = batch_norm(held, None, None, training=True, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_compiled_graph_gives_the_same_gradients():
    weight, bias = parameters(3, torch.float32)

    def call(x):
        return batch_norm(x * 1, None, None, weight, bias, training=True, activation="leaky_relu", inplace=True)

    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = torch.linspace(-1, 2, 24).reshape(4, 3, 2).clone().requires_grad_()
        function(leaf).pow(3).sum().backward()
        found.append(leaf.grad)
    assert_close(found[1], found[0], dtype=torch.float32)
