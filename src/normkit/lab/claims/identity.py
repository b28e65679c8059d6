"""E18: with gamma = std and beta = mean a batch norm gives its input back."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..charts import Bars, Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks
from ..data import Dataset
from ..networks import norm_layer
from ..rows import as_number, mean_and_spread, per_seed
from ..training import UNTRAINED
from ..verdicts import Rule, Verdict, conclude, single

__all__ = ["CLAIM"]

TYPES = {"float64": torch.float64, "float32": torch.float32}
LAYOUTS = ("dense", "convolutional")

# What the project's table of tolerances allows results of these types, relative to the largest number.
LINES = {"float64": 1e-12, "float32": 2e-6}
RULES = {
    name: Rule(
        effect=f"largest deviation from the input in {name}, relative to the largest input",
        unit="",
        direction="below",
        line=line,
    )
    for name, line in LINES.items()
}


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Set gamma and beta to the batch's own deviation and mean, and measure how far the output is from the input."""
    generator = torch.Generator().manual_seed(cell.seed)
    batch = torch.randperm(len(dataset.train_images), generator=generator)[: cell.settings.batch_size]
    images = dataset.train_images[batch].to(cell.device, torch.float64)
    measured: dict[str, float] = {}
    for layout in LAYOUTS:
        x = _with_scales(images.flatten(1) if layout == "dense" else _channels(images, generator), generator)
        for name, dtype in TYPES.items():
            measured[f"{layout}_{name}"] = deviation(x.to(dtype), cell.norm)
    yield measured


def deviation(x: Tensor, norm: str = "batch") -> float:
    """Return the largest deviation of the recovered input, relative to the largest input.

    >>> deviation(torch.tensor([[1.0], [2.0], [4.0]])) < 2e-6
    True
    """
    layer = norm_layer(norm, x.shape[1], dimensions=x.dim() - 2 if x.dim() > 2 else 0).to(x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x.double(), dim=axes, correction=0)
    with torch.no_grad():
        layer.get_parameter("weight").copy_((var + 1e-5).sqrt())
        layer.get_parameter("bias").copy_(mean)
        largest = (layer.train()(x) - x).double().abs().max()
    return float(largest / x.double().abs().max())


def _channels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return eight channels: random mixtures of an image and its shifted copies."""
    shifted = torch.cat([images.roll((down, right), (2, 3)) for down in (0, 1) for right in (0, 1)], dim=1)
    mixture = torch.randn(8, 4, 1, 1, generator=generator, dtype=images.dtype).to(images.device)
    return nn.functional.conv2d(shifted, mixture)


def _with_scales(x: Tensor, generator: torch.Generator) -> Tensor:
    """Give each channel a scale from 0.01 to 100 and an offset of up to three of its deviations."""
    shape = [1, -1, *[1] * (x.dim() - 2)]
    scale, offset = torch.rand(2, x.shape[1], generator=generator, dtype=x.dtype).to(x.device)
    scaled: Tensor = (x + 6 * (offset.view(shape) - 0.5)) * torch.pow(10.0, 4 * scale.view(shape) - 2)
    return scaled


def decide(rows: Sequence[Row]) -> Verdict:
    """Hold the worse of both layouts against the line, in each type."""
    worst = {name: per_seed(rows, partial(_worst_layout, name)) for name in TYPES}
    first, *others = (single(RULES[name], worst[name]) for name in TYPES)
    return conclude(first, details=others, compared="batch against its own input")


def _worst_layout(name: str, run: Sequence[Row]) -> float:
    return max(as_number(run[0][f"{layout}_{name}"]) for layout in LAYOUTS)


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the deviation by type and layout."""
    spreads = {
        (layout, name): mean_and_spread([as_number(row[f"{layout}_{name}"]) for row in rows])
        for layout in LAYOUTS
        for name in TYPES
    }
    marks = [
        Bars(
            label=layout,
            categories=list(TYPES),
            heights=[spreads[layout, name][0] for name in TYPES],
            **look,
        )
        for layout, look in zip(LAYOUTS, looks(["batch"] * len(LAYOUTS)), strict=True)
    ]
    words = "; ".join(f"{layout} in {name} {mean:.1e}" for (layout, name), (mean, _) in spreads.items())
    text = f"Bars of the largest relative deviation, mean over seeds: {words}."
    panel = Panel(
        title="Distance from the input",
        x_label="type",
        y_label="relative to the largest input",
        marks=marks,
        log_y=True,
    )
    table = Table(
        title="Largest deviation from the input",
        header=["layout", "type", "relative to the largest input", "allowed"],
        rows=[
            [layout, name, f"{mean:.1e} ± {spread:.1e}", f"{LINES[name]:g}"]
            for (layout, name), (mean, spread) in spreads.items()
        ],
        note="Mean ± standard deviation over seeds.",
    )
    return Chart(name="identity", title="How exactly the input comes back", panels=(panel,), text=text), table


CLAIM = Claim(
    id="identity",
    number="E18",
    title="With gamma = std and beta = mean, batch normalization gives its input back",
    statement="A batch norm can represent the identity: with gamma = sqrt(var + eps) and beta = mean of the batch its "
    "output is its input, so that putting it into a network loses no capacity.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 3; repeated in the sources S1 and S4",
    prediction="In exact arithmetic the deviation is 0; in floating point at most 1e-12 of the largest input in "
    "float64 and 2e-6 in float32, for dense and for convolutional inputs.",
    question=RULES["float64"],
    details=(RULES["float32"],),
    kind="formula",
    settings_rule="Nothing is trained. Each seed draws 256 images and gives every channel a scale from 0.01 to 100 and "
    "an offset of up to three deviations. A first line of 8 roundings left out that the sums behind the statistics "
    "round too; a unit test on random numbers went past it (8.9), and the project's table of tolerances took its place "
    "before the first run.",
    meaning={
        "supported": "The layer recovers its input to within the rounding of the type. It holds for the batch whose "
        "statistics were used: another batch has others, and is recovered only as far as they agree.",
        "refuted": "The layer does not give its input back. Either the formula or this implementation of it is wrong.",
        "inconclusive": "The interval holds the line, or too few seeds were run. More seeds decide.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": UNTRAINED, "fashion-mnist": UNTRAINED},
    measure=measure,
    judge=decide,
    show=show,
)
