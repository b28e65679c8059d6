"""E4: large learning rates work with batch normalization; at 0.5 the net without it stays at chance."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from statistics import stdev
from typing import Any

from ..charts import Chart, Line, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import norm_label, over_variants
from ..data import Dataset
from ..networks import LeNet5
from ..own import build_network
from ..rows import as_number, compared_norms, mean_curve, of_norm, per_seed, spread_in_words, where
from ..training import TrainingSettings, train, with_seed
from ..verdicts import Rule, Verdict, combine, judge, judge_values

__all__ = ["CLAIM"]

RATES = (0.01, 0.05, 0.1, 0.5, 1.0)
LARGE = 0.5
# A run that diverged counts as one that learnt nothing: the loss of ten equal shares.
CHANCE = math.log(10)
STUCK = Rule(
    effect=f"training loss of the last epoch at a rate of {LARGE}, without a norm",
    unit="nats",
    direction="above",
    threshold=2.0,
    predicted=2.25,
)
LOWER = Rule(
    effect=f"training loss of the last epoch at a rate of {LARGE}, with the norm minus without",
    unit="nats",
    direction="below",
    threshold=-0.5,
)
STEADIER = Rule(
    effect=f"deviation of the loss from step to step in the last epoch at a rate of {LARGE}, with the norm minus "
    "without",
    unit="nats",
    direction="below",
    threshold=0.0,
)
SETTINGS = TrainingSettings(epochs=5, batch_size=64, optimizer="sgd", learning_rate=LARGE)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train LeNet-5 at the cell's rate and yield each epoch's losses and test accuracy."""
    settings = replace(cell.settings, learning_rate=float(dict(cell.variant)["rate"]))
    model = with_seed(lambda: build_network(cell.network, cell.norm, LeNet5), cell.seed)
    for epoch in train(model, dataset, settings, cell.seed, cell.device):
        yield asdict(epoch)


def final_loss(run: Sequence[Row]) -> float:
    """Return the last epoch's training loss; chance where it is not finite or worse than chance."""
    loss = as_number(run[-1]["train_loss"])
    return min(loss, CHANCE) if math.isfinite(loss) else CHANCE


def unsteadiness(run: Sequence[Row]) -> float:
    """Return the standard deviation of the last epoch's losses per step, each at most at chance."""
    losses = [as_number(loss) for loss in run[-1]["step_losses"]]
    return stdev(min(loss, CHANCE) if math.isfinite(loss) else CHANCE for loss in losses)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the runs at the large rate."""
    candidate, baseline = compared_norms(rows)
    sides = [of_norm(where(rows, rate=LARGE), norm) for norm in (candidate, baseline)]
    losses = [per_seed(side, final_loss) for side in sides]
    steadiness = [per_seed(side, unsteadiness) for side in sides]
    parts = [judge(LOWER, *losses), judge_values(STUCK, losses[1]), judge(STEADIER, *steadiness)]
    return combine(parts, compared=f"{candidate} against {baseline}")


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show figure 5, the loss by step for each rate on either side, and the last loss against the rate."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    panels = [_losses(of_norm(rows, norm), norm) for norm in norms]
    last = [
        over_variants(of_norm(rows, norm), "rate", final_loss, label=norm_label(norm), colour=colour)
        for colour, norm in enumerate(norms)
    ]
    panels.append(Panel(title="Last epoch", x_label="learning rate", y_label="training loss", marks=last, log_x=True))
    lines = [
        [norm, *(spread_in_words(_values(of_norm(rows, norm), rate), digits=3) for rate in RATES)] for norm in norms
    ]
    table = Table(
        title="Training loss of the last epoch, by learning rate",
        header=["norm", *(f"{rate:g}" for rate in RATES)],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. A run that diverged counts as chance, {CHANCE:.4f}.",
    )
    words = "; ".join(f"{norm_label(line[0])} {line[1 + RATES.index(LARGE)]}" for line in lines)
    text = f"Loss by epoch for each rate, and the last loss against the rate. At a rate of {LARGE}: {words}."
    return Chart(name="learning-rate", title="Loss by learning rate", panels=panels, text=text), table


def _values(rows: Sequence[Row], rate: float) -> list[float]:
    return list(per_seed(where(rows, rate=rate), final_loss).values())


def _losses(rows: Sequence[Row], norm: str) -> Panel:
    """Return the training loss per epoch, one line per rate."""
    marks = []
    for colour, rate in enumerate(RATES):
        runs = [where(where(rows, rate=rate), seed=seed) for seed in sorted({row["seed"] for row in rows})]
        curves = [[final_loss([row]) for row in run] for run in runs if run]
        if curves:
            mean, low, high = mean_curve(curves)
            epochs = list(range(1, len(mean) + 1))
            marks.append(Line(label=f"rate {rate:g}", x=epochs, y=mean, low=low, high=high, colour=colour))
    return Panel(title=norm_label(norm).capitalize(), x_label="epoch", y_label="training loss", marks=marks)


CLAIM = Claim(
    id="learning-rate",
    number="E4",
    title="Batch normalization makes large learning rates work",
    statement="At a learning rate of 0.5 the net without batch normalization stays near a loss of 2.25, while the net "
    "with it gets lower and steadier.",
    source="Batch normalization built from scratch, section 3.3, figure 5; repeated in the sources S1, S3 and S4",
    prediction="At a rate of 0.5 the last epoch's training loss stays above 2 without a norm (the source's figure "
    "shows 2.25, chance is 2.3026), is lower by more than 0.5 with batch normalization, and varies less from step to "
    "step.",
    rules=(LOWER, STUCK, STEADIER),
    settings_rule="Plain gradient descent on batches of 64 at every rate of a grid that holds the source's 0.5; the "
    "source names neither optimiser nor batch size. A loss that is not finite, or above chance, counts as chance. "
    "On FashionMNIST 3,000 training and 2,000 test images are used, drawn by class, for the sake of time.",
    meaning={
        "supported": "At the source's rate the net learns only with the norm. The table shows how far the range of "
        "rates that work reaches on either side.",
        "refuted": "At least one part of the source's figure does not show here: the net without a norm learns at "
        "0.5, or the net with it is not lower or not steadier. Read the table by rate before drawing a lesson.",
        "inconclusive": "An interval holds its line: at this rate some seeds learn and others do not, or too few were "
        "run. More seeds make the intervals narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    variants=tuple((("rate", rate),) for rate in RATES),
    measure=measure,
    judge=decide,
    show=show,
    own_network=True,
)
