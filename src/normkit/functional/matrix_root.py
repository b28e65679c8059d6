"""The square root of covariances, differentiable to every order, also where eigenvalues are equal.

``S = root(C)`` solves ``S S = C``, so a change obeys the Lyapunov equation ``S dS + dS S = dC``. Its solution divides
by sums of eigenvalues, where the derivative of an eigenvector would divide by differences. The equation is its own
adjoint, so its solver is also its backward. Matrices are symmetric, in stacks ``(..., d, d)``.

In forward mode no autograd function runs (see `transforms`): both are then iterations about the value itself, whose
every step makes one more derivative exact and leaves the value as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .transforms import is_forward_mode

__all__ = ["matrix_root"]

# The highest derivative that is exact where forward mode takes part.
_ORDER = 8


class _Lyapunov(torch.autograd.Function):
    """X with ``S X + X S = Q``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, q: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(s)
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        x: Tensor = vectors @ ((vectors.mT @ q @ vectors) / sums) @ vectors.mT
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        s, x = ctx.saved_tensors
        dq = _solve(s, given)
        return -(dq @ x + x @ dq), dq


class _Root(torch.autograd.Function):
    """S with ``S S = C``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(covariance: Tensor, floor: float) -> Tensor:
        return _root_of_values(covariance, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return _solve(s, (given + given.mT) / 2), None


def _solve(s: Tensor, q: Tensor) -> Tensor:
    """Return X with ``S X + X S = Q``."""
    if is_forward_mode():
        solve = _solver(s)
        solution, moved = solve(q), s - s.detach()
        for _ in range(_ORDER):
            solution = solve(q - moved @ solution - solution @ moved)
        return solution
    found: Tensor = _Lyapunov.apply(s, q)
    return found


def _solver(s: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what solves the equation for a constant S: linear in Q, in operations that any transform can follow."""
    values, vectors = torch.linalg.eigh(s.detach())
    sums = values.unsqueeze(-1) + values.unsqueeze(-2)
    return lambda q: vectors @ ((vectors.mT @ q @ vectors) / sums) @ vectors.mT


def _root_of_values(covariance: Tensor, floor: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # No eigenvalue is below the floor in exact arithmetic.
    root: Tensor = (vectors * values.clamp_min(floor).sqrt().unsqueeze(-2)) @ vectors.mT
    return root


def matrix_root(covariance: Tensor, floor: float) -> Tensor:
    """Return the symmetric square root of matrices whose eigenvalues are at least ``floor``, which is positive."""
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiled or is_forward_mode():
        # Newton's method from the exact root, its Jacobian held: every step makes one more derivative right. A compiled
        # graph is differentiated once.
        symmetric = (covariance + covariance.mT) / 2
        root = start = _root_of_values(covariance.detach(), floor)
        solve, residue = _solver(start), symmetric.detach() - start @ start
        for _ in range(1 if compiled else _ORDER):
            root = root + solve(symmetric - residue - root @ root)
        return root
    found: Tensor = _Root.apply(covariance, floor)
    return found
