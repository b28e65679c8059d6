"""What a batch size means to every normalization layer of a model, before anything is trained."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .. import renderers
from ..anatomy import Call, preserved
from ..anatomy.programs import refuse_programs, unwrapped
from ..errors import ArgumentError
from .cutting import cut
from .ghost_parts import larger_parts
from .measurements import Measured, PooledMoments, independent_values
from .probes import measure
from .subjects import Subject, subjects_of_model
from .thresholds import BATCH_SIZE_SMALL, SAMPLES_FOR_SPREAD

__all__ = ["PlannedLayer", "TrainingPlan", "plan"]

# An error of the stored statistics that nobody sees, in deviations: that of a mean of 1,000 independent samples.
_STORED = 0.03
_LARGEST_MOMENTUM = 0.1
# So many layers are named in a line of advice.
_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One layer under the plan. Errors are those of the channel in the middle.

    Attributes:
        name: the layer's path.
        kind: as in :class:`normkit.anatomy.NormLayer`.
        samples: how many samples share a statistic.
        values: how many values of a channel they bring, samples times positions.
        last_values: the same of the last batch of an epoch.
        effective: as how many independent values they count, by how much the variance varies from batch to batch, as
            the doctor reckons; never more than there are, and None where the example is too small to tell.
        mean_error: the standard error of a batch's mean, in deviations of the channel.
        var_error: the standard error of a batch's variance, as a share of it; None of one value, which has none.
        gap: how far the layer's output in training lies from that in evaluation, root mean square, in deviations:
            ``sqrt(mean_error^2 + var_error^2 / 4)``.
        samples_needed: how many samples would have to share a statistic for the gap that was asked for.
        advice: what to do, in words; empty where nothing is to be done.
        ghost_size: the largest part in ghost normalization; None in other layers.
    """

    name: str
    kind: str
    samples: int
    values: int
    last_values: int
    effective: float | None
    mean_error: float
    var_error: float | None
    gap: float
    samples_needed: int
    advice: str
    ghost_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What :func:`plan` found; printed, it is a table and the advice, and `to_html` draws a page of it.

    Attributes:
        layers: those that normalize with the batch in training, in the model's order.
        batch_size: samples of a step.
        ranks: processes.
        micro_batches: of each process.
        gap: the gap that was asked for.
        momentum: with which the stored statistics are off by 0.03 deviations at most, in the worst layer; at most 0.1.
        ghost_size: the smallest part of a batch that keeps to the gap in every layer.
        group: the smallest number of ranks that share statistics and keep to the gap; None where all are too few.
        advice: what to do, the most urgent first.
    """

    layers: tuple[PlannedLayer, ...]
    batch_size: int
    ranks: int
    micro_batches: int
    gap: float
    momentum: float
    ghost_size: int
    group: int | None
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON holds it."""
        return asdict(self)

    def to_html(self, title: str = "Plan") -> str:
        """Return the plan as one self-contained page; it needs the extra ``lab`` for pictures and template."""
        return renderers.render("plan as a page", self, title)

    def __str__(self) -> str:
        """Draw the table, and the advice below it."""
        header = ("layer", "kind", "samples", "values", "effective", "mean off", "variance off", "gap", "needs")
        rows = [header, *map(_cells, self.layers)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
        shares = f"batch of {self.batch_size} on {self.ranks} ranks in {self.micro_batches} micro-batches each"
        lines = [shares, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
        return "\n".join([*lines, *(f"- {line}" for line in self.advice)])


def _cells(layer: PlannedLayer) -> tuple[str, ...]:
    effective = "?" if layer.effective is None else f"{layer.effective:.0f}"
    variance = "no variance" if layer.var_error is None else f"{layer.var_error:.0%}"
    errors = (f"{layer.mean_error:.0%}", variance, f"{layer.gap:.2f}")
    needs = f"{layer.samples_needed} samples"
    return (
        layer.name or "(the model itself)",
        layer.kind,
        str(layer.samples),
        str(layer.values),
        effective,
        *errors,
        needs,
    )


def plan(
    model: nn.Module,
    example: Any,
    batch_size: int,
    *,
    ranks: int = 1,
    micro_batches: int = 1,
    samples: int | None = None,
    gap: float = 0.1,
    call: Call | None = None,
) -> TrainingPlan:
    """Reckon, before anything is trained, from how much data every batch norm takes its statistics.

    The example is run in batches as large as those that share a statistic, and the spread of their means and variances
    is measured: neighbouring positions of a sample go together, and batches behind another norm have means closer
    together than samples let expect; both count as what they are. With fewer than ten such batches the spread is
    reckoned from that of the samples. From both follows how far the layer's output in training lies from that in
    evaluation, the same input given::

        gap = sqrt(mean_error^2 + var_error^2 / 4)        in deviations of the layer's output

    Args:
        model: is run on the example and is bit for bit as before.
        example: data as training has it, a tensor or anything that yields batches; 32 samples and more tell how
            correlated the values are, fewer count as independent.
        batch_size: samples of one step, over all ranks and micro-batches.
        ranks: how many processes share them.
        micro_batches: into how many parts each process cuts its share.
        samples: of an epoch: then the remainder is looked at too.
        gap: what is taken for small: 0.1 deviations is what 50 independent samples leave.
        call: ``lambda model, batch: ...``, where the model is not called with the first part of a batch.

    Returns:
        The plan; print it.

    Raises:
        ArgumentError: a number below 1 or none, a batch that ranks and micro-batches cannot share, an example without
            samples, one that gives a layer nothing finite, or a model without a layer that normalizes with the batch.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> found = plan(model, torch.randn(256, 3), batch_size=32, ranks=8, samples=1025)
        >>> [(layer.samples, layer.values, layer.last_values) for layer in found.layers]
        [(4, 4, 1)]
        >>> found.advice[0]
        'the last batch of an epoch of 1025 leaves 1 value per channel at 1: training raises an error; drop_last=True'

    References:
        Wu and He, Group Normalization, 2018, arXiv:1803.08494, figure 1, for what few samples cost.
    """
    _check(batch_size, ranks, micro_batches, samples, gap)
    refuse_programs(model)
    model, _ = unwrapped(model)
    share = batch_size // (ranks * micro_batches)
    subjects = [subject for subject in subjects_of_model(model) if subject.is_batch and subject.kind != "frozen"]
    with preserved(model):
        live = frozenset(subject.name for subject in subjects)
        together = share * (ranks if subjects and all(map(_is_over_ranks, subjects)) else 1)
        seen = measure(model, subjects, cut(example, together), call, None, live)
    measured = [(subject, seen.measured[subject.name]) for subject in subjects if subject.name in seen.measured]
    if not measured:
        raise ArgumentError("plan: the model has no layer that normalizes with the batch, or the example reaches none")
    told = {name: max((call.samples for call in entry.calls), default=0) for name, entry in seen.measured.items()}
    notes = [
        *_not_finite({subject.name: entry for subject, entry in measured}),
        *_too_small_an_example(seen.samples, min(told[subject.name] for subject, _ in measured)),
    ]
    rest = samples % batch_size if samples else 0
    last = _smallest_share(rest, ranks, micro_batches) if rest else share
    layers = tuple(_layer(subject, entry, share, last, ranks, gap) for subject, entry in measured)
    return _planned(layers, batch_size, ranks, micro_batches, samples, gap, notes)


def _not_finite(measured: dict[str, Measured]) -> list[str]:
    """Say which layers were given values that are not finite, or refuse an example that gives nothing else.

    Raises:
        ArgumentError: a layer saw no batch of finite values.
    """
    counts = {name: sum(call.nonfinite_batches for call in entry.calls) for name, entry in measured.items()}
    for name, count in counts.items():
        if count and not any(call.samples for call in measured[name].calls):
            raise ArgumentError(
                f"plan: {name or 'the model itself'} is given NaN or infinite values in every batch of the example, of "
                "which nothing can be reckoned; look at the data, and for an overflow before this layer"
            )
    some = {name or "the model itself": count for name, count in counts.items() if count}
    first = next(iter(some), None)
    said = "were given NaN or infinite values, in batches that are left out here"
    return [] if first is None else [f"{_listed(list(some))} {said}, {some[first]} of them at {first}"]


def _too_small_an_example(samples: int, least: int) -> list[str]:
    """Say that an example is too small to tell how far values go together."""
    if least >= SAMPLES_FOR_SPREAD:
        return []
    said = f"the example holds {samples} sample{'s' * (samples != 1)}, too few to tell how far values go together"
    return [f"{said}: they count as independent; give {SAMPLES_FOR_SPREAD} or more"]


def _check(batch_size: int, ranks: int, micro_batches: int, samples: int | None, gap: float) -> None:
    numbers = {"batch_size": batch_size, "ranks": ranks, "micro_batches": micro_batches, "samples": samples}
    for name, value in numbers.items():
        if not (value is None and name == "samples") and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
    if batch_size % (ranks * micro_batches):
        fitting = batch_size // (ranks * micro_batches) * ranks * micro_batches or ranks * micro_batches
        raise ArgumentError(
            f"a batch of {batch_size} is not shared evenly by {ranks} ranks with {micro_batches} micro-batches each; "
            f"{fitting} is"
        )
    if isinstance(gap, bool) or not isinstance(gap, int | float):
        raise ArgumentError(f"gap must be a number of deviations, got {type(gap).__name__} {gap!r}; pass gap=0.1")
    if not 0 < gap < math.inf:
        raise ArgumentError(f"gap must be above 0, got {gap}; pass gap=0.1")


def _smallest_share(rest: int, ranks: int, micro_batches: int) -> int:
    """Return the samples of the smallest part of a remainder that is dealt out evenly; none where parts stay empty."""
    parts = ranks * micro_batches
    return max(rest // parts, 1)


def _layer(subject: Subject, entry: Measured, share: int, last: int, ranks: int, gap: float) -> PlannedLayer:
    over = ranks if _is_over_ranks(subject) else 1
    together, positions = _of_one_statistic(subject, share * over), max(entry.values_per_sample, 1)
    calls = [call for call in entry.calls if call]
    # One value has no variance, and says nothing of how many are enough; batches of this size do.
    single = together * positions == 1
    size = SAMPLES_FOR_SPREAD if single else together
    alone = _independent_errors(size * positions)
    found = max((_errors(call, size, positions) for call in calls), default=alone, key=_gap)
    told = max((call.samples for call in calls), default=0) >= SAMPLES_FOR_SPREAD
    wide = 1.0 if single else _gap(found)
    needed = math.ceil(size * (_gap(found) / gap) ** 2)
    values, left = together * positions, _of_one_statistic(subject, last * over) * positions
    return PlannedLayer(
        name=subject.name,
        kind=subject.kind,
        samples=together,
        values=values,
        last_values=left,
        effective=independent_values(found[1], values) if told else None,
        mean_error=1.0 if single else found[0],
        var_error=None if single else found[1],
        gap=wide,
        samples_needed=max(needed, 2 if positions == 1 else 1),
        advice=_advice(values, left, wide, gap),
        ghost_size=_ghost_size(subject),
    )


def _is_over_ranks(subject: Subject) -> bool:
    """Say whether the ranks share what a batch is normalized with: a synchronized ghost layer shares what it stores."""
    return subject.kind == "sync" and _ghost_size(subject) is None


def _ghost_size(subject: Subject) -> int | None:
    return getattr(subject.layer and subject.layer.module, "ghost_size", None)


def _of_one_statistic(subject: Subject, samples: int) -> int:
    """Return how many of these samples share a statistic: all, or the smallest part of ghost normalization."""
    size = _ghost_size(subject)
    return samples if size is None else samples // math.ceil(samples / size)


def _errors(moments: PooledMoments, samples: int, positions: int) -> tuple[float, float]:
    """Return the standard errors of mean and variance of a batch of so many samples, of the channel in the middle."""
    if moments.samples < SAMPLES_FOR_SPREAD:
        return _independent_errors(samples * positions)
    return float(moments.batch_mean_spread(samples).median()), float(moments.batch_spread(samples).median())


def _independent_errors(values: int) -> tuple[float, float]:
    """Return the same of values that know nothing of each other, of a normal distribution."""
    return 1 / math.sqrt(values), math.sqrt(2 / max(values - 1, 1))


def _gap(errors: tuple[float, float]) -> float:
    mean, variance = errors
    return math.sqrt(mean**2 + variance**2 / 4)


def _advice(values: int, last: int, gap: float, wanted: float) -> str:
    if values <= 2:
        return (
            "one value has no variance, and training raises an error"
            if values == 1
            else "two values have outputs of +1 and -1 alone"
        )
    if gap > wanted:
        return "too few independent values"
    return "drop the last batch" if last <= 2 else ""


def _planned(
    layers: tuple[PlannedLayer, ...],
    batch_size: int,
    ranks: int,
    micro_batches: int,
    samples: int | None,
    gap: float,
    notes: list[str],
) -> TrainingPlan:
    worst = max(layers, key=lambda layer: layer.samples_needed)
    share = batch_size // (ranks * micro_batches)
    groups = [size for size in range(1, ranks + 1) if ranks % size == 0 and share * size >= worst.samples_needed]
    remainders = [layer for layer in layers if layer.last_values <= 2 < layer.values]
    few = [layer for layer in layers if layer.values <= 2 or layer.gap > gap]
    advice = []
    for count in (1, 2):
        names = _named([layer for layer in remainders if layer.last_values == count])
        if names:
            effect = "training raises an error" if count == 1 else "outputs are +1 and -1 alone"
            left = f"the last batch of an epoch of {samples} leaves {count} value{'s' * (count > 1)} per channel"
            advice.append(f"{left} at {names}: {effect}; drop_last=True")
    parted, whole = ([layer for layer in few if (layer.ghost_size is None) == kind] for kind in (False, True))
    for layer in parted:
        cure = larger_parts(layer.ghost_size or 1, layer.samples_needed, share, ranks * micro_batches)
        advice.append(f"{_named([layer])}: {layer.advice}; {cure}")
    if whole:
        advice += _cures(whole, worst, batch_size, ranks, micro_batches, groups)
    noisy = [layer for layer in layers if layer not in few and layer.samples < BATCH_SIZE_SMALL]
    advice += _of_few_samples([layer for layer in noisy if layer.ghost_size is None], gap, batch_size)
    momentum = _momentum(max(layer.gap for layer in layers))
    if momentum < _LARGEST_MOMENTUM and all(layer.values > 1 for layer in layers):
        half_life = math.log(0.5) / math.log1p(-momentum)
        advice.append(f"momentum={momentum:.2g} (half_life={half_life:.0f}) keeps the stored statistics to {_STORED:g}")
    return TrainingPlan(
        layers=layers,
        batch_size=batch_size,
        ranks=ranks,
        micro_batches=micro_batches,
        gap=gap,
        momentum=momentum,
        ghost_size=worst.samples_needed,
        group=groups[0] if groups else None,
        advice=(*(advice or ["every layer has data enough"]), *notes),
    )


def _cures(
    few: list[PlannedLayer],
    worst: PlannedLayer,
    batch_size: int,
    ranks: int,
    micro_batches: int,
    groups: list[int],
) -> list[str]:
    """Return what gives these layers more values, the most faithful first; another norm where there are not enough."""
    names, cures = _named(few), []
    if groups and ranks > 1 and any(layer.kind != "sync" for layer in few):
        cures.append(f'{names}: normkit.convert(model, to="sync") over groups of {groups[0]} ranks')
    if micro_batches > 1 and batch_size // ranks >= worst.samples_needed:
        cures.append(f'{names}: normkit.accumulate(..., kind="exact") over the {micro_batches} micro-batches')
    if not cures and ranks * micro_batches > 1 and batch_size >= worst.samples_needed:
        cures.append(f'{names}: to="sync" and kind="exact" together, over the whole batch')
    if cures:
        return cures
    # By what they lack, each with what is enough for the worst of them.
    for cause in dict.fromkeys(layer.advice for layer in few):
        alike = [layer for layer in few if layer.advice == cause]
        # What shares a statistic is a part of the batch, for each of them one of so many.
        parts = ranks * micro_batches
        needed = max(math.ceil(layer.samples_needed * batch_size / layer.samples) for layer in alike)
        needed = math.ceil(needed / parts) * parts
        hopeless = [layer for layer in alike if layer.samples_needed > batch_size]
        small = any(layer.samples < BATCH_SIZE_SMALL for layer in hopeless)
        other = f"; or {_as_groups(hopeless, f'samples_needed > {batch_size}')}" if small else ""
        cures.append(f"{_named(alike)}: {cause}; a batch of {needed} or more{other}")
    return cures


def _of_few_samples(layers: list[PlannedLayer], gap: float, batch_size: int) -> list[str]:
    """Say of layers that keep to the gap, and of which the doctor warns all the same, why both are right."""
    if not layers:
        return []
    least = min(layer.samples for layer in layers)
    size = math.ceil(batch_size * BATCH_SIZE_SMALL / least)
    said = f"{_named(layers)}: {least} sample{'s' * (least > 1)} share a statistic; the gap keeps to {gap:g}, and still"
    seen = f"accuracy has been seen to fall below {BATCH_SIZE_SMALL} (Wu and He 2018)"
    return [f"{said} {seen}: a batch of {size} or more; or {_as_groups(layers, f'samples < {BATCH_SIZE_SMALL}')}"]


def _as_groups(layers: list[PlannedLayer], condition: str) -> str:
    """Return the call that gives these layers another norm; many are taken from the plan by what they have alike."""
    names = ", ".join(repr(layer.name) for layer in layers)
    if len(layers) > _NAMES:
        names = f"layer.name for layer in found.layers if layer.{condition}"
    return f'normkit.convert(model, to="group", where=[{names}])'


def _named(layers: list[PlannedLayer]) -> str:
    return _listed([layer.name or "the model itself" for layer in layers])


def _listed(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:_NAMES])
    return shown if len(names) <= _NAMES else f"{shown} and {len(names) - _NAMES} more"


def _momentum(gap: float) -> float:
    """Return the momentum that averages so many batches that ``gap * sqrt(sum of squared weights)`` is small.

    The squared weights of a moving average add up to ``momentum / (2 - momentum)``.
    """
    share = (_STORED / max(gap, 1e-9)) ** 2
    return min(_LARGEST_MOMENTUM, 2 * share / (1 + share))
