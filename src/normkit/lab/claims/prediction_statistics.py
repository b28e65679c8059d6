"""E20: which stored statistics predict best, the moving average or the population's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...layers import BatchNorm1d, BatchNorm2d
from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..images import as_bits, share_won
from ..networks import LeNet5
from ..premises import LEARNT, learnt
from ..probes import probe, recorded
from ..rows import as_number, mean_and_spread, mean_of, per_seed, where
from ..training import TrainingSettings, classified_rightly, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "average_error"]

NORMS = ("norm1", "norm2", "norm3", "norm4")
WAYS = {"unbiased": "moving average, unbiased", "biased": "moving average, biased", "population": "population"}
# Measured beside those, in the same training, and shown in the table: other laws of a moving average, and the mean and
# variance of all values where `population` is the plain average of batches. Older runs lack them.
BESIDE = {
    "debiased": "moving average, debiased",
    "total": "moving average, debiased, total variance",
    "half_life": "half-life of 20 batches, debiased, total variance",
    "pooled": "population, pooled",
}
JUDGED = ("population", "unbiased")
HALF_LIFE = 20
MOMENTA = (0.5, 0.1, 0.01)
USUAL = 0.1
FORMULA = Rule(
    effect="distance of a moving average's error after k equal batches from decay^k, largest over k and both "
    "conventions",
    unit="",
    direction="below",
    line=1e-6,
)
NEARER = Rule(
    effect="log10 of the stored statistics' error, mean over epochs, population minus moving average (momentum 0.1)",
    unit="decades",
    direction="below",
    line=-math.log10(2),
)
BETTER = Rule(
    effect="test accuracy averaged over the epochs, population minus moving average (momentum 0.1)",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.002, 0.002),
)
WON = Rule(
    effect="share that the population's statistics classify rightly of the test images that only they or the moving "
    "average's (momentum 0.1) do, all epochs together",
    unit="",
    direction="above",
    line=0.5,
)
_OF_OTHERS = (
    " Nor does the half-life's. A debiased average has no trace of its start; a total variance holds that of the batch "
    "means too; pooled are the mean and the variance of all values."
)
SETTINGS = TrainingSettings(epochs=5, batch_size=64, optimizer="adam", learning_rate=0.002)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train LeNet-5 and yield, per epoch and per way of storing, the accuracy and the error of the statistics."""
    momentum = float(dict(cell.variant)["momentum"])
    model = with_seed(lambda: LeNet5(cell.norm), cell.seed)
    for layer in _norms(model).values():
        layer.momentum = momentum
    laws: dict[str, dict[str, Any]] = {
        "debiased": {"momentum": momentum, "average": "debiased"},
        "total": {"momentum": momentum, "average": "debiased", "variance": "total"},
        "half_life": {"half_life": HALF_LIFE, "average": "debiased", "variance": "total"},
    }
    beside = {way: _followed(model, **law) for way, law in laws.items()}
    # Part of the network, so that they are where it is.
    model.beside = nn.ModuleDict(beside)
    formula = average_error(cell.seed)
    images = dataset.train_images[:10_000].to(cell.device)
    test = dataset.test_images.to(cell.device), dataset.test_labels.to(cell.device)
    for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
        steps = epoch.epoch * len(epoch.step_losses)
        exact, counts = _exact(model, images, cell.settings.batch_size)
        stored = {
            "unbiased": _stored(model),
            "biased": _as_biased(_stored(model), counts, (1 - momentum) ** steps),
            **_population(model, images, cell.settings.batch_size),
            **{way: _kept(dict(layers.items())) for way, layers in beside.items()},
        }
        yield {"epoch": epoch.epoch, "formula": formula, **_compare(model, stored, exact, test)}


def _followed(model: nn.Module, **law: Any) -> nn.ModuleDict:
    """Return layers that keep, by another law, the statistics of every batch that the model's own are trained on."""
    followers = nn.ModuleDict()
    for name, layer in _norms(model).items():
        cls = BatchNorm2d if isinstance(layer, nn.BatchNorm2d) else BatchNorm1d
        followers[name] = cls(layer.num_features, affine=False, **law).to(layer.weight.device)
        layer.register_forward_pre_hook(partial(_follow, layer, followers[name]))
    return followers


def _follow(layer: nn.Module, follower: nn.Module, called: nn.Module, given: tuple[Tensor, ...]) -> None:
    # Copies of the model, which are probed, bring the hook along.
    if called is layer and layer.training:
        with torch.no_grad():
            follower.train()(given[0].detach())


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_children() if isinstance(module, _BatchNorm)}


Statistics = Mapping[str, tuple[Tensor, Tensor]]


def average_error(seed: int) -> float:
    """Return how far a moving average's error after k equal batches is from ``decay^k``, at most, in float64.

    The error is the distance to the batch's own statistics over the distance at the start. Both ways to say the same
    (``momentum=0.1`` and ``decay=0.9``) are tried, and biased and unbiased variances.
    """
    x = torch.randn(32, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 5
    worst = 0.0
    for decay in (0.5, 0.9, 0.99):
        layers = (
            BatchNorm1d(7, decay=decay), BatchNorm1d(7, momentum=1 - decay), BatchNorm1d(7, decay=decay, unbiased=False)
        )  # fmt: skip
        for place, layer in enumerate(layers):
            targets = x.mean(0), x.var(0, correction=int(place < 2))
            layer.double()
            for step in range(1, 51):
                layer(x)
                for name, start, target in zip(("running_mean", "running_var"), (0.0, 1.0), targets, strict=True):
                    error = (layer.get_buffer(name) - target) / (start - target)
                    worst = max(worst, float((error - decay**step).abs().max()))
    return worst


def _stored(model: nn.Module) -> Statistics:
    """Return the model's running statistics."""
    return _kept({name: model.get_submodule(name) for name in NORMS})


def _kept(layers: Mapping[str, nn.Module]) -> Statistics:
    return {
        name: (layer.get_buffer("running_mean").clone(), layer.get_buffer("running_var").clone())
        for name, layer in layers.items()
    }


def _as_biased(stored: Statistics, counts: Mapping[str, int], left: float) -> Statistics:
    """Return what a layer that stores the biased variance would hold: the average is linear in the batches' variances.

    ``left`` is the weight that the start, a variance of 1, still has.
    """
    return {
        name: (mean, (var - left) * (counts[name] - 1) / counts[name] + left) for name, (mean, var) in stored.items()
    }


def _exact(model: nn.Module, images: Tensor, batch_size: int) -> tuple[Statistics, dict[str, int]]:
    """Return the statistics of all images passed at once, and how many numbers a training batch gives per channel."""
    with probe(model) as copied, recorded(copied, NORMS) as seen, torch.no_grad():
        copied.train()
        copied(images)
    statistics, counts = {}, {}
    for name in NORMS:
        x = seen[name][0].double().transpose(0, 1).flatten(1)
        statistics[name] = (x.mean(1), x.var(1, correction=0))
        counts[name] = batch_size * x.shape[1] // len(images)
    return statistics, counts


def _population(model: nn.Module, images: Tensor, batch_size: int) -> dict[str, Statistics]:
    """Return the plain average of all batches' means and unbiased variances, with the weights held; and the pooled.

    They are what ``normkit.recalibrate`` writes with ``aggregate="average"`` and with ``"pooled"``, but for its divisor
    of m - 1 where m is all values.
    """
    with probe(model) as copied, torch.no_grad():
        copied.train()
        pooled = _followed(copied, momentum=None, variance="total")
        for layer in _norms(copied).values():
            layer.momentum = None
            layer.get_buffer("num_batches_tracked").zero_()
        for start in range(0, len(images) - batch_size + 1, batch_size):
            copied(images[start : start + batch_size])
        return {"population": _stored(copied), "pooled": _kept(dict(pooled.items()))}


def _compare(
    model: nn.Module, stored: Mapping[str, Statistics], exact: Statistics, test: tuple[Tensor, Tensor]
) -> dict[str, float | str]:
    """Return each way's accuracy, and log10 of its error in units of the channels' deviations."""
    compared: dict[str, float | str] = {}
    for way, statistics in stored.items():
        with probe(model) as copied:
            errors = []
            for name, (mean, var) in statistics.items():
                layer = copied.get_submodule(name)
                layer.get_buffer("running_mean").copy_(mean)
                layer.get_buffer("running_var").copy_(var)
                exact_mean, exact_var = exact[name]
                # A channel that never varies has no unit to measure in.
                alive = exact_var > 1e-8
                off_mean = ((mean - exact_mean).abs() / exact_var.sqrt())[alive]
                off_var = (var / exact_var - 1).abs()[alive]
                errors += [float(off_mean.mean()), float(off_var.mean())]
            right = classified_rightly(copied, *test)
            compared[f"accuracy_{way}"] = int(right.sum()) / len(right)
            if way in JUDGED:
                compared[f"right_{way}"] = as_bits(right)
            compared[f"error_{way}"] = math.log10(fmean(errors))
    return compared


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the usual momentum: the formula, the statistics' error, and the accuracy."""
    usual = where(rows, momentum=USUAL)
    accuracies, errors = (
        [per_seed(usual, partial(mean_of, f"{column}_{way}")) for way in JUDGED] for column in ("accuracy", "error")
    )
    return conclude(
        paired(BETTER, *accuracies),
        premises=[learnt(usual, column="accuracy_population")],
        details=[
            paired(NEARER, *errors),
            single(WON, per_seed(usual, partial(share_won, "right_population", "right_unbiased"))),
            single(FORMULA, per_seed(usual, lambda run: as_number(run[0]["formula"]))),
        ],
        compared="population against moving average",
    )


def _have(rows: Sequence[Row], way: str) -> bool:
    """Say whether all rows have a way's numbers: a run that was begun before there was the way lacks some."""
    return all(f"error_{way}" in row for row in rows)


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show error and accuracy by epoch at the usual momentum, and means for every momentum."""
    usual = where(rows, momentum=USUAL) or list(rows)
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(usual, f"{column}_{way}", label=label, **look)
                for (way, label), look in zip(WAYS.items(), looks(["batch"] * len(WAYS)), strict=True)
            ],
        )
        for title, unit, column in (
            ("Error of the statistics", "log10", "error"),
            ("Test accuracy", "accuracy", "accuracy"),
        )
    ]
    lines = []
    for momentum in MOMENTA:
        mine = where(rows, momentum=momentum)
        shown = [(way, label) for way, label in (WAYS | BESIDE).items() if mine and _have(mine, way)]
        for way, label in shown:
            columns = [per_seed(mine, partial(mean_of, f"{column}_{way}")) for column in ("error", "accuracy")]
            (error, _), (accuracy, spread) = (mean_and_spread(list(column.values())) for column in columns)
            lines.append([f"{momentum:g}", label, f"{10**error:.3f}", f"{accuracy:.4f} ± {spread:.4f}"])
    table = Table(
        title="Stored statistics, mean over epochs",
        header=["momentum", "statistics", "error", "test accuracy"],
        rows=lines,
        note="Error: distance of means in deviations and of variances as a share, from the statistics of all training "
        "images at once. The population's do not hang on the momentum; the rows repeat them."
        + (_OF_OTHERS if rows and _have(rows, "total") else ""),
    )
    words = "; ".join(f"momentum {line[0]}, {line[1]}: error {line[2]}, accuracy {line[3]}" for line in lines)
    text = f"Curves by epoch of the stored statistics' error and the accuracy they give. {words}."
    title = f"Statistics for prediction, momentum {USUAL:g}"
    return Chart(name="prediction-statistics", title=title, panels=panels, text=text), table


CLAIM = Claim(
    id="prediction-statistics",
    number="E20",
    title="Population statistics predict better than a moving average",
    statement="Prediction with the plain average of all training batches' statistics, weights held, is nearer to the "
    "exact statistics than a moving average that was gathered while the weights moved, and classifies better.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2, repeated in the source S1; moving averages in S0, "
    "S2 and S3; Wu and Johnson 2021, arXiv:2105.07576",
    prediction="The test accuracy with the population's statistics, averaged over the epochs, is higher than with the "
    "moving average's; within a fifth of a point is no difference. Beside it: the population's error is less than half "
    "the moving average's, and after k equal batches that one's error is decay^k, to 1e-6, however its momentum is "
    "said. Of the images that only one of the two gets right most are the population's.",
    question=BETTER,
    premises=(LEARNT,),
    details=(NEARER, WON, FORMULA),
    design=3,
    settings_rule="LeNet-5 with E1's optimiser, rate and batch size, chosen for a net without a norm. All statistics "
    "are taken from the same weights after every epoch; the momentum judged is torch's default, 0.1. "
    "On FashionMNIST 3,000 training and 2,000 test images are used, drawn by class, for the sake of time.",
    meaning={
        "supported": "At the usual momentum the population's statistics predict better over these first "
        "epochs. The lead is largest while the weights move fast, and one pass over the data buys it.",
        "refuted": "At the usual momentum the moving average predicts better. The table by momentum shows where a "
        "moving average is good enough.",
        "inconclusive": "An interval holds its line. Statistics may be nearer without a test set of this size showing "
        "it in the accuracy.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    variants=tuple((("momentum", momentum),) for momentum in MOMENTA),
    measure=measure,
    judge=decide,
    show=show,
)
