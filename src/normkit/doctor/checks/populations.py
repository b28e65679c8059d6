"""Checks of the statistics against the data: are they those of what the layer really sees?"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..measurements import Measured, PooledMoments
from ..sampling import errors_wanted
from ..subjects import Subject
from ..thresholds import (
    CHANNEL_LOG_RATIO,
    CHANNEL_Z,
    DRIFT_ERROR,
    DRIFT_ERROR_ALONE,
    DRIFT_ERROR_LARGE,
    DRIFT_ERROR_MODERATE,
    DRIFT_LOG_RATIO,
    DRIFT_SHARE,
    DRIFT_Z,
    DROPOUT_LOG_RATIO,
    FROZEN_LOG_RATIO,
    FROZEN_Z,
    RESIDUE_ERROR,
    SAMPLES_WANTED,
)
from .state import is_never_updated, is_zeroed, running_and_true

__all__ = [
    "POPULATION_CHECKS",
    "Drift",
    "compare",
    "drift_of",
    "dropout_shift",
    "judged_drift",
    "off_together",
    "percentile",
]

_MOST_OCTAVES = 60.0  # of a ratio of variances: beyond, no number says more


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far one set of moments is from another, per channel.

    Attributes:
        z: distance of the means in standard deviations of the measured values.
        log_ratio: log2 of the variance over the measured one, eps added to both.
        certain_z, certain_log_ratio: the same, 0 where sampling may explain the difference.
        heard: the channels that are multiplied by something.
        alone: the channels that tell alone: not those whose measured variance may only lack a rare event.
    """

    z: Tensor
    log_ratio: Tensor
    certain_z: Tensor
    certain_log_ratio: Tensor
    heard: Tensor
    alone: Tensor

    @property
    def beyond(self) -> Tensor:
        """The channels past either limit."""
        return (self.certain_z > DRIFT_Z) | (self.certain_log_ratio.abs() > DRIFT_LOG_RATIO)

    @property
    def share(self) -> float:
        """The share of channels beyond the limits."""
        return float(self.beyond.double().mean())

    @property
    def share_off(self) -> float:
        """The share of channels that are off at all, beyond what sampling explains."""
        return float(((self.certain_z != 0) | (self.certain_log_ratio != 0)).double().mean())

    @property
    def severity(self) -> Severity | None:
        """The verdict on the channels, by the limits of ``thresholds.py``; that on the errors is `off_together`'s."""
        if self.share >= DRIFT_SHARE:
            return "error"
        many = percentile(self.certain_z) > DRIFT_Z or percentile(self.certain_log_ratio.abs()) > DRIFT_LOG_RATIO
        # A percentile cannot see one channel of many.
        one = (self.heard & self.alone) & (
            (self.certain_z > CHANNEL_Z) | (self.certain_log_ratio.abs() > CHANNEL_LOG_RATIO)
        )
        return "warning" if many or bool(one.any()) else None

    @property
    def error(self) -> float:
        """What is surely off moves a normalized value by so much, in its own deviations: root mean square."""
        return float(self._squares.mean().sqrt())

    @property
    def worst(self) -> int:
        """The channel that moves most."""
        return int(self._squares.argmax())

    @property
    def _squares(self) -> Tensor:
        """The square of what each channel moves by.

        ``(x - m) / s`` with one mean and deviation is apart from that with others by ``z s' / s`` in the mean and by
        the factor ``s' / s``, with ``s'`` the measured deviation.
        """
        factor = torch.exp2(-self.certain_log_ratio.clamp(-_MOST_OCTAVES, _MOST_OCTAVES) / 2)
        return ((self.certain_z * factor) ** 2 + (factor - 1) ** 2) * self.heard


def compare(
    mean: Tensor,
    var: Tensor,
    population: PooledMoments,
    eps: float,
    *,
    layers: int,
    own: float = 0.0,
    weight: Tensor | None = None,
) -> Drift:
    """Compare moments with measured ones, per channel.

    Variances are compared in their logarithm, in which one that is eight times too small is as far off as one that is
    eight times too large, and no further than it can be: the difference itself is never more than the whole variance.

    Args:
        mean: ``(C,)``.
        var: ``(C,)``.
        population: what was measured.
        eps: of the layer.
        layers: among how many layers the worst is looked for.
        own: what the moments themselves owe to sampling: their squared standard error over a single sample's.
        weight: what each channel is multiplied by, where it is known.
    """
    mean, var = mean.to(population.mean), var.to(population.var)
    distance = (mean - population.mean).abs()
    z = distance / (population.var + eps).sqrt()
    log_ratio = torch.log2((var + eps) / (population.var + eps))
    log_error = population.var_error / ((population.var + eps) * math.log(2))
    # Of few samples the error of a variance is badly known, and smallest where an outlier failed to come: a channel is
    # no surer than the layer's median.
    log_error = torch.maximum(log_error, log_error.median())
    samples, zero = population.effective_samples, torch.zeros_like(z)
    # Both are samples of one population if nothing is wrong, so that both are uncertain.
    errors = errors_wanted(samples, len(z), layers) * math.sqrt(1.0 + max(samples - 1.0, 0.0) * own)
    return Drift(
        z=z,
        log_ratio=log_ratio,
        certain_z=torch.where(distance > errors * population.mean_error, z, zero),
        certain_log_ratio=torch.where(log_ratio.abs() > errors * log_error, log_ratio, zero),
        # What is rare in the wildest channel of a layer is rare in others too, and there it may not have come at all.
        alone=(log_ratio <= CHANNEL_LOG_RATIO / 2) | (log_ratio > errors * log_error.max()),
        heard=torch.ones_like(z, dtype=torch.bool) if weight is None else weight.to(z) != 0,
    )


def percentile(values: Tensor) -> float:
    """Return the 99th percentile over channels."""
    return float(torch.quantile(values, 0.99))


def drift_of(examination: Examination, subject: Subject, measured: Measured) -> Drift | None:
    """Compare a layer's running statistics with its data; None where there is nothing to compare."""
    mean, variance = subject.running_mean, subject.running_var
    if mean is None or variance is None or not subject.tracks or not subject.is_batch or not measured.pooled:
        return None
    if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()) or bool((variance < 0).any()):
        return None  # the check for non-finite statistics speaks of these
    own = 0.0 if examination.plan is None else left_by_average(subject) / max(examination.plan.regular, 1)
    layers, weight = examination.layers_judged, subject.weight
    return compare(mean, variance, measured.pooled, subject.eps, layers=layers, own=own, weight=weight)


def start_left(subject: Subject) -> float:
    """Return the share of the initial 0 and 1 in a moving average, as momentum and counter tell it; 0 where unknown."""
    momentum, updates = subject.momentum, subject.updates
    is_number = isinstance(momentum, int | float) and not isinstance(momentum, bool) and 0 < momentum <= 1
    if not updates or not is_number or subject.average == "debiased":
        return 0.0
    return float((1 - momentum) ** updates)


def keeps_its_start(examination: Examination, subject: Subject, measured: Measured | None) -> bool | None:
    """Say whether the statistics are a moving average that still holds its initial values; None where nothing tells.

    Measured statistics have a small counter and nothing of the start. A moving average from variance 1 holds at least
    its share of that: one channel below is proof of another origin. So are data that most channels agree with, and
    would not agree with such an average. Where such an average would be right as well, nothing is wrong with it.
    """
    residue = start_left(subject)
    if subject.running_var is None or bool((subject.running_var < 0.999 * residue).any()):
        return False
    drift = drift_of(examination, subject, measured) if measured is not None else None
    if measured is None or drift is None:
        return None
    pooled, layers = measured.pooled, examination.layers_judged
    own = 0.0 if examination.plan is None else left_by_average(subject) / max(examination.plan.regular, 1)
    mean, var = (1 - residue) * pooled.mean, residue + (1 - residue) * pooled.var
    averaged = compare(mean, var, pooled, subject.eps, layers=layers, own=own, weight=subject.weight)
    explains = drift.severity is not None and averaged.severity is not None
    return explains and averaged.share_off <= 2 * drift.share_off


def left_by_average(subject: Subject) -> float:
    """Return the variance of an average of batches over that of one batch, as momentum and counter tell it.

    With weights ``w_i``, ``sum w_i^2 / (sum w_i)^2``: one over the number of batches for a plain average, and
    ``momentum / (2 - momentum)`` for a moving one that has forgotten where it began; 0 where neither is known.
    """
    momentum, updates = subject.momentum, subject.updates
    if updates == 0:
        return 0.0  # they came from elsewhere
    if momentum is None:
        return 0.0 if updates is None else 1.0 / updates
    if not isinstance(momentum, float | int) or not 0.0 < momentum <= 1.0:
        return 0.0
    kept, limit = 1.0 - momentum, momentum / (2.0 - momentum)
    return limit if updates is None else limit * (1.0 + kept**updates) / (1.0 - kept**updates)


def judged_drift(examination: Examination, subject: Subject) -> Drift | None:
    """Return how far a layer's statistics are from its data, in training or in evaluation, whichever is nearer.

    Statistics are right that are those of what the layer is given in training, before it normalizes with the batch's;
    and those of what it is given in evaluation: behind many layers and with small batches the two differ.
    """
    both = [
        found
        for entry in (examination.measured.get(subject.name), examination.in_use.get(subject.name))
        if entry is not None and (found := drift_of(examination, subject, entry)) is not None
    ]
    return min(both, key=lambda found: (found.share, found.error), default=None)


def off_together(examination: Examination) -> tuple[float, Mapping[str, Drift]]:
    """Return the layers that are moderately off and together too far, and how far: 0 and none where they are not.

    One that is far off is too far by itself, by a wider limit.

    As for one layer the nearer of two judgements counts: all against what they are given in training, or all against
    what they are given in evaluation.
    """
    judged = []
    for sense in (examination.measured, examination.in_use):
        found = {
            subject.name: drift
            for subject in examination.subjects
            if subject.name in sense
            and not _has_none(examination, subject)
            and (drift := drift_of(examination, subject, sense[subject.name])) is not None
            and drift.error >= DRIFT_ERROR_MODERATE
            and not _is_excused(examination, subject, drift)
        }
        if sense:
            judged.append((math.hypot(*(drift.error for drift in found.values())), found))
    error, found = min(judged, key=lambda pair: pair[0], default=(0.0, {}))
    limit = DRIFT_ERROR if len(found) > 1 else DRIFT_ERROR_ALONE
    return (error, found) if error >= limit else (0.0, {})


def drift(examination: Examination) -> Iterator[Finding]:
    """Compare the running statistics with those of the data, dropout off and on."""
    together, moderate = off_together(examination)
    for subject in examination.subjects:
        measured = examination.measured.get(subject.name)
        found = judged_drift(examination, subject)
        if measured is None or found is None or _has_none(examination, subject):
            continue
        severity, among = found.severity, None
        if subject.name in moderate:
            if severity is None:
                found, among = moderate[subject.name], (together, len(moderate))
                severity = "warning"
            if together >= DRIFT_ERROR_LARGE:
                severity = "error"
        if severity is None:
            continue
        if _is_excused(examination, subject, found):
            severity = "info"
        shift = dropout_shift(examination, subject)
        young = start_left(subject) > RESIDUE_ERROR and bool(keeps_its_start(examination, subject, measured))
        yield _drift_finding(subject, measured, found, severity, shift, among, young)


def _has_none(examination: Examination, subject: Subject) -> bool:
    """Say whether the layer has no statistics to be off: those of construction, or all zero."""
    return is_never_updated(subject) or is_zeroed(subject, examination.measured.get(subject.name))


def _is_excused(examination: Examination, subject: Subject, found: Drift) -> bool:
    return _is_held_on_purpose(examination, subject) and not _is_stale(examination, subject, found)


def _is_held_on_purpose(examination: Examination, subject: Subject) -> bool:
    """Say whether a layer stands still while others learn: it normalizes training and evaluation alike."""
    learning = examination.model is not None and any(p.requires_grad for p in examination.model.parameters())
    return not subject.moves and learning and (subject.kind == "frozen" or subject.held_still)


def _is_stale(examination: Examination, subject: Subject, found: Drift) -> bool:
    """Say whether a layer that was frozen is further off than training around it leaves behind.

    Where nothing before it learns, other data are the only way to it, and those were chosen. Weights before it that
    learn adapt to what it does, so the limits are wider.
    """
    far = (found.certain_z > FROZEN_Z) | (found.certain_log_ratio.abs() > FROZEN_LOG_RATIO)
    return subject.name in examination.learning_before and float(far.double().mean()) >= DRIFT_SHARE


def _drift_finding(
    subject: Subject,
    measured: Measured,
    found: Drift,
    severity: Severity,
    shift: float | None,
    among: tuple[float, int] | None,
    young: bool,
) -> Finding:
    evidence: dict[str, float | int] = {
        "channels_beyond": int(found.beyond.sum()),
        "share": found.share,
        "z_99th_percentile": percentile(found.certain_z),
        "log2_ratio_99th_percentile": percentile(found.certain_log_ratio.abs()),
        "worst_channel": found.worst,
        "error": found.error,
        "samples": measured.pooled.samples,
    }
    if shift is not None:
        evidence["dropout_log2_ratio"] = shift
    if among is None:
        which = f"{int(found.beyond.sum())} of {len(found.z)} channels are off"
    else:
        evidence["error_together"], count = among
        which = f"{found.error:.2g} of a deviation over its channels, {among[0]:.2g} with all {count} layers like it: "
        which += "errors add up"
    return Finding(
        check="drift",
        layer=subject.name,
        severity=severity,
        summary=f"{_in_plain_numbers(found)} ({which}): evaluation normalizes with other numbers than "
        + ("the data have" if subject.moves is False and subject.kind == "frozen" else "training did"),
        extent=found.share + float(found.z.max()) / 1e3 + float(found.log_ratio.abs().max()) / 1e3,
        evidence=evidence,
        causes=_drift_causes(subject, measured, shift, young),
        remedy=subject.recalibration,
        proof='not normkit.diagnose(model, batches).of("drift", {layer})',
        channels=running_and_true(subject, measured) | {"z": tuple(found.z.tolist())},
    )


def _in_plain_numbers(found: Drift) -> str:
    """Say how far the worst channel is off, in words that need no explanation."""
    said = []
    worst_ratio = found.certain_log_ratio[found.certain_log_ratio.abs().argmax()].item()
    if abs(worst_ratio) > DRIFT_LOG_RATIO / 2:
        size = "large" if worst_ratio > 0 else "small"
        said.append(f"the running variance is {_plain(2 ** abs(worst_ratio))} times too {size}")
    worst_z = float(found.certain_z.max())
    if worst_z > DRIFT_Z / 2 or not said:
        said.append(f"{'the running mean is' if not said else 'the mean'} {_plain(worst_z)} standard deviations off")
    return " and ".join(said)


def _plain(number: float) -> str:
    """Write a number as people say it: no powers of ten."""
    return f"{number:,.0f}" if 10 <= number < 1e6 else f"{number:.2g}"


def _drift_causes(subject: Subject, measured: Measured, shift: float | None, young: bool) -> tuple[str, ...]:
    causes = [
        "the weights changed after the statistics last moved: averaged, pruned, swapped, or trained with the layer "
        "in evaluation mode",
        "extra forwards in training mode on other data: a summary, a probe, a warm-up",
        "the batches given here are not what the model was trained on",
    ]
    if shift is not None and shift > DROPOUT_LOG_RATIO:
        causes.insert(0, "dropout before the layer: its variance was learnt with dropout on and is used with it off")
    if young:
        causes.insert(0, f"too few updates ({subject.updates}) for momentum {subject.momentum:g}")
    if measured.pooled.samples < SAMPLES_WANTED:
        causes.append(f"only {measured.pooled.samples} samples were measured; {SAMPLES_WANTED} are better")
    return tuple(causes)


def dropout_shift(examination: Examination, subject: Subject) -> float | None:
    """Return the log ratio of variances with dropout on and off, where dropout was measured.

    It is the median's, which many channels tell together, or the 99th percentile's of those that tell it alone: where
    few samples were measured, the most extreme of many channels is so by chance.
    """
    measured = examination.measured[subject.name]
    with_dropout = measured.with_dropout
    if with_dropout is None or not with_dropout or not measured.pooled:
        return None
    off, layers = measured.pooled, examination.layers_judged
    found = compare(with_dropout.mean, with_dropout.var, off, subject.eps, layers=layers)
    back = compare(off.mean, off.var, with_dropout, subject.eps, layers=layers)
    certain = torch.minimum(found.certain_log_ratio.abs(), back.certain_log_ratio.abs())
    return max(float(found.log_ratio.median().abs()), percentile(certain))


POPULATION_CHECKS: tuple[Check, ...] = (
    Check(
        name="drift",
        question="Are the running statistics those of the data?",
        needs="batches",
        examine=drift,
        innocent=("a frozen backbone from another data set", "batches that are not the training data"),
    ),
)
