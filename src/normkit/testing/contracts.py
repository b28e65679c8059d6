"""One contract per row of the catalog: how a layer is called, what it gives and stores, what is not asked of it."""

from collections.abc import Mapping

from . import judges, mistakes
from .subject import Contract

__all__ = ["CONTRACTS"]

_CENTRES_NOTHING = "the method removes no mean"


CONTRACTS: Mapping[str, Contract] = {
    "batch": Contract(judge=judges.batch, predict=judges.prediction, per_sample=False),
    "layer": Contract(judge=judges.layer, predict=judges.prediction, per_sample=True),
    "rms": Contract(
        judge=judges.rms,
        predict=judges.prediction,
        per_sample=True,
        skipped={"huge mean": _CENTRES_NOTHING, "constant channel": _CENTRES_NOTHING},
    ),
    "group": Contract(judge=judges.group, predict=judges.prediction, per_sample=True),
    "instance": Contract(
        judge=judges.instance,
        predict=judges.prediction,
        per_sample=True,
        skipped={"counter": "torch's instance normalization has a counter and leaves it at 0"},
    ),
    "response": Contract(
        judge=judges.response,
        predict=judges.prediction,
        per_sample=True,
        variants=mistakes.responses,
        skipped={"huge mean": _CENTRES_NOTHING, "constant channel": _CENTRES_NOTHING},
    ),
    "adaptive": Contract(
        judge=judges.adaptive,
        predict=judges.prediction,
        per_sample=True,
        company=judges.style,
        variants=mistakes.styles,
        skipped={"constant channel": "a constant channel becomes the style's mean, which is rounded"},
    ),
    "renorm": Contract(
        judge=judges.renorm,
        predict=judges.prediction,
        per_sample=False,
        skipped={
            "double gradients": "r and d are constants to the gradient, and differences would see them move",
            "constant channel": "a constant channel becomes d, which is not 0",
            "huge mean": "d is as large as its limit, and so is the output",
        },
    ),
    "ghost": Contract(judge=judges.ghost, predict=judges.prediction, per_sample=False, variants=mistakes.ghosts),
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
