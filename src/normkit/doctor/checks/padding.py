"""Check of padding: does it count as data in any normalization layer?"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..measurements import Lengthened, Measured
from ..subjects import Subject
from ..thresholds import DRIFT_SHARE, PADDING_LOG_RATIO, PADDING_SHARE, PADDING_SPREAD, PADDING_UNMOVED
from .populations import percentile

__all__ = ["PADDING_CHECKS"]


def padding(examination: Examination) -> Iterator[Finding]:
    """Find layers whose output at the data hangs on how much padding stands behind them."""
    for subject in examination.subjects:
        lengthened = examination.lengthened.get(subject.name)
        if lengthened is None or lengthened.moved <= PADDING_UNMOVED:
            continue  # more of it changes nothing: it is masked, or each position stands for itself
        measured = examination.measured.get(subject.name)
        shares = (measured.padding.shares if measured and measured.padding else None) or [lengthened.share]
        average, spread = sum(shares) / len(shares), max(shares) - min(shares)
        average = max(average, lengthened.share)
        if average > PADDING_SHARE or spread > PADDING_SPREAD:
            yield _finding(subject, lengthened, measured, average, spread)


def _finding(
    subject: Subject, lengthened: Lengthened, measured: Measured | None, average: float, spread: float
) -> Finding:
    ratio = _ratio(subject, measured)
    moved = None if ratio is None else float((ratio.abs() > PADDING_LOG_RATIO).double().mean())
    severity: Severity = "error" if moved is not None and moved >= DRIFT_SHARE else "warning"
    when = "in training" if subject.is_batch else "in training and in evaluation"
    return Finding(
        check="padding",
        layer=subject.name,
        severity=severity,
        summary=f"{average:.0%} of the positions are padding, and they count in the mean and the variance {when}: "
        f"half as much again moves the data's outputs by {lengthened.moved:.2g} deviations",
        evidence={
            "padded_share": average,
            "spread_over_batches": spread,
            "channels_moved": moved,
            "log2_ratio_99th_percentile": None if ratio is None else percentile(ratio.abs()),
            "moved_by_longer_padding": lengthened.moved,
        },
        causes=(
            "sequences of different lengths, filled up to the longest of the batch",
            "signals that end in silence: then these are data, and nothing is wrong",
        ),
        remedy=_REMEDY_OF_BATCH if subject.is_batch else _REMEDY_OF_SAMPLE,
        proof='not normkit.diagnose(model, batches).of("padding", {layer})',
        channels={} if ratio is None else {"log2_ratio": tuple(ratio.tolist())},
        extent=lengthened.moved,
    )


_REMEDY_OF_BATCH = (
    "normkit.mask_padding(model, lambda given: (given != 0).any(1), where={layer}); "
    "normkit.recalibrate(model, batches)  # the mask of your own data, (N, L); then train again"
)
_REMEDY_OF_SAMPLE = "batches = [batch[:1] for batch in batches]  # one length in each batch: nothing is filled up"


def _ratio(subject: Subject, measured: Measured | None) -> Tensor | None:
    """Return log2 of the variance with padding over the one without, per channel, where the layer sees padding."""
    if measured is None or measured.padding is None or not measured.padding.valid or not measured.pooled:
        return None
    valid = measured.padding.valid
    return torch.log2((measured.pooled.var + subject.eps) / (valid.var + subject.eps))


PADDING_CHECKS: tuple[Check, ...] = (
    Check(
        name="padding",
        question="Does padding count as data?",
        needs="batches",
        examine=padding,
        innocent=("signals that end in silence",),
    ),
)
