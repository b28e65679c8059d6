"""What the reference says of each method, for the layer and the values of one call."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..reference.arrays import Array
from .subject import Case, Judgement, Subject, parameter

__all__ = [
    "adaptive",
    "batch",
    "ghost",
    "group",
    "instance",
    "layer",
    "mask",
    "masked",
    "masked_prediction",
    "prediction",
    "renorm",
    "response",
    "rms",
    "style",
    "valid_values",
    "whitening",
    "whitening_prediction",
    "whitening_settings",
]


def _affine(output: Array, found: Any) -> Judgement:
    return Judgement(output=output, dx=found.dx, dweight=found.dweight, dbias=found.dbias)


def prediction(case: Case) -> Array:
    """Normalize by the running mean and variance."""
    mean, var = parameter(case.module, "running_mean"), parameter(case.module, "running_var")
    assert mean is not None
    assert var is not None
    return reference.batch_norm_inference(case.x, mean, var, *case.affine, eps=case.eps).output


def batch(case: Case) -> Judgement:
    """Batch normalization."""
    step = reference.batch_norm(case.x, *case.affine, eps=case.eps)
    return _affine(step.output, reference.batch_norm_backward(case.dy, step))


def layer(case: Case) -> Judgement:
    """Layer normalization of the last dimensions, or of whole samples with a weight per channel."""
    weight, _ = case.affine
    per_channel = weight is not None and weight.shape == (case.subject.channels,)
    if per_channel and not hasattr(case.module, "normalized_shape"):
        step = reference.group_norm(case.x, 1, *case.affine, eps=case.eps)
    else:
        wanted = tuple(case.setting("normalized_shape", case.x.shape[1:]))
        step = reference.layer_norm(case.x, wanted, *case.affine, eps=case.eps)
    return _affine(step.output, reference.layer_norm_backward(case.dy, step))


def rms(case: Case) -> Judgement:
    """Root mean square normalization."""
    wanted = tuple(case.setting("normalized_shape", case.x.shape[1:]))
    step = reference.rms_norm(case.x, wanted, case.affine[0], eps=case.eps)
    found = reference.rms_norm_backward(case.dy, step)
    return Judgement(output=step.output, dx=found.dx, dweight=found.dweight)


def group(case: Case) -> Judgement:
    """Group normalization."""
    step = reference.group_norm(case.x, int(case.setting("num_groups", 1)), *case.affine, eps=case.eps)
    return _affine(step.output, reference.group_norm_backward(case.dy, step))


def instance(case: Case) -> Judgement:
    """Instance normalization."""
    step = reference.instance_norm(case.x, *case.affine, eps=case.eps)
    return _affine(step.output, reference.instance_norm_backward(case.dy, step))


def response(case: Case) -> Judgement:
    """Local response normalization."""
    settings = {"alpha": 1e-4, "beta": 0.75, "k": 1.0}
    settings = {name: float(case.setting(name, default)) for name, default in settings.items()}
    step = reference.local_response_norm(case.x, int(case.setting("size", 5)), **settings)
    return Judgement(output=step.output, dx=reference.local_response_norm_backward(case.dy, step).dx)


def adaptive(case: Case) -> Judgement:
    """Adaptive instance normalization by the given style."""
    step = reference.adaptive_instance_norm(case.x, case.company[0], eps=case.eps)
    found = reference.adaptive_instance_norm_backward(case.dy, step)
    return Judgement(output=step.output, dx=found.dcontent, dstyle=found.dstyle)


def style(subject: Subject, x: Tensor) -> tuple[Tensor, ...]:
    """A style for every sample, with one position more than the content in each direction."""
    generator = torch.Generator().manual_seed(6)
    shape = (x.shape[0], x.shape[1], *(size + 1 for size in x.shape[2:]))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 - 2
    # Eighths below 16 are the same numbers in every type.
    return ((values * 8).round().clamp(-127, 127).div(8).to(x.dtype).to(x.device),)


def _first_statistics(case: Case) -> tuple[reference.Running, dict[str, float]]:
    """Return what a layer of batch renormalization stored before its first step, and its limits then."""
    fresh = case.subject.build()
    mean, var = parameter(fresh, "running_mean"), parameter(fresh, "running_var")
    assert mean is not None
    assert var is not None
    limits = getattr(fresh, "limits", None)
    r_max, d_max = limits() if callable(limits) else (getattr(fresh, "r_max", 3.0), getattr(fresh, "d_max", 5.0))
    return reference.Running(mean=mean, var=var), {"r_max": float(r_max), "d_max": float(d_max)}


def renorm(case: Case) -> Judgement:
    """Batch renormalization of the first step."""
    running, limits = _first_statistics(case)
    step = reference.batch_renorm(case.x, running, *case.affine, eps=case.eps, **limits)
    return _affine(step.output, reference.batch_renorm_backward(case.dy, step))


def ghost(case: Case) -> Judgement:
    """Ghost batch normalization."""
    step = reference.ghost_batch_norm(case.x, int(case.setting("ghost_size", 32)), *case.affine, eps=case.eps)
    return _affine(step.output, reference.ghost_batch_norm_backward(case.dy, step))


def masked(case: Case) -> Judgement:
    """Masked batch normalization."""
    step = reference.masked_batch_norm(case.x, case.company[0], *case.affine, eps=case.eps)
    return _affine(step.output, reference.masked_batch_norm_backward(case.dy, step))


def mask(subject: Subject, x: Tensor) -> tuple[Tensor, ...]:
    """Every sample but the first has one valid position less than it could; without positions a sample is missing."""
    mask = torch.ones((x.shape[0], *x.shape[2:]), dtype=torch.bool)
    if x.dim() == 2:
        mask[1:2] = False
    else:
        mask[1:, ..., -1] = False
    return (mask.to(x.device),)


def masked_prediction(case: Case) -> Array:
    """Normalize by the running statistics, and leave zeros in the padding."""
    return np.where(np.expand_dims(case.company[0], 1), prediction(case), 0.0)


def valid_values(case: Case) -> Array:
    """Return the values that are no padding, (m, C)."""
    values: Array = np.moveaxis(case.x, 1, -1)[case.company[0]]
    return values


def whitening_settings(case: Case) -> dict[str, Any]:
    """Return how the covariance is treated."""
    return {name: case.setting(name, default) for name, default in (("shrinkage", 0.0), ("iterations", None))}


def whitening(case: Case) -> Judgement:
    """Whitening batch normalization."""
    groups = int(case.setting("num_groups", 1))
    settings = whitening_settings(case)
    step = reference.whitening_batch_norm(case.x, *case.affine, num_groups=groups, eps=case.eps, **settings)
    return _affine(step.output, reference.whitening_batch_norm_backward(case.dy, step))


def whitening_prediction(case: Case) -> Array:
    """Whiten by the running mean and covariance."""
    mean, covariance = parameter(case.module, "running_mean"), parameter(case.module, "running_covariance")
    assert mean is not None
    assert covariance is not None
    settings = whitening_settings(case)
    return reference.whitening_batch_norm_inference(case.x, mean, covariance, *case.affine, eps=case.eps, **settings)
