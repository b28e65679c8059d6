"""E6: with batch normalization the scale of the initial weights matters less."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_variants
from ..data import Dataset
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..rows import as_number, compared_norms, of_norm, per_seed, spread_in_words, where
from ..search import RATE_RULE, best_rate
from ..training import TrainingSettings, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "build"]

SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
USUAL = 1.0
RATES = (0.03, 0.1, 0.3)
LOST = Rule(
    effect="test accuracy lost to a scale other than 1, mean over the scales, with the norm minus without",
    unit="",
    direction="below",
    line=-0.05,
    band=(-0.05, 0.05),
)
WORST = Rule(
    effect="test accuracy at the worst scale, with the norm minus without",
    unit="",
    direction="above",
    line=0.1,
)
SETTINGS = TrainingSettings(epochs=8, batch_size=64, optimizer="sgd", learning_rate=0.0)


def build(scale: float, norm: str) -> DenseNetwork:
    """Return three hidden layers of 100 with ReLU, every initial weight times the scale."""
    model = DenseNetwork([100] * 3, norm)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(scale)
    return model


BUILDS: Mapping[float, Callable[[str], DenseNetwork]] = {scale: partial(build, scale) for scale in SCALES}


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train from the cell's scale, at the rate that is best for this side at this scale."""
    side = BUILDS[float(dict(cell.variant)["scale"])]
    rate = best_rate(side, cell.norm, dataset, cell.settings, RATES, cell.device)
    model = with_seed(lambda: side(cell.norm), cell.seed)
    for epoch in train(model, dataset, replace(cell.settings, learning_rate=rate), cell.seed, cell.device):
        yield {"rate": rate, **asdict(replace(epoch, step_losses=()))}


def final_accuracy(run: Sequence[Row]) -> float:
    """Return the last epoch's test accuracy."""
    return as_number(run[-1]["test_accuracy"])


def _by_scale(rows: Sequence[Row]) -> dict[int, dict[float, float]]:
    """Return, for every seed whose scales have all been run, the final accuracy by scale."""
    accuracies = {scale: per_seed(where(rows, scale=scale), final_accuracy) for scale in SCALES}
    seeds = set.intersection(*(set(values) for values in accuracies.values()))
    return {seed: {scale: accuracies[scale][seed] for scale in SCALES} for seed in sorted(seeds)}


def _lost(accuracies: dict[float, float]) -> float:
    return accuracies[USUAL] - fmean(accuracy for scale, accuracy in accuracies.items() if scale != USUAL)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what the other scales cost, and the worst of them."""
    candidate, baseline = compared_norms(rows)
    sides = [_by_scale(of_norm(rows, norm)) for norm in (candidate, baseline)]
    lost = [{seed: _lost(scales) for seed, scales in side.items()} for side in sides]
    worst = [{seed: min(scales.values()) for seed, scales in side.items()} for side in sides]
    usual = [where(of_norm(rows, norm), scale=USUAL) for norm in (candidate, baseline)]
    return conclude(
        paired(LOST, *lost),
        premises=[learnt(*usual)],
        details=[paired(WORST, *worst)],
        compared=f"{candidate} against {baseline}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the final accuracy against the scale."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    marks = [
        over_variants(of_norm(rows, norm), "scale", final_accuracy, label=norm_label(norm), **look)
        for norm, look in zip(norms, looks(norms), strict=True)
    ]
    panel = Panel(
        title="Test accuracy, last epoch",
        x_label="factor on every initial weight",
        y_label="accuracy",
        marks=marks,
        log_x=True,
        x_ticks=SCALES,
    )
    lines = []
    for norm in norms:
        mine = of_norm(rows, norm)
        parts = [where(mine, scale=scale) for scale in SCALES]
        cells = [
            f"{spread_in_words(list(per_seed(part, final_accuracy).values()), 3)} ({part[0]['rate']:g})" if part else ""
            for part in parts
        ]
        lines.append([norm, *cells])
    table = Table(
        title="Test accuracy after the last epoch (and the rate chosen), by the initial weights' scale",
        header=["norm", *(f"{scale:g}" for scale in SCALES)],
        rows=lines,
        note="Mean ± standard deviation over seeds. Scale 1 is torch's own initial scale.",
    )
    words = "; ".join(
        f"{norm_label(norm)} from {min(mark.y):.3f} to {max(mark.y):.3f}"
        for norm, mark in zip(norms, marks, strict=True)
    )
    text = f"Curves of the last test accuracy against the factor on the initial weights, mean over seeds: {words}."
    return Chart(name="initialization", title="Accuracy by initial scale", panels=(panel,), text=text), table


CLAIM = Claim(
    id="initialization",
    number="E6",
    title="Batch normalization makes training less dependent on the scale of the initial weights",
    statement="Over a wide range of scales of the initial weights the net with batch normalization learns about as "
    "well as at the usual scale, while the net without loses much.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, abstract and section 1; repeated in the sources S1 and S3",
    prediction="Over factors from 0.03 to 30 on every initial weight the mean loss of test accuracy against factor 1 "
    "is smaller by more than five points with batch normalization, each side at its best rate for each factor. Beside "
    "it: the worst accuracy is higher by more than ten.",
    question=LOST,
    premises=(LEARNT,),
    details=(WORST,),
    design=2,
    settings_rule="Three hidden layers of 100 with ReLU, batches of 64, plain gradient descent. A side is a norm with "
    f"a factor, from 0.03, 0.1 or 0.3. {RATE_RULE}",
    meaning={
        "supported": "The net with the norm survives initial scales that the plain net does not, each at "
        "its own best rate. The curve shows how wide the range is on either side.",
        "refuted": "Here the norm does not buy the independence claimed: the loss over the scales is not "
        "smaller by the margin set. Look at the curve for the side on which it fails.",
        "inconclusive": "An interval holds its line, or too few seeds were run. More seeds make the intervals "
        "narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={
        "digits": SETTINGS,
        "fashion-mnist": replace(SETTINGS, epochs=4, train_images=3000, test_images=2000),
    },
    variants=tuple((("scale", scale),) for scale in SCALES),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
