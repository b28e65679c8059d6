"""Checks of what a layer holds: its statistics, affine part and counter. They need no data, and work on files."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..measurements import Measured
from ..subjects import Subject
from ..thresholds import ABSORBED_RATIO

__all__ = ["STATE_CHECKS", "freezing", "is_absorbed", "is_never_updated", "is_zeroed", "running_and_true"]

_LISTED = 16  # channels that a finding names


def nonfinite(examination: Examination) -> Iterator[Finding]:
    """Find NaN, infinities, negative variances and an eps of 0; and an output that is not finite all the same."""
    found = [*_bad_statistics(examination), *_bad_eps(examination)]
    yield from found
    if examination.overflowed is not None and not found:
        yield _overflow(examination, examination.overflowed)
    elif not found:
        yield from _spoiled(examination)


def _bad_eps(examination: Examination) -> Iterator[Finding]:
    """An eps of 0 divides by 0 wherever a channel is constant, and torch refuses to train with it."""
    for subject in examination.subjects:
        name = subject.names.eps
        eps = getattr(subject.layer.module, name, None) if subject.layer is not None and isinstance(name, str) else None
        if not isinstance(eps, int | float) or 0 < eps < math.inf:
            continue
        if not math.isfinite(eps):
            yield _eps_finding(subject, eps, "error", "no output of the layer says anything of its input")
            continue
        variance = subject.running_var
        divided = variance is not None and subject.tracks and bool((variance + eps <= 0).any())
        severity: Severity = "error" if divided else "info" if subject.is_fixed else "warning"
        zero = "a channel whose variance is 0 is divided by 0" if divided else "a constant channel is divided by 0"
        yield _eps_finding(subject, eps, severity, f"{zero}, and torch does not train with it")


def _eps_finding(subject: Subject, eps: float, severity: Severity, said: str) -> Finding:
    return Finding(
        check="nonfinite",
        layer=subject.name,
        severity=severity,
        summary=f"eps is {eps:g}: {said}",
        evidence={"eps": float(eps)},
        causes=("a number rounded to 0 on its way through a settings file", "a converter that left eps out"),
        remedy=f"{subject.accessor}.{subject.names.eps} = 1e-05",
        proof='not normkit.diagnose(model).of("nonfinite", {layer})',
    )


def _spoiled(examination: Examination) -> Iterator[Finding]:
    """Find batches of which layers were given NaN or infinities: a step of training on one is never forgotten."""
    parts = {name: sum(part.nonfinite_batches for part in entry.calls) for name, entry in examination.measured.items()}
    names = [name for name, count in parts.items() if count]
    if not names:
        return
    count, of = examination.spoiled
    if count:
        said = f"{count} of {of} batches hold NaN or infinities, which reach {len(names)} of the layers"
        causes = ("a missing value in the data", "a logarithm or a quotient of 0 in the preparation of the data")
        remedy = (
            "batches = [batch for batch in batches "
            "if all(tensor.isfinite().all() for tensor in normkit.anatomy.batches.tensors(batch))]"
        )
    else:
        said = f"a finite batch gives {names[0]} an input that is not finite"
        causes = ("numbers too large for the type", "a logarithm or a quotient of 0 before the layer")
        remedy = "model.float()  # where it is in half precision; else look at what stands before the layer"
    yield Finding(
        check="nonfinite",
        layer="" if count else names[0],
        severity="warning",
        summary=f"{said}: one step of training on that makes the running statistics NaN for ever",
        evidence={"batches": count, "of": of, "first_layer": names[0], "layers": len(names)},
        causes=causes,
        remedy=remedy,
        proof='not normkit.diagnose(model, batches).of("nonfinite")',
    )


def _overflow(examination: Examination, layer: str) -> Finding:
    subject = examination.subject(layer) if layer else None
    broken = _broken_parameter(examination.model)
    if broken:
        remedy = "model.load_state_dict(last_good_state)"
    elif subject is not None and subject.tracks and subject.is_batch:
        remedy = subject.recalibration
    else:
        remedy = "model.float()  # where it is in half precision; else look for the first module that gives NaN"
    return Finding(
        check="nonfinite",
        layer=layer,
        severity="error",
        summary="in evaluation the output of the model is not finite, though the batch is"
        + (": this layer is the first to make NaN or an infinity of finite numbers" if layer else "")
        + (f": {broken} holds NaN or an infinity" if broken else ""),
        evidence={"first_layer": layer or None},
        causes=(
            ("statistics far from what the layer is given", "numbers too large for the layer's type")
            if layer
            else ("weights with NaN, or numbers too large for their type", "a logarithm or a quotient of 0")
        )
        + ("scores that are set to minus infinity on purpose",),
        remedy=remedy,
        proof='not normkit.diagnose(model, batches).of("nonfinite")',
    )


def _broken_parameter(model: nn.Module | None) -> str:
    named = () if model is None else model.named_parameters()
    wrong = (name for name, value in named if value.is_floating_point() and not torch.isfinite(value).all())
    return next(wrong, "")


def _bad_statistics(examination: Examination) -> Iterator[Finding]:
    for subject in examination.subjects:
        bad = {name: channels for name, channels in _bad_channels(subject).items() if channels}
        if not bad:
            continue
        affine = bad.keys() & {"weight", "bias"}
        count = len({channel for channels in bad.values() for channel in channels})
        yield Finding(
            check="nonfinite",
            layer=subject.name,
            severity="error",
            summary=f"{' and '.join(bad)} {'hold' if len(bad) > 1 else 'holds'} NaN, an infinity or a negative "
            f"variance: in evaluation {count} channel{'s are' if count > 1 else ' is'} NaN or wrong for ever",
            evidence={f"{name}_channels": channels[:_LISTED] for name, channels in bad.items()} | {"channels": count},
            causes=(
                "one training batch with NaN or an overflow; a loss scaler skips the weights' step, not the statistics",
                "a batch of one value per channel",
                "weights averaged or quantized with a fault",
            ),
            remedy="model.load_state_dict(last_good_state)" if affine else "normkit.repair(model, batches=batches)",
            proof='not normkit.diagnose(model).of("nonfinite", {layer})',
        )


def _bad_channels(subject: Subject) -> dict[str, list[int]]:
    bad: dict[str, list[int]] = {}
    for name in ("running_mean", "running_var", "weight", "bias"):
        values: Tensor | None = getattr(subject, name)
        if values is None or not values.is_floating_point():
            continue
        wrong = ~torch.isfinite(values)
        if name == "running_var":
            wrong |= values < 0
        bad[name] = torch.nonzero(wrong.reshape(-1)).reshape(-1).tolist()
    return bad


def running_and_true(subject: Subject, measured: Measured | None) -> dict[str, tuple[float, ...]]:
    """Return the running statistics and those of the data, per channel, for a picture; empty where unmeasured."""
    mean, variance = subject.running_mean, subject.running_var
    if measured is None or not measured.calls or not measured.pooled or mean is None or variance is None:
        return {}
    named = {
        "running_mean": mean,
        "running_var": variance,
        "population_mean": measured.pooled.mean,
        "population_var": measured.pooled.var,
    }
    return {name: tuple(values.double().tolist()) for name, values in named.items()}


def is_never_updated(subject: Subject) -> bool:
    """Say whether the running statistics are bit for bit those of construction: mean 0 and variance 1."""
    mean, variance = subject.running_mean, subject.running_var
    if not subject.tracks or mean is None or variance is None or not mean.numel():
        return False
    return bool((mean == 0).all()) and bool((variance == 1).all())


def is_zeroed(subject: Subject, measured: Measured | None) -> bool:
    """Say whether the running variance is 0 in every channel, and the data's, where it was measured, is not."""
    variance = subject.running_var
    if not subject.tracks or variance is None or not variance.numel() or bool((variance != 0).any()):
        return False
    seen = measured.pooled if measured is not None and measured.calls else None
    return not seen or bool((seen.var > 0).any())


def freezing(subject: Subject) -> str:
    """Return the call that freezes a layer; initial statistics are measured first, for freezing refuses those."""
    first = f"{subject.recalibration}; " if is_never_updated(subject) else ""
    return f"{first}normkit.freeze(model, where={{layer}})"


def never_updated(examination: Examination) -> Iterator[Finding]:
    """Find statistics that are still those of construction in a layer that counts on them."""
    for subject in examination.subjects:
        if is_zeroed(subject, examination.measured.get(subject.name)):
            yield _zeroed_finding(subject, examination.measured.get(subject.name))
            continue
        trained = _affine_moved(subject)
        if not is_never_updated(subject) or (subject.moves and not trained):
            continue
        measured = examination.measured.get(subject.name)
        if is_absorbed(subject, measured):
            yield _absorbed_finding(subject)
            continue
        unused = subject.name in examination.unheard
        past_its_call = examination.plan is not None and measured is None and not unused
        untold = trained and not (measured is not None and measured.pooled)
        yield Finding(
            check="never-updated",
            layer=subject.name,
            severity="info" if unused else "error",
            summary="the running statistics are those of construction, mean 0 and variance 1: "
            + ("no output of the model depends on them" if unused else "in evaluation the layer normalizes nothing"),
            evidence={"updates": subject.updates, "affine_trained": trained, "training": subject.training},
            causes=("the batches given here do not reach the layer, and nothing else reads it",)
            if unused
            else (
                "parameters were copied or averaged without the buffers (a mean teacher, SWA, federated averaging)",
                "a file of weights without the running statistics, loaded with strict=False",
                "the layer was frozen before it had seen data or weights",
                "a new model was put in evaluation mode without training",
            )
            + (
                ("or they were absorbed into weight and bias, and all is well: give batches to tell",) if untold else ()
            ),
            remedy=subject.forwards if past_its_call else subject.recalibration,
            proof='not normkit.diagnose(model).of("never-updated", {layer})',
            channels=running_and_true(subject, measured),
        )


def _zeroed_finding(subject: Subject, measured: Measured | None) -> Finding:
    return Finding(
        check="never-updated",
        layer=subject.name,
        severity="error",
        summary="the running variance is 0 in every channel, as no data leave it: in evaluation every value is divided "
        "by the root of eps alone",
        evidence={"updates": subject.updates, "eps": subject.eps, "training": subject.training},
        causes=(
            "they were set to zero: a file that lacks them, an initialisation of all tensors, a sum of models",
            "the layer was only ever given constants",
        ),
        remedy=subject.recalibration,
        proof='not normkit.diagnose(model, batches).of("never-updated", {layer})',
        channels=running_and_true(subject, measured),
    )


def _absorbed_finding(subject: Subject) -> Finding:
    return Finding(
        check="never-updated",
        layer=subject.name,
        severity="info",
        summary="mean 0 and variance 1 stand beside a weight and a bias that hold the data's own: the statistics were "
        "absorbed into them, and evaluation normalizes as it should",
        evidence={"updates": subject.updates},
        causes=("converted detection backbones carry their statistics in weight and bias",),
        remedy="model = normkit.fold(model, example).model  # where the layer is not needed; never recalibrate it",
        proof="normkit.diagnose(model, batches).healthy",
    )


def is_absorbed(subject: Subject, measured: Measured | None) -> bool:
    """Say whether weight and bias do what mean 0 and variance 1 do not.

    Absorbing makes ``weight = gamma / sigma`` and ``bias = beta - mean * gamma / sigma``. Then weight times the data's
    deviation, and bias plus weight times the data's mean, vary less over the channels than weight and bias do
    themselves; where training left the parameters with the statistics lost, the data only add their own variety.
    """
    weight, bias = subject.weight, subject.bias
    if not is_never_updated(subject) or weight is None or bias is None or measured is None or not measured.pooled:
        return False
    scale, shift = weight.double(), bias.double()
    deviation, mean = measured.pooled.var.to(scale).sqrt(), measured.pooled.mean.to(scale)
    heard = (scale != 0) & (deviation > 0)
    if int(heard.sum()) < 3:
        return False
    scale, shift, deviation, mean = (values[heard] for values in (scale, shift, deviation, mean))
    tiny = torch.finfo(torch.float64).tiny
    by_weight = (scale.abs() * deviation).log().std() / scale.abs().log().std().clamp_min(tiny)
    by_bias = (shift + scale * mean).std() / shift.std().clamp_min(tiny)
    return bool(by_weight < 1) and bool(by_bias < 1) and bool(by_weight * by_bias < ABSORBED_RATIO)


def _affine_moved(subject: Subject) -> bool:
    """Say whether training has touched the affine part.

    A bias starts alike in all channels, so it tells; a weight may be drawn at construction, as generators do, and
    tells only where there is no bias.
    """
    part = subject.weight if subject.bias is None else subject.bias
    return part is not None and bool(part.numel()) and bool((part != part[0]).any())


STATE_CHECKS: tuple[Check, ...] = (
    Check(
        name="nonfinite",
        question="Is every statistic finite, no variance negative, eps above 0, and the output finite?",
        needs="state",
        examine=nonfinite,
        innocent=(),
    ),
    Check(
        name="never-updated",
        question="Have the statistics ever been updated?",
        needs="state",
        examine=never_updated,
        innocent=("a new model in evaluation mode that nobody uses yet", "an input that is standardized by hand"),
    ),
)
