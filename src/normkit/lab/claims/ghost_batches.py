"""E35: ghost batches give a large batch the small batch's generalization back."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ...layers import GhostBatchNorm1d
from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..rows import mean_of, per_seed, spread_in_words, where
from ..search import RATE_RULE, best_rate
from ..training import TrainingSettings, evaluate, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "build"]

SMALL, LARGE = 16, 256
RATES = (0.03, 0.1, 0.3)
# The accuracy is read over the last so many measurements, each after as many steps on either side.
LATE = 3
WAYS = {"small": "batches of 16", "large": "batches of 256", "ghost": "batches of 256, statistics of 16"}
RECOVERS = Rule(
    effect=f"test accuracy, mean over the last {LATE} of ten measurements, batches of 256 with statistics of 16 minus "
    "batches of 256 with their own",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.005, 0.005),
)
COSTS = Rule(
    effect=f"test accuracy, mean over the last {LATE} of ten measurements, batches of 16 minus batches of 256",
    unit="",
    direction="above",
    line=0.0,
)
LEFT = Rule(
    effect=f"test accuracy, mean over the last {LATE} of ten measurements, batches of 16 minus batches of 256 with "
    "statistics of 16",
    unit="",
    direction="below",
    line=0.005,
)
SETTINGS = TrainingSettings(epochs=10, batch_size=SMALL, optimizer="sgd", learning_rate=0.0, train_images=512)


def build(norm: str, part: int) -> DenseNetwork:
    """Return three hidden layers of 128 with ReLU whose norms take their statistics from parts of so many images."""
    model = DenseNetwork([128] * 3)
    model.norms = nn.ModuleList(GhostBatchNorm1d(128, ghost_size=part) for _ in range(3))
    return model


def settings_of(way: str, settings: TrainingSettings) -> TrainingSettings:
    """Return the settings of a side: a large batch has as many more epochs as it is larger, so that steps are equal."""
    if way == "small":
        return settings
    times = LARGE // SMALL
    return replace(settings, batch_size=settings.batch_size * times, epochs=settings.epochs * times)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train for the same number of steps, and measure after the same steps on every side."""
    way = str(dict(cell.variant)["way"])
    settings = settings_of(way, cell.settings)
    side = partial(build, part=LARGE if way == "large" else SMALL)
    rate = best_rate(side, cell.norm, dataset, settings, RATES, cell.device)
    model = with_seed(lambda: side(cell.norm), cell.seed)
    images, labels = dataset.train_images.to(cell.device), dataset.train_labels.to(cell.device)
    times = settings.epochs // cell.settings.epochs
    for epoch in train(model, dataset, replace(settings, learning_rate=rate), cell.seed, cell.device):
        if epoch.epoch % times:
            continue
        fit_loss, _ = evaluate(model, images, labels)
        yield {
            "rate": rate,
            "epoch": epoch.epoch // times,
            "fit_loss": fit_loss,
            "test_loss": epoch.test_loss,
            "test_accuracy": epoch.test_accuracy,
        }


def _late(column: str, run: Sequence[Row]) -> float:
    return mean_of(column, run[-LATE:])


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what ghost batches give the large batch; beside it, the small batch."""
    sides = {way: where(rows, way=way) for way in WAYS}
    accuracies = {way: per_seed(side, partial(_late, "test_accuracy")) for way, side in sides.items()}
    return conclude(
        paired(RECOVERS, accuracies["ghost"], accuracies["large"]),
        premises=[learnt(*sides.values())],
        details=[
            paired(COSTS, accuracies["small"], accuracies["large"]),
            paired(LEFT, accuracies["small"], accuracies["ghost"]),
        ],
        compared="a large batch with small statistics against one with its own",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show training loss and accuracy after the same steps."""
    ways = [way for way in WAYS if where(rows, way=way)]
    panels = [
        Panel(
            title=title,
            x_label="epochs of the small batch, as many steps for all",
            y_label=unit,
            marks=[
                over_epochs(where(rows, way=way), column, label=WAYS[way], **look)
                for way, look in zip(ways, looks(["ghost" if way == "ghost" else "batch" for way in ways]), strict=True)
            ],
        )
        for title, unit, column in (
            ("Training loss", "cross-entropy", "fit_loss"),
            ("Test accuracy", "accuracy", "test_accuracy"),
        )
    ]
    lines = []
    for way in ways:
        mine = where(rows, way=way)
        cells = [
            spread_in_words(list(per_seed(mine, partial(_late, column)).values()))
            for column in ("fit_loss", "test_loss", "test_accuracy")
        ]
        lines.append([WAYS[way], f"{mine[0]['rate']:g}", *cells])
    table = Table(
        title=f"Mean over the last {LATE} measurements",
        header=["step", "learning rate", "training loss", "test loss", "test accuracy"],
        rows=lines,
        note="Mean ± standard deviation over seeds. All sides take the same number of steps.",
    )
    words = "; ".join(f"{line[0]}: test loss {line[3]}, accuracy {line[4]}" for line in lines)
    text = f"Curves of training loss and test accuracy, after the same steps. {words}."
    return Chart(name="ghost-batches", title="Large batches, small statistics", panels=panels, text=text), table


CLAIM = Claim(
    id="ghost-batches",
    number="E35",
    title="Ghost batches make a large batch generalise better",
    statement="A net trained with large batches generalises worse than one trained with small ones. Part of that is "
    "the norm's: with statistics taken from small parts of the large batch, ghost batches, it comes back.",
    source="Hoffer, Hubara and Soudry 2017, Train longer, generalize better, arXiv:1705.08741, algorithm 1",
    prediction=f"With steps of {LARGE} images the test accuracy is higher with statistics of {SMALL} than with those "
    "of the whole batch, after equally many steps; within 0.005 is no difference. Beside it: whether batches of "
    f"{SMALL} are ahead of those of {LARGE} then, and by less than 0.005 of those with ghost batches.",
    question=RECOVERS,
    premises=(LEARNT,),
    details=(COSTS, LEFT),
    settings_rule="Three hidden layers of 128 with ReLU on few training images, 512, so that there is a gap, plain "
    "gradient descent. As the paper trains longer with large batches, all sides take the same number of steps, so that "
    f"a batch of {LARGE} sees the images {LARGE // SMALL} times as often. A side is a batch with its statistics, from "
    f"0.03, 0.1 or 0.3. {RATE_RULE} The accuracy is the mean of the last {LATE} of ten measurements.",
    meaning={
        "supported": "Statistics of small parts made the large batch's net generalise better. Where a batch must be "
        "large, its norms need not be.",
        "refuted": "Statistics of small parts made the large batch's net generalise worse: here their noise costs more "
        "than it regularizes.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, test_images=2000)},
    variants=tuple((("way", way),) for way in WAYS),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
