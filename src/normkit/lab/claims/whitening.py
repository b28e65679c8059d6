"""E21: full whitening costs too much for what it gives over batch normalization."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_epochs
from ..data import Dataset
from ..premises import LEARNT, learnt
from ..probes import retaken
from ..rows import as_number, of_norm, per_seed, spread_in_words
from ..search import RATE_RULE, best_rate
from ..small_network import SmallLeNet
from ..training import TrainingSettings, evaluate, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "layer_operations", "norm_operations", "step_milliseconds"]

NORMS = ("batch", "whitening")
RATES = (0.03, 0.1, 0.3)
# The first steps warm up caches and the kernels' compiler, and are not counted.
WARM_STEPS, TIMED_STEPS = 5, 40
COSTS = Rule(
    effect="time per training step, whitening over batch norm, medians of interleaved steps",
    unit="times",
    direction="above",
    line=1.5,
)
GIVES_LITTLE = Rule(
    effect="test accuracy after the last epoch with statistics taken again, whitening minus batch norm",
    unit="",
    direction="below",
    line=0.01,
)
STORED = Rule(
    effect="test accuracy after the last epoch with the stored statistics, whitening minus batch norm",
    unit="",
    direction="below",
    line=0.01,
)
BATCH = 64
# What the small LeNet's norms normalize, channels and positions, and the multiplications per image of its layers: two
# convolutions and two dense layers. The first has no gradient of its input to compute.
MAPS = ((8, 14 * 14), (16, 7 * 7), (32, 1))
FIRST_LAYER, OTHER_LAYERS = 8 * 9 * 14 * 14, 16 * 72 * 7 * 7 + 16 * 7 * 7 * 32 + 32 * 10
GROUP = 16
# Per value of a step. Batch norm: mean, variance, output; two sums, and two terms of the gradient. Whitening beside its
# products: mean, output; two sums, the gradient through gamma, and that through the mean.
ELEMENTWISE = {"batch": 7, "whitening": 6}
# Products of d by m per value of a group of d channels: covariance and output; two gradients of each.
PRODUCTS = 6
# Eigenvectors, the root and its inverse, and their gradients, in products of two d by d matrices; a round figure.
ROOT = 20
SETTINGS = TrainingSettings(
    epochs=12, batch_size=BATCH, optimizer="sgd", learning_rate=0.0, momentum=0.9, train_images=960
)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the small LeNet at the norm's best rate; the cells of whitening also time a step of both nets."""
    times = step_milliseconds(cell, dataset) if cell.norm == "whitening" else dict.fromkeys(NORMS)
    columns = {f"milliseconds_{norm}": times[norm] for norm in NORMS}
    rate = best_rate(SmallLeNet, cell.norm, dataset, cell.settings, RATES, cell.device)
    model = with_seed(lambda: SmallLeNet(cell.norm), cell.seed)
    images = dataset.train_images.to(cell.device)
    test = dataset.test_images.to(cell.device), dataset.test_labels.to(cell.device)
    for epoch in train(model, dataset, replace(cell.settings, learning_rate=rate), cell.seed, cell.device):
        with retaken(model, images, cell.settings.batch_size) as copied:
            accuracy = evaluate(copied, *test)[1]
        yield {
            "rate": rate,
            "epoch": epoch.epoch,
            "train_loss": epoch.train_loss,
            "stored_accuracy": epoch.test_accuracy,
            "test_accuracy": accuracy,
            **columns,
        }


def step_milliseconds(cell: Cell, dataset: Dataset) -> dict[str, float]:
    """Return the median time of a training step with each norm, the norms taking turns step by step."""
    batch = slice(cell.settings.batch_size)
    images, labels = dataset.train_images[batch].to(cell.device), dataset.train_labels[batch].to(cell.device)
    nets = {norm: with_seed(partial(SmallLeNet, norm), cell.seed).to(cell.device).train() for norm in NORMS}
    steps = {norm: _step(net, images, labels) for norm, net in nets.items()}
    seconds: dict[str, list[float]] = {norm: [] for norm in NORMS}
    for _ in range(WARM_STEPS + TIMED_STEPS):
        for norm, step in steps.items():
            begun = _clock(cell.device)
            step()
            seconds[norm].append(_clock(cell.device) - begun)
    return {norm: 1000 * median(values[WARM_STEPS:]) for norm, values in seconds.items()}


def norm_operations(norm: str, batch_size: int) -> int:
    """Return the multiplications with their additions that the net's norms take in a training step, both ways.

    Batch norm takes a few per value. Whitening of groups of d channels takes 6 d more per value, and some d^3 per group
    for the inverse root of the covariance.

    >>> norm_operations("batch", 1), norm_operations("whitening", 1)
    (16688, 423904)
    """
    total = 0
    for channels, positions in MAPS:
        values = channels * positions * batch_size
        total += ELEMENTWISE[norm] * values
        if norm == "whitening":
            width = min(GROUP, channels)
            total += PRODUCTS * width * values + ROOT * width**3 * (channels // width)
    return total


def layer_operations(batch_size: int) -> int:
    """Return those of its convolutions and dense layers: forward, and the gradients of weights and inputs."""
    return batch_size * (2 * FIRST_LAYER + 3 * OTHER_LAYERS)


def _step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Return one whole training step of this model: forward, backward, update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _clock(device: str) -> float:
    """Return seconds: of this process's own work on a CPU, which others may share, and of the wall on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _ratio(run: Sequence[Row]) -> float:
    batch, whitening = (as_number(run[0][f"milliseconds_{norm}"]) for norm in NORMS)
    return whitening / batch


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the cost and the gain."""
    batch, whitening = (of_norm(rows, norm) for norm in NORMS)
    retaken_again, stored = (
        [per_seed(side, partial(_last, column)) for side in (whitening, batch)]
        for column in ("test_accuracy", "stored_accuracy")
    )
    return conclude(
        paired(GIVES_LITTLE, *retaken_again),
        premises=[learnt(whitening, batch)],
        details=[single(COSTS, per_seed(whitening, _ratio)), paired(STORED, *stored)],
        compared="whitening against batch norm",
    )


def _last(column: str, run: Sequence[Row]) -> float:
    return as_number(run[-1][column])


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show accuracy by epoch, the same against the time it took, and both in numbers."""
    marks, timed, lines = [], [], []
    for norm, look in zip(NORMS, looks(NORMS), strict=True):
        mine = of_norm(rows, norm)
        if not mine:
            continue
        line = over_epochs(mine, "test_accuracy", label=norm_label(norm), **look)
        marks.append(line)
        times = [as_number(row[f"milliseconds_{norm}"]) for row in of_norm(rows, "whitening") if row["epoch"] == 1]
        if times:
            timed.append(replace(line, x=[epoch * median(times) for epoch in line.x]))
        accuracies = [
            spread_in_words(list(per_seed(mine, partial(_last, column)).values()))
            for column in ("test_accuracy", "stored_accuracy")
        ]
        lines.append([norm, spread_in_words(times, digits=2), f"{mine[0]['rate']:g}", *accuracies])
    panels = (
        Panel(title="Accuracy by epoch", x_label="epoch", y_label="test accuracy", marks=marks),
        Panel(
            title="Accuracy by time",
            x_label="epoch times milliseconds per step",
            y_label="test accuracy",
            marks=timed,
        ),
    )
    ratio = spread_in_words(list(per_seed(of_norm(rows, "whitening"), _ratio).values()), digits=2)
    table = Table(
        title="Time per training step, and test accuracy after the last epoch",
        header=[
            "norm",
            "milliseconds per step",
            "rate chosen",
            "test accuracy, statistics again",
            "with the stored ones",
        ],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. A step with whitening takes {ratio} times as long. Rates tried: "
        f"{', '.join(f'{rate:g}' for rate in RATES)}.",
    )
    layers, size = layer_operations(BATCH), {norm: norm_operations(norm, BATCH) for norm in NORMS}
    steps = {norm: layers + size[norm] for norm in NORMS}
    counted = Table(
        title="Operations of a training step, counted",
        header=["norm", "norms, millions", "other layers, millions", "whole step over that with batch norm"],
        rows=[
            [norm, f"{size[norm] / 1e6:.2f}", f"{layers / 1e6:.2f}", f"{steps[norm] / steps['batch']:.2f}"]
            for norm in NORMS
        ],
        note=f"Multiplications with their additions, forward and backward, for a batch of {BATCH}. Whitening: 6 d per "
        "value more than a few, in groups of d channels, and about 20 d^3 per group for the inverse root. What a step "
        "takes beyond its operations is the price of many small steps one after the other.",
    )
    words = "; ".join(f"{norm_label(line[0])} {line[1]} ms per step, accuracy {line[3]}" for line in lines)
    text = f"Test accuracy by epoch and against the time it took. {words.capitalize()}. Ratio of times: {ratio}."
    return Chart(name="whitening", title="What whitening costs and gives", panels=panels, text=text), table, counted


CLAIM = Claim(
    id="whitening",
    number="E21",
    title="Full whitening classifies no better than batch normalization by a point",
    statement="Whitening removes the correlation of channels too, which is what batch normalization is the cheap form "
    "of. It makes training steps dearer, and what it adds in accuracy does not pay for that.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 3; repeated in the source S4. Whitening as in Huang et "
    "al. 2018, arXiv:1804.08450",
    prediction="The test accuracy with whitening is higher than with batch normalization by less than one percentage "
    "point, both with statistics taken again after training. Beside it: a training step takes more than 1.5 times as "
    "long, and the same with the stored statistics. No source gives a number.",
    question=GIVES_LITTLE,
    premises=(LEARNT,),
    details=(COSTS, STORED),
    design=2,
    settings_rule="A small LeNet (two convolutions, one hidden dense layer, a norm at each). Whitening takes groups of "
    "16 channels at most, so its cost here is less than that of all 32 at once. Gradient descent with momentum 0.9 on "
    f"batches of 64 at a rate of 0.03, 0.1 or 0.3. {RATE_RULE} Both sides predict with statistics taken again over the "
    "training images, weights held, because a moving average costs whitening more. Steps of both nets take turns on "
    "the same batch, one thread; processor time on a CPU. Times differ from run to run, so this claim's rows do not "
    "repeat bit for bit.",
    meaning={
        "supported": "In this net whitening gains less than a point, for a step that is dearer. In a larger net the "
        "convolutions take a larger part of a step and the ratio of times is smaller.",
        "refuted": "In this net whitening gains a point or more. Whether that is worth a dearer step is for whoever "
        "pays.",
        "inconclusive": "A gain of one point is inside the interval. More seeds make it narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=NORMS,
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=6, train_images=3200, test_images=2000)},
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
