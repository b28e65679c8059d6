"""What is true of the per-sample family for any input, by hypothesis."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit import functional as F
from tolerances import assert_close

SHAPES = st.tuples(st.integers(1, 5), st.sampled_from([2, 4, 6]), st.integers(2, 7))
SEEDS = st.integers(0, 2**16)
SCALES = st.floats(0.01, 100.0)
SHIFTS = st.floats(-100.0, 100.0)

METHODS = st.sampled_from(
    [
        lambda x, eps=1e-5: F.layer_norm(x, x.shape[1:], eps=eps),
        lambda x, eps=1e-5: F.group_norm(x, 2, eps=eps),
        lambda x, eps=1e-5: F.instance_norm(x, eps=eps),
    ]
)


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(METHODS, SHAPES, SEEDS, SCALES, SHIFTS)
def test_scale_and_shift_of_the_input_do_not_matter(method, shape, seed, scale, shift):
    x = random(shape, seed)
    # A variance near zero loses the digits that the shift takes; such draws prove nothing.
    x = x + torch.linspace(-3, 3, x.shape[2], dtype=torch.float64)
    # The shift's rounding, relative to the smallest deviation, is what float64 leaves.
    assert_close(method(scale * x + shift, 0.0).float(), method(x, 0.0).float(), dtype=torch.float32)


@given(METHODS, SHAPES, SEEDS)
def test_samples_do_not_see_each_other(method, shape, seed):
    x = random(shape, seed)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    assert_close(method(x[order]), method(x)[order], dtype=torch.float64)
    assert_close(
        torch.cat([method(x[:1]), method(x[1:])]) if shape[0] > 1 else method(x), method(x), dtype=torch.float64
    )


@given(METHODS, SHAPES, SEEDS)
def test_gradient_of_the_sum_is_zero_and_gradients_do_not_follow_the_output(method, shape, seed):
    x = random(shape, seed).requires_grad_()
    y = method(x, 0.0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    size = max(1.0, float(1 / x.detach().std()))
    assert dx.abs().max() < 1e-6 * size
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert dx.abs().max() < 1e-6 * size


@given(SHAPES, SEEDS)
def test_one_group_is_layer_norm_and_one_channel_each_is_instance_norm(shape, seed):
    x = random(shape, seed)
    assert_close(F.group_norm(x, 1), F.layer_norm(x, shape[1:]), dtype=torch.float64)
    assert_close(F.group_norm(x, shape[1]), F.instance_norm(x), dtype=torch.float64)


@given(SHAPES, SEEDS)
def test_rms_norm_is_layer_norm_where_the_mean_is_zero(shape, seed):
    x = random(shape, seed)
    x = x - x.mean(-1, keepdim=True)
    assert_close(F.rms_norm(x, shape[-1:], eps=1e-5), F.layer_norm(x, shape[-1:], eps=1e-5), dtype=torch.float64)


@given(SHAPES, SEEDS)
def test_instance_norm_of_one_sample_is_batch_norm(shape, seed):
    x = random((1, *shape[1:]), seed)
    assert_close(F.instance_norm(x), F.batch_norm(x, None, None, training=True), dtype=torch.float64)


@given(SHAPES, SEEDS, st.integers(1, 6))
def test_ghost_norm_is_batch_norm_of_its_parts(shape, seed, size):
    x = random((shape[0] + 1, *shape[1:]), seed)
    parts = -(-len(x) // size)
    expected = [F.batch_norm(part, None, None, training=True) for part in torch.tensor_split(x, parts)]
    y = F.ghost_batch_norm(x, None, None, training=True, ghost_size=size)
    assert_close(y, torch.cat(expected), dtype=torch.float64)
