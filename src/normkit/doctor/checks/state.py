"""Checks of what a layer holds: its statistics, affine part and counter. They need no data, and work on files."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..measurements import Measured
from ..subjects import Subject
from ..thresholds import DEAD_SHARE, DEAD_VARIANCE, SCALE_OUTLIER

__all__ = ["STATE_CHECKS", "is_never_updated", "running_and_true"]

_LISTED = 16  # channels that a finding names


def nonfinite(examination: Examination) -> Iterator[Finding]:
    """Find NaN, infinities and negative variances: an average never forgets an infinity."""
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
            summary=f"{' and '.join(bad)} hold NaN, an infinity or a negative variance: "
            f"in evaluation {count} channel{'s are' if count > 1 else ' is'} NaN or wrong for ever",
            evidence={f"{name}_channels": channels[:_LISTED] for name, channels in bad.items()} | {"channels": count},
            causes=(
                "one training batch with NaN or an overflow; a loss scaler skips the weights' step, not the statistics",
                "a batch of one value per channel",
                "weights averaged or quantized with a fault",
            ),
            remedy="model.load_state_dict(last_good_state)" if affine else "normkit.repair(model, batches=batches)",
            proof=f'not normkit.diagnose(model).of("nonfinite", {subject.name!r})',
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


def never_updated(examination: Examination) -> Iterator[Finding]:
    """Find statistics that are still those of construction in a layer that counts on them."""
    for subject in examination.subjects:
        trained = _affine_moved(subject)
        if not is_never_updated(subject) or (subject.moves and not trained):
            continue
        yield Finding(
            check="never-updated",
            layer=subject.name,
            severity="error",
            summary="the running statistics are those of construction, mean 0 and variance 1: "
            "in evaluation the layer normalizes nothing",
            evidence={"updates": subject.updates, "affine_trained": trained, "training": subject.training},
            causes=(
                "parameters were copied or averaged without the buffers (a mean teacher, SWA, federated averaging)",
                "a file of weights without the running statistics, loaded with strict=False",
                "the layer was frozen before it had seen data or weights",
                "a new model was put in evaluation mode without training",
            ),
            remedy="normkit.recalibrate(model, batches)",
            proof=f'not normkit.diagnose(model).of("never-updated", {subject.name!r})',
            channels=running_and_true(subject, examination.measured.get(subject.name)),
        )


def _affine_moved(subject: Subject) -> bool:
    """Say whether training has touched the affine part: an initial value is the same for all channels."""
    parts = [part for part in (subject.weight, subject.bias) if part is not None and part.numel()]
    return any(bool((part != part[0]).any()) for part in parts)


def dead_channel(examination: Examination) -> Iterator[Finding]:
    """Find channels whose variance is no larger than eps, and scales far beyond the layer's others."""
    for subject in examination.subjects:
        variance = subject.running_var
        if variance is None or not subject.tracks or is_never_updated(subject) or _has_bad_variance(variance):
            continue
        variance = variance.double()
        small, outliers = variance < DEAD_VARIANCE * subject.eps, _outliers(subject, variance)
        share = float(small.double().mean())
        severity: Severity | None = None
        if share > DEAD_SHARE or bool(outliers.any()):
            severity = "warning"
        elif bool((variance < subject.eps).any()):
            severity = "info"
        if severity is not None:
            yield _dead_finding(subject, severity, variance, small, outliers)


def _has_bad_variance(variance: Tensor) -> bool:
    return not variance.numel() or not bool(torch.isfinite(variance).all()) or bool((variance < 0).any())


def _outliers(subject: Subject, variance: Tensor) -> Tensor:
    """Mark the channels whose scale is a hundred times the median: those ruin quantization per tensor."""
    weight = torch.ones_like(variance) if subject.weight is None else subject.weight.double().abs()
    scale = weight / (variance + subject.eps).sqrt()
    median = scale.median()
    return scale > SCALE_OUTLIER * median if median > 0 else torch.zeros_like(scale, dtype=torch.bool)


def _dead_finding(subject: Subject, severity: Severity, variance: Tensor, small: Tensor, outliers: Tensor) -> Finding:
    count, channels = int(small.sum()), variance.numel()
    everywhere = count == channels
    return Finding(
        check="dead-channel",
        layer=subject.name,
        severity=severity,
        summary=f"{count} of {channels} channels ha{'s' if channels == 1 else 've'} a variance not large beside eps"
        + (f", {int(outliers.sum())} a scale a hundred times the median" if bool(outliers.any()) else ""),
        evidence={
            "share": count / channels,
            "eps": subject.eps,
            "smallest_variance": float(variance.min()),
            "channels": torch.nonzero(small | outliers).reshape(-1).tolist()[:_LISTED],
        },
        causes=(
            "the inputs are tiny: raw data in small units, never scaled"
            if everywhere
            else "the filters before the layer died: pruned, decayed to zero, or behind a ReLU that is always off",
            "eps is that of another framework (Keras 1e-3, torch 1e-5)",
            "an input feature that is constant in the data",
        ),
        remedy=(
            f"{subject.accessor}.eps = {float(variance.median()) * 1e-3:.1e}"
            if everywhere
            else "model = normkit.fold(model, example).model"
        ),
        proof=f'not normkit.diagnose(model).of("dead-channel", {subject.name!r})',
        channels={"running_var": tuple(variance.tolist())},
    )


STATE_CHECKS: tuple[Check, ...] = (
    Check(
        name="nonfinite",
        question="Is every statistic finite and no variance negative?",
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
    Check(
        name="dead-channel",
        question="Is every variance large beside eps?",
        needs="state",
        examine=dead_channel,
        innocent=("a constant input feature, such as a border pixel", "channels pruned on purpose"),
    ),
)
