"""E2: with batch normalization the layers' pre-activations are nearer to a standard normal than without."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..charts import NEUTRAL, Chart, Line, Panel, Table, norm_colour
from ..claim import Cell, Claim, Row
from ..curves import norm_label
from ..data import Dataset
from ..networks import FourConvolutions
from ..premises import LEARNT, learnt
from ..probes import probe, recorded
from ..rows import as_number, compared_norms, mean_and_spread, mean_curve, of_norm, per_seed
from ..training import TrainingSettings, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "distance_to_normal"]

LAYERS = 4
NEARER = Rule(
    effect="distance of the pre-activations from a standard normal, mean over layers, with the norm minus without",
    unit="",
    direction="below",
    line=0.0,
    band=(-0.05, 0.05),
)
NEAR = Rule(
    effect="distance of the pre-activations from a standard normal, mean over layers, with the norm",
    unit="",
    direction="below",
    line=0.25,
)
ALIKE = Rule(
    effect="log10 of the largest layer's deviation over the smallest's, with the norm minus without",
    unit="decades",
    direction="below",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=5, batch_size=64, optimizer="adam", learning_rate=0.002)
# The histogram of a figure: bins of a fifth, from -6 to 6; what lies outside is counted in the note's share.
EDGES = [place / 5 for place in range(-30, 31)]


def distance_to_normal(values: Tensor) -> float:
    """Return the Wasserstein distance of the values from a standard normal: the mean gap between equal quantiles.

    A normal sample of mean m and deviation 1 is at a distance of m.

    >>> round(distance_to_normal(torch.special.ndtri(torch.arange(0.0005, 1, 0.001)) + 2), 3)
    2.0
    """
    ordered = values.double().flatten().sort().values
    count = len(ordered)
    places = (torch.arange(count, dtype=torch.float64, device=ordered.device) + 0.5) / count
    return float((ordered - torch.special.ndtri(places)).abs().mean())


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the net of four convolutions and yield, per epoch, what the four activations take in."""
    model = with_seed(lambda: FourConvolutions(cell.norm), cell.seed)
    names = [f"norms.{place}" for place in range(LAYERS)]
    images = dataset.train_images[:256].to(cell.device)
    for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
        with probe(model) as copied, recorded(copied, names) as seen, torch.no_grad():
            copied.train()
            copied(images)
        outputs = [seen[name][1].double().cpu().flatten() for name in names]
        yield {
            "epoch": epoch.epoch,
            "test_accuracy": epoch.test_accuracy,
            "distances": [distance_to_normal(output) for output in outputs],
            "means": [float(output.mean()) for output in outputs],
            "deviations": [float(output.std()) for output in outputs],
            "densities": [_densities(output) for output in outputs],
        }


def _densities(values: Tensor) -> list[float]:
    """Return the share of values per unit in each bin."""
    counts, _ = torch.histogram(values, torch.tensor(EDGES, dtype=torch.float64))
    return [round(float(count) / len(values) * 5, 5) for count in counts]


def _distance(run: Sequence[Row]) -> float:
    return fmean(as_number(distance) for distance in run[-1]["distances"])


def _unlikeness(run: Sequence[Row]) -> float:
    deviations = [max(as_number(value), 1e-12) for value in run[-1]["deviations"]]
    return math.log10(max(deviations) / min(deviations))


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the last epoch."""
    candidate, baseline = compared_norms(rows)
    sides = [of_norm(rows, candidate), of_norm(rows, baseline)]
    distances = [per_seed(side, _distance) for side in sides]
    return conclude(
        paired(NEARER, *distances),
        premises=[learnt(*sides)],
        details=[single(NEAR, distances[0]), paired(ALIKE, *(per_seed(side, _unlikeness) for side in sides))],
        compared=f"{candidate} against {baseline}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show figures 3 and 4 in one: four layers' histograms, both sides, with the normal curve."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    last = {norm: [row for row in of_norm(rows, norm) if row["epoch"] == rows[-1]["epoch"]] for norm in norms}
    lines = []
    for norm, mine in last.items():
        cells = []
        for place in range(LAYERS):
            values = [
                mean_and_spread([as_number(row[name][place]) for row in mine])[0]
                for name in ("distances", "means", "deviations")
            ]
            cells.append("{:.3f} ({:+.2f}, {:.2f})".format(*values))
        lines.append([norm, *cells])
    table = Table(
        title="Distance from a standard normal after the last epoch (mean and deviation of the values)",
        header=["norm", *(f"convolution {place + 1}" for place in range(LAYERS))],
        rows=lines,
        note="Means over seeds, of the values that the activations take in for 256 training images.",
    )
    words = ". ".join(f"{norm_label(norm)}, distance (mean, deviation) {'; '.join(cells)}" for norm, *cells in lines)
    return Chart(
        name="distributions",
        title="What the activations take in",
        panels=[_histograms(last, place) for place in range(LAYERS)],
        text=f"Histograms of what four convolutions put out, beside a standard normal. {words}.",
    ), table


def _histograms(last: Mapping[str, Sequence[Row]], place: int) -> Panel:
    """Return one layer's histograms, one line per norm."""
    middles = [(low + high) / 2 for low, high in pairwise(EDGES)]
    curve = [math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in middles]
    marks = []
    for norm, rows in last.items():
        mean, low, high = mean_curve([[as_number(value) for value in row["densities"][place]] for row in rows])
        marks.append(Line(label=norm_label(norm), x=middles, y=mean, low=low, high=high, colour=norm_colour(norm)))
    marks.append(Line(label="standard normal", x=middles, y=curve, colour=NEUTRAL, dashed=True))
    return Panel(title=f"Convolution {place + 1}", x_label="pre-activation", y_label="density", marks=marks)


CLAIM = Claim(
    id="distributions",
    number="E2",
    title="With batch normalization the layers' pre-activations are nearer to a standard normal",
    statement="After training, what each layer's activation takes in is close to a standard normal with batch "
    "normalization, and differs widely from layer to layer without.",
    source="Batch normalization built from scratch, section 3.2, figures 3 and 4",
    prediction="The distance from a standard normal (Wasserstein, in deviations), mean over the layers, is smaller "
    "with batch normalization; a difference within 0.05 is none. Beside it: with the norm it is below 0.25, and the "
    "layers' deviations differ by a smaller factor.",
    question=NEARER,
    premises=(LEARNT,),
    details=(NEAR, ALIKE),
    design=2,
    settings_rule="The net of four convolutions with E1's optimiser, rate and batch size, chosen for another net "
    "without a norm. Measured is what the activation takes in: the norm's output, gamma and beta included. "
    "On FashionMNIST 6,000 training and 2,000 test images are used, drawn by class, for the sake of time.",
    meaning={
        "supported": "After this training the norm's outputs are closer to a standard normal than those of the plain "
        "net, as the figures show. Gamma and beta could have moved them away, and did not do so in a few epochs.",
        "refuted": "After this training what the activations take in is no nearer to a standard normal with the norm.",
        "inconclusive": "An interval holds its line, or too few seeds were run. More seeds make the intervals "
        "narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=6000, test_images=2000)},
    measure=measure,
    judge=decide,
    show=show,
)
