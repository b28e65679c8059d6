"""One contract per row of the catalog: how a layer is called, what it gives and stores, what is not asked of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ..reference.arrays import Array
from . import judges, mistakes
from .judges import Case, Judgement

if TYPE_CHECKING:
    from .subject import Subject

__all__ = ["CONTRACTS", "Contract"]

_CENTRES_NOTHING = "the method removes no mean"


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What holds of a method's layers.

    Attributes:
        judge: the training forward and backward of the reference.
        per_sample: a sample's output does not depend on its batch mates.
        company: what a layer is called with besides x.
        predict: the output with what is stored.
        stored: the names of the running statistics.
        seen: which values of x the stored statistics are of, where not all.
        variants: what mistakes of this method alone would have given, with words for them.
        skipped: checks that make no sense, with the reason.
    """

    judge: Callable[[Case], Judgement]
    per_sample: bool
    company: Callable[["Subject", Tensor], tuple[Tensor, ...]] = lambda subject, x: ()
    predict: Callable[[Case], Array] = judges.prediction
    stored: tuple[str, ...] = ("running_mean", "running_var")
    seen: Callable[[Case], Array] = lambda case: case.x
    variants: Callable[[Case], Iterator[tuple[str, Array]]] = lambda case: iter(())
    skipped: Mapping[str, str] = field(default_factory=dict)


CONTRACTS: Mapping[str, Contract] = {
    "batch": Contract(judge=judges.batch, per_sample=False),
    "layer": Contract(judge=judges.layer, per_sample=True),
    "rms": Contract(
        judge=judges.rms,
        per_sample=True,
        skipped={"huge mean": _CENTRES_NOTHING, "constant channel": _CENTRES_NOTHING},
    ),
    "group": Contract(judge=judges.group, per_sample=True),
    "instance": Contract(
        judge=judges.instance,
        per_sample=True,
        skipped={"counter": "torch's instance normalization has a counter and leaves it at 0"},
    ),
    "response": Contract(
        judge=judges.response,
        per_sample=True,
        variants=mistakes.responses,
        skipped={"huge mean": _CENTRES_NOTHING, "constant channel": _CENTRES_NOTHING},
    ),
    "adaptive": Contract(
        judge=judges.adaptive,
        per_sample=True,
        company=judges.style,
        variants=mistakes.styles,
        skipped={"constant channel": "a constant channel becomes the style's mean, which is rounded"},
    ),
    "renorm": Contract(
        judge=judges.renorm,
        per_sample=False,
        skipped={
            "double gradients": "r and d are constants to the gradient, and differences would see them move",
            "constant channel": "a constant channel becomes d, which is not 0",
            "huge mean": "d is as large as its limit, and so is the output",
        },
    ),
    "ghost": Contract(judge=judges.ghost, per_sample=False, variants=mistakes.ghosts),
    "masked": Contract(
        judge=judges.masked,
        per_sample=False,
        company=judges.mask,
        predict=judges.masked_prediction,
        seen=judges.valid_values,
        variants=mistakes.masks,
    ),
    "whitening": Contract(
        judge=judges.whitening,
        per_sample=False,
        predict=judges.whitening_prediction,
        stored=("running_mean", "running_covariance"),
        variants=mistakes.whitenings,
    ),
}
