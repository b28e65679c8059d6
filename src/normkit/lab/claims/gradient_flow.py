"""E8: batch normalization keeps the gradient from vanishing on its way through a deep network of sigmoids."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..charts import NEUTRAL, Chart, Line, Panel, Table
from ..claim import Cell, Claim, Row, Value
from ..curves import looks, norm_label, over_variants
from ..data import Dataset
from ..networks import DenseNetwork, he_initialized, norm_layer
from ..rows import as_number, compared_norms, mean_and_spread, of_norm, per_seed, where
from ..training import UNTRAINED, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "growth_per_layer"]

DEPTHS = (5, 10, 20, 30)
DEEPEST = 30
ACTIVATIONS = ("sigmoid", "relu")
INITIALIZATIONS = ("torch", "he")
WIDTH = 100
# Yang et al. 2019: behind BN and ReLU, in a wide network, the squared gradient grows by this factor per layer.
MEAN_FIELD_GROWTH = math.pi / (math.pi - 1)
# The source's number for what is left of a gradient that loses a tenth in each of thirty layers.
LEFT_OF_A_GRADIENT = 0.9**30

MORE = Rule(
    effect="gradient of the first layer over the last hidden one at depth 30 (sigmoid), with the norm minus without",
    unit="decades",
    direction="above",
    line=1.0,
)
LEFT = Rule(
    effect="gradient of the first layer over the last hidden one at depth 30 (sigmoid), with the norm",
    unit="decades",
    direction="above",
    line=math.log10(LEFT_OF_A_GRADIENT),
)
EXPLODES = Rule(
    effect="gradient of the first layer over the last hidden one at depth 30 (ReLU, He's initialization), with the "
    "norm",
    unit="decades",
    direction="above",
    line=1.0,
)
KEEPS = Rule(
    effect="distance from 0 of the gradient of the first layer over the last hidden one at depth 30 (ReLU, He's "
    "initialization), without a norm",
    unit="decades",
    direction="below",
    line=1.0,
)
GROWTH = Rule(
    effect="distance of the squared gradient's growth per layer (BN, ReLU, width 512) from pi/(pi-1), relative",
    unit="",
    direction="below",
    line=0.05,
)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the norm of each layer's weight gradient in a fresh network, on one batch."""
    variant = dict(cell.variant)
    depth, activation = int(variant["depth"]), str(variant["activation"])
    he = variant["initialization"] == "he"

    def build() -> DenseNetwork:
        model = DenseNetwork([WIDTH] * depth, cell.norm, activation=activation)
        return he_initialized(model) if he else model

    model = with_seed(build, cell.seed)
    model.to(cell.device).train()
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(cell.seed))
    batch = order[: cell.settings.batch_size]
    images, labels = dataset.train_images[batch].to(cell.device), dataset.train_labels[batch].to(cell.device)
    functional.cross_entropy(model(images), labels).backward()
    norms = [float(_gradient(linear.get_parameter("weight")).double().norm()) for linear in model.linears]
    mean_field = cell.norm == "batch" and activation == "relu" and depth == DEEPEST and he
    yield {
        "gradients": norms,
        "decades": _decades(norms[0], norms[-1]),
        "growth": growth_per_layer(cell.seed) if mean_field else None,
    }


def _decades(first: float, last: float) -> float:
    """Return log10 of first over last; a gradient that underflowed to zero counts as the least positive float."""
    least = 1e-45
    return math.log10(max(first, least) / max(last, least))


def growth_per_layer(seed: int, width: int = 512, depth: int = DEEPEST, batch: int = 256) -> float:
    """Return the factor by which the squared gradient grows per layer downwards, in BN and ReLU with random weights.

    The mean over layers 6 to ``depth - 5``, away from input and loss, with weights of variance 1/width, random inputs
    and a random gradient at the top.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = draw(batch, width)
    outputs = []
    for _ in range(depth):
        x = norm_layer("batch", width, dimensions=0)(functional.linear(x, draw(width, width) / math.sqrt(width)))
        x = torch.relu(x)
        x.retain_grad()
        outputs.append(x)
    x.backward(draw(batch, width))
    squares = [float(_gradient(output).double().square().sum()) for output in outputs]
    low, high = 5, depth - 6
    return float((squares[low] / squares[high]) ** (1 / (high - low)))


def _gradient(value: Tensor) -> Tensor:
    if value.grad is None:
        raise RuntimeError("no gradient reached a tensor that the loss hangs on")
    return value.grad


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge depth 30 with sigmoids; beside it ReLU from He's initialization, and the growth of the theory."""
    candidate, baseline = compared_norms(rows)

    def sides(activation: str, initialization: str) -> list[dict[int, float]]:
        deep = where(rows, depth=DEEPEST, activation=activation, initialization=initialization)
        return [per_seed(of_norm(deep, norm), _first_decades) for norm in (candidate, baseline)]

    sigmoid, relu = sides("sigmoid", "torch"), sides("relu", "he")
    off = {seed: abs(decades) for seed, decades in relu[1].items()}
    details = [single(LEFT, sigmoid[0]), single(EXPLODES, relu[0]), single(KEEPS, off)]
    wide = [row for row in rows if row["growth"] is not None]
    if wide or candidate == "batch":
        growth = per_seed(wide, lambda run: abs(as_number(run[0]["growth"]) / MEAN_FIELD_GROWTH - 1))
        details.append(single(GROWTH, growth))
    return conclude(paired(MORE, *sigmoid), details=details, compared=f"{candidate} against {baseline}")


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the ratio against depth for both activations, with 0.9 to the depth beside it."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    panels, lines, words = [], [], []
    for activation, initialization in ((a, i) for a in ACTIVATIONS for i in INITIALIZATIONS):
        marks = []
        for norm, look in zip(norms, looks(norms), strict=True):
            mine = where(of_norm(rows, norm), activation=activation, initialization=initialization)
            if not mine:
                continue
            marks.append(over_variants(mine, "depth", _first_decades, label=norm_label(norm), **look))
            spreads = [
                mean_and_spread(list(per_seed(where(mine, depth=d), _first_decades).values()))
                for d in DEPTHS
                if where(mine, depth=d)
            ]
            lines.append(
                [
                    activation,
                    initialization,
                    norm,
                    *(f"{mean:+.2f} ± {spread:.2f}" for mean, spread in spreads),
                    *[""] * (len(DEPTHS) - len(spreads)),
                ]
            )
            words.append(
                f"{activation} from {initialization}'s {norm_label(norm)} {marks[-1].y[-1]:+.1f} decades at "
                f"depth {marks[-1].x[-1]:g}"
            )
        if not marks:
            continue
        left = [depth * math.log10(0.9) for depth in DEPTHS]
        marks.append(Line(label="0.9 to the depth", x=DEPTHS, y=left, colour=NEUTRAL, dashed=True))
        panels.append(
            Panel(
                title=f"{activation}, {initialization}'s initialization",
                x_label="hidden layers",
                y_label="log10 of first over last gradient",
                marks=marks,
                x_ticks=DEPTHS,
            )
        )
    growths = [as_number(row["growth"]) for row in rows if row["growth"] is not None]
    grown = ""
    if growths:
        mean = mean_and_spread(growths)[0]
        grown = f" Growth of the squared gradient per layer: measured {mean:.4f}, theory {MEAN_FIELD_GROWTH:.4f}."
    table = Table(
        title="First over last hidden layer's gradient, in decades",
        header=["activation", "initialization", "norm", *(f"depth {depth}" for depth in DEPTHS)],
        rows=lines,
        note=f"Mean ± standard deviation over seeds; 0 is no loss, -1 a tenth.{grown}",
    )
    text = f"The first layer's gradient over the last hidden layer's, against depth: {'; '.join(words)}.{grown}"
    return Chart(
        name="gradient-flow", title="What is left of the gradient at the first layer", panels=panels, text=text
    ), table


def _first_decades(run: Sequence[Row]) -> float:
    return as_number(run[0]["decades"])


VARIANTS: tuple[tuple[tuple[str, Value], ...], ...] = tuple(
    (("activation", activation), ("initialization", initialization), ("depth", depth))
    for activation in ACTIVATIONS
    for initialization in INITIALIZATIONS
    for depth in DEPTHS
)
CLAIM = Claim(
    id="gradient-flow",
    number="E8",
    title="In deep networks of sigmoids ten times more of the gradient is left with batch normalization",
    statement="In a deep network each layer takes a share of the gradient, and a tenth lost in each of thirty layers "
    "leaves 0.04 of it. With batch normalization the first layers still get a gradient.",
    source="The sources S2 and S4; the growth per layer: Yang et al. 2019, A mean field theory of batch normalization, "
    "arXiv:1902.08129",
    prediction="Behind 30 sigmoid layers the first layer's weight gradient over the last hidden one's is at least ten "
    "times larger with batch normalization. Beside it: it is larger than 0.9^30 = 0.042; in ReLU networks with He's "
    "initialization, where the plain net keeps its gradient, the norm makes it explode; and in wide ones the squared "
    f"gradient grows by pi/(pi-1) = {MEAN_FIELD_GROWTH:.4f} per layer towards the input.",
    question=MORE,
    details=(LEFT, EXPLODES, KEEPS, GROWTH),
    design=2,
    settings_rule="Nothing is trained: networks of width 100 with torch's default initial weights or He's, on one "
    "batch of 256 images. The theory's network has width 512, weights of variance 1/width and no bias, and a batch of "
    "256.",
    meaning={
        "supported": "At the start of training the norm keeps a gradient alive that otherwise dies in the sigmoids. "
        "With ReLU and He's initialization nothing vanishes without it, and with it the gradient grows from layer to "
        "layer: there the norm does harm at the start.",
        "refuted": "At the start of training the gradient that reaches the first of thirty sigmoid layers is not ten "
        "times larger with the norm.",
        "inconclusive": "An interval holds its line, or too few seeds were run. More seeds make the intervals "
        "narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": UNTRAINED, "fashion-mnist": UNTRAINED},
    variants=VARIANTS,
    measure=measure,
    judge=decide,
    show=show,
)
