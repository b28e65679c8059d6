"""What a batch size means to every normalization layer of a model, before anything is trained."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .. import renderers
from ..anatomy import Call, iterate, preserved
from ..anatomy.programs import refuse_programs, unwrapped
from ..errors import ArgumentError
from .measurements import Measured, PooledMoments
from .probes import measure
from .subjects import Subject, subjects_of_model
from .thresholds import BATCH_SIZE_SMALL, SAMPLES_FOR_SPREAD

__all__ = ["PlannedLayer", "TrainingPlan", "plan"]

# An error of the stored statistics that nobody sees, in deviations: that of a mean of 1,000 independent samples.
_STORED = 0.03
_LARGEST_MOMENTUM = 0.1


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One layer under the plan. Errors are those of the channel in the middle.

    Attributes:
        name: the layer's path.
        kind: as in :class:`normkit.anatomy.NormLayer`.
        samples: how many samples share a statistic.
        values: how many values of a channel they bring, samples times positions.
        last_values: the same of the last batch of an epoch.
        effective: as how many independent values they count, by how far batch means lie apart; None where the example
            is too small to tell.
        mean_error: the standard error of a batch's mean, in deviations of the channel.
        var_error: the standard error of a batch's variance, as a share of it.
        gap: how far the layer's output in training lies from that in evaluation, root mean square, in deviations:
            ``sqrt(mean_error^2 + var_error^2 / 4)``.
        samples_needed: how many samples would have to share a statistic for the gap that was asked for.
        advice: what to do, in words; empty where nothing is to be done.
    """

    name: str
    kind: str
    samples: int
    values: int
    last_values: int
    effective: float | None
    mean_error: float
    var_error: float
    gap: float
    samples_needed: int
    advice: str


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
    errors = (f"{layer.mean_error:.0%}", f"{layer.var_error:.0%}", f"{layer.gap:.2f}")
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
        ArgumentError: a number below 1, a batch that ranks and micro-batches cannot share, or a model without a layer
            that normalizes with the batch.

    Example:
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
        seen = measure(model, subjects, _cut(example, together), call, None, live)
    measured = [(subject, seen.measured[subject.name]) for subject in subjects if subject.name in seen.measured]
    if not measured:
        raise ArgumentError("plan: the model has no layer that normalizes with the batch, or the example reaches none")
    rest = samples % batch_size if samples else 0
    last = _smallest_share(rest, ranks, micro_batches) if rest else share
    layers = tuple(_layer(subject, entry, share, last, ranks, gap) for subject, entry in measured)
    return _planned(layers, batch_size, ranks, micro_batches, samples, gap)


def _cut(example: Any, size: int) -> Any:
    """Return batches of this many samples, where the example can be cut: a tensor, or batches of tensors or tuples."""
    if isinstance(example, torch.Tensor):
        return example.split(size) if len(example) >= size else example
    given = list(iterate(example))
    if given and all(isinstance(batch, torch.Tensor) for batch in given):
        return _cut(torch.cat(given), size)
    if given and all(isinstance(batch, tuple | list) and _is_flat(batch) for batch in given):
        columns = [torch.cat(column) for column in zip(*given, strict=True)]
        return list(zip(*(column.split(size) for column in columns), strict=True))
    return given


def _is_flat(batch: Any) -> bool:
    return all(isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(batch[0]) for value in batch)


def _check(batch_size: int, ranks: int, micro_batches: int, samples: int | None, gap: float) -> None:
    numbers = {"batch_size": batch_size, "ranks": ranks, "micro_batches": micro_batches, "samples": samples}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
    if batch_size % (ranks * micro_batches):
        fitting = batch_size // (ranks * micro_batches) * ranks * micro_batches or ranks * micro_batches
        raise ArgumentError(
            f"a batch of {batch_size} is not shared evenly by {ranks} ranks with {micro_batches} micro-batches each; "
            f"{fitting} is"
        )
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
    found = max((_errors(call, together, positions) for call in calls), default=(1.0, 1.0), key=_gap)
    told = sum(call.samples for call in calls) >= SAMPLES_FOR_SPREAD
    wide = _gap(found)
    needed = math.ceil(together * (wide / gap) ** 2)
    values, left = together * positions, _of_one_statistic(subject, last * over) * positions
    return PlannedLayer(
        name=subject.name,
        kind=subject.kind,
        samples=together,
        values=values,
        last_values=left,
        effective=1 / max(found[0], 1e-9) ** 2 if told else None,
        mean_error=found[0],
        var_error=found[1],
        gap=wide,
        samples_needed=max(needed, 2 if positions == 1 else 1),
        advice=_advice(values, left, wide, gap),
    )


def _is_over_ranks(subject: Subject) -> bool:
    """Say whether the ranks share what a batch is normalized with: a synchronized ghost layer shares what it stores."""
    return subject.kind == "sync" and getattr(subject.layer and subject.layer.module, "ghost_size", None) is None


def _of_one_statistic(subject: Subject, samples: int) -> int:
    """Return how many of these samples share a statistic: all, or the smallest part of ghost normalization."""
    size = getattr(subject.layer.module, "ghost_size", None) if subject.layer is not None else None
    return samples if size is None else samples // math.ceil(samples / size)


def _errors(moments: PooledMoments, samples: int, positions: int) -> tuple[float, float]:
    """Return the standard errors of mean and variance of a batch of so many samples, of the channel in the middle."""
    if moments.samples < SAMPLES_FOR_SPREAD:
        values = samples * positions
        return 1 / math.sqrt(values), math.sqrt(2 / max(values - 1, 1))
    return float(moments.batch_mean_spread(samples).median()), float(moments.batch_spread(samples).median())


def _gap(errors: tuple[float, float]) -> float:
    mean, variance = errors
    return math.sqrt(mean**2 + variance**2 / 4)


def _advice(values: int, last: int, gap: float, wanted: float) -> str:
    if values <= 2:
        return "one value has no variance" if values == 1 else "two values have outputs of +1 and -1 alone"
    if gap > wanted:
        return "too few independent values"
    return "drop the last batch" if last <= 2 else ""


def _planned(
    layers: tuple[PlannedLayer, ...], batch_size: int, ranks: int, micro_batches: int, samples: int | None, gap: float
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
    if few:
        advice += _cures(few, worst, batch_size, ranks, micro_batches, groups)
    momentum = _momentum(max(layer.gap for layer in layers))
    if momentum < _LARGEST_MOMENTUM:
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
        advice=tuple(advice) or ("every layer has data enough",),
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
    if not cures:
        hopeless = [layer for layer in few if layer.samples_needed > batch_size]
        size = f"a batch of {worst.samples_needed} or more"
        small = any(layer.samples < BATCH_SIZE_SMALL for layer in hopeless)
        other = f'; or normkit.convert(model, to="group", where=[{_named(hopeless, quoted=True)}])' if small else ""
        cures.append(f"{names}: {size}{other}")
    return cures


def _named(layers: list[PlannedLayer], *, quoted: bool = False) -> str:
    names = [repr(layer.name) if quoted else layer.name or "the model itself" for layer in layers]
    return ", ".join(names)


def _momentum(gap: float) -> float:
    """Return the momentum that averages so many batches that ``gap * sqrt(sum of squared weights)`` is small.

    The squared weights of a moving average add up to ``momentum / (2 - momentum)``.
    """
    share = (_STORED / max(gap, 1e-9)) ** 2
    return min(_LARGEST_MOMENTUM, 2 * share / (1 + share))
