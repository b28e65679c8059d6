"""Checks of what comes out: the training forward, evaluation, types, layouts, large means, constant channels."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from .. import reference
from ..reference.arrays import Array
from .report import Finding
from .subject import Subject, parameter

__all__ = [
    "check_constant_channel",
    "check_evaluation",
    "check_half_precision",
    "check_huge_mean",
    "check_input_kept",
    "check_memory_layout",
    "check_padding",
    "check_sample_independence",
    "check_shape_and_type",
    "check_training_output",
]

# What a layer that computes in float64 may lose.
_CLOSE = 1e-9
# Units in the last place of float32 that a sound layer may lose at mean/std 1e4: the promise of our own is 4.
_ULPS = 64


def distance(found: Array, expected: Array) -> float:
    """Return the largest difference, infinite where the shapes differ or something is not a number."""
    if found.shape != expected.shape:
        return float("inf")
    gap = float(np.abs(found - expected).max(initial=0.0)) / max(1.0, float(np.abs(expected).max(initial=0.0)))
    return gap if gap == gap else float("inf")


def recognise(found: Array, candidates: Iterator[tuple[str, Array]]) -> str:
    """Return the words of the candidate that the result equals, or an empty string."""
    for words, expected in candidates:
        if distance(found, expected) < _CLOSE:
            return words
    return ""


def check_training_output(subject: Subject) -> Iterator[Finding]:
    """The training output is the reference's; if not, known variants are tried."""
    module, x = subject.build(), subject.input()
    found = subject.call(module, x).detach().double().numpy()
    gap = distance(found, subject.judge(module, x).output)
    if gap > _CLOSE:
        words = recognise(found, _variants(subject, module, x.double().numpy()))
        yield Finding(check="training output", problem=f"it is off by {gap:.3g} from the reference.", convention=words)


def _variants(subject: Subject, module: nn.Module, x: Array) -> Iterator[tuple[str, Array]]:
    """Yield what the usual mistakes would have given."""
    yield from subject.contract.variants(subject.case(module, torch.from_numpy(x)))
    space = tuple(range(2, x.ndim))
    axes = {
        "batch": (0, *space),
        "layer": tuple(range(1, x.ndim)),
        "instance": space,
        "rms": tuple(range(1, x.ndim)),
    }.get(subject.method)
    eps = subject.eps(module)
    if axes is not None and subject.method != "rms":
        count = int(np.prod([x.shape[axis] for axis in axes]))
        yield from _scaled(module, x, axes, eps, count)
    for words, other in (
        ("averages the samples only, each position by itself", (0,)),
        ("averages the positions only, each sample by itself, as instance normalization does", space),
        ("averages all channels of a sample, as layer normalization does", tuple(range(1, x.ndim))),
        ("averages everything, all channels together", tuple(range(x.ndim))),
        ("averages samples and positions, as batch normalization does", (0, *space)),
    ):
        if other and other != axes:
            mean, var = x.mean(axis=other, keepdims=True), x.var(axis=other, keepdims=True)
            yield words, _affine(module, (x - mean) / np.sqrt(var + eps))
    if subject.method == "batch" and subject.keeps_statistics:
        yield (
            "normalizes with what it stores in training too, as a frozen layer does",
            subject.predict(module, torch.from_numpy(x)),
        )
    if subject.method == "group":
        yield "takes every G-th channel into a group instead of neighbours", _interleaved(subject, module, x, eps)


def _scaled(module: nn.Module, x: Array, axes: tuple[int, ...], eps: float, count: int) -> Iterator[tuple[str, Array]]:
    mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    deviation, xhat = x - mean, (x - mean) / np.sqrt(var + eps)
    yield "normalizes with the unbiased variance", _affine(module, deviation / np.sqrt(var * count / (count - 1) + eps))
    yield "adds eps to the deviation, outside the root", _affine(module, deviation / (np.sqrt(var) + eps))
    yield "leaves eps out", _affine(module, deviation / np.sqrt(var))
    yield "divides by the variance instead of its root", _affine(module, deviation / (var + eps))
    yield "does not remove the mean", _affine(module, x / np.sqrt(var + eps))
    for other in (1e-3, 1e-5, 1e-6, 1e-8, 1e-12):
        if other != eps:
            yield f"uses eps={other} where it says {eps}", _affine(module, deviation / np.sqrt(var + other))
    weight, bias = parameter(module, "weight"), parameter(module, "bias")
    if weight is not None and bias is not None and weight.shape == (x.shape[1],):
        gamma, beta = (value.reshape(1, -1, *(1 for _ in x.shape[2:])) for value in (weight, bias))
        yield "ignores the bias", gamma * xhat
        yield "ignores the weight", xhat + beta
        yield "ignores weight and bias", xhat
        yield "multiplies by 1 + weight", (1 + gamma) * xhat + beta
        yield "adds the bias before it multiplies by the weight", gamma * (xhat + beta)
        yield "subtracts the bias", gamma * xhat - beta


def _affine(module: nn.Module, xhat: Array) -> Array:
    weight, bias = parameter(module, "weight"), parameter(module, "bias")
    for value, multiply in ((weight, True), (bias, False)):
        if value is not None:
            per_channel = value.shape == (xhat.shape[1],)
            shaped = value.reshape(1, -1, *(1 for _ in xhat.shape[2:])) if per_channel else value
            xhat = xhat * shaped if multiply else xhat + shaped
    return xhat


def _interleaved(subject: Subject, module: nn.Module, x: Array, eps: float) -> Array:
    groups = int(getattr(module, "num_groups", 1))
    order = np.arange(subject.channels).reshape(-1, groups).T.ravel()
    mixed = reference.group_norm(x[:, order], groups, eps=eps).output
    return _affine(module, mixed[:, np.argsort(order)])


def check_evaluation(subject: Subject) -> Iterator[Finding]:
    """Evaluation uses what is stored, and writes nothing."""
    module, x = subject.build(), subject.input()
    if not subject.keeps_statistics:
        expected = subject.call(module, x).detach().double().numpy()
        gap = distance(subject.call(module.eval(), x).detach().double().numpy(), expected)
        if gap > _CLOSE:
            yield Finding(check="evaluation", problem=f"it differs from training by {gap:.3g}, and nothing is stored.")
        return
    _store(subject, module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = subject.call(module.eval(), x).detach().double().numpy()
    gap = distance(found, subject.predict(module, x))
    if gap > _CLOSE:
        yield Finding(
            check="evaluation",
            problem=f"it is off by {gap:.3g} from the stored statistics.",
            convention=recognise(found, _evaluations(subject, module, x)),
        )
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        words = "updates its statistics in evaluation"
        yield Finding(check="evaluation", problem=f"it wrote {', '.join(changed)}.", convention=words)


def _store(subject: Subject, module: nn.Module) -> None:
    """Give a layer running statistics that no batch has, and a covariance that is one."""
    for name, value in subject.stores(module).items():
        if value.dim() == 3:
            mixed = torch.linspace(-1, 1, value.numel()).reshape(value.shape)
            value.copy_(mixed @ mixed.mT + torch.eye(value.shape[-1]))
        else:
            low, high = (-1.0, 1.0) if name == "running_mean" else (0.5, 2.0)
            value.copy_(torch.linspace(low, high, value.numel()))


def _evaluations(subject: Subject, module: nn.Module, x: Tensor) -> Iterator[tuple[str, Array]]:
    """Yield what the usual mistakes would have given in evaluation."""
    yield "uses the statistics of the batch in evaluation", subject.judge(module, x).output
    if "running_var" not in subject.contract.stored:
        return
    given, eps = x.double().numpy(), subject.eps(module)
    mean, var = (value.double().numpy() for value in subject.stores(module).values())
    weight, bias = parameter(module, "weight"), parameter(module, "bias")
    as_std = reference.batch_norm_inference(given, mean, var**2, weight, bias, eps=eps).output
    yield "takes the running variance for a deviation", as_std
    outside = [value.reshape(1, -1, *(1 for _ in x.shape[2:])) for value in (mean, var)]
    words = "adds eps to the deviation, outside the root"
    yield words, _affine(module, (given - outside[0]) / (np.sqrt(outside[1]) + eps))


def check_shape_and_type(subject: Subject) -> Iterator[Finding]:
    """The output has the input's shape and type."""
    for dtype in (torch.float32, torch.float64):
        x = subject.input(dtype=dtype)
        y = subject.call(subject.build(dtype), x)
        if y.shape != x.shape:
            yield Finding(check="shape and type", problem=f"{tuple(x.shape)} became {tuple(y.shape)}.")
        if y.dtype != dtype:
            words = "changes the type of what it is given"
            yield Finding(check="shape and type", problem=f"{dtype} became {y.dtype}.", convention=words)


def check_half_precision(subject: Subject) -> Iterator[Finding]:
    """In bfloat16 the statistics are still computed in float32 or wider."""
    module = subject.build(torch.bfloat16)
    x = (subject.input(dtype=torch.float32, samples=9) + 8).bfloat16()
    y = subject.call(module, x)
    gap = distance(y.detach().double().numpy(), subject.judge(module, x).output)
    if y.dtype != torch.bfloat16:
        yield Finding(
            check="half precision",
            problem=f"bfloat16 became {y.dtype}.",
            convention="changes the type of what it is given",
        )
    elif gap > 2**-6:
        words = "rounds to half precision before the end"
        yield Finding(check="half precision", problem=f"bfloat16 is off by {gap:.3g}.", convention=words)


def check_huge_mean(subject: Subject) -> Iterator[Finding]:
    """A mean of ten thousand deviations costs no digits."""
    x = (torch.randn(subject.shape(16), generator=torch.Generator().manual_seed(3)) + 1e4).float()
    for name, given in _layouts(x):
        module = subject.build(torch.float32)
        expected = subject.judge(module, x).output
        unit = np.spacing(np.maximum(1, np.abs(expected)).astype(np.float32)).astype(np.float64)
        off = float((np.abs(subject.call(module, given).detach().double().numpy() - expected) / unit).max())
        if not off <= _ULPS:
            words = "loses its digits to a large mean, as E[x^2] - E[x]^2 does" if off > 1e5 else ""
            problem = f"at mean/std 1e4 ({name}) it is off by {off:.3g} units in the last place."
            yield Finding(check="huge mean", problem=problem, convention=words)


def check_constant_channel(subject: Subject) -> Iterator[Finding]:
    """A constant input gives the bias exactly."""
    module = subject.build(torch.float32)
    y = subject.call(module, torch.full(subject.shape(), 100.1)).detach().double().numpy()
    expected = subject.judge(module, torch.full(subject.shape(), 100.0, dtype=torch.float64)).output
    off = float(np.abs(y - expected).max())
    if off > 0:
        problem = f"a constant channel of 100.1 gives the bias only to {off:.3g}, divided by the root of eps."
        yield Finding(check="constant channel", problem=problem)


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "contiguous", x
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats:
        yield "channels last", x.to(memory_format=formats[x.dim()])


def check_memory_layout(subject: Subject) -> Iterator[Finding]:
    """Strides do not change the result."""
    x = subject.input()
    expected = subject.call(subject.build(), x).detach()
    other = {
        "channels last": list(_layouts(x))[-1][1],
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "with gaps": torch.stack([x, x], -1)[..., 0],
    }
    for name, given in other.items():
        gap = distance(subject.call(subject.build(), given).detach().numpy(), expected.numpy())
        if gap > _CLOSE:
            words = "reads memory in an order that the strides do not have"
            yield Finding(check="memory layout", problem=f"{name} input is off by {gap:.3g}.", convention=words)


def check_input_kept(subject: Subject) -> Iterator[Finding]:
    """The input is not written."""
    x = subject.input()
    kept = x.clone()
    subject.call(subject.build(), x)
    if not torch.equal(x, kept):
        yield Finding(check="input kept", problem="the input changed.", convention="writes into its input")


def check_sample_independence(subject: Subject) -> Iterator[Finding]:
    """In a method that averages per sample, a sample's output does not depend on its batch mates."""
    x = subject.input()
    extra = subject.company(x)
    alone = subject.build()(x[:2], *(value[:2] for value in extra))
    gap = distance(alone.detach().numpy(), subject.build()(x, *extra).detach().numpy()[:2])
    if gap > _CLOSE:
        words = "lets samples of a batch see each other"
        yield Finding(check="sample independence", problem=f"outputs differ by {gap:.3g}.", convention=words)


def check_padding(subject: Subject) -> Iterator[Finding]:
    """What stands in the padding changes nothing, NaN included, and nor does more of it."""
    x = subject.input()
    (mask,) = subject.company(x)
    expected = subject.build()(x, mask).detach()
    filled = x.masked_fill(~mask.unsqueeze(1), float("nan"))
    found = subject.build()(filled, mask).detach()
    if distance(found.numpy(), expected.numpy()) > _CLOSE:
        words = "lets the padding into the output"
        yield Finding(check="padding", problem="NaN in the padding changes the output.", convention=words)
    if x.dim() > 2:
        longer, more = torch.cat([x, x[..., :2]], -1), torch.cat([mask, torch.zeros_like(mask[..., :2])], -1)
        found = subject.build()(longer, more).detach()[..., : x.shape[-1]]
        if distance(found.numpy(), expected.numpy()) > _CLOSE:
            words = "lets the padding into the output"
            yield Finding(check="padding", problem="more padding changes the output.", convention=words)
