"""E27: where the stored variance starts is forgotten after fifty batches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from ...layers import BatchNorm1d, BatchNorm2d
from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_variants
from ..data import Dataset
from ..networks import LeNet5
from ..premises import LEARNT, learnt
from ..probes import probe
from ..rows import as_number, per_seed, spread_in_words, where
from ..training import TrainingSettings, evaluate, large_batch, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "build"]

# After so many batches the net predicts for the test images.
BATCHES = (1, 2, 5, 10, 20, 50)
FIRST, EARLY, LATE = 1, 5, 50
# No distance at all has no logarithm.
LEAST = 1e-9
FORGOTTEN = Rule(
    effect=f"distance between the test losses with the two starts, after {LATE} batches",
    unit="nats",
    direction="below",
    line=0.01,
)
MATTERS = Rule(
    effect="log10 of the distance between the test losses with the two starts, after the first batch",
    unit="decades",
    direction="above",
    line=-1.0,
)
ZERO = Rule(
    effect=f"log10 of the test loss, mean over what is measured up to {EARLY} batches, start at 0 minus start at 1",
    unit="decades",
    direction="above",
    line=0.0,
)
NEITHER = Rule(
    effect=f"log10 of the test loss, mean over what is measured up to {EARLY} batches, average without a start minus "
    "start at 1",
    unit="decades",
    direction="below",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=1, batch_size=16, optimizer="adam", learning_rate=0.002)
STARTS: Mapping[str, str] = {"0": "starts at 0", "1": "starts at 1", "none": "average without a start"}


def build(start: str) -> LeNet5:
    """Return LeNet-5 whose stored variances start at this value, or are averages in which no start has a part."""
    model = LeNet5("batch")
    for name, layer in list(model.named_children()):
        if not isinstance(layer, BatchNorm1d | BatchNorm2d):
            continue
        if start == "none":
            setattr(model, name, type(layer)(layer.num_features, average="debiased"))
        else:
            assert layer.running_var is not None
            layer.running_var.fill_(float(start))
    return model


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train, and after some of the batches, and at the end, predict for the test images; starts differ in nothing else.

    What is stored has no part in training, so that all starts go through the same weights.
    """
    model = with_seed(lambda: build(str(dict(cell.variant)["start"])), cell.seed)
    images, labels = dataset.test_images.to(cell.device), dataset.test_labels.to(cell.device)
    found: list[dict[str, Any]] = []
    done = 0

    def look() -> dict[str, Any]:
        with probe(model) as copied:
            test_loss, test_accuracy = evaluate(copied, images, labels)
        return {"batches": done, "test_loss": test_loss, "test_accuracy": test_accuracy}

    def step(network: nn.Module, batch: Tensor, expected: Tensor) -> Tensor:
        nonlocal done
        if done in BATCHES:
            found.append(look())
        done += 1
        return large_batch(network, batch, expected)

    for _ in train(model, dataset, cell.settings, cell.seed, cell.device, gradients=step):
        yield from found
        found.clear()
    yield look()


def _at(batches: int, run: Sequence[Row]) -> float:
    (row,) = where(run, batches=batches)
    return as_number(row["test_loss"])


def _early(run: Sequence[Row]) -> float:
    # The losses are of different orders; a loss of exactly 0 has no logarithm and does not occur before the net learns.
    return fmean(math.log10(as_number(row["test_loss"])) for row in run if row["batches"] <= EARLY)


def _apart(rows: Sequence[Row], batches: int) -> dict[int, float]:
    """Return each seed's distance between the losses with the two starts."""
    zero, one = (per_seed(where(rows, start=start), partial(_at, batches)) for start in ("0", "1"))
    return {seed: abs(zero[seed] - one[seed]) for seed in sorted(zero.keys() & one.keys())}


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what is left of the start after many batches; beside it, what the first predictions are."""
    first = {seed: math.log10(max(apart, LEAST)) for seed, apart in _apart(rows, FIRST).items()}
    early = {start: per_seed(where(rows, start=start), _early) for start in STARTS}
    return conclude(
        single(FORGOTTEN, _apart(rows, LATE)),
        premises=[learnt(*(where(rows, start=start) for start in ("0", "1"))), single(MATTERS, first)],
        details=[paired(ZERO, early["0"], early["1"]), paired(NEITHER, early["none"], early["1"])],
        compared="start at 0 against start at 1",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show loss and accuracy against the batches seen, for each start."""
    early = [row for row in rows if row["batches"] in BATCHES]
    starts = [start for start in STARTS if where(early, start=start)]

    def last(column: str, run: Sequence[Row]) -> float:
        return as_number(run[-1][column])

    panels = [
        Panel(
            title=title,
            x_label="batches seen",
            y_label=unit,
            marks=[
                over_variants(where(early, start=start), "batches", partial(last, column), label=STARTS[start], **look)
                for start, look in zip(starts, looks(["batch"] * len(starts)), strict=True)
            ],
            log_x=True,
            log_y=column == "test_loss",
            x_ticks=BATCHES,
        )
        for title, unit, column in (
            ("Test loss", "cross-entropy", "test_loss"),
            ("Test accuracy", "accuracy", "test_accuracy"),
        )
    ]
    lines = [
        [
            STARTS[start],
            *(
                spread_in_words(
                    list(per_seed(where(rows, start=start, batches=batches), partial(last, "test_loss")).values()), 3
                )
                for batches in BATCHES
            ),
        ]
        for start in starts
    ]
    table = Table(
        title="Test loss by the batches seen",
        header=["stored variance", *(str(batches) for batches in BATCHES)],
        rows=lines,
        note="Mean ± standard deviation over seeds. The stored mean starts at 0 in the first two rows. The weights are "
        "the same in all rows.",
    )
    words = "; ".join(f"{line[0]}: {', '.join(line[1:])}" for line in lines)
    text = f"Test loss after {', '.join(map(str, BATCHES))} batches, mean over seeds. {words}."
    return Chart(name="variance-start", title="The first predictions", panels=panels, text=text), table


CLAIM = Claim(
    id="variance-start",
    number="E27",
    title=f"Where the stored variance starts, at 0 or at 1, is forgotten after {LATE} batches",
    statement="The stored variance may start at 0 or at 1: with a tenth taken from every batch the start counts for "
    f"0.9 to the k-th after k batches, and after {LATE} of them it makes no difference to the predictions.",
    source="The source S0, section 2.1, whose moving_var starts at 0; the source S2, whose running_var starts at 1, as "
    "torch's",
    prediction=f"After {LATE} batches the test losses with the two starts are nearer to each other than 0.01. Beside "
    f"it: over the first {EARLY} batches a start at 0 predicts worse than a start at 1, and an average in which no "
    "start has a part better.",
    question=FORGOTTEN,
    premises=(LEARNT, MATTERS),
    details=(ZERO, NEITHER),
    settings_rule="LeNet-5 with E1's optimiser and rate, batches of 16, momentum 0.1, torch's default. Nothing was "
    "searched. The starts differ in the stored variance alone, and what is stored has no part in training, so that the "
    "weights are the same. Taken for granted is that after the first batch the losses differ by 0.1.",
    meaning={
        "supported": f"After {LATE} batches the start is forgotten. Before that, do not predict with stored "
        "statistics, or have them debiased.",
        "refuted": f"The start is still seen after {LATE} batches. Where a channel varies little, what is left of a "
        "start at 1 is large beside it.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=1000, test_images=2000)},
    variants=tuple((("start", start),) for start in STARTS),
    measure=measure,
    judge=decide,
    show=show,
)
