"""Checks of what is learnt and stored: gradients, double gradients, the running update."""

import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from .. import reference
from ..reference.arrays import Array
from .forward import distance, recognise
from .reading import form_of, held
from .report import Finding
from .subject import Subject

__all__ = ["check_counter", "check_double_gradients", "check_gradients", "check_running_update"]

_CLOSE = 1e-9


def check_gradients(subject: Subject) -> Iterator[Finding]:
    """The gradients for a random cotangent are the reference's."""
    module, x = subject.build(), subject.input().requires_grad_()
    dy = subject.cotangent(x)
    judge = subject.judge(module, x, dy)
    extra = [value.requires_grad_(value.is_floating_point()) for value in subject.company(x.detach())]
    y = module(x, *extra)
    form = form_of(module)
    own = {name: module._parameters.get(getattr(form, name)) for name in ("weight", "bias")}
    wanted = {"input": x, **{name: value for name, value in own.items() if value is not None}}
    wanted |= dict(zip(["style"], (value for value in extra if value.requires_grad), strict=False))
    found: tuple[Tensor | None, ...] = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    expected = {"input": judge.dx, "weight": judge.dweight, "bias": judge.dbias, "style": judge.dstyle}
    for name, gradient in zip(wanted, found, strict=True):
        target = expected[name]
        if target is None:
            continue
        if gradient is None:
            yield Finding(check="gradients", problem="there is none.", convention=f"gives the {name} no gradient")
            continue
        if name in own and gradient.numel() == target.size:
            gradient = gradient.reshape(target.shape)
        gap = distance(gradient.double().numpy(), target)
        if gap > _CLOSE:
            words = recognise(gradient.double().numpy(), _variants(subject, module, x, dy)) if name == "input" else ""
            yield Finding(
                check="gradients", problem=f"the gradient of the {name} is off by {gap:.3g}.", convention=words
            )


def _variants(subject: Subject, module: nn.Module, x: Tensor, dy: Tensor) -> Iterator[tuple[str, Array]]:
    """Yield what an input gradient with a forgotten term would be, for batch normalization."""
    if subject.method != "batch":
        return
    given, axes = x.detach().double().numpy(), (0, *range(2, x.dim()))
    step = reference.batch_norm(given, eps=subject.eps(module))
    broadcast = (1, -1, *(1 for _ in range(2, x.dim())))
    weight = held(module, "weight")
    scale = step.rstd if weight is None else step.rstd * weight.detach().double().numpy()
    g, s = dy.double().numpy(), scale.reshape(broadcast)
    mean, along = g.mean(axis=axes, keepdims=True), step.xhat * (g * step.xhat).mean(axis=axes, keepdims=True)
    yield "treats mean and variance as constants in the backward", s * g
    yield "treats the mean as a constant in the backward", s * (g - along)
    yield "treats the variance as a constant in the backward", s * (g - mean)
    yield "has the sign of the gradient wrong", -s * (g - mean - along)


def check_double_gradients(subject: Subject) -> Iterator[Finding]:
    """The gradient can be differentiated, or refuses in words; it is not silently wrong."""
    module = subject.build().double()
    # Few values, since every one is moved; more than channels, since a covariance wants them.
    shape = (3 if subject.dimensions else 9, subject.channels, *(2 for _ in range(subject.dimensions)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if subject.method in ("layer", "rms") and x.shape[1:] != subject.shape()[1:]:
        x = subject.input(samples=2)
    try:
        with warnings.catch_warnings():
            # A layer that changes the type is another check's finding.
            warnings.simplefilter("ignore", UserWarning)
            torch.autograd.gradgradcheck(
                lambda value: subject.call(module, value), (x.requires_grad_(),), atol=1e-4, rtol=1e-3
            )
    except GradcheckError:
        words = "gives second derivatives that are wrong"
        problem = "finite differences of the gradient disagree with its derivative."
        yield Finding(check="double gradients", problem=problem, convention=words)
    except (RuntimeError, NotImplementedError) as refusal:
        if not str(refusal):
            yield Finding(check="double gradients", problem="it is refused without a word.")


def check_running_update(subject: Subject) -> Iterator[Finding]:
    """One training step moves the running statistics as the layer's settings say."""
    module, x = subject.build(), subject.input()
    start = {name: value.double().numpy().copy() for name, value in subject.stores(module).items()}
    subject.call(module, x)
    named = form_of(module).momentum
    value = getattr(module, named, 0.1) if isinstance(named, str) else named
    rate = 1.0 if value is None else float(value)
    target = _updates(subject, module, x)
    wanted = "unbiased" if getattr(module, "unbiased", True) else "biased"
    found = {name: value.detach().double().numpy() for name, value in subject.stores(module).items()}
    for name, kind in zip(subject.contract.stored, ("mean", wanted), strict=True):
        expected = start[name] + rate * (target[kind] - start[name])
        gap = distance(found[name], expected)
        if gap > _CLOSE:
            words = recognise(found[name], _update_variants(start[name], target, name, rate))
            problem = f"{name} is off by {gap:.3g} after one step."
            yield Finding(check="running update", problem=problem, convention=words)


def _updates(subject: Subject, module: nn.Module, x: Tensor) -> dict[str, Array]:
    """Return what a layer may store of a batch, by kind."""
    given = subject.contract.seen(subject.case(module, x))
    if subject.method == "instance":
        batch = reference.instance_statistics(reference.instance_norm(given))
    else:
        batch = reference.batch_statistics(given)
    count = batch.count
    kinds = {"mean": batch.mean, "scaled mean": batch.mean * count / (count - 1)}
    if "running_covariance" in subject.contract.stored:
        groups = int(getattr(module, "num_groups", 1))
        covariance = reference.whitening_batch_norm(given, num_groups=groups, eps=subject.eps(module)).covariance
        return kinds | {"biased": covariance, "unbiased": covariance * count / (count - 1)}
    return kinds | {
        "biased": batch.var,
        "unbiased": batch.unbiased_var,
        "deviation": np.sqrt(batch.var),
        "unbiased deviation": np.sqrt(batch.unbiased_var),
        "twice corrected": batch.unbiased_var * count / (count - 1),
    }


def _update_variants(start: Array, target: dict[str, Array], name: str, rate: float) -> Iterator[tuple[str, Array]]:
    yield "does not update its running statistics", start
    kinds = (
        {"mean": "", "scaled mean": "stores the mean times m / (m - 1)"}
        if name == "running_mean"
        else {
            "unbiased": "stores the unbiased variance",
            "biased": "stores the biased variance",
            "deviation": "stores the deviation, not the variance",
            "unbiased deviation": "stores the deviation, not the variance",
            "twice corrected": "corrects the variance for its bias twice",
        }
    )
    weights = {
        rate: "",
        1 - rate: "weights the old value by momentum, as Keras, Flax and ONNX do",
        1.0: "stores the last batch alone",
        rate / 2: "weights the new value by half of momentum",
    }
    known = {kind: stored for kind, stored in kinds.items() if kind in target}
    for (kind, stored), (weight, weighs) in itertools.product(known.items(), weights.items()):
        words = " and ".join(part for part in (weighs, stored) if part)
        yield words, start + weight * (target[kind] - start)


def check_counter(subject: Subject) -> Iterator[Finding]:
    """The counter of batches advances by one with each training step."""
    module = subject.build()
    counter = held(module, "num_batches_tracked")
    if counter is None:
        return
    before = int(counter)
    subject.call(module, subject.input())
    now = held(module, "num_batches_tracked")
    advanced = (before if now is None else int(now)) - before
    if advanced != 1:
        words = "does not count its batches" if advanced == 0 else "counts a batch more than once"
        yield Finding(check="counter", problem=f"one step advanced it by {advanced}.", convention=words)
