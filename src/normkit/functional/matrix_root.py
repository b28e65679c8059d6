"""The square root of covariances, differentiable to every order, also where eigenvalues are equal.

``S = root(C)`` solves ``S S = C``, so a change obeys the Lyapunov equation ``S dS + dS S = dC``. Its solution divides
by sums of eigenvalues, where the derivative of an eigenvector would divide by differences. The equation is its own
adjoint, so its solver is also its backward. Matrices are symmetric, in stacks ``(..., d, d)``.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["matrix_root"]


def _lyapunov(s: Tensor, q: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    sums = values.unsqueeze(-1) + values.unsqueeze(-2)
    x: Tensor = vectors @ ((vectors.mT @ q @ vectors) / sums) @ vectors.mT
    return x


class _Lyapunov(torch.autograd.Function):
    """X with ``S X + X S = Q``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, q: Tensor) -> Tensor:
        return _lyapunov(s, q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        s, x = ctx.saved_tensors
        dq = _solve(s, given)
        return -(dq @ x + x @ dq), dq

    @staticmethod
    def jvp(ctx: Any, ds: Tensor | None, dq: Tensor | None) -> Tensor:
        s, x = ctx.saved_tensors
        moved = torch.zeros_like(x) if dq is None else dq
        return _solve(s, moved if ds is None else moved - ds @ x - x @ ds)


def _root(covariance: Tensor, floor: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # No eigenvalue is below the floor in exact arithmetic.
    root: Tensor = (vectors * values.clamp_min(floor).sqrt().unsqueeze(-2)) @ vectors.mT
    return root


class _Root(torch.autograd.Function):
    """S with ``S S = C``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(covariance: Tensor, floor: float) -> Tensor:
        return _root(covariance, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return _solve(s, (given + given.mT) / 2), None

    @staticmethod
    def jvp(ctx: Any, dc: Tensor, _: None) -> Tensor:
        (s,) = ctx.saved_tensors
        return _solve(s, (dc + dc.mT) / 2)


class _CompiledRoot(torch.autograd.Function):
    """The same in a graph that torch.compile makes: it takes no function with a ``jvp``, and differentiates once."""

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, floor: float) -> Tensor:
        root = _root(covariance, floor)
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return _lyapunov(s, (given + given.mT) / 2), None


def _solve(s: Tensor, q: Tensor) -> Tensor:
    solution: Tensor = _Lyapunov.apply(s, q)
    return solution


def matrix_root(covariance: Tensor, floor: float) -> Tensor:
    """Return the symmetric square root of matrices whose eigenvalues are at least ``floor``, which is positive."""
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    root: Tensor = (_CompiledRoot if compiled else _Root).apply(covariance, floor)
    return root
