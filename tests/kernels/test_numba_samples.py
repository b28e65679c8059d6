"""The CPU kernels of layer, RMS, group and instance norm, in every way they cut their work.

Each test says which kernel ran: nothing here is compared with torch operations that served the call instead.
"""

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import normkit
from normkit import reference
from normkit.errors import ArgumentError, BackendError
from normkit.functional import group_norm, instance_norm, layer_norm, rms_norm
from normkit.kernels.native import calls as native
from normkit.kernels.numba.samples import passes as sample_passes
from tolerances import FORWARD_ULP, assert_close


@dataclass(frozen=True)
class Way:
    """One way to cut the work.

    Attributes:
        method: "layer", "rms", "group" or "instance".
        shape: of the input.
        groups: of the channels.
        layout: in which the kernels see it.
        parts: tasks that share a group or a sample; 1 where one task does everything.
    """

    method: str
    shape: tuple[int, ...]
    groups: int
    layout: str
    parts: int

    @property
    def channels(self) -> int:
        return self.shape[1] if self.method in ("group", "instance") else self.shape[-1]

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers in this shape and layout; the plan is what the table says."""
        x = torch.randn(self.shape, dtype=dtype) * 2 + 3
        if self.layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        form = sample_passes.form_of(x, self.groups) if x.dim() > 2 else sample_passes.form_of_rows(x, 1)
        assert form is not None
        found = (form.layout, sample_passes.plan(form, x.element_size()).parts)
        assert found == (self.layout, self.parts), "this shape goes another way now; choose one that does not"
        return x

    def call(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str | None = None) -> Tensor:
        if self.method == "layer":
            return layer_norm(x, x.shape[-1:], weight, bias, activation=activation)
        if self.method == "rms":
            return rms_norm(x, x.shape[-1:], weight, 1e-5, activation=activation)
        if self.method == "group":
            return group_norm(x, self.groups, weight, bias, activation=activation)
        return instance_norm(x, weight=weight, bias=bias, activation=activation)

    def judge(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[object, Callable[..., object]]:
        """The reference's forward in float64, and its backward."""
        array, gamma, beta = (None if value is None else value.detach().double().numpy() for value in (x, weight, bias))
        if self.method == "layer":
            return reference.layer_norm(array, x.shape[-1], gamma, beta), reference.layer_norm_backward
        if self.method == "rms":
            return reference.rms_norm(array, x.shape[-1], gamma, eps=1e-5), reference.rms_norm_backward
        if self.method == "group":
            return reference.group_norm(array, self.groups, gamma, beta), reference.group_norm_backward
        return reference.instance_norm(array, gamma, beta), reference.instance_norm_backward

    def group_of(self, x: Tensor, channel: int) -> Tensor:
        """What shares its statistics with this channel in the last sample."""
        if x.dim() == 2:
            return x[-1]
        size = self.channels // self.groups
        return x[-1, channel // size * size : (channel // size + 1) * size]


WAYS = {
    "layer": Way("layer", (71, 257), 1, "elementwise", 1),
    "layer, long rows": Way("layer", (5, 9001), 1, "elementwise", 1),
    "layer, one short row": Way("layer", (1, 5), 1, "elementwise", 1),
    "rms": Way("rms", (301, 131), 1, "elementwise", 1),
    "group, planes": Way("group", (3, 12, 13, 11), 4, "contiguous", 1),
    "group, planes in parts": Way("group", (2, 6, 173, 167), 1, "contiguous", 10),
    "group, pieces of planes": Way("group", (1, 2, 373, 367), 2, "contiguous", 8),
    "group, channels_last": Way("group", (5, 24, 7, 5), 3, "channels_last", 1),
    "group, folded channels_last": Way("group", (5, 6, 16, 12), 2, "channels_last", 1),
    "group, channels_last in parts": Way("group", (3, 66, 61, 37), 2, "channels_last", 9),
    "one group, channels_last": Way("group", (5, 24, 7, 5), 1, "channels_last", 1),
    "one group, channels_last in parts": Way("group", (3, 33, 61, 37), 1, "channels_last", 4),
    "instance, planes": Way("instance", (4, 17, 7, 7), 17, "contiguous", 1),
    "instance, channels_last": Way("instance", (4, 40, 7, 9), 40, "channels_last", 1),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
large_ways = pytest.mark.parametrize("name", [name for name in WAYS if name != "layer, one short row"])


@pytest.fixture
def ran(monkeypatch) -> Iterator[list[tuple[str, torch.dtype, str | None]]]:
    """Note every kernel that runs, by either path."""
    noted, kernel = [], sample_passes.kernel

    def note(*which):
        noted.append(which)
        return kernel(*which)

    monkeypatch.setattr(sample_passes, "kernel", note)
    native.watch(lambda name, dtype, activation, residual: noted.append((name, dtype, activation)))
    yield noted
    native.watch(None)
    assert noted, "no kernel ran"


def ulps(y: Tensor, expected: np.ndarray) -> float:
    """The largest error of a float32 result, in units in the last place of max(1, |y|)."""
    unit = np.spacing(np.maximum(1, np.abs(expected)).astype(np.float32)).astype(np.float64)
    return float((np.abs(y.detach().double().numpy() - expected) / unit).max())


def parameters(way: Way, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(way.channels, dtype=dtype, requires_grad=True)
    return weight, None if way.method == "rms" else torch.randn(way.channels, dtype=dtype, requires_grad=True)


def gradients(way: Way, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None):
    """y, dx, dweight and, where there is a bias, dbias."""
    leaf = x.clone().requires_grad_()
    y = way.call(leaf, weight, bias, activation)
    leaves = (leaf, weight) if bias is None else (leaf, weight, bias)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


# Every element type and layout is compiled for itself, which takes seconds: the pairs that matter, not all.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in WAYS), ("rms", torch.float64)],
)
def test_output_and_gradients_match_the_reference(name, dtype, ran):
    way = WAYS[name]
    x, (weight, bias) = way.input(dtype), parameters(way, dtype)
    dy = torch.randn_like(x)
    found = gradients(way, x, dy, weight, bias)
    assert {name for name, *_ in ran} >= {f"samples.{way.layout}.forward", f"samples.{way.layout}.backward"}
    step, backward = way.judge(x, weight, bias)
    back = backward(dy.double().numpy(), step)
    expected = {"y": step.output, "dx": back.dx, "dweight": back.dweight}
    if bias is not None:
        expected["dbias"] = back.dbias
    for value, (name, judged) in zip(found, expected.items(), strict=True):
        assert_close(value, torch.from_numpy(judged), dtype=dtype, what=name)
    assert found[0].stride() == x.stride() == found[1].stride()


# Relu is the lower half of relu6; `test_numba_channels` has it by itself.
@pytest.mark.parametrize(
    ("name", "activation", "dtype"),
    [
        ("layer", "silu", torch.float32),
        ("group, planes", "relu6", torch.float32),
        ("group, planes", "silu", torch.float64),
        ("group, channels_last", "leaky_relu", torch.float32),
    ],
)
def test_fused_activation_matches_torch_in_float64(name, activation, dtype, ran):
    way = WAYS[name]
    x, (weight, bias) = way.input(dtype), parameters(way, dtype)
    dy = torch.randn_like(x)
    found = gradients(way, x, dy, weight, bias, activation)
    assert {which[2] for which in ran if which[0].endswith(("forward", "backward"))} == {activation}
    leaves = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    if way.method == "layer":
        z = F.layer_norm(leaves[0], x.shape[-1:], *leaves[1:])
    else:
        z = F.group_norm(leaves[0], way.groups, *leaves[1:])
    y = getattr(F, activation)(z)
    expected = (y, *torch.autograd.grad(y, leaves, dy.double()))
    for value, judged, what in zip(found, expected, ("y", "dx", "dweight", "dbias"), strict=True):
        assert_close(value, judged.detach(), dtype=dtype, what=what)


@pytest.mark.parametrize(("name", "dtype"), [("layer", torch.bfloat16), ("group, planes", torch.float16)])
def test_half_precision_is_rounded_once(name, dtype, ran):
    way = WAYS[name]
    x = way.input().to(dtype)
    weight, bias = parameters(way)
    dy = torch.randn_like(x)
    wide = gradients(way, x.float(), dy.float(), weight, bias)
    found = gradients(way, x, dy, weight, bias)
    assert (f"samples.{way.layout}.forward", dtype, None) in ran
    for value, judged, what in zip(found[:2], wide[:2], ("y", "dx"), strict=True):
        assert torch.equal(value, judged.to(dtype)), what
    for value, judged, what in zip(found[2:], wide[2:], ("dweight", "dbias"), strict=True):
        assert value.dtype is torch.float32
        assert torch.equal(value, judged), what
    same = way.call(x, weight.detach().to(dtype), bias.detach().to(dtype))
    assert torch.equal(same, way.call(x, weight.detach().to(dtype).float(), bias.detach().to(dtype).float()))


@large_ways
def test_results_are_equal_in_every_bit_for_any_number_of_threads(name, ran):
    way, threads = WAYS[name], torch.get_num_threads()
    x, (weight, bias) = way.input(), parameters(way)
    dy = torch.randn_like(x)
    try:
        found = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(gradients(way, x, dy, weight, bias))
    finally:
        torch.set_num_threads(threads)
    for results in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], results, strict=True))


@every_way
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_float32_is_within_four_units_of_the_reference(way, mean, ran):
    x = way.input() / 2 + mean
    assert ulps(way.call(x, None, None), way.judge(x, None, None)[0].output) <= FORWARD_ULP


@every_way
def test_values_far_from_the_first_ones_stay_exact(way, ran):
    # Statistics gathered about an outlier would lose its square's digits.
    x = way.input()
    x.flatten()[:16] = x.flatten()[:16] if x.numel() < 64 else 3e3
    assert ulps(way.call(x, None, None), way.judge(x, None, None)[0].output) <= FORWARD_ULP


@every_way
@pytest.mark.parametrize("value", [7.0, 0.1, 1e10])
def test_constant_group_gives_the_bias_exactly(way, value, ran):
    if way.method == "rms":
        y = way.call(torch.zeros(3, 131), torch.randn(131), None)
        assert torch.equal(y, torch.zeros(3, 131))
        return
    x, bias = way.input(), torch.randn(way.channels)
    way.group_of(x, 1)[...] = value
    y = way.group_of(way.call(x, None, bias), 1)
    expected = bias if x.dim() == 2 else way.group_of(bias.reshape(1, -1, 1, 1), 1)
    assert torch.equal(y, expected.expand_as(y))


@every_way
@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_huge_values_stay_finite(way, scale, ran):
    x, (weight, bias) = (way.input().double() * scale).float(), parameters(way)
    y, dx, dweight, *_ = gradients(way, x, torch.randn_like(x), weight, bias)
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dweight).all()
    assert ulps(way.call(x, None, None), way.judge(x, None, None)[0].output) <= FORWARD_ULP
    assert torch.isfinite(y).all()


@large_ways
def test_nan_stays_in_its_group(name, ran):
    way = WAYS[name]
    x, (weight, bias) = way.input(), parameters(way)
    dy, dirty = torch.randn_like(x), x.clone()
    way.group_of(dirty, 1)[..., -1] = math.nan
    clean, found = gradients(way, x, dy, weight, bias), gradients(way, dirty, dy, weight, bias)
    for one, other in zip(clean[:2], found[:2], strict=True):
        assert way.group_of(other, 1).isnan().all()
        way.group_of(other, 1)[...] = 0
        way.group_of(one, 1)[...] = 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [2, 3, 15, 16, 17, 31, 33, 63, 65])
def test_rows_of_every_small_size_match_the_reference(size, ran):
    way = Way("layer", (size, size), 1, "elementwise", 1)
    x, (weight, bias) = way.input(), parameters(way)
    dy = torch.randn_like(x)
    found = gradients(way, x, dy, weight, bias)
    step, backward = way.judge(x, weight, bias)
    back = backward(dy.double().numpy(), step)
    for value, judged in zip(found, (step.output, back.dx, back.dweight, back.dbias), strict=True):
        assert_close(value, torch.from_numpy(judged), dtype=torch.float32)


# Three groups of a few elements, and of more than the backward of short runs takes.
@pytest.mark.parametrize("shape", [(71, 24), (6, 1803)])
def test_groups_of_vectors_match_the_reference(shape, ran):
    way = Way("group", shape, 3, "elementwise", 1)
    x, (weight, bias) = torch.randn(shape) * 2 + 3, parameters(way)
    dy = torch.randn_like(x)
    found = gradients(way, x, dy, weight, bias)
    assert ("samples.elementwise.backward", torch.float32, None) in ran
    step, backward = way.judge(x, weight, bias)
    back = backward(dy.double().numpy(), step)
    for value, judged in zip(found, (step.output, back.dx, back.dweight, back.dbias), strict=True):
        assert_close(value, torch.from_numpy(judged), dtype=torch.float32)


def test_strided_input_and_gradient_are_followed(ran):
    x, weight, bias = torch.randn(7, 2, 12, 5), torch.randn(12, requires_grad=True), torch.randn(12, requires_grad=True)
    sliced = x[:, 0].requires_grad_()
    dy = torch.randn(5, 12, 7).transpose(0, 2)
    y = group_norm(sliced, 3, weight, bias)
    found = torch.autograd.grad(y, (sliced, weight, bias), dy)
    step = reference.group_norm(sliced.detach().double().numpy(), 3, weight.detach().numpy(), bias.detach().numpy())
    back = reference.group_norm_backward(dy.double().numpy(), step)
    for value, judged in zip((y, *found), (step.output, back.dx, back.dweight, back.dbias), strict=True):
        assert_close(value.detach(), torch.from_numpy(judged), dtype=torch.float32)


def test_permuted_positions_keep_their_order_in_memory(ran):
    x = torch.randn(2, 6, 4, 5, 3).permute(0, 1, 4, 2, 3)
    y = instance_norm(x)
    assert y.stride() == x.stride()
    assert_close(y, torch.from_numpy(reference.instance_norm(x.double().numpy()).output), dtype=torch.float32)


def test_several_dimensions_are_normalized_as_one_row(ran):
    x, weight = torch.randn(3, 5, 7, 2), torch.randn(7, 2, requires_grad=True)
    y = layer_norm(x, (7, 2), weight)
    (dweight,) = torch.autograd.grad(y, weight, dy := torch.randn_like(x))
    step = reference.layer_norm(x.double().numpy(), (7, 2), weight.detach().double().numpy())
    back = reference.layer_norm_backward(dy.double().numpy(), step)
    assert_close(y.detach(), torch.from_numpy(step.output), dtype=torch.float32)
    assert_close(dweight, torch.from_numpy(back.dweight), dtype=torch.float32)


@pytest.mark.parametrize("name", ["layer", "rms", "group, planes", "group, channels_last"])
@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_the_gradients_that_are_asked_for_are_computed(name, wanted, ran):
    way = WAYS[name]
    x, (weight, bias) = way.input(), parameters(way)
    dy = torch.randn_like(x)
    expected = dict(zip(("y", "x", "weight"), gradients(way, x, dy, weight, bias), strict=False))[wanted]
    frozen = {"x": x.clone(), "weight": weight.detach()}
    frozen[wanted].requires_grad_()
    y = way.call(frozen["x"], frozen["weight"], None if bias is None else bias.detach())
    (found,) = torch.autograd.grad(y, frozen[wanted], dy)
    assert torch.equal(found, expected)


def test_tracked_statistics_are_those_of_the_kernel(ran):
    x = torch.randn(5, 3, 11, 7) * 3 + 1e3
    mean, var = torch.full((3,), 0.5), torch.full((3,), 2.0)
    y = instance_norm(x, mean, var, momentum=0.25)
    flat = x.double().flatten(2)
    assert_close(mean, 0.75 * 0.5 + 0.25 * flat.mean(2).mean(0), dtype=torch.float32)
    assert_close(var, 0.75 * 2.0 + 0.25 * flat.var(2).mean(0), dtype=torch.float32)
    assert torch.equal(y, instance_norm(x))


def test_double_backward_agrees_with_torch(ran):
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn_like(x)
    found = []
    for y in (group_norm(x, 2, weight, bias, activation="silu"), F.silu(F.group_norm(x, 2, weight, bias))):
        dx, dweight = torch.autograd.grad(y, (x, weight), torch.cos(y), create_graph=True)
        found.append(torch.autograd.grad((dx * v).sum() + dweight.square().sum(), (x, weight, bias)))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, dtype=torch.float64)


def test_input_changed_before_the_backward_is_refused(ran):
    x = torch.randn(4, 8)
    weight = torch.ones(8, requires_grad=True)
    y = layer_norm(x, (8,), weight)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_several_python_threads_get_the_same_results(ran):
    way = WAYS["group, channels_last in parts"]
    x, (weight, bias) = way.input(), parameters(way)
    dy = torch.randn_like(x)
    expected = gradients(way, x, dy, weight, bias)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradients(way, x, dy, weight, bias), range(8)):
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def _in_the_child(connection, x: Tensor) -> None:
    # Filling memory is torch's own loop over its threads, which would wait for ever here.
    torch.utils.deterministic.fill_uninitialized_memory = False
    connection.send(group_norm(x, 3).numpy())


# Python itself warns of a fork beside running threads, which is what this test is about.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_child_gets_the_same_result_and_ends(ran):
    x = torch.randn(4, 12, 33, 29)
    expected = group_norm(x, 3)  # the pool has run in the parent
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_the_child, args=(sender, x), daemon=True)
    child.start()
    try:
        assert receiver.poll(60), "the child waits for threads that the fork did not take along"
        assert torch.equal(torch.from_numpy(receiver.recv()), expected)
        child.join(60)
        assert child.exitcode == 0
    finally:
        if child.is_alive():
            child.kill()
            child.join()


def test_requested_backend_is_honoured_or_refused():
    x = torch.randn(4, 8)
    with normkit.use_backend("plain"):
        assert_close(layer_norm(x, (8,)), F.layer_norm(x, (8,)), dtype=torch.float32)
    with normkit.use_backend("numba"):
        layer_norm(x, (8,))
        with pytest.raises(BackendError, match="meta"):
            layer_norm(x.to("meta"), (8,))
    with normkit.use_backend("triton"), pytest.raises(BackendError, match="triton"):
        layer_norm(x, (8,))


def test_explanation_names_the_kernel_that_runs():
    x = torch.randn(4, 6, 5, 3)
    found = normkit.explain(normkit.GroupNorm(2, 6), x.to(memory_format=torch.channels_last))
    assert (found.backend, found.kernel.split(", ")[:2]) == ("numba", ["per sample", "channels_last"])
    found = normkit.explain(normkit.LayerNorm(4), x.transpose(0, 3))
    assert found.kernel.startswith("per sample, elementwise, ")
    assert found.kernel.endswith(", after a copy into contiguous memory")
    tracked = normkit.InstanceNorm2d(6, track_running_stats=True)
    assert normkit.explain(tracked, x).kernel.startswith("per sample, contiguous")
    assert normkit.explain(tracked.eval(), x).kernel.startswith("contiguous")


@pytest.mark.parametrize(
    "call", [lambda x, a: layer_norm(x, (6,), activation=a), lambda x, a: rms_norm(x, (6,), activation=a)]
)
def test_unknown_activation_is_refused(call):
    with pytest.raises(ArgumentError, match="unknown activation 'tanh'; known are: relu, relu6, leaky_relu, silu"):
        call(torch.randn(2, 6), "tanh")


def test_plain_operations_apply_the_activation_too():
    x = torch.randn(3, 6, 4)
    for call in (
        lambda: group_norm(x, 2, activation="relu6"),
        lambda: instance_norm(x, activation="relu6"),
        lambda: layer_norm(x, (4,), activation="silu"),
        lambda: rms_norm(x, (4,), activation="silu"),
    ):
        with normkit.use_backend("plain"):
            plain = call()
        assert_close(call(), plain, dtype=torch.float32)
