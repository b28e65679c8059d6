"""The square root of covariances: its equation, and its derivatives to second order where eigenvalues are equal."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from normkit.functional.matrix_root import matrix_root
from tolerances import assert_close
from torch_versions import uses_torchscript


def covariance(seed: Tensor) -> Tensor:
    """A symmetric matrix that any small change of the seed leaves symmetric and well above the floor."""
    return seed @ seed.mT + torch.eye(seed.shape[-1], dtype=seed.dtype)


def seeds(kind: str) -> Tensor:
    made = {
        "distinct": torch.randn(2, 3, 3, dtype=torch.float64),
        "equal": torch.eye(3, dtype=torch.float64)[None],
        "a pair": torch.diag(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))[None],
    }
    return made[kind].requires_grad_()


every_kind = pytest.mark.parametrize("kind", ["distinct", "equal", "a pair"])


@every_kind
def test_root_times_itself_is_the_matrix(kind):
    given = covariance(seeds(kind)).detach()
    root = matrix_root(given, 1e-3)
    assert_close(root @ root, given, dtype=torch.float64)
    assert_close(root, root.mT, dtype=torch.float64)


@uses_torchscript
@every_kind
def test_every_entry_of_both_derivatives_agrees_with_differences(kind):
    def call(seed: Tensor) -> Tensor:
        return matrix_root(covariance(seed), 1e-3)

    given = seeds(kind)
    assert gradcheck(call, given, check_forward_ad=True)
    assert gradgradcheck(call, given)


def test_third_derivative_of_a_number_is_the_closed_form():
    value = torch.tensor([[[4.0]]], dtype=torch.float64, requires_grad=True)
    found = matrix_root(value, 1e-3)
    for expected in (1 / 4, -1 / 32, 3 / 256):
        (found,) = torch.autograd.grad(found.sum(), value, create_graph=True)
        assert found.item() == pytest.approx(expected, rel=1e-12)


@uses_torchscript
def test_derivatives_of_a_number_in_forward_mode_are_the_closed_form_to_the_eighth():
    value, one = torch.tensor([[[4.0]]], dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)

    def next_of(f):
        return lambda x: torch.func.jvp(f, (x,), (one,))[1]

    f, expected = (lambda x: matrix_root(x, 1e-3)), 2.0
    for order in range(1, 9):
        # The square root's derivatives: each is the one before times (3 / 2 - order) / x.
        f, expected = next_of(f), expected * (1.5 - order) / 4.0
        assert f(value).item() == pytest.approx(expected, rel=1e-10)


@uses_torchscript
@every_kind
def test_second_and_third_derivatives_in_both_modes_agree(kind):
    seed = seeds(kind).detach()
    directions = torch.randn(3, *seed.shape, dtype=torch.float64)

    def forward(f, v):
        return lambda x: torch.func.jvp(f, (x,), (v,))[1]

    def reverse(f, v):
        return lambda x: (torch.func.grad(f)(x) * v).sum()

    for steps in ((forward, forward), (forward, forward, forward), (reverse, forward, reverse)):
        f = expected = lambda x: (matrix_root(covariance(x), 1e-3).tanh() ** 2).sum()
        for step, v in zip(steps, directions, strict=False):
            f, expected = step(f, v), reverse(expected, v)
        assert_close(f(seed), expected(seed), dtype=torch.float64)


def test_eigenvalues_that_rounding_made_negative_are_held_at_the_floor():
    singular = torch.tensor([[[1.0, 1.0], [1.0, 1.0 - 1e-9]]], dtype=torch.float64)
    values = torch.linalg.eigvalsh(matrix_root(singular, 1e-4))
    assert values.min().item() == pytest.approx(1e-2, rel=1e-9)
