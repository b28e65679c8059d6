"""Batch normalization inside a graph that torch.compile makes: one operator, and the running statistics copied back."""

import torch
from torch import Tensor

__all__ = ["run_compiled"]


def run_compiled(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    unbiased: bool,
    activation: str | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """Return y, with the running statistics moved as an eager call moves them, bit for bit."""
    # Imported here: registering the operators costs milliseconds that only a compiled model needs.
    from ..kernels import operators

    if not training:
        assert running_mean is not None
        assert running_var is not None
        y: Tensor
        y, _ = operators.batch_norm_inference(x, weight, bias, residual, running_mean, running_var, eps, activation)
        return y
    running = (running_mean, running_var, num_batches_tracked)
    settings = (momentum, eps, unbiased, activation)
    y, _, mean, var, count = operators.batch_norm_forward(x, weight, bias, residual, *running, *settings)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.copy_(mean)
            running_var.copy_(var)
            if num_batches_tracked is not None:
                num_batches_tracked.copy_(count)
    return y
