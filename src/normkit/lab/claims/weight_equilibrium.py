"""E38: behind batch norms, learning rate times weight decay decides the effective rate that training settles at."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..rows import mean_of, per_seed, spread_in_words, where
from ..training import TrainingSettings, large_batch, train, with_seed
from ..verdicts import Rule, Verdict, conclude, single

__all__ = ["CLAIM", "effective_rate"]

# Rate and decay: the first two have the same product, the third a quarter of it, so that it settles in 4 times as many
# epochs: it is shown and not judged.
PAIRS = {"fast": (0.2, 0.02), "slow": (0.05, 0.08), "weak": (0.05, 0.02)}
SAME = Rule(
    effect="distance between the effective rates of two pairs of rate and decay with the same product, mean over the "
    "last quarter of the epochs",
    unit="octaves",
    direction="below",
    line=0.25,
)
SETTLED = Rule(
    effect="change of the effective rate from the third quarter of the epochs to the last, of the one of these two "
    "pairs that changes more",
    unit="octaves",
    direction="below",
    line=0.25,
)
ACCURACY = Rule(
    effect="distance between the test accuracies of two pairs with the same product, mean over the last quarter of the "
    "epochs",
    unit="",
    direction="below",
    line=0.02,
)
SETTINGS = TrainingSettings(epochs=60, batch_size=64, optimizer="sgd", learning_rate=0.0)


def effective_rate(model: DenseNetwork, rate: float) -> float:
    """Return the mean over the weights before the norms of log2 of the rate over the squared norm of each.

    Behind a batch norm only the direction of such a weight counts, and a step turns it by this rate.

    >>> model = DenseNetwork([2], "batch", inputs=2)
    >>> _ = nn.init.constant_(model.linears[0].weight, 1.0)
    >>> effective_rate(model, 1.0)
    -2.0
    """
    squares = [linear.get_parameter("weight").detach().double().square().sum() for linear in model.linears]
    return math.log2(rate) - float(torch.stack(squares).log2().mean())


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train with the cell's rate and decay, and yield the effective rate before and after every epoch."""
    rate, decay = PAIRS[str(dict(cell.variant)["pair"])]
    model = with_seed(lambda: DenseNetwork([100] * 3, cell.norm), cell.seed)
    settings = replace(cell.settings, learning_rate=rate)
    weights = [linear.get_parameter("weight") for linear in model.linears]

    def decayed(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Add the decay to the gradients of the weights before the norms, and of no other parameter."""
        loss = large_batch(network, images, labels)
        for weight in weights:
            assert weight.grad is not None
            weight.grad.add_(weight.detach(), alpha=decay)
        return loss

    before = effective_rate(model, rate)
    for epoch in train(model, dataset, settings, cell.seed, cell.device, gradients=decayed):
        yield {
            "epoch": epoch.epoch,
            "before": before,
            "effective": effective_rate(model, rate),
            "train_loss": epoch.train_loss,
            "test_accuracy": epoch.test_accuracy,
        }


def _quarter(column: str, back: int, run: Sequence[Row]) -> float:
    """Return the mean of a column over the last quarter of the epochs, or over the one so many before it."""
    length = max(len(run) // 4, 1)
    end = max(len(run) - back * length, 1)
    return mean_of(column, run[max(end - length, 0) : end])


def _distances(rows: Sequence[Row], first: str, second: str, column: str) -> dict[int, float]:
    """Return how far two pairs are apart in each seed in a column, both as means over the last quarter."""
    sides = [per_seed(where(rows, pair=pair), partial(_quarter, column, 0)) for pair in (first, second)]
    return {seed: abs(sides[0][seed] - sides[1][seed]) for seed in sorted(sides[0].keys() & sides[1].keys())}


def _change(run: Sequence[Row]) -> float:
    """Return how far the effective rate has moved from the third quarter of the epochs to the last."""
    return abs(_quarter("effective", 0, run) - _quarter("effective", 1, run))


def _unsettled(rows: Sequence[Row]) -> dict[int, float]:
    changes = [per_seed(where(rows, pair=pair), _change) for pair in ("fast", "slow")]
    return {seed: max(side[seed] for side in changes) for seed in sorted(changes[0].keys() & changes[1].keys())}


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge whether two pairs of the same product come to the same effective rate."""
    return conclude(
        single(SAME, _distances(rows, "fast", "slow", "effective")),
        premises=[learnt(*(where(rows, pair=pair) for pair in PAIRS)), single(SETTLED, _unsettled(rows))],
        details=[
            single(ACCURACY, _distances(rows, "fast", "slow", "test_accuracy")),
        ],
        compared="two pairs of rate and decay with the same product",
    )


def _label(pair: str) -> str:
    rate, decay = PAIRS[pair]
    return f"rate {rate:g}, decay {decay:g}"


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show effective rate and accuracy by epoch for every pair."""
    pairs = [pair for pair in PAIRS if where(rows, pair=pair)]
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(where(rows, pair=pair), column, label=_label(pair), **look)
                for pair, look in zip(pairs, looks(["batch"] * len(pairs)), strict=True)
            ],
        )
        for title, unit, column in (
            ("Effective rate", "log2", "effective"),
            ("Test accuracy", "accuracy", "test_accuracy"),
        )
    ]
    lines = []
    for pair in pairs:
        mine = where(rows, pair=pair)
        columns = [
            list(per_seed(mine, partial(_quarter, name, 0)).values())
            for name in ("before", "effective", "test_accuracy")
        ]
        lines.append(
            [
                _label(pair),
                *(spread_in_words(values, 4 if place == 2 else 2) for place, values in enumerate(columns)),
            ]
        )
    table = Table(
        title="Effective rate, log2 of the rate over the weights' squared norm",
        header=["pair", "before the first step", "over the last quarter", "test accuracy"],
        rows=lines,
        note="Mean ± standard deviation over seeds; of an effective rate the mean over the three layers before norms.",
    )
    words = "; ".join(f"{line[0]}: {line[1]} before, {line[2]} after, accuracy {line[3]}" for line in lines)
    text = f"Curves by epoch of effective rate and test accuracy. {words}."
    return Chart(name="weight-equilibrium", title="Rate times decay", panels=panels, text=text), table


CLAIM = Claim(
    id="weight-equilibrium",
    number="E38",
    title="With batch normalization, rate times weight decay decides the effective rate that training settles at",
    statement="Behind a batch norm weight decay does not limit what the net computes. It holds the norm of the "
    "weights at an equilibrium, and the effective rate there, the rate over their squared norm, goes with the root "
    "of rate times decay.",
    source="van Laarhoven 2017, L2 regularization versus batch and weight normalization, arXiv:1706.05350, section 3",
    prediction="Over the last quarter of the epochs the effective rates at rate 0.2 with decay 0.02 and at rate "
    "0.05 with decay 0.08 are nearer than a quarter of an octave, though they begin two octaves apart. Beside it: "
    "the test accuracies of the two pairs are within two points.",
    question=SAME,
    premises=(LEARNT, SETTLED),
    details=(ACCURACY,),
    settings_rule="Three hidden layers of 100 with ReLU and torch's initial weights, plain gradient descent with decay "
    "on the weights before the norms alone. Rates, decays and epochs are such that rate times decay times steps is "
    "about 5 for the first two pairs. Taken for granted is that both have settled: that from the third quarter of the "
    "epochs to the last their effective rates move by less than a quarter of an octave. A third pair, with a quarter "
    "of the product, is shown and not judged: it needs 4 times as many epochs to settle.",
    meaning={
        "supported": "Two pairs with the same product settle at the same effective rate, though they begin two octaves "
        "apart: of rate and decay the norms leave the product.",
        "refuted": "Two pairs with the same product do not settle at the same effective rate: what the rate does to "
        "gamma, beta and the last layer, which no norm follows, counts as well.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=30, train_images=3000, test_images=2000)},
    variants=tuple((("pair", pair),) for pair in PAIRS),
    sets=("learning_rate", "weight_decay"),
    measure=measure,
    judge=decide,
    show=show,
)
