"""Check of dead channels: a variance that is nothing beside eps, a weight near zero, a bias no value lifts above zero.

A channel of variance ``v`` leaves the layer with ``sqrt(v / (v + eps))`` of the deviation that its weight asks for. It
is dead where that is next to nothing. Where eps only takes a part, as in many networks with eps 1e-3 by design, the
layer does what it did in training, and the doctor says so without alarm.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..subjects import Subject
from ..thresholds import (
    DEAD_BIAS,
    DEAD_FILTER,
    DEAD_PARAMETERS_SHARE,
    DEAD_SHARE,
    DEAD_VARIANCE,
    DEAD_WEIGHT,
    EPS_FELT,
    SCALE_OUTLIER,
)
from .state import is_never_updated, is_zeroed

__all__ = ["DEAD_CHECKS"]

_FEW_WEIGHTS = 4  # of a filter that may all be near zero by chance are fewer
_LISTED = 16  # channels that a finding names
_LEAST_EPS = 1e-30  # float32 goes on a little further


def dead_channel(examination: Examination) -> Iterator[Finding]:
    """Find channels that say nothing: by their variance, weight or bias; and scales far beyond the layer's others."""
    for subject in examination.subjects:
        yield from _dead_by_parameters(subject, subject.name in examination.rectified)
        variance = subject.running_var
        if variance is None or not subject.tracks or is_never_updated(subject) or _has_bad_variance(variance):
            continue
        if is_zeroed(subject, examination.measured.get(subject.name)):
            continue  # the check for statistics that were lost speaks of it
        variance = variance.double()
        # What has no weight is multiplied by nothing.
        heard = torch.ones_like(variance, dtype=torch.bool) if subject.weight is None else subject.weight != 0
        small, outliers = (variance < EPS_FELT * subject.eps) & heard, _outliers(examination, subject, variance)
        dead = _dead(variance, subject.eps) & heard
        # Raw data in small units: no filter before the layer can make them larger.
        raw = examination.model is not None and subject.name not in examination.weighted_before
        severity: Severity | None = None
        if float(dead.double().mean()) > DEAD_SHARE or bool(outliers.any()) or (raw and bool(small.all())):
            severity = "warning"
        elif float(small.double().mean()) > DEAD_SHARE or bool((small & (variance < subject.eps)).any()):
            severity = "info"
        if severity is not None:
            yield _dead_finding(examination, subject, severity, variance, small, dead, outliers)


def _dead(variance: Tensor, eps: float) -> Tensor:
    """Mark the channels of which next to nothing is left, unless eps takes nearly as much from all of the layer."""
    limit, usual = DEAD_VARIANCE * eps, variance.median()
    return (variance < limit) & ((variance < DEAD_VARIANCE * usual) | (usual < limit))


def _dead_by_parameters(subject: Subject, rectified: bool) -> Iterator[Finding]:
    """Find channels whose weight is nothing beside the others', or whose bias no value can lift above zero."""
    weight, bias = subject.weight, subject.bias
    if (
        weight is not None
        and subject.names.weight_is == "weight"
        and weight.numel()
        and bool(torch.isfinite(weight).all())
    ):
        size = weight.double().abs()
        # Weights that are all zero are how residual blocks begin.
        usual = torch.quantile(size, 0.9)
        quiet = size < DEAD_WEIGHT * usual
        if not bool(size.any()) and not subject.moves:
            yield _parameter_finding(
                subject,
                size == 0,
                "a weight of 0: the layer gives its bias whatever comes in",
                {"smallest_weight": 0.0, "usual_weight": 0.0},
                ("a residual block that was never trained: it begins so", "a branch that was pruned on purpose"),
                f"layer.{subject.names.weight}.data.fill_(1)",
                on_purpose=True,
            )
        if bool(quiet.any()):
            yield _parameter_finding(
                subject,
                quiet,
                f"a weight below {DEAD_WEIGHT:g} of the layer's usual one: nothing but the bias goes out",
                {"smallest_weight": float(size.min()), "usual_weight": float(usual)},
                ("weight decay on a channel that the loss does not need", "channels pruned on purpose"),
                f"w = layer.{subject.names.weight}.data; "
                f"w[w.abs() < {DEAD_WEIGHT:g} * w.abs().double().quantile(0.9)] = 1",
                # A weight of exactly zero was set to it, as pruning does.
                on_purpose=bool((size[quiet] == 0).all()),
            )
    if rectified and bias is not None and bias.numel() and bool(torch.isfinite(bias).all()):
        spread = torch.ones_like(bias) if weight is None else weight.abs()
        low = bias < -DEAD_BIAS * spread
        # A channel without a weight is told of above.
        low &= spread > DEAD_WEIGHT * torch.quantile(spread.double(), 0.9)
        if bool(low.any()):
            yield _parameter_finding(
                subject,
                low,
                f"a bias more than {DEAD_BIAS:g} deviations below zero before an activation that lets nothing below "
                "zero through: the output is zero for every input, and no gradient comes back",
                {"lowest_bias": float(bias.min()), "in_deviations": float((bias[low] / spread[low]).min())},
                ("a step that was too large pushed the channel below zero", "channels pruned on purpose"),
                f"b = layer.{subject.names.bias}.data; b[b < {-DEAD_BIAS:g} * "
                + ("1" if weight is None else f"layer.{subject.names.weight}.data.abs()")
                + "] = 0",
            )


def _parameter_finding(
    subject: Subject,
    dead: Tensor,
    why: str,
    evidence: dict[str, object],
    causes: tuple[str, ...],
    wake: str,
    *,
    on_purpose: bool = False,
) -> Finding:
    count, share = int(dead.sum()), float(dead.double().mean())
    return Finding(
        check="dead-channel",
        layer=subject.name,
        severity="warning" if share >= DEAD_PARAMETERS_SHARE and not on_purpose else "info",
        summary=f"{count} of {dead.numel()} channels {'has' if count == 1 else 'have'} {why}",
        evidence={"share": share, **evidence, "channels": torch.nonzero(dead).reshape(-1).tolist()[:_LISTED]},
        causes=causes,
        remedy=f"for name in {{layers}}: layer = model.get_submodule(name); {wake}  # wakes them; then train on",
        proof='not normkit.diagnose(model).of("dead-channel", {layer})',
        extent=share,
    )


def _has_bad_variance(variance: Tensor) -> bool:
    return not variance.numel() or not bool(torch.isfinite(variance).all()) or bool((variance < 0).any())


def _outliers(examination: Examination, subject: Subject, variance: Tensor) -> Tensor:
    """Mark the channels whose scale is a hundred times the median: those ruin quantization per tensor.

    Where the layer before is known it is the scale times that layer's filter, as folding makes it: a small filter has a
    small variance, and the large scale only makes up for it. Not so where the filter has died: then the scale makes a
    signal of what is left of it.
    """
    weight = torch.ones_like(variance) if subject.weight is None else subject.weight.double().abs()
    scale = weight / (variance + subject.eps).sqrt()
    filters, weights = _filters_before(examination, subject)
    if filters is None or len(filters) != len(scale):
        return _stand_out(scale)
    filters = filters.to(scale)
    # One weight alone, as in a depthwise filter of 1x1, is near zero by chance.
    died = (filters < DEAD_FILTER * filters.median()) & (weights >= _FEW_WEIGHTS)
    return _stand_out(scale * filters) | (_stand_out(scale) & died)


def _stand_out(scale: Tensor) -> Tensor:
    median = scale.median()
    return scale > SCALE_OUTLIER * median if median > 0 else torch.zeros_like(scale, dtype=torch.bool)


def _filters_before(examination: Examination, subject: Subject) -> tuple[Tensor | None, int]:
    """Return the largest weight of each filter of the layer before, ``(C,)``, or None where it is not known, and how
    many weights a filter has.
    """
    beside = (examination.pairs or {}).get(subject.name)
    if examination.model is None or beside is None:
        return None, 0
    before = examination.model.get_submodule(beside.before)
    weight = getattr(before, "weight", None)
    if not isinstance(weight, Tensor) or not weight.numel() or not bool(torch.isfinite(weight).all()):
        return None, 0
    size = weight.detach().double().abs()
    if not isinstance(before, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return size.flatten(1).amax(1), size[0].numel()
    # (inputs, outputs / groups, *kernel): the outputs of a group follow each other.
    parts = size.flatten(2).amax(2).view(before.groups, -1, size.shape[1])
    return parts.amax(1).flatten(), size.numel() // (size.shape[1] * before.groups)


def _dead_finding(
    examination: Examination,
    subject: Subject,
    severity: Severity,
    variance: Tensor,
    small: Tensor,
    dead: Tensor,
    outliers: Tensor,
) -> Finding:
    said, of_all = (dead if bool(dead.any()) else small), variance.numel()
    count = int(said.sum())
    everywhere = bool(small.all())
    taken = 1 - (variance / (variance + subject.eps)).sqrt()
    return Finding(
        check="dead-channel",
        layer=subject.name,
        severity=severity,
        summary=f"{count} of {of_all} channels ha{'s' if of_all == 1 else 've'} a variance "
        + ("that is nothing beside eps" if bool(dead.any()) else "not large beside eps")
        + (f", which takes {float(taken[said].median()):.0%} of their deviation" if count else "")
        + (f"; {int(outliers.sum())} a scale a hundred times the median" if bool(outliers.any()) else "")
        + (f"; eps {subject.eps:g} is assumed, the file does not hold it" if subject.eps_assumed else ""),
        evidence={
            "share": count / of_all,
            "eps": subject.eps,
            **({"eps_assumed": True} if subject.eps_assumed else {}),
            "smallest_variance": float(variance.min()),
            "channels": torch.nonzero(said | outliers).reshape(-1).tolist()[:_LISTED],
        },
        causes=(
            "the inputs are tiny: raw data in small units, never scaled"
            if everywhere
            else "the filters before the layer died: pruned, decayed to zero, or behind a ReLU that is always off",
            "eps is that of another framework (Keras 1e-3, torch 1e-5)",
            "an input feature that is constant in the data",
        ),
        remedy=_smaller_eps(subject)
        # Nothing divides by a variance of 0 and an eps beside it that is next to nothing.
        if everywhere and isinstance(subject.names.eps, str) and float(variance.min()) * 1e-3 > _LEAST_EPS
        else _silence(examination, subject, said | outliers, plainly=not bool((outliers & ~dead).any())),
        extent=count / of_all,
        proof='not normkit.diagnose(model).of("dead-channel", {layer})',
        channels={"running_var": tuple(variance.tolist())},
    )


def _smaller_eps(subject: Subject) -> str:
    names = subject.names
    return (
        "for name in {layers}: layer = model.get_submodule(name); "
        f"layer.{names.eps} = 1e-3 * layer.{names.var}.double().median().item()"
    )


def _silence(examination: Examination, subject: Subject, quiet: Tensor, *, plainly: bool) -> str:
    """Return the call that makes constants of dead channels: folding, where the layer has a neighbour to fold into.

    Where the variance alone tells which they are, it is the same code for every layer: many layers are one finding.
    """
    beside = (examination.pairs or {}).get(subject.name)
    names = subject.names
    if (beside is not None and beside.reason is None) or subject.weight is None:
        return "model = normkit.fold(model, example).model"
    if not plainly:
        channels = torch.nonzero(quiet).reshape(-1).tolist()
        return f"{subject.accessor}.{names.weight}.data[{channels}] = 0  # their bias goes out, as it nearly does now"
    eps = f"layer.{names.eps}" if isinstance(names.eps, str) else repr(names.eps)
    return (
        f"for name in {{layers}}: layer = model.get_submodule(name); v = layer.{names.var}; "
        f"limit = {DEAD_VARIANCE:g} * {eps}; layer.{names.weight}.data[v < (limit if v.median() < limit else "
        f"min(limit, {DEAD_VARIANCE:g} * v.median().item()))] = 0  # their bias goes out, as it nearly does now"
    )


DEAD_CHECKS: tuple[Check, ...] = (
    Check(
        name="dead-channel",
        question="Does every channel say something: its variance not lost in eps, its weight and bias alive?",
        needs="state",
        examine=dead_channel,
        innocent=("a constant input feature, such as a border pixel", "channels pruned on purpose"),
    ),
)
