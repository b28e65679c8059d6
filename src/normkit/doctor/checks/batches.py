"""Checks of what a batch is to a layer: how many values it brings, and whether it still matters in evaluation."""

from collections.abc import Iterable, Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..measurements import BatchPlan, Measured, independent_values
from ..subjects import Subject
from ..thresholds import (
    BATCH_SIZE_SMALL,
    BATCH_TOLERANCE,
    BATCH_TOLERANCE_ERROR,
    BATCH_TOLERANCE_LOW_PRECISION,
    SAMPLES_FOR_SPREAD,
    VALUES_EFFECTIVE_SMALL,
    VALUES_SMALL,
)
from .state import freezing

__all__ = ["BATCH_CHECKS"]


def batch_dependence(examination: Examination) -> Iterator[Finding]:
    """Find outputs that change with the company a sample keeps, in evaluation mode."""
    company = examination.company
    if company is None:
        return
    limit = BATCH_TOLERANCE_LOW_PRECISION if company.low_precision else BATCH_TOLERANCE
    if company.difference <= limit:
        return
    subject = examination.subject(company.layer) if company.layer is not None else None
    yield Finding(
        check="batch-dependence",
        layer="" if subject is None else subject.name,
        layers=() if subject is None else _alike(examination, subject, company.layer_differences),
        severity="error" if company.difference > BATCH_TOLERANCE_ERROR else "warning",
        summary=f"in evaluation mode the output of one sample changes by {company.difference:.2g} with the batch "
        "it is in",
        evidence={
            "relative_difference": company.difference,
            "limit": limit,
            "layers_with_batch_statistics": [
                name for name in company.layer_differences if _uses_batch(examination, name)
            ],
        },
        causes=_dependence_causes(examination, subject),
        remedy=_dependence_remedy(examination, subject),
        proof='not normkit.diagnose(model, batches).of("batch-dependence")',
        channels={"layer_differences": tuple(company.layer_differences.values())},
    )


def _uses_batch(examination: Examination, name: str) -> bool:
    subject = examination.subject(name)
    return name in examination.asleep or (subject.is_batch and not subject.tracks)


def _alike(examination: Examination, first: Subject, names: Iterable[str]) -> tuple[str, ...]:
    """Name the layers that depend on the batch for the same reason as the first that was found, and it among them."""
    cause, remedy = _dependence_causes(examination, first), _dependence_remedy(examination, first)
    alike = [
        name
        for name in names
        if name == first.name
        or (
            _uses_batch(examination, name)
            and _dependence_causes(examination, examination.subject(name)) == cause
            and _dependence_remedy(examination, examination.subject(name)) == remedy
        )
    ]
    return tuple(alike) if len(alike) > 1 else (first.name,)


def _dependence_causes(examination: Examination, subject: Subject | None) -> tuple[str, ...]:
    if subject is None:
        return (
            "the model itself mixes the samples of a batch: attention over it, or a mean taken over it",
            "kernels that differ with the batch size, where the difference is small",
        )
    if subject.name in examination.asleep:
        return (
            "model.eval() does not reach the layer: train() or eval() is overridden, or the layer is not registered",
            "the layer was frozen with the batch's statistics",
        )
    if not subject.tracks:
        return (
            "track_running_stats=False: the layer has no statistics of its own and takes the batch's",
            "track_running_stats was switched after construction",
        )
    return ("the layer is a class of its own that takes the batch's statistics in evaluation too",)


def _dependence_remedy(examination: Examination, subject: Subject | None) -> str:
    """Return the cure; a class of its own has a forward that no call mends."""
    if subject is None:
        return "model.eval()  # and look for a mean or an attention over dimension 0 in forward"
    if subject.name in examination.asleep:
        return freezing(subject)
    if subject.layer is None or subject.layer.overridden or not isinstance(subject.layer.module, _BatchNorm):
        return "model.set_submodule({layer}, ...)  # a layer that keeps running statistics, such as nn.BatchNorm2d"
    # The layer stays the one it is, with its parameters and settings, and gets buffers of its type, on its device.
    return (
        "for name in {layers}: layer = model.get_submodule(name); like = next(model.parameters()) if layer.weight is "
        "None else layer.weight.detach(); layer.track_running_stats = True; "
        'layer.register_buffer("running_mean", like.new_zeros(layer.num_features)); '
        'layer.register_buffer("running_var", like.new_ones(layer.num_features)); '
        'layer.register_buffer("num_batches_tracked", like.new_zeros(()).long())\n'
        "normkit.recalibrate(model.eval(), batches)"
    )


def effective_n(examination: Examination) -> Iterator[Finding]:
    """Find layers that get too few values per channel, in a regular batch or in the last one."""
    plan = examination.plan
    for subject in examination.subjects:
        measured = examination.measured.get(subject.name)
        if measured is None or not measured.sizes:
            continue
        if subject.kind == "group":
            yield from _one_value_per_group(subject, measured)
        if plan is not None and subject.is_batch and subject.name in examination.awake:
            yield from _few_values(examination, subject, measured, plan)


def _few_values(examination: Examination, subject: Subject, measured: Measured, plan: BatchPlan) -> Iterator[Finding]:
    samples, values = max(measured.sizes)
    last = values * plan.last // plan.regular if plan.regular else values
    training = plan.for_training or any(other.training for other in examination.subjects)
    severity: Severity | None = None
    if values <= 2:
        severity, said = "error", f"a channel has {values} value{'s' if values > 1 else ''} per batch"
    elif last <= 2:
        severity, said = "error", f"the last batch brings {plan.last} samples, {last} values per channel"
    spread = _spread(measured, samples)
    effective = None if spread is None else independent_values(spread, values)
    few_samples = samples < BATCH_SIZE_SMALL or values < VALUES_SMALL
    dependent = effective is not None and effective < VALUES_EFFECTIVE_SMALL
    if severity is None and (few_samples or dependent) and subject.kind != "sync":
        severity, said = "warning", f"a batch brings {samples} samples, {values} values per channel"
    if severity is None:
        return
    few = min(values, last)
    if few == 1:
        effect = ": training raises an error"
    elif few == 2:
        effect = ": outputs are only +1 and -1, all magnitude is lost"
    elif spread is not None and few == values:
        effect = f": the variance of a batch varies by {spread:.0%}, as of {effective:.0f} independent values"
    else:
        effect = f": the variance is off by {(2 / max(few - 1, 1)) ** 0.5:.0%} by chance, or more"
    yield Finding(
        check="effective-n",
        layer=subject.name,
        # Nobody trains on these batches as far as one can see; evaluation does not care.
        severity=severity if training else "info",
        summary=said + effect,
        evidence={
            "samples": samples,
            "values": values,
            "last_samples": plan.last,
            "last_values": last,
            "spread_of_variance": spread,
            "effective_values": effective,
        },
        extent=spread or 1 / few,
        causes=(
            "a remainder at the end of the data" if last <= 2 < values else "a small batch per device",
            "neighbouring positions are alike, so that many values of few samples say little"
            if dependent and values >= VALUES_SMALL
            else "a map pooled to one position: the batch is all that is left",
            "gradient accumulation: it adds gradients, not statistics",
        ),
        remedy="loader = DataLoader(loader.dataset, batch_size=loader.batch_size, shuffle=True, drop_last=True)"
        if last <= 2 < values
        else 'model = normkit.convert(model, to="group", where={layer}).model  # then train again',
        proof=f'not normkit.diagnose(model, {"loader" if last <= 2 < values else "batches"}).of("effective-n")',
    )


def _spread(measured: Measured, samples: int) -> float | None:
    """Return by how much the variance of a batch varies over batches, in the median channel; None of few samples."""
    pooled = measured.pooled
    if not pooled or pooled.samples < SAMPLES_FOR_SPREAD or pooled.samples <= samples:
        return None
    return float(pooled.batch_spread(samples).median())


def _one_value_per_group(subject: Subject, measured: Measured) -> Iterator[Finding]:
    assert subject.layer is not None
    groups, channels = getattr(subject.layer.module, "num_groups", None), subject.layer.channels
    if not isinstance(groups, int) or not channels or measured.values_per_sample * channels // groups != 1:
        return
    yield Finding(
        check="effective-n",
        layer=subject.name,
        severity="error",
        summary=f"{groups} groups of {channels} channels on inputs of one position: each group holds one value, "
        "and the output is its bias whatever comes in",
        evidence={"groups": groups, "channels": channels, "values_per_group": 1},
        causes=("batch normalization was replaced by as many groups as channels",),
        remedy=f"{subject.accessor}.num_groups = 1  # layer normalization; then train again",
        proof='not normkit.diagnose(model, batches).of("effective-n")',
    )


BATCH_CHECKS: tuple[Check, ...] = (
    Check(
        name="batch-dependence",
        question="Does evaluation give one sample one output, whatever batch it is in?",
        needs="batches",
        examine=batch_dependence,
        innocent=("deliberate batch statistics in a generator", "transductive few-shot learning"),
    ),
    Check(
        name="effective-n",
        question="Does every batch bring enough values per channel?",
        needs="batches",
        examine=effective_n,
        innocent=("batches that the model is only evaluated on", "a batch size chosen for its noise"),
    ),
)
