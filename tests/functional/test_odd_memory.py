"""Tensors that lie oddly in memory: every argument of every function, in both layouts, gives the right numbers.

The judge is torch's function in float64, on plain copies of the same values.
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import normkit
from normkit.errors import ArgumentError, DtypeError, StatisticsError
from normkit.functional import (
    batch_norm,
    batch_renorm,
    batch_steps,
    ghost_batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    masked_batch_norm,
    rms_norm,
    whitening_batch_norm,
)
from normkit.kernels.numba.channels import launch, step_calls
from normkit.kernels.numba.channels import passes as channel_passes
from normkit.kernels.numba.samples import passes as sample_passes
from tolerances import RELATIVE, assert_close

SHAPE = (4, 6, 5, 3)


def negative(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    """The imaginary part of a conjugate, as torch makes negative views of itself."""
    wide = x if x.dtype in (torch.float32, torch.float64) else None
    return negative(x) if wide is None else torch.complex(torch.zeros_like(wide), -wide).conj().imag


def zero(x: Tensor) -> Tensor:
    """Zeros without memory, as autograd passes them on for a derivative that is zero."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def expanded(x: Tensor) -> Tensor:
    return x.narrow(0, 0, 1).expand(x.shape)


def spread(x: Tensor) -> Tensor:
    """With another number after each."""
    wide = torch.full((*x.shape, 2), 77.0, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def beginning_at(elements: int, byte: int = 0):
    """Place a tensor some elements, and bytes, after where memory is aligned."""

    def place(x: Tensor) -> Tensor:
        start = elements * x.element_size() + byte
        raw = bytearray(x.numel() * x.element_size() + start)
        placed = torch.frombuffer(raw, dtype=x.dtype, offset=start).as_strided(x.shape, x.stride())
        return placed.copy_(x)

    return place


ODD = {
    "negative": negative,
    "imaginary part of a conjugate": imaginary,
    "ZeroTensor": zero,
    "expanded": expanded,
    "spread": spread,
    **{f"{k} elements on": beginning_at(k) for k in (1, 2, 3, 5, 7, 9, 15)},
    "a byte on": beginning_at(0, 1),
    "an element and three bytes on": beginning_at(1, 3),
}
# A statistic of these is refused where it would be written; see below.
UNWRITABLE = ("ZeroTensor", "expanded")


def call(kind: str, a: dict[str, Tensor]) -> Tensor:
    """Our function."""
    x = a["x"]
    stored = (a.get("running_mean"), a.get("running_var"))
    affine = (a.get("weight"), a.get("bias"))
    if kind in ("training", "evaluation"):
        return batch_norm(x, *stored, *affine, kind == "training")
    if kind == "fused":
        return batch_norm(x, *stored, *affine, True, activation="silu", residual=a["residual"])
    if kind == "in place":
        return batch_norm(x, *stored, *affine, True, inplace=True)
    if kind == "layer":
        return layer_norm(x, x.shape[-1:], *affine)
    if kind == "rms":
        return rms_norm(x, x.shape[-1:], a["weight"], 1e-5)
    if kind == "group":
        return group_norm(x, 2, *affine)
    return instance_norm(x, *stored, *affine)


def judged(kind: str, a: dict[str, Tensor]) -> Tensor:
    """Torch's."""
    x, stored = a["x"], (a.get("running_mean"), a.get("running_var"))
    affine = (a.get("weight"), a.get("bias"))
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], *affine)
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], a["weight"], 1e-5)
    if kind == "group":
        return F.group_norm(x, 2, *affine)
    if kind == "instance":
        return F.instance_norm(x, *stored, *affine)
    y = F.batch_norm(x, *stored, *affine, kind != "evaluation")
    return F.silu(y + a["residual"]) if kind == "fused" else y


ARGUMENTS = {
    "training": ("x", "weight", "bias", "running_mean", "running_var", "dy"),
    "evaluation": ("x", "weight", "bias", "running_mean", "running_var", "dy"),
    "fused": ("x", "residual", "weight", "bias", "running_mean", "running_var", "dy"),
    "in place": ("x", "weight", "bias", "running_mean", "running_var"),
    "layer": ("x", "weight", "bias", "dy"),
    "rms": ("x", "weight", "dy"),
    "group": ("x", "weight", "bias", "dy"),
    "instance": ("x", "weight", "bias", "running_mean", "running_var", "dy"),
}


def arguments(kind: str, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Tensor]:
    size = SHAPE[-1] if kind in ("layer", "rms") else SHAPE[1]
    made = {}
    for name in ARGUMENTS[kind]:
        if name in ("x", "residual", "dy"):
            made[name] = torch.randn(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
        else:
            made[name] = torch.rand(size, dtype=dtype) + 0.5
    return made


def plain(x: Tensor) -> Tensor:
    """The same values in fresh memory, in float64."""
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=torch.float64)
    return x.detach().clone(memory_format=torch.contiguous_format).double()


def check(kind: str, which: str, odd: str, dtype: torch.dtype, memory_format: torch.memory_format, recorded: bool):
    a = arguments(kind, dtype, memory_format)
    a[which] = ODD[odd](a[which])
    dy = a.pop("dy", torch.zeros(SHAPE))
    leaves = [name for name in a if not name.startswith("running")]
    wide = {name: plain(value).requires_grad_(recorded and name in leaves) for name, value in a.items()}
    if recorded:
        for name in leaves:
            a[name] = a[name].detach().requires_grad_()
    with torch.set_grad_enabled(recorded):
        y, expected = call(kind, a), judged(kind, wide)
    found, wanted = {"y": y.detach()}, {"y": expected.detach()}
    if recorded:
        found.update(zip(leaves, torch.autograd.grad(y, [a[name] for name in leaves], dy), strict=True))
        wanted.update(zip(leaves, torch.autograd.grad(expected, [wide[k] for k in leaves], plain(dy)), strict=True))
    for name in a:
        if name.startswith("running"):
            found[name], wanted[name] = plain(a[name]), wide[name]
    if kind == "in place":
        assert y is a["x"]
    for name, value in found.items():
        scale = max(1.0, wanted[name].abs().max().item())
        # Without positions apart, gradients divide by a deviation of a few values: four times the table's for those.
        allowed = 4 * RELATIVE[dtype] * scale
        off = (value.double() - wanted[name]).abs().max().item()
        assert off <= allowed, f"{name}: off by {off:.3g}, allowed {allowed:.3g} ({memory_format}, {recorded=})"


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("kind", "which"), [(kind, name) for kind, names in ARGUMENTS.items() for name in names])
def test_odd_memory_gives_the_right_numbers(kind, which, odd):
    if odd in UNWRITABLE and (
        (kind == "in place" and which == "x") or (kind != "evaluation" and which.startswith("running"))
    ):
        return  # `test_what_cannot_be_written_is_refused`
    formats = (torch.contiguous_format, torch.channels_last)
    for dtype, memory_format, recorded in itertools.product((torch.float32, torch.float64), formats, (False, True)):
        if not (recorded and kind == "in place") and (recorded or which != "dy"):
            check(kind, which, odd, dtype, memory_format, recorded)


@pytest.mark.parametrize(
    "odd", ["negative", "ZeroTensor", "spread", *(f"{k} elements on" for k in (1, 7)), "a byte on"]
)
@pytest.mark.parametrize("kind", ["training", "layer"])
def test_odd_memory_of_half_precision_gives_the_right_numbers(kind, odd):
    for which in ARGUMENTS[kind]:
        if odd != "ZeroTensor" or not which.startswith("running"):
            check(kind, which, odd, torch.bfloat16, torch.contiguous_format, which == "dy")


@pytest.mark.parametrize("odd", ["negative", "ZeroTensor", "spread", "7 elements on", "a byte on"])
@pytest.mark.parametrize("which", ["x", "dy", "mean", "rstd", "weight", "bias", "sums"])
def test_odd_memory_gives_the_right_steps(which, odd):
    tensors = {name: torch.randn(SHAPE) for name in ("x", "dy")} | {name: torch.rand(6) + 0.5 for name in
               ("mean", "rstd", "weight", "bias", "sums")}  # fmt: skip
    tensors[which] = ODD[odd](tensors[which])
    results = []
    for a in (tensors, {name: plain(value).to(value.dtype) for name, value in tensors.items()}):
        with torch.device("meta"):  # a device that others set says nothing of working memory
            mean, var = batch_steps.statistics(a["x"])
            y = batch_steps.apply(a["x"], a["mean"], a["rstd"], a["weight"], a["bias"])
            total, along = batch_steps.reduce(a["dy"], a["x"], a["mean"], a["rstd"])
            sums = (a["sums"], a["sums"])
            dx = batch_steps.apply_backward(a["dy"], a["x"], a["mean"], a["rstd"], a["weight"], sums, 60)
        results.append((mean, var, y, total, along, dx))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_numpy_array_that_is_not_aligned_is_normalized_in_place():
    """Past 16 MB outputs go past the caches, in stores that need a line of it whole."""
    array = np.random.default_rng(0).standard_normal(2 * 64 * 200 * 200 + 16, dtype=np.float32)
    for memory_format, skipped, kind in itertools.product(
        (torch.contiguous_format, torch.channels_last), (1, 4, 13), ("training", "evaluation")
    ):
        x = torch.from_numpy(array)[skipped:][: 2 * 64 * 200 * 200].view(2, 64, 200, 200)
        if memory_format is torch.channels_last:
            x = x.view(2, 200, 200, 64).permute(0, 3, 1, 2)
        stored = torch.zeros(64).double(), torch.ones(64).double()
        expected = F.batch_norm(x.double(), *stored, training=kind == "training")
        y = batch_norm(x, torch.zeros(64), torch.ones(64), training=kind == "training", inplace=True)
        assert y is x
        assert_close(y, expected, dtype=torch.float32)


STATISTICS = {
    "batch": lambda x, mean, var, **a: batch_norm(x, mean, var, a.get("weight"), a.get("bias"), True,
                                                  num_batches_tracked=a.get("count")),
    "fused": lambda x, mean, var, **a: batch_norm(x, mean, var, a.get("weight"), a.get("bias"), True,
                                                  activation="relu", residual=a.get("residual")),
    "renorm": lambda x, mean, var, **a: batch_renorm(x, mean, var, a.get("weight"), a.get("bias"), True),
    "ghost": lambda x, mean, var, **a: ghost_batch_norm(x, mean, var, a.get("weight"), a.get("bias"), True,
                                                        ghost_size=2),
    "masked": lambda x, mean, var, **a: masked_batch_norm(x, torch.ones(4, 5, dtype=torch.bool), mean, var,
                                                          a.get("weight"), a.get("bias"), True),
    "instance": lambda x, mean, var, **a: instance_norm(x, mean, var, a.get("weight"), a.get("bias")),
}  # fmt: skip
every_method = pytest.mark.parametrize("method", STATISTICS)


def test_statistics_that_interleave_are_written_each_in_its_place():
    x, base, pair = torch.randn(4, 6, 5), torch.full((13,), 0.5), (torch.full((6,), 0.5), torch.full((6,), 0.5))
    for method, run in STATISTICS.items():
        base.fill_(0.5)
        mean, var = (value.fill_(0.5) for value in pair)
        run(x, base[:12:2], base[1:12:2])
        run(x, mean, var)
        assert torch.equal(base[:12:2], mean), method
        assert torch.equal(base[1:12:2], var), method
        assert base[12] == 0.5
        base.fill_(0.5)
        mean.fill_(0.5), var.fill_(0.5)
        run(x, mean, base[:12:2])
        assert torch.equal(base[1::2], torch.full((6,), 0.5)), f"{method}: the neighbours were written"


@every_method
@pytest.mark.parametrize("case", ["the same tensor", "a view", "one element", "weight", "bias", "input"])
def test_statistics_that_share_memory_are_refused(method, case):
    base, x = torch.full((17,), 0.5), torch.randn(4, 6, 5)
    mean, var, more = base[:6], base[6:12], {}
    if case == "the same tensor":
        var = mean
    elif case == "a view":
        var = base.view(-1)[:6]
    elif case == "one element":
        var = base[5:11]
    elif case in ("weight", "bias"):
        more = {case: base[2:8]}
    else:
        mean = x.view(-1)[20:26]
    before = base.clone(), x.clone()
    with pytest.raises(StatisticsError, match=r"share memory.*pass running_\w+.clone\(\)"):
        STATISTICS[method](x, mean, var, **more)
    assert torch.equal(base, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("other", ["weight", "bias", "x", "residual"])
@pytest.mark.parametrize("which", ["mean", "var"])
def test_each_pair_of_addresses_is_looked_at(which, other):
    """By a byte on either side; side by side is apart."""
    size, span = 24, 96
    far = {"mean": 1000, "var": 2000, "weight": 3000, "bias": 4000, "x": 5000, "residual": 6000}
    own = span if other in ("x", "residual") else size
    launch.check_apart(size, *far.values(), span)
    for step, apart in ((-own, True), (1 - own, False), (0, False), (size - 1, False), (size, True)):
        places = {**far, other: far[which] + step}
        with contextlib.nullcontext() if apart else pytest.raises(StatisticsError, match="share memory"):
            launch.check_apart(size, *places.values(), span)
    for step, apart in ((-size, True), (1 - size, False), (size - 1, False), (size, True)):
        places = {**far, "mean": far["var"] + step}
        with contextlib.nullcontext() if apart else pytest.raises(StatisticsError, match="share memory"):
            launch.check_apart(size, *places.values(), span)
    with pytest.raises(StatisticsError, match="no memory"):
        launch.check_apart(size, *{**far, which: 0}.values(), span)


@every_method
@pytest.mark.parametrize("case", ["each other", "weight", "input"])
def test_statistics_with_gaps_that_share_memory_are_refused(method, case):
    """The kernel is handed copies of these, which share nothing."""
    base, x, more = torch.full((24,), 0.5), torch.randn(4, 6, 5), {}
    mean, var = base[0:12:2], base[12::2]
    if case == "each other":
        var = base[2:14:2]
    elif case == "weight":
        more = {"weight": base[4:10]}
    else:
        mean = x.view(-1)[0:12:2]
    before = base.clone(), x.clone()
    with pytest.raises(StatisticsError, match="share memory"):
        STATISTICS[method](x, mean, var, **more)
    assert torch.equal(base, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_outputs_that_begin_across_lines_of_the_cache_are_right(memory_format, monkeypatch):
    """No allocator of today makes such; `kernel_contract` looks at every launch."""

    def askew(like: Tensor) -> Tensor:
        room = torch.full((like.numel() + 1,), torch.nan, dtype=like.dtype)
        return room[1:].as_strided(like.shape, like.stride(), 1)

    x, dy, residual = (torch.randn(2, 64, 256, 130).contiguous(memory_format=memory_format) for _ in range(3))
    weight, mean, rstd = torch.rand(3, 64) + 0.5
    results = []
    for patched in (False, True):
        if patched:
            for module in (channel_passes, step_calls, sample_passes):
                monkeypatch.setattr(module, "empty_like", askew)
        layout = channel_passes.layout_of(x)
        y, saved = channel_passes.forward(x, layout, weight, None, None, None, 0.1, 1e-5, True)
        back = channel_passes.backward(dy, x, layout, weight, None, saved, "silu", residual, True)
        wide = mean.double(), rstd.double()
        stepped = step_calls.apply(x, *wide, weight, None)
        stepped_back = step_calls.apply_backward(dy, x, *wide, weight, wide, 7)
        form = sample_passes.form_of(x, 2)
        each, kept = sample_passes.forward(x, form, weight, None, 1e-5)
        each_back = sample_passes.backward(dy, x, form, weight, None, kept)
        results.append((y, back[0], back[3], stepped, stepped_back, each, each_back[0]))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_refusal_of_shared_statistics_names_the_layer_and_both_tensors():
    layer = normkit.BatchNorm1d(6)
    layer.running_var = layer.running_mean
    with pytest.raises(StatisticsError, match=r"^BatchNorm1d\(6\): running_mean and running_var share memory"):
        layer(torch.randn(4, 6))
    assert layer.num_batches_tracked == 0
    x = torch.randn(4, 6)
    with pytest.raises(StatisticsError, match="residual share memory"):
        batch_norm(torch.randn(4, 6), x[0], torch.ones(6), training=True, residual=x)
    mean = torch.zeros(6)
    with pytest.raises(StatisticsError, match="running_mean and num_batches_tracked share memory"):
        batch_norm(x, mean, torch.ones(6), training=True, num_batches_tracked=mean[0])
    covariance = torch.eye(6)[None]
    with pytest.raises(StatisticsError, match="share memory"):
        whitening_batch_norm(torch.randn(9, 6), covariance[0, 0], covariance, training=True)


@every_method
@pytest.mark.parametrize("odd", ["ZeroTensor", "expanded", "overlapping", "inference", "freed"])
@pytest.mark.parametrize("which", ["mean", "var"])
def test_what_cannot_be_written_is_refused(method, which, odd):
    def make(value: Tensor) -> Tensor:
        if odd == "inference":
            with torch.inference_mode():
                return value.clone()
        if odd == "freed":
            value.untyped_storage().resize_(0)
            return value
        return value.as_strided((6,), (0,)) if odd == "overlapping" else ODD[odd](value)

    running = {"mean": torch.full((6,), 0.5), "var": torch.full((6,), 0.5)}
    running[which] = make(running[which])
    with pytest.raises(StatisticsError, match=f"running_{which}"):
        STATISTICS[method](torch.randn(4, 6, 5), running["mean"], running["var"])
    other = running["var" if which == "mean" else "mean"]
    assert torch.equal(other, torch.full((6,), 0.5))


@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_tensors_that_autograd_would_not_save_are_refused_before_anything_moves(name):
    a = {"input": torch.randn(4, 6), "weight": torch.ones(6), "bias": torch.zeros(6), "residual": torch.randn(4, 6)}
    with torch.inference_mode():
        a[name] = a[name].clone()
    a["weight" if name != "weight" else "bias"].requires_grad_()
    mean, var = torch.zeros(6), torch.ones(6)
    residual = a.pop("residual") if name == "residual" else None
    with pytest.raises(DtypeError, match=f"{name} was made under inference_mode"):
        batch_norm(a["input"], mean, var, a["weight"], a["bias"], True, residual=residual)
    assert torch.equal(mean, torch.zeros(6))
    assert torch.equal(var, torch.ones(6))


def _overlapping(base: Tensor) -> dict[str, tuple[Tensor, dict[str, Tensor], str]]:
    x = base[:120].view(4, 6, 5)
    with torch.inference_mode():
        made = torch.randn(4, 6, 5)
    return {
        "expanded": (base[:30].view(1, 6, 5).expand(4, 6, 5), {}, "the elements of the input share memory"),
        "windows": (base.as_strided((4, 6, 5), (1, 5, 1)), {}, "the elements of the input share memory"),
        "ZeroTensor": (torch._efficientzerotensor((4, 6, 5)), {}, "a ZeroTensor"),
        "inference": (made, {}, "made under inference_mode"),
        "weight": (x, {"weight": base[114:120]}, "weight shares memory with the input"),
        "bias": (x, {"bias": base[115:121]}, "bias shares memory with the input"),
        "residual": (x, {"residual": base[1:121].view(4, 6, 5)}, "residual shares memory with the input"),
        "turned residual": (
            x, {"residual": base[:120].view(4, 5, 6).transpose(1, 2)}, "residual shares memory with the input"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(_overlapping(torch.zeros(130))))
def test_input_that_cannot_be_overwritten_is_refused(case):
    base = torch.randn(130)
    before, mean = base.clone(), torch.zeros(6)
    x, others, words = _overlapping(base)[case]
    with pytest.raises(ArgumentError, match=f"inplace=True: .*{words}"):
        batch_norm(x, mean, torch.ones(6), training=True, inplace=True, **others)
    assert torch.equal(base, before)
    assert torch.equal(mean, torch.zeros(6))


@pytest.mark.parametrize("backend", ["numba", "plain"])
def test_residual_that_is_the_input_may_be_overwritten(backend):
    x = torch.randn(4, 6, 5)
    expected = F.batch_norm(x, None, None, training=True) + x
    with normkit.use_backend(backend):
        y = batch_norm(x, None, None, training=True, residual=x, inplace=True)
    assert y is x
    assert (y - expected).abs().max() < 1e-5


def test_interleaved_input_is_overwritten_in_its_place_alone():
    base = torch.randn(4, 6, 5, 2)
    before, x = base.clone(), base[..., 0]
    expected = F.batch_norm(x, None, None, training=True)
    assert batch_norm(x, None, None, training=True, inplace=True, weight=None, residual=None) is x
    assert (x - expected).abs().max() < 1e-5
    assert torch.equal(base[..., 1], before[..., 1])


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: batch_norm(x, None, None, w, training=True),
        lambda x, w: batch_norm(x, torch.zeros(6), torch.ones(6), w),
        lambda x, w: group_norm(x, 2, w),
        lambda x, w: instance_norm(x, weight=w),
        lambda x, w: layer_norm(x.view(20, 6), (6,), w),
        lambda x, w: rms_norm(x.view(20, 6), (6,), w),
    ],
)
@pytest.mark.parametrize("freed", ["x", "weight"])
def test_freed_storage_is_told(run, freed):
    x, weight = torch.randn(4, 6, 5), torch.ones(6)
    storage = (x if freed == "x" else weight).untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    try:
        with pytest.raises(ArgumentError, match="its storage was freed"):
            run(x, weight)
    finally:
        storage.resize_(size)  # what is freed cannot be shown where the test fails
