"""E34: with all weights left random, gamma and beta alone learn far above chance."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..networks import he_initialized
from ..premises import LEARNT, chance, learnt
from ..rows import as_number, last_accuracies, per_seed, spread_in_words, where
from ..search import RATE_RULE, train_at_best_rate
from ..small_network import SmallResidual
from ..training import TrainingSettings
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "build", "learnt_numbers"]

RATES = (0.003, 0.01, 0.03)
PARTS = {"all": "everything", "norms": "gamma and beta", "random": "as many weights drawn at random"}
FAR = Rule(
    effect="test accuracy above chance after the last epoch, as a share of all there is above chance, gamma and beta "
    "alone",
    unit="",
    direction="above",
    line=0.5,
)
MORE = Rule(
    effect="test accuracy after the last epoch, gamma and beta alone minus as many weights drawn at random",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.01, 0.01),
)
LESS = Rule(
    effect="test accuracy after the last epoch, everything minus gamma and beta alone",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.01, 0.01),
)
SETTINGS = TrainingSettings(epochs=8, batch_size=64, optimizer="adam", learning_rate=0.0)


def build(norm: str, part: str) -> SmallResidual:
    """Return the small residual net with He's initial weights, of which this part can be learnt.

    The weights that are drawn at random are as many in every convolution as the norm behind it has numbers.
    """
    model = he_initialized(SmallResidual(norm))
    if part == "all":
        return model
    model.requires_grad_(False)
    convolution: nn.Conv2d | None = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif getattr(module, "num_features", 0):
            if part == "norms":
                module.requires_grad_(True)
            else:
                assert convolution is not None
                _learn_some(
                    convolution.get_parameter("weight"), sum(parameter.numel() for parameter in module.parameters())
                )
    return model


def _learn_some(weight: nn.Parameter, count: int) -> None:
    """Let so many of the weight's numbers be learnt: the gradient of the others is put at 0."""
    chosen = torch.zeros(weight.numel())
    chosen[torch.randperm(weight.numel())[:count]] = 1.0
    chosen = chosen.view_as(weight)
    weight.requires_grad_(True)
    weight.register_hook(lambda gradient: gradient * chosen.to(gradient.device))


def learnt_numbers(model: nn.Module) -> int:
    """Return how many of the model's numbers a step changes, by their gradients on a random batch."""
    logits = model.train()(torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    logits.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return sum(int(gradient.count_nonzero()) for gradient in gradients)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the cell's part of the net at its best rate."""
    side = partial(build, part=str(dict(cell.variant)["part"]))
    return train_at_best_rate(side, cell, dataset, RATES)


def _above_chance(run: Sequence[Row]) -> float:
    guessed = chance(run[-1])
    return (as_number(run[-1]["test_accuracy"]) - guessed) / (1 - guessed)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge gamma and beta alone; beside it the other parts."""
    sides = {part: where(rows, part=part) for part in PARTS}
    accuracies = {part: last_accuracies(side) for part, side in sides.items()}
    return conclude(
        single(FAR, per_seed(sides["norms"], _above_chance)),
        premises=[learnt(sides["all"])],
        details=[
            paired(MORE, accuracies["norms"], accuracies["random"]),
            paired(LESS, accuracies["all"], accuracies["norms"]),
        ],
        compared="gamma and beta alone",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show training loss and accuracy by epoch for every part."""
    parts = [part for part in PARTS if where(rows, part=part)]
    panels = [
        Panel(
            title=title,
            x_label="epoch",
            y_label=unit,
            marks=[
                over_epochs(where(rows, part=part), column, label=PARTS[part], **look)
                for part, look in zip(parts, looks(["batch"] * len(parts)), strict=True)
            ],
        )
        for title, unit, column in (
            ("Training loss", "cross-entropy", "train_loss"),
            ("Test accuracy", "accuracy", "test_accuracy"),
        )
    ]
    lines = []
    for part in parts:
        mine = where(rows, part=part)
        accuracy = spread_in_words(list(last_accuracies(mine).values()))
        lines.append([PARTS[part], f"{mine[0]['rate']:g}", accuracy])
    table = Table(
        title="Test accuracy after the last epoch",
        header=["learnt", "learning rate", "test accuracy"],
        rows=lines,
        note="Mean ± standard deviation over seeds. What is not learnt stays at He's initial weights, the last layer "
        "too.",
    )
    words = "; ".join(f"{line[0]}: {line[2]}" for line in lines)
    text = f"Curves by epoch of training loss and test accuracy. After the last epoch, accuracy: {words}."
    return Chart(name="norms-alone", title="What gamma and beta can do alone", panels=panels, text=text), table


CLAIM = Claim(
    id="norms-alone",
    number="E34",
    title="With all weights left random, gamma and beta alone learn half of what there is above chance",
    statement="Trained alone, with every weight left at its random start, gamma and beta reach an accuracy far above "
    "chance, and a higher one than as many of the weights do.",
    source="Frankle, Schwab and Morcos 2020, Training BatchNorm and only BatchNorm, arXiv:2003.00152",
    prediction="With gamma and beta alone the test accuracy after the last epoch covers more than half of the way from "
    "chance to 1. Beside it: it is higher than with as many weights per convolution, drawn at random, and lower than "
    "with everything; within one point is no difference.",
    question=FAR,
    premises=(LEARNT,),
    details=(MORE, LESS),
    settings_rule="A small residual net with He's initial weights and norms behind its convolutions, Adam; a side is "
    f"what is learnt, from 0.003, 0.01 or 0.03. {RATE_RULE} What is not learnt stays as it was drawn, the last layer "
    "too.",
    meaning={
        "supported": "Random features, scaled and shifted, carry a net more than half of the way. Gamma and beta are a "
        "share of a net's capacity.",
        "refuted": "In this small net gamma and beta alone stay below half of the way. The paper's deep nets have far "
        "more features to choose among.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch",),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=3000, test_images=2000)},
    variants=tuple((("part", part),) for part in PARTS),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
