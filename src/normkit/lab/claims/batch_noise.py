"""E11: a sample's output depends on its batch mates, and more of that noise regularises more."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...layers import GhostBatchNorm1d
from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_variants
from ..data import Dataset
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..probes import probe
from ..rows import as_number, matched, of_norm, per_seed, spread_in_words, where
from ..search import RATE_RULE, best_rate
from ..training import TrainingSettings, evaluate, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "build", "slope", "spread"]

# Every step takes 64 images; the norms take their statistics from parts of so many.
BATCH = 64
PARTS = (4, 8, 16, 32, 64)
RATES = (0.03, 0.1, 0.3)
SAMPLES, DRAWS = 16, 32
MATCHED = Rule(
    effect="test loss at the same training loss, statistics of 4 minus statistics of 64",
    unit="nats",
    direction="below",
    line=0.0,
    band=(-0.01, 0.01),
)
GAP = Rule(
    effect="training minus test accuracy after the last epoch, with the norm (statistics of 64) minus without",
    unit="",
    direction="below",
    line=0.0,
)
NOISE = Rule(
    effect="training minus test accuracy after the last epoch, with the norm, statistics of 4 minus statistics of 64",
    unit="",
    direction="below",
    line=0.0,
)
SPREAD = Rule(
    effect="deviation of a sample's output over random batch mates (statistics of 64), over the outputs' own deviation",
    unit="",
    direction="above",
    line=0.05,
)
SLOPE = Rule(
    effect="distance from -1/2 of the slope of log spread against log of the images the statistics are taken from",
    unit="",
    direction="below",
    line=0.1,
)
SETTINGS = TrainingSettings(epochs=40, batch_size=BATCH, optimizer="sgd", learning_rate=0.0, train_images=320)


def build(norm: str, part: int = BATCH) -> DenseNetwork:
    """Return three hidden layers of 128 with ReLU; batch norms take their statistics from parts of the batch."""
    model = DenseNetwork([128] * 3)
    if norm == "batch":
        model.norms = nn.ModuleList(GhostBatchNorm1d(128, ghost_size=part) for _ in range(3))
    return model


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train and yield each epoch's training and test accuracy; after the last, the spread of a sample's output."""
    part = int(dict(cell.variant)["part"])
    sizes = PARTS if (cell.norm, part) == ("batch", BATCH) else (part,)
    rate = best_rate(build, cell.norm, dataset, cell.settings, RATES, cell.device)
    model = with_seed(lambda: build(cell.norm, part), cell.seed)
    images, labels = dataset.train_images.to(cell.device), dataset.train_labels.to(cell.device)
    for epoch in train(model, dataset, replace(cell.settings, learning_rate=rate), cell.seed, cell.device):
        last = epoch.epoch == cell.settings.epochs
        fit_loss, train_accuracy = evaluate(model, images, labels)
        yield {
            "rate": rate,
            "fit_loss": fit_loss,
            "train_accuracy": train_accuracy,
            "sizes": sizes,
            "spreads": [spread(model, dataset, size, cell.seed) for size in sizes] if last else [],
            **asdict(replace(epoch, step_losses=())),
        }


def spread(model: nn.Module, dataset: Dataset, size: int, seed: int) -> float:
    """Return how far a sample's logits vary over random batch mates, in deviations of the logits over samples.

    Each of a few samples is passed, as in training, in many batches of this size whose other members are drawn from
    the training images.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(dataset.train_labels)
    device = next(model.parameters()).device
    with probe(model) as copied, torch.no_grad():
        copied.train()
        for layer in copied.modules():
            if isinstance(layer, GhostBatchNorm1d):
                layer.ghost_size = size
        logits = []
        for sample in range(SAMPLES):
            batches = torch.randint(count, (DRAWS, size), generator=generator)
            batches[:, 0] = sample
            outputs = copied(dataset.train_images[batches.flatten()].to(device))
            logits.append(outputs.view(DRAWS, size, -1)[:, 0].double())
    # (samples, draws, classes)
    stacked = torch.stack(logits)
    within = stacked.var(1).mean()
    between = stacked.mean(1).var(0).mean()
    return float((within / between).sqrt())


def slope(spreads: Sequence[float]) -> float:
    """Return the least-squares slope of log spread against log size: -1/2 where it falls as one over the root.

    >>> round(slope([size ** -0.5 for size in PARTS]), 6)
    -0.5
    """
    x = [math.log(size) for size in PARTS]
    y = [math.log(value) if value > 0 else math.nan for value in spreads]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.fsum((a - mean_x) ** 2 for a in x)


def _gap(run: Sequence[Row]) -> float:
    return as_number(run[-1]["train_accuracy"]) - as_number(run[-1]["test_accuracy"])


def _last(column: str, run: Sequence[Row]) -> float:
    return as_number(run[-1][column])


def _spread_at(size: int, run: Sequence[Row]) -> float:
    return as_number(run[-1]["spreads"][run[-1]["sizes"].index(size)])


def _off(run: Sequence[Row]) -> float:
    return abs(slope([as_number(value) for value in run[-1]["spreads"]]) + 0.5)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the gap against no norm and between sizes, and the spread of the nets with statistics of 64."""
    usual = where(of_norm(rows, "batch"), part=BATCH)
    noisy = where(of_norm(rows, "batch"), part=PARTS[0])
    plain = where(of_norm(rows, "none"), part=BATCH)
    return conclude(
        paired(MATCHED, *matched(noisy, usual, fit="fit_loss", read="test_loss")),
        premises=[learnt(noisy, usual)],
        details=[
            paired(NOISE, per_seed(noisy, _gap), per_seed(usual, _gap)),
            paired(GAP, per_seed(usual, _gap), per_seed(plain, _gap)),
            single(SPREAD, per_seed(usual, partial(_spread_at, BATCH))),
            single(SLOPE, per_seed(usual, _off)),
        ],
        compared="statistics of 4 against statistics of 64",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show gap, test accuracy and spread against the number of images the statistics are taken from."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))

    def panel(title: str, unit: str, reduce: Any, sides: Sequence[str], log_y: bool = False) -> Panel:
        marks = [
            over_variants(of_norm(rows, norm), "part", reduce, label=norm_label(norm), **look)
            for norm, look in zip(sides, looks(sides), strict=True)
        ]
        label = "images the statistics are taken from"
        return Panel(title=title, x_label=label, y_label=unit, marks=marks, log_x=True, log_y=log_y, x_ticks=PARTS)

    panels = [
        panel("Training minus test accuracy", "accuracy", _gap, norms),
        panel("Test accuracy, last epoch", "accuracy", partial(_last, "test_accuracy"), norms),
    ]
    if "batch" in norms:
        own = "share of the outputs' own"
        panels.append(panel("Spread of a sample's output", own, _own_spread, ["batch"], log_y=True))
    lines = []
    for norm in norms:
        for size in PARTS:
            mine = where(of_norm(rows, norm), part=size)
            # Without a norm the parts of a batch make no difference.
            if mine and (norm != "none" or size == BATCH):
                columns = (_gap, partial(_last, "test_accuracy"), _own_spread)
                cells = [spread_in_words(list(per_seed(mine, column).values())) for column in columns]
                lines.append([norm, str(size) if norm != "none" else "", f"{mine[0]['rate']:g}", *cells])
    table = Table(
        title="Gap and spread by the number of images that statistics are taken from",
        header=["norm", "statistics of", "learning rate", "training minus test accuracy", "test accuracy", "spread"],
        rows=lines,
        note="Mean ± standard deviation over seeds, after the last epoch. Every step takes 64 images in every row. "
        "Spread: of a sample's logits over random batch mates, over the logits' deviation between samples.",
    )
    words = "; ".join(f"{line[0]} {line[1]}: gap {line[3]}, spread {line[5]}" for line in lines)
    text = f"Curves against the number of images the statistics are taken from. {words}."
    return Chart(name="batch-noise", title="Noise of the batch, and the gap", panels=panels, text=text), table


def _own_spread(run: Sequence[Row]) -> float:
    """Return the spread at the size the net was trained with."""
    return _spread_at(int(run[-1]["part"]), run)


CLAIM = Claim(
    id="batch-noise",
    number="E11",
    title="At the same training loss, statistics of fewer images give batch normalization a lower test loss",
    statement="What a net with batch normalization puts out for a sample depends on the rest of its batch, which acts "
    "like augmentation: fitted equally well, the net does better on the test data the fewer images the statistics are "
    "taken from.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.4; repeated in the sources S1 and S2; compared at "
    "matched fit after Luo et al. 2019, arXiv:1809.00846",
    prediction="At the same training loss the test loss is lower with statistics of 4 images than of 64. Beside it: "
    "the gap in accuracy is smaller with 4 than with 64, and with the norm than without, whatever each has fitted. A "
    "sample's output varies over random batches of 64 by more than 5 % of the outputs' own deviation, and this spread "
    "falls as one over the root of the size: a slope of -1/2, within 0.1.",
    question=MATCHED,
    premises=(LEARNT,),
    details=(NOISE, GAP, SPREAD, SLOPE),
    design=2,
    settings_rule="Three hidden layers of 128 with ReLU on few training images, so that there is a gap: 320 of digits, "
    "1024 of FashionMNIST. Every step takes 64 images on every side; only the parts of them that the norms take "
    "statistics from differ (ghost batch norm), so that the noise of the gradient stays the same. Plain gradient "
    f"descent at 0.03, 0.1 or 0.3, searched with statistics of 64. {RATE_RULE} Compared is the test loss at the lowest "
    "training loss that both sides reach, both losses taken with stored statistics and read between the epochs.",
    meaning={
        "supported": "Fitted equally well, the net that saw more of the batch's noise does better on the test data. It "
        "is a side effect that goes away as batches grow.",
        "refuted": "Fitted equally well, the net that saw more of the batch's noise does worse on the test data. Noise "
        "that is there need not help.",
        "inconclusive": "The interval holds the line: the noise is measured, but not what it does to the test loss. "
        "More seeds or harder data decide.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    any_norm=False,
    seeds=5,
    settings={
        "digits": SETTINGS,
        "fashion-mnist": replace(SETTINGS, epochs=30, train_images=1024, test_images=2000),
    },
    variants=tuple((("part", size),) for size in (4, 16, BATCH)),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
