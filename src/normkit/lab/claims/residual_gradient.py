"""E33: residual connections keep the gradient of a deep batch-normalized net from exploding at initialization."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..charts import NEUTRAL, Chart, Line, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_variants
from ..data import Dataset
from ..networks import he_initialized, norm_layer
from ..rows import as_number, per_seed, spread_in_words, where
from ..training import UNTRAINED, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "DeepNetwork"]

DEPTHS = (10, 20, 50)
DEEPEST = 50
WIDTH = 100
# Yang et al. 2019: behind batch norm and ReLU, in a wide net, the squared gradient grows by pi/(pi-1) per layer.
MEAN_FIELD = math.log10(math.pi / (math.pi - 1)) / 2
CURED = Rule(
    effect=f"gradient of the first layer over the last at depth {DEEPEST}, with residual connections minus without",
    unit="decades",
    direction="below",
    line=-2.0,
)
KEPT = Rule(
    effect=f"gradient of the first layer over the last at depth {DEEPEST}, with residual connections",
    unit="decades",
    direction="below",
    line=1.0,
)
GROWTH = Rule(
    effect=f"distance of the gradient's growth per layer, without residual connections, from {10**MEAN_FIELD:.2f}",
    unit="",
    direction="below",
    line=0.05,
)
NETS = {"plain": "without residual connections", "residual": "with residual connections"}


class DeepNetwork(nn.Module):
    """Dense layers of one width, ``relu(norm(W x))``, each added to its input or not, and a head of ten logits.

    Args:
        depth: how many layers of the width follow the first one, which reads the image.
        norm: ``"none"`` or a name of the catalog.
        residual: whether what a layer puts out is added to what it takes in.

    Shape:
        Input ``(N, 1, 28, 28)``, output ``(N, 10)``.

    >>> DeepNetwork(3, "batch", residual=True)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, depth: int, norm: str, *, residual: bool) -> None:
        super().__init__()
        self.first = nn.Linear(28 * 28, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norms = nn.ModuleList(norm_layer(norm, WIDTH, dimensions=0) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 10)
        self.residual = residual

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = functional.relu(self.first(images.flatten(1)))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            put_out = functional.relu(norm(layer(x)))
            x = x + put_out if self.residual else put_out
        logits: Tensor = self.head(x)
        return logits


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the norm of each layer's weight gradient in a fresh network, on one batch."""
    variant = dict(cell.variant)
    residual = variant["net"] == "residual"
    model = with_seed(
        lambda: he_initialized(DeepNetwork(int(variant["depth"]), cell.norm, residual=residual)), cell.seed
    )
    model.to(cell.device).train()
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(cell.seed))
    batch = order[: cell.settings.batch_size]
    images, labels = dataset.train_images[batch].to(cell.device), dataset.train_labels[batch].to(cell.device)
    functional.cross_entropy(model(images), labels).backward()
    norms = []
    for layer in model.layers:
        gradient = layer.get_parameter("weight").grad
        assert gradient is not None
        norms.append(float(gradient.double().norm()))
    # A gradient of nothing has no logarithm: its quotient is 0, or none.
    quotient = norms[0] / norms[-1] if norms[-1] > 0 else math.nan
    yield {"gradients": norms, "decades": math.log10(quotient) if quotient > 0 else -math.inf}


def _decades(run: Sequence[Row]) -> float:
    return as_number(run[0]["decades"])


def _off(run: Sequence[Row]) -> float:
    """Return how far the growth per layer is from the mean field's."""
    steps = len(run[0]["gradients"]) - 1
    return abs(10 ** (_decades(run) / steps) - 10**MEAN_FIELD)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the deepest nets."""
    plain, residual = (where(rows, net=net, depth=DEEPEST) for net in NETS)
    return conclude(
        paired(CURED, per_seed(residual, _decades), per_seed(plain, _decades)),
        details=[single(KEPT, per_seed(residual, _decades)), single(GROWTH, per_seed(plain, _off))],
        compared="with residual connections against without",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the first layer's gradient over the last one's, by depth."""
    nets = [net for net in NETS if where(rows, net=net)]
    marks = [
        over_variants(where(rows, net=net), "depth", _decades, label=NETS[net], **look)
        for net, look in zip(nets, looks(["batch"] * len(nets)), strict=True)
    ]
    theory = [MEAN_FIELD * (depth - 1) for depth in DEPTHS]
    marks.append(Line(label="mean field", x=DEPTHS, y=theory, colour=NEUTRAL, dashed=True))
    panel = Panel(
        title="First layer's gradient over the last one's",
        x_label="hidden layers",
        y_label="decades",
        marks=marks,
        x_ticks=DEPTHS,
    )
    lines = [
        [
            NETS[net],
            *(spread_in_words(list(per_seed(where(rows, net=net, depth=d), _decades).values()), 2) for d in DEPTHS),
        ]
        for net in nets
    ]
    table = Table(
        title="First layer's gradient over the last one's, in decades",
        header=["net", *(f"depth {depth}" for depth in DEPTHS)],
        rows=lines,
        note="Mean ± standard deviation over seeds. At initialization, on one batch, with batch statistics.",
    )
    words = "; ".join(f"{line[0]}: {', '.join(line[1:])}" for line in lines)
    text = (
        f"The first layer's gradient over the last one's at depths {', '.join(map(str, DEPTHS))}, in decades. {words}."
    )
    return Chart(name="residual-gradient", title="Exploding gradients", panels=(panel,), text=text), table


CLAIM = Claim(
    id="residual-gradient",
    number="E33",
    title="Residual connections keep a deep batch-normalized net's gradient from exploding",
    statement="Batch normalization itself makes the gradient of a deep net without residual connections grow from "
    "layer to layer, by about 1.21 with ReLU, whatever the scale of the initial weights. Residual connections take "
    "that away.",
    source="Yang et al. 2019, A mean field theory of batch normalization, arXiv:1902.08129, abstract",
    prediction=f"At depth {DEEPEST} the first layer's gradient over the last one's is more than a hundred times "
    "smaller with residual connections. Beside it: with them it is below ten, and without them it grows per layer "
    "by 1.21, to within 0.05.",
    question=CURED,
    details=(KEPT, GROWTH),
    settings_rule=f"Nothing is trained: nets of width {WIDTH} with He's initial weights, on one batch of 256 images, "
    "in training mode. A layer is dense, norm, ReLU; with residual connections what it puts out is added to what it "
    "takes in. Compared are gradients of the weights.",
    meaning={
        "supported": "With residual connections the gradient reaches the first layers in the order of the last ones. A "
        "deep plain net with batch norm begins with a gradient that explodes; warm-up or shortcuts are its cure.",
        "refuted": "Residual connections do not make the gradient a hundred times smaller in these nets.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": UNTRAINED, "fashion-mnist": UNTRAINED},
    variants=tuple((("net", net), ("depth", depth)) for net in NETS for depth in DEPTHS),
    measure=measure,
    judge=decide,
    show=show,
)
