"""What is true of every row of the catalog for any input, by hypothesis; a row that is left out has its reason."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normkit import functional as F
from normkit.layers.catalog import METHODS, METHODS_OF_WEIGHTS, create
from tolerances import RELATIVE, assert_close

SHAPES = st.tuples(st.integers(3, 6), st.sampled_from([2, 4, 6]), st.integers(4, 7))
SEEDS = st.integers(0, 2**16)
few = settings(max_examples=20)

# The axes of (N, C, L) along which values share statistics.
PER_CHANNEL, PER_SAMPLE = (0, 2), (1, 2)


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random values; a slope keeps every variance well away from zero, where digits would be lost."""
    x = random(shape, seed)
    return x + sum(
        torch.linspace(-2, 2, size, dtype=torch.float64).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, size in enumerate(shape)
    )


def mask_of(x: Tensor) -> Tensor:
    """All positions of a third of the samples are valid, and all but the last of the others; the same for twins."""
    mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)
    mask[:, -1] = x.detach()[:, 0, 0] > x.detach()[:, 0, 0].median()
    return mask


def style_of(x: Tensor) -> Tensor:
    return x.detach().flip(2)[..., :-1] * 2 + 1


@dataclass(frozen=True)
class Subject:
    """One row: how it is called in training, and what holds of it.

    Attributes:
        call: the function without parameters, on (N, C, L) in float64, with an eps.
        axes: the axes that share statistics.
        shift: adding a constant to x changes nothing as eps goes to zero.
        scale: nor does a positive factor.
        samples: permuting the samples permutes the output.
        channels: permuting the channels does.
        twins: a batch beside its copy gives the same.
    """

    call: Callable[[Tensor, float], Tensor]
    axes: tuple[int, ...]
    shift: bool = True
    scale: bool = True
    samples: bool = True
    channels: bool = True
    twins: bool = True


def renorm(x: Tensor, eps: float) -> Tensor:
    mean, var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
    return F.batch_renorm(x, mean, var, training=True, eps=eps)


SUBJECTS = {
    "batch": Subject(lambda x, eps: F.batch_norm(x, None, None, training=True, eps=eps), PER_CHANNEL),
    "layer": Subject(lambda x, eps: F.layer_norm(x, x.shape[1:], eps=eps), PER_SAMPLE),
    # It removes no mean.
    "rms": Subject(lambda x, eps: F.rms_norm(x, x.shape[1:], eps=eps), PER_SAMPLE, shift=False),
    # A permutation across groups changes who is averaged.
    "group": Subject(lambda x, eps: F.group_norm(x, 2, eps=eps), PER_SAMPLE, channels=False),
    "instance": Subject(lambda x, eps: F.instance_norm(x, eps=eps), (2,)),
    # It divides by neighbours, in their order, and by no scale of x.
    "response": Subject(
        lambda x, eps: F.local_response_norm(x, 3, alpha=2.0), (), shift=False, scale=False, channels=False
    ),
    # With the style held.
    "adaptive": Subject(lambda x, eps: F.adaptive_instance_norm(x, style_of(x), eps), (2,), shift=False, scale=False),
    # r and d compare x with what is stored.
    "renorm": Subject(renorm, PER_CHANNEL, shift=False, scale=False),
    # Its parts are of neighbouring samples.
    "ghost": Subject(
        lambda x, eps: F.ghost_batch_norm(x, None, None, training=True, eps=eps, ghost_size=2),
        PER_CHANNEL,
        samples=False,
        twins=False,
    ),
    # The mask here hangs on the first channel.
    "masked": Subject(
        lambda x, eps: F.masked_batch_norm(x, mask_of(x), None, None, training=True, eps=eps),
        PER_CHANNEL,
        channels=False,
    ),
    "whitening": Subject(lambda x, eps: F.whitening_batch_norm(x, None, None, training=True, eps=eps), PER_CHANNEL),
}
TINY = 1e-14  # an eps that is positive, as training asks for, and shows in no digit


def those(condition: Callable[[Subject], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if condition(subject)])


def test_every_row_is_a_subject():
    assert list(SUBJECTS) == [row.name for row in METHODS]


@those(lambda subject: subject.scale)
@few
@given(shape=SHAPES, seed=SEEDS, factor=st.floats(0.01, 100.0), shift=st.floats(-100.0, 100.0))
def test_scale_and_shift_of_the_input_do_not_matter(name, shape, seed, factor, shift):
    subject, x = SUBJECTS[name], values(shape, seed)
    moved = factor * x + (shift if subject.shift else 0.0)
    # Rounding the shifted values costs as many digits as the shift has over the deviation.
    assert_close(subject.call(moved, TINY).float(), subject.call(x, TINY).float(), dtype=torch.float32)


@few
@given(shape=SHAPES, seed=SEEDS, factor=st.floats(0.01, 100.0), shift=st.floats(-100.0, 100.0))
def test_content_that_is_scaled_and_shifted_takes_the_same_style(shape, seed, factor, shift):
    x = values(shape, seed)
    style = style_of(x)
    found, expected = (F.adaptive_instance_norm(content, style, 1e-20) for content in (factor * x + shift, x))
    assert_close(found.float(), expected.float(), dtype=torch.float32)


@those(lambda subject: subject.samples)
@few
@given(shape=SHAPES, seed=SEEDS)
def test_permuted_samples_give_permuted_outputs(name, shape, seed):
    x, call = values(shape, seed), SUBJECTS[name].call
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    assert_close(call(x[order], 1e-5), call(x, 1e-5)[order], dtype=torch.float64)


@those(lambda subject: subject.channels)
@few
@given(shape=SHAPES, seed=SEEDS)
def test_permuted_channels_give_permuted_outputs(name, shape, seed):
    x, call = values(shape, seed), SUBJECTS[name].call
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    # Whitening's eigenvectors lose what its condition costs.
    found, expected = call(x[:, order], 1e-3), call(x, 1e-3)[:, order]
    assert_close(found.float(), expected.float(), dtype=torch.float32)


@few
@given(shape=SHAPES, seed=SEEDS)
def test_reversed_channels_give_reversed_responses_where_the_window_is_odd(shape, seed):
    x, call = values(shape, seed), SUBJECTS["response"].call
    assert_close(call(x.flip(1), 0.0), call(x, 0.0).flip(1), dtype=torch.float64)


@those(lambda subject: subject.twins)
@few
@given(shape=SHAPES, seed=SEEDS)
def test_a_batch_beside_its_copy_gives_the_same(name, shape, seed):
    x, call = values(shape, seed), SUBJECTS[name].call
    y = call(torch.cat([x, x]), 1e-5)
    assert_close(y[: shape[0]], call(x, 1e-5), dtype=torch.float64)
    assert_close(y[shape[0] :], y[: shape[0]], dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in SUBJECTS if SUBJECTS[name].axes == PER_CHANNEL])
@few
@given(shape=SHAPES, seed=SEEDS)
def test_a_batch_beside_its_copy_stores_the_same_mean_and_the_known_factor_of_the_variance(name, shape, seed):
    x, order = values(shape, seed), torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    stored = []
    for batch in (x, torch.cat([x, x]), x[order]):
        layer = create(name, shape[1], 1).double()
        mask = (mask_of(batch),) if name == "masked" else ()
        layer.momentum = 1.0
        layer(batch, *mask)
        second = layer.running_covariance if name == "whitening" else layer.running_var
        m = int(mask[0].sum()) if mask else shape[2] * len(batch)
        stored.append((layer.running_mean, second * (m - 1) / m))
    for found in stored[1:]:
        assert_close(found[0], stored[0][0], dtype=torch.float64, what="mean")
        assert_close(found[1], stored[0][1], dtype=torch.float64, what="biased variance")


@those(lambda subject: subject.axes != ())
@few
@given(shape=SHAPES, seed=SEEDS)
def test_gradients_do_not_shift_or_stretch_what_shares_statistics(name, shape, seed):
    subject, x = SUBJECTS[name], values(shape, seed).requires_grad_()
    y = subject.call(x, TINY)
    (dx,) = torch.autograd.grad(y, x, random(shape, seed + 1))
    size = dx.abs().max().item() * x.numel()
    if name != "rms":
        sums = dx.sum(subject.axes) if name != "group" else dx.unflatten(1, (2, -1)).sum((2, 3))
        assert sums.abs().max() <= RELATIVE[torch.float32] * size
    if name != "whitening":
        # x itself where no mean is removed; elsewhere its mean drops out, since dx has none.
        along = (dx * x.detach()).sum(subject.axes)
        along = (dx * x.detach()).unflatten(1, (2, -1)).sum((2, 3)) if name == "group" else along
        assert along.abs().max() <= RELATIVE[torch.float32] * size * x.detach().abs().max()


@few
@given(shape=SHAPES, seed=SEEDS)
def test_gradient_through_whitening_is_orthogonal_to_every_mixing_of_channels(shape, seed):
    # y changes by a rotation alone when x is mixed, so a loss that sees y y' alone has no gradient along it.
    x = values(shape, seed).requires_grad_()
    y = SUBJECTS["whitening"].call(x, TINY)
    (dx,) = torch.autograd.grad(y.transpose(0, 1).flatten(1).square().sum(), x)
    assert dx.abs().max() <= RELATIVE[torch.float32] * max(1.0, y.abs().max().item()) * 10


@few
@given(shape=SHAPES, seed=SEEDS)
def test_smoothness_identity_of_santurkar_holds_per_channel(shape, seed):
    """Theorem 4.1: |dx|^2 = gamma^2 / var * (|dy|^2 - (1'dy)^2 / m - <dy, xhat>^2 / m), exactly so with eps = 0."""
    x, dy, gamma = values(shape, seed).requires_grad_(), random(shape, seed + 1), random((shape[1],), seed + 2)
    y = F.batch_norm(x, None, None, gamma, None, training=True, eps=1e-30)
    (dx,) = torch.autograd.grad(y, x, dy)
    var, mean = torch.var_mean(x.detach(), PER_CHANNEL, correction=0, keepdim=True)
    xhat, m = (x.detach() - mean) / var.sqrt(), shape[0] * shape[2]
    inner = dy.square().sum(PER_CHANNEL) - dy.sum(PER_CHANNEL) ** 2 / m - (dy * xhat).sum(PER_CHANNEL) ** 2 / m
    expected = gamma.square() / var.flatten() * inner
    assert_close(dx.square().sum(PER_CHANNEL), expected, dtype=torch.float64)


@few
@given(shape=SHAPES, seed=SEEDS)
def test_a_weight_before_batch_norm_gets_no_gradient_along_itself(shape, seed):
    weight = random((4, shape[1]), seed + 1).requires_grad_()
    z = torch.einsum("oc,ncl->nol", weight, values(shape, seed))
    y = F.batch_norm(z, None, None, training=True, eps=1e-30)
    (dw,) = torch.autograd.grad(y, weight, random(tuple(y.shape), seed + 2))
    size = (dw.detach() * weight.detach()).abs().max().item()
    assert (dw * weight).sum(1).abs().max() <= 1e-9 * max(1.0, size)


@few
@given(shape=SHAPES, seed=SEEDS, factor=st.floats(0.01, 100.0))
def test_a_factor_of_the_weight_does_not_matter_to_weight_norm_and_standardization(shape, seed, factor):
    assert [row.name for row in METHODS_OF_WEIGHTS] == ["weight", "standardization"]
    v, lengths = values(shape, seed).requires_grad_(), random((shape[0], 1, 1), seed + 1)
    for call in (lambda v: F.weight_norm(v, lengths), lambda v: F.weight_standardization(v, 1e-30)):
        assert_close(call(factor * v), call(v), dtype=torch.float64)
        order = torch.arange(shape[1]).flip(0)
        assert_close(call(v[:, order]), call(v)[:, order], dtype=torch.float64)
        (dv,) = torch.autograd.grad(call(v), v, random(shape, seed + 2))
        assert (dv * v).sum((1, 2)).abs().max() <= 1e-9 * max(1.0, dv.abs().max().item()) * v.numel()


# One method is another.


@few
@given(shape=SHAPES, seed=SEEDS)
def test_every_relative_of_batch_norm_is_batch_norm_at_one_setting(shape, seed):
    x = values(shape, seed)
    expected = SUBJECTS["batch"].call(x, 1e-5)
    stored = (torch.zeros(shape[1]).double(), torch.ones(shape[1]).double())
    everywhere = torch.ones(shape[0], shape[2]).bool()
    found = {
        "renorm": F.batch_renorm(x, *stored, training=True, r_max=1.0, d_max=0.0),
        "ghost": F.ghost_batch_norm(x, None, None, training=True, ghost_size=shape[0]),
        "masked": F.masked_batch_norm(x, everywhere, None, None, training=True),
        "whitening": F.whitening_batch_norm(x, None, None, training=True, num_groups=shape[1]),
    }
    for name, y in found.items():
        assert_close(y, expected, dtype=torch.float64, what=name)


@few
@given(shape=SHAPES, seed=SEEDS)
def test_content_in_its_own_style_stays_as_it_is(shape, seed):
    x = values(shape, seed)
    assert_close(F.adaptive_instance_norm(x, x), x, dtype=torch.float64)


@few
@given(shape=SHAPES, seed=SEEDS)
def test_standardized_weights_are_layer_normalized_rows(shape, seed):
    weight = values(shape, seed)
    assert_close(F.weight_standardization(weight), F.layer_norm(weight, shape[1:], eps=1e-6), dtype=torch.float64)


@few
@given(shape=SHAPES, seed=SEEDS)
def test_whitening_that_is_whitened_again_stays_as_it_is(shape, seed):
    y = SUBJECTS["whitening"].call(values(shape, seed), 1e-12)
    assert_close(SUBJECTS["whitening"].call(y, 1e-12).float(), y.float(), dtype=torch.float32)


# What a layer keeps.


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
@settings(max_examples=5)
@given(seed=SEEDS, steps=st.integers(0, 3))
def test_saved_layers_load_bit_by_bit_and_evaluation_writes_nothing(row, seed, steps):
    dimensions = max(key for key in row.layers if key < 2)
    shape = (5, 4) if dimensions == 0 else (5, 4, 6)
    layer, twin = (create(row.name, 4, dimensions) for _ in range(2))
    for step in range(steps):
        layer(random(shape, seed + step).float())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    kept = copy.deepcopy(twin.state_dict())
    x = random(shape, seed).float()
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    assert all(torch.equal(value, kept[name]) for name, value in twin.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())
