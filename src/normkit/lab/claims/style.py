"""E22: adaptive instance normalization sets exactly the style's statistics, and instance normalization removes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers import AdaptiveInstanceNorm, InstanceNorm2d
from ..charts import NEUTRAL, Bars, Chart, Line, Panel, Table, norm_colour
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..networks import DenseNetwork
from ..rows import as_number, mean_and_spread, per_seed, spread_in_words, where
from ..training import TrainingSettings, evaluate, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "LOOKS", "Stylized", "deviation", "stylized", "transferred"]

STYLES = 10
CHANNELS = 8
CHANCE = 1 / STYLES
TASKS = ("style", "class")
SIDES = ("no", "yes")
TYPES = {"float64": torch.float64, "float32": torch.float32}
# What the project's table of tolerances allows results of these types.
LINES = {"float64": 1e-12, "float32": 2e-6}
GONE = Rule(
    effect="share of styles told rightly from instance-normalized features",
    unit="",
    direction="below",
    line=1.5 * CHANCE,
)
REMOVED = Rule(
    effect="share of styles told rightly, instance-normalized minus plain features",
    unit="",
    direction="below",
    line=-0.5,
)
LEFT = Rule(
    effect="share of classes told rightly, instance-normalized minus plain features",
    unit="",
    direction="above",
    line=-0.05,
)
SET = {
    name: Rule(
        effect=f"largest distance of the output's mean and deviation from the style's in {name}, relative to the "
        "style's root mean square",
        unit="",
        direction="below",
        line=line,
    )
    for name, line in LINES.items()
}
CHANGED = Rule(
    effect="share of features given another image's style whose look is told as that image's",
    unit="",
    direction="above",
    line=0.5,
)
KEPT = Rule(
    effect="share of classes told rightly from features given another image's style minus from their own",
    unit="",
    direction="above",
    line=-0.05,
)
# How the images of the transfer look: photographed, so to speak, in five ways.
LOOKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda images: images,
    "faint": lambda images: 0.3 * images,
    "negative": lambda images: -images,
    "striped": lambda images: images + 1.5 * (torch.arange(images.shape[-1], device=images.device) % 4 < 2),
    "noisy": lambda images: images + torch.randn(
        images.shape, generator=torch.Generator().manual_seed(len(images))
    ).to(images.device),
}  # fmt: skip
SETTINGS = TrainingSettings(epochs=10, batch_size=64, optimizer="adam", learning_rate=0.001)


@dataclass(frozen=True, eq=False, kw_only=True)
class Stylized:
    """Features of images, each given the statistics of one of ten styles.

    Attributes:
        features: ``(N, 8, 14, 14)``.
        styles: the number of each image's style.
        deviation: how far the features' statistics are from their style's, at most.
    """

    features: Tensor
    styles: Tensor
    deviation: float


def stylized(images: Tensor, seed: int, draw: int, dtype: torch.dtype = torch.float32) -> Stylized:
    """Make features with random weights, and give each image a random style by adaptive instance norm.

    Args:
        images: ``(N, 1, 28, 28)``.
        seed: of the weights and of the ten styles.
        draw: of which image gets which style.
        dtype: in which the style is given.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CHANNELS, 1, 3, 3, generator=generator, dtype=torch.float64)
    palette = torch.randn(STYLES, CHANNELS, 14, 14, generator=generator, dtype=torch.float64)
    scale = torch.exp(0.5 * torch.randn(STYLES, CHANNELS, 1, 1, generator=generator, dtype=torch.float64))
    offset = torch.randn(STYLES, CHANNELS, 1, 1, generator=generator, dtype=torch.float64)
    palette = (palette * scale + offset).to(images.device, dtype)
    styles = torch.randint(STYLES, (len(images),), generator=torch.Generator().manual_seed(draw)).to(images.device)
    content = _convolved(images, weight).to(dtype)
    features = AdaptiveInstanceNorm(CHANNELS, eps=0.0, device=images.device, dtype=dtype)(content, palette[styles])
    return Stylized(features=features, styles=styles, deviation=deviation(features, palette[styles]))


def transferred(images: Tensor, seed: int, draw: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give each image a look, and its features the channels' statistics of another image, which has another look.

    Returns:
        The features with their own statistics, ``(N, 8, 14, 14)``; with the other image's; the image's look; the other
        image's look.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CHANNELS, 1, 3, 3, generator=generator, dtype=torch.float64)
    drawing = torch.Generator().manual_seed(draw)
    own = torch.randint(len(LOOKS), (len(images),), generator=drawing).to(images.device)
    other = ((own.cpu() + torch.randint(1, len(LOOKS), (len(images),), generator=drawing)) % len(LOOKS)).to(own.device)
    partners = torch.randperm(len(images), generator=drawing).to(images.device)
    content, style = (
        _convolved(_looking(part, look), weight) for part, look in ((images, own), (images[partners], other))
    )
    changed = AdaptiveInstanceNorm(CHANNELS, eps=1e-5, device=images.device, dtype=torch.float64)(content, style)
    return content.float(), changed.float(), own, other


def _looking(images: Tensor, looks_of: Tensor) -> Tensor:
    """Return each image in its look."""
    every = torch.stack([look(images) for look in LOOKS.values()])
    return every[looks_of, torch.arange(len(images), device=images.device)]


def _convolved(images: Tensor, weight: Tensor) -> Tensor:
    return functional.conv2d(images.double(), weight.to(images.device), stride=2, padding=1)


def deviation(output: Tensor, style: Tensor) -> float:
    """Return the largest distance of means and deviations, relative to the style channel's root mean square.

    >>> style = torch.tensor([[[[3.0, 5.0]]]])
    >>> deviation(style, style), round(deviation(style + 1, style) * 17**0.5, 6)
    (0.0, 1.0)
    """
    (output_var, output_mean), (style_var, style_mean) = (
        torch.var_mean(x.double(), dim=(2, 3), correction=0) for x in (output, style)
    )
    size = (style_var + style_mean.square()).sqrt()
    off_mean, off_std = (output_mean - style_mean).abs(), (output_var.sqrt() - style_var.sqrt()).abs()
    return float((torch.maximum(off_mean, off_std) / size).max())


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train a probe for the style and one for the class on stylized features, and yield both accuracies by epoch."""
    deviations = {
        f"deviation_{name}": stylized(dataset.train_images[:256].to(cell.device), cell.seed, cell.seed, dtype).deviation
        for name, dtype in TYPES.items()
    }
    train_part, test_part = (
        stylized(images.to(cell.device), cell.seed, draw)
        for images, draw in ((dataset.train_images, 2 * cell.seed), (dataset.test_images, 2 * cell.seed + 1))
    )
    by_class = replace(dataset, train_images=train_part.features, test_images=test_part.features)
    by_style = replace(by_class, train_labels=train_part.styles, test_labels=test_part.styles)

    def probe_network() -> nn.Module:
        norm = InstanceNorm2d(CHANNELS) if dict(cell.variant)["instance"] == "yes" else nn.Identity()
        return nn.Sequential(norm, DenseNetwork([64], inputs=CHANNELS * 14 * 14))

    trainings = [
        train(with_seed(probe_network, cell.seed), task, cell.settings, cell.seed, cell.device)
        for task in (by_style, by_class)
    ]
    told = _told_after_transfer(cell, dataset) if dict(cell.variant)["instance"] == "no" else {}
    for epochs in zip(*trainings, strict=True):
        accuracies = {f"accuracy_{task}": epoch.test_accuracy for task, epoch in zip(TASKS, epochs, strict=True)}
        yield {"epoch": epochs[0].epoch, **accuracies, **deviations, **told}


def _told_after_transfer(cell: Cell, dataset: Dataset) -> dict[str, float]:
    """Train probes for look and class on features as they are; ask them of the test data, before and after transfer."""
    train_features, _, train_looks, _ = transferred(dataset.train_images.to(cell.device), cell.seed, 2 * cell.seed)
    before, after, own, other = transferred(dataset.test_images.to(cell.device), cell.seed, 2 * cell.seed + 1)
    by_class = replace(dataset, train_images=train_features, test_images=before)
    by_look = replace(by_class, train_labels=train_looks, test_labels=own)
    probes = [with_seed(lambda: DenseNetwork([64], inputs=CHANNELS * 14 * 14), cell.seed) for _ in (by_look, by_class)]
    for probe, task in zip(probes, (by_look, by_class), strict=True):
        for _ in train(probe, task, cell.settings, cell.seed, cell.device):
            pass
    look, named = probes
    classes = dataset.test_labels.to(cell.device)
    return {
        "look_before": evaluate(look, before, own)[1],
        "look_changed": evaluate(look, after, other)[1],
        "look_kept": evaluate(look, after, own)[1],
        "class_before": evaluate(named, before, classes)[1],
        "class_kept": evaluate(named, after, classes)[1],
    }


def _last(rows: Sequence[Row], column: str) -> dict[int, float]:
    return per_seed(rows, lambda run: as_number(run[-1][column]))


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what the probes still tell after instance norm, and how exactly the style was set."""
    plain, normalized = (where(rows, instance=side) for side in SIDES)
    exact, *others = (single(SET[name], _last(plain, f"deviation_{name}")) for name in TYPES)
    details = [
        *others,
        single(GONE, _last(normalized, "accuracy_style")),
        paired(REMOVED, _last(normalized, "accuracy_style"), _last(plain, "accuracy_style")),
        paired(LEFT, _last(normalized, "accuracy_class"), _last(plain, "accuracy_class")),
        single(CHANGED, _last(plain, "look_changed")),
        paired(KEPT, _last(plain, "class_kept"), _last(plain, "class_before")),
    ]
    return conclude(exact, details=details, compared="instance-normalized against plain features")


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show what the probes tell with and without instance norm, and how exactly the style was set."""
    sides = {"plain": where(rows, instance="no"), "instance-normalized": where(rows, instance="yes")}
    panels = [_told(sides, task, title) for task, title in zip(TASKS, ("Style told", "Class told"), strict=True)]
    deviations = {name: mean_and_spread(list(_last(rows, f"deviation_{name}").values()))[0] for name in TYPES}
    panels.append(
        Panel(
            title="AdaIN's statistics against the style's",
            x_label="type",
            y_label="largest relative deviation",
            marks=[
                Bars(
                    label="", categories=list(TYPES), heights=list(deviations.values()), colour=norm_colour("adaptive")
                )
            ],
            log_y=True,
        )
    )
    lines = [
        [label, *(spread_in_words(list(_last(mine, f"accuracy_{task}").values())) for task in TASKS)]
        for label, mine in sides.items()
    ]
    exact = "; ".join(f"{deviations[name]:.1e} in {name} (allowed {LINES[name]:g})" for name in TYPES)
    table = Table(
        title="Share of styles and of classes told rightly",
        header=["features", *TASKS],
        rows=lines,
        note=f"Mean ± standard deviation over seeds; chance is {CHANCE:g} for both. The output's statistics are off "
        f"the style's by {exact}.",
    )
    words = "; ".join(f"{line[0]} features, style {line[1]}, class {line[2]}" for line in lines)
    text = (
        f"What a probe tells, by epoch. After the last: {words}; chance {CHANCE:g}. Deviation from the style's "
        f"statistics: {exact}."
    )
    plain = sides["plain"]
    told = {
        name: spread_in_words(list(_last(plain, name).values()))
        for name in ("look_before", "look_changed", "look_kept", "class_before", "class_kept")
        if plain
    }
    transfer = Table(
        title="Features given another image's style, and what probes trained on features as they are tell of them",
        header=["told", "before", "after", "after, as the other image's"],
        rows=[
            ["look", told["look_before"], told["look_kept"], told["look_changed"]],
            ["class", told["class_before"], told["class_kept"], ""],
        ]
        if told
        else [],
        note=f"Mean ± standard deviation over seeds. Looks: {', '.join(LOOKS)}; chance is {1 / len(LOOKS):g}. The "
        "other image has another look.",
    )
    return Chart(name="style", title="What is left of style and class", panels=panels, text=text), table, transfer


def _told(sides: Mapping[str, Sequence[Row]], task: str, title: str) -> Panel:
    """Return what the probe tells by epoch, on plain and on instance-normalized features, with chance beside it."""
    marks = [
        over_epochs(mine, f"accuracy_{task}", label=label, **look)
        for (label, mine), look in zip(sides.items(), looks(["none", "instance"]), strict=True)
        if mine
    ]
    epochs = max((mark.x for mark in marks), key=len, default=[1])
    marks.append(Line(label="chance", x=epochs, y=[CHANCE] * len(epochs), colour=NEUTRAL, dashed=True))
    return Panel(title=title, x_label="epoch", y_label="accuracy", marks=marks)


CLAIM = Claim(
    id="style",
    number="E22",
    title="Adaptive instance normalization sets the style's mean and deviation exactly",
    statement="Style, as the channels' means and deviations of one image, is gone after instance norm while the class "
    "can still be told; adaptive instance norm gives its output exactly the style's mean and deviation.",
    source="Huang and Belongie 2017, arXiv:1703.06868, sections 4 and 5, equation (8); Ulyanov, Vedaldi and Lempitsky "
    "2016, arXiv:1607.08022; repeated in the source S2",
    prediction="AdaIN's statistics differ from the style's by at most 1e-12 in float64, with eps = 0. Beside it: 2e-6 "
    "in float32; from instance-normalized features ten styles, which are nothing but means and deviations here, are "
    "told at chance (0.1; below 0.15), at least 0.5 less often than from plain ones, and classes at most 0.05 less "
    "often. And transferred: features of an image that are given the statistics of an image of another look are told "
    "to have that look in more than half of all cases, and their class at most 0.05 less often than before.",
    question=SET["float64"],
    details=(SET["float32"], GONE, REMOVED, LEFT, CHANGED, KEPT),
    kind="formula",
    design=3,
    settings_rule="Features are a convolution with random weights, eight channels of 14 by 14; each image gets one of "
    "ten random styles by adaptive instance norm. The probe is a net with one hidden layer of 64, with Adam at torch's "
    "default rate of 0.001 on batches of 64, the same for both tasks and both sides. In the "
    "transfer a look is a change of the image itself (as it is, faint, negative, striped, noisy), and the style is "
    "that of another image's features. Nothing was searched.",
    meaning={
        "supported": "The output has the style's statistics to within rounding, so that instance norm, which removes "
        "them, removes such a style. It is algebra, checked; what a painter calls style is more.",
        "refuted": "The output's statistics are not the style's. Either the formula or this implementation of it is "
        "wrong.",
        "inconclusive": "An interval holds its line, or too few seeds were run. More seeds make the intervals "
        "narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=5, train_images=5000, test_images=2000)},
    variants=tuple((("instance", side),) for side in SIDES),
    measure=measure,
    judge=decide,
    show=show,
)
