"""E4: batch normalization makes larger learning rates work; at 0.5 the source's net without it stays at chance."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from statistics import fmean, stdev
from typing import Any

from ..charts import Chart, Line, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_variants
from ..data import Dataset
from ..networks import LeNet5
from ..own import build_network
from ..premises import chance
from ..rows import as_number, compared_norms, mean_curve, of_norm, per_seed, spread_in_words, where
from ..training import TrainingSettings, train, with_seed
from ..verdicts import Reproduced, Rule, Verdict, conclude, paired, shares

__all__ = ["CLAIM"]

RATES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
LARGE = 0.5
FACTOR = 2
# Of so many seeds of five a rate must train this many to count in the table as one that works.
MOST = 0.8
LARGER = Rule(
    effect=f"share of seeds in which the largest rate that trains with the norm is at least {FACTOR} times that "
    "without",
    unit="",
    direction="above",
    line=0.5,
    kind="share",
)
TRAINS = Rule(
    effect=f"share of seeds in which both sides train at the smallest rate, {RATES[0]:g}",
    unit="",
    direction="above",
    line=0.5,
    kind="share",
)
RATIO = Rule(
    effect="log2 of the largest rate that trains, with the norm minus without",
    unit="octaves",
    direction="above",
    line=math.log2(FACTOR),
)
# The source's figure 5, without a norm at a rate of 0.5, and how near ours must be.
SOURCE_LOSS, WITHIN = 2.25, 0.1
LOWER = Rule(
    effect=f"training loss of the last epoch at a rate of {LARGE}, with the norm minus without",
    unit="nats",
    direction="below",
    line=-0.5,
)
STEADIER = Rule(
    effect=f"deviation of the loss from step to step in the last epoch at a rate of {LARGE}, with the norm minus "
    "without",
    unit="nats",
    direction="below",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=3, batch_size=64, optimizer="sgd", learning_rate=LARGE)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train LeNet-5 at the cell's rate and yield each epoch's losses and test accuracy."""
    settings = replace(cell.settings, learning_rate=float(dict(cell.variant)["rate"]))
    model = with_seed(lambda: build_network(cell.network, cell.norm, LeNet5), cell.seed)
    for epoch in train(model, dataset, settings, cell.seed, cell.device):
        yield asdict(epoch)


def final_loss(run: Sequence[Row]) -> float:
    """Return the last epoch's training loss; chance where it is not finite or worse than chance."""
    loss, most = as_number(run[-1]["train_loss"]), loss_at_chance(run[-1])
    return min(loss, most) if math.isfinite(loss) else most


def loss_at_chance(row: Row) -> float:
    """Return the loss of equal shares for all classes: a run that diverged counts as one that learnt nothing."""
    return -math.log(chance(row))


def trained(run: Sequence[Row]) -> bool:
    """Tell whether a run learnt: its last epoch's training loss is below half of chance."""
    return final_loss(run) < loss_at_chance(run[-1]) / 2


def largest_rates(rows: Sequence[Row]) -> dict[int, float]:
    """Return, for each seed whose rates have all been run, the largest at which it trains; 0 where none does."""
    by_rate = {rate: per_seed(where(rows, rate=rate), lambda run: float(trained(run))) for rate in RATES}
    seeds = set.intersection(*(set(runs) for runs in by_rate.values()))
    return {seed: max((rate for rate in RATES if by_rate[rate][seed]), default=0.0) for seed in sorted(seeds)}


def unsteadiness(run: Sequence[Row]) -> float:
    """Return the standard deviation of the last epoch's losses per step, each at most at chance."""
    losses, most = [as_number(loss) for loss in run[-1]["step_losses"]], loss_at_chance(run[-1])
    return stdev(min(loss, most) if math.isfinite(loss) else most for loss in losses)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge how far the rates that train reach on either side; beside it the runs at the source's rate."""
    candidate, baseline = compared_norms(rows)
    sides = [of_norm(where(rows, rate=LARGE), norm) for norm in (candidate, baseline)]
    losses = [per_seed(side, final_loss) for side in sides]
    steadiness = [per_seed(side, unsteadiness) for side in sides]
    largest = [largest_rates(of_norm(rows, norm)) for norm in (candidate, baseline)]
    pairs = {seed: (largest[0][seed], largest[1][seed]) for seed in largest[0].keys() & largest[1].keys()}
    octaves = [{seed: math.log2(rate) for seed, rate in side.items() if rate > 0} for side in largest]
    smallest = [per_seed(of_norm(where(rows, rate=RATES[0]), norm), trained) for norm in (candidate, baseline)]
    both = {seed: bool(smallest[0][seed] and smallest[1][seed]) for seed in smallest[0].keys() & smallest[1].keys()}
    return conclude(
        shares(LARGER, {seed: ours >= FACTOR * theirs for seed, (ours, theirs) in pairs.items()}),
        premises=[shares(TRAINS, both)],
        details=[paired(RATIO, *octaves), paired(LOWER, *losses), paired(STEADIER, *steadiness)],
        reproduced=_reproduced(rows),
        compared=f"{candidate} against {baseline}",
    )


def _reproduced(rows: Sequence[Row]) -> list[Reproduced]:
    """Put our mean loss at the source's rate without a norm beside its figure."""
    losses = list(per_seed(where(of_norm(rows, "none"), rate=LARGE, data="fashion-mnist"), final_loss).values())
    what = f"training loss at a rate of {LARGE:g}, without norm (figure 5)"
    return [Reproduced(what=what, source=SOURCE_LOSS, ours=fmean(losses) if losses else None, within=WITHIN)]


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show figure 5, the loss by step for each rate on either side, and the last loss against the rate."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    panels = [_losses(of_norm(rows, norm), norm) for norm in norms]
    last = [
        over_variants(of_norm(rows, norm), "rate", final_loss, label=norm_label(norm), **look)
        for norm, look in zip(norms, looks(norms), strict=True)
    ]
    panels.append(Panel(title="Last epoch", x_label="learning rate", y_label="training loss", marks=last, log_x=True))
    lines = [
        [norm, *(spread_in_words(_values(of_norm(rows, norm), rate), digits=3) for rate in RATES)] for norm in norms
    ]
    table = Table(
        title="Training loss of the last epoch, by learning rate",
        header=["norm", *(f"{rate:g}" for rate in RATES)],
        rows=lines,
        note="Mean ± standard deviation over seeds. A run that diverged counts as chance, "
        f"{loss_at_chance(rows[0]):.4f}.",
    )
    dead = Table(
        title="Seeds that do not train, by learning rate",
        header=["norm", *(f"{rate:g}" for rate in RATES), "largest rate that works"],
        rows=[_dead(of_norm(rows, norm), norm) for norm in norms],
        note="A run trains where the last epoch's training loss is below half of chance. A rate works where at least "
        f"{MOST:.0%} of the seeds train.",
    )
    words = "; ".join(f"{norm_label(line[0])} {line[1 + RATES.index(LARGE)]}" for line in lines)
    text = f"Loss by epoch for each rate, and the last loss against the rate. At a rate of {LARGE}: {words}."
    return Chart(name="learning-rate", title="Loss by learning rate", panels=panels, text=text), table, dead


def _dead(rows: Sequence[Row], norm: str) -> list[str]:
    """Return a line of the table of runs that do not train."""
    runs = {rate: list(per_seed(where(rows, rate=rate), trained).values()) for rate in RATES}
    works = [rate for rate, trains in runs.items() if trains and sum(trains) >= MOST * len(trains)]
    cells = [f"{len(trains) - sum(trains)} of {len(trains)}" if trains else "not run" for trains in runs.values()]
    return [norm, *cells, f"{max(works):g}" if works else "none"]


def _values(rows: Sequence[Row], rate: float) -> list[float]:
    return list(per_seed(where(rows, rate=rate), final_loss).values())


def _losses(rows: Sequence[Row], norm: str) -> Panel:
    """Return the training loss per epoch, one line per rate."""
    marks = []
    for rate, look in zip(RATES, looks([norm] * len(RATES)), strict=True):
        runs = [where(where(rows, rate=rate), seed=seed) for seed in sorted({row["seed"] for row in rows})]
        curves = [[final_loss([row]) for row in run] for run in runs if run]
        if curves:
            mean, low, high = mean_curve(curves)
            epochs = list(range(1, len(mean) + 1))
            marks.append(Line(label=f"rate {rate:g}", x=epochs, y=mean, low=low, high=high, **look))
    return Panel(title=norm_label(norm).capitalize(), x_label="epoch", y_label="training loss", marks=marks)


CLAIM = Claim(
    id="learning-rate",
    number="E4",
    title="Batch normalization makes larger learning rates work",
    statement="The net with batch normalization trains at rates at which the net without it does not. At a learning "
    "rate of 0.5 the net without batch normalization stays near a loss of 2.25, while the net with it gets lower and "
    "steadier.",
    source="Batch normalization built from scratch, section 3.3, figure 5; repeated in the sources S1, S3 and S4",
    prediction=f"In more than half of all seeds the largest rate that trains is at least {FACTOR} times larger with "
    "batch normalization. Beside it: at 0.5 the loss is lower by more than 0.5 and varies less from step to step, and "
    "without a norm it stays at the 2.25 of the source's figure (chance is 2.3026).",
    question=LARGER,
    premises=(TRAINS,),
    details=(RATIO, LOWER, STEADIER),
    design=2,
    settings_rule="Plain gradient descent on batches of 64 at every rate of a grid that holds the source's 0.5; the "
    "source names neither optimiser nor batch size. A loss that is not finite, or above chance, counts as chance. Runs "
    "split into ones that train and ones that die, so seeds are counted and no mean is taken. All 60,000 images of "
    "FashionMNIST.",
    meaning={
        "supported": "In most seeds the rates that train reach at least twice as far with the norm. The tables show "
        "which rates kill which net.",
        "refuted": "In most seeds the rates that train do not reach twice as far with the norm. Read the table by rate "
        "before drawing a lesson.",
        "inconclusive": "In some seeds the norm trains at twice the rate and in others it does not, or too few were "
        "run to count.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    # A share of seeds cannot be told from a half by five.
    seeds=10,
    settings={"digits": replace(SETTINGS, epochs=5), "fashion-mnist": SETTINGS},
    variants=tuple((("rate", rate),) for rate in RATES),
    measure=measure,
    judge=decide,
    show=show,
    own_network=True,
)
