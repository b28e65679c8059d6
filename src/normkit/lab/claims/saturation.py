"""E7: batch normalization keeps the inputs of sigmoids in the region where they are not saturated."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_epochs
from ..data import Dataset
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..probes import probe, recorded
from ..rows import as_number, compared_norms, mean_and_spread, of_norm, per_seed
from ..training import TrainingSettings, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "SATURATED"]

# Beyond this input the sigmoid's slope is below a tenth of its largest, 0.25: s(1 - s) = 0.025.
SATURATED = 3.6369
LAYERS = 3
LESS = Rule(
    effect="share of saturated sigmoid inputs, mean over layers and epochs, with the norm minus without",
    unit="",
    direction="below",
    line=0.0,
    band=(-0.005, 0.005),
)
LAST = Rule(
    effect="share of saturated inputs of the last hidden layer, mean over epochs, with the norm minus without",
    unit="",
    direction="below",
    line=0.0,
)
FEW = Rule(
    effect="share of saturated sigmoid inputs, mean over layers and epochs, with the norm",
    unit="",
    direction="below",
    line=0.05,
)
SETTINGS = TrainingSettings(epochs=40, batch_size=60, optimizer="sgd", learning_rate=0.1)


def build(norm: str) -> DenseNetwork:
    """Return the paper's network: three hidden layers of 100 sigmoids, small normal weights, no bias at the start."""
    model = DenseNetwork([100] * LAYERS, norm, activation="sigmoid")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
            nn.init.zeros_(module.bias)
    return model


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train on binary images and yield, per epoch, each layer's share of saturated inputs and its percentiles."""
    dataset = replace(
        dataset,
        train_images=(dataset.train_images > 0).float(),
        test_images=(dataset.test_images > 0).float(),
    )
    model = with_seed(lambda: build(cell.norm), cell.seed)
    for epoch in train(model, dataset, cell.settings, cell.seed, cell.device):
        yield {
            "epoch": epoch.epoch,
            "train_loss": epoch.train_loss,
            "test_accuracy": epoch.test_accuracy,
            **_inputs_of_sigmoids(model, dataset),
        }


def _inputs_of_sigmoids(model: DenseNetwork, dataset: Dataset) -> dict[str, Any]:
    """Return each layer's share of saturated inputs, and the percentiles of one unit of the last layer."""
    names = [f"norms.{place}" for place in range(LAYERS)]
    device = next(model.parameters()).device
    with probe(model) as copied, recorded(copied, names) as seen, torch.no_grad():
        copied.train()
        copied(dataset.train_images[:1000].to(device))
    inputs = [seen[name][1].double() for name in names]
    shares = [float((value.abs() > SATURATED).double().mean()) for value in inputs]
    unit = torch.quantile(inputs[-1][:, 0], torch.tensor([0.15, 0.5, 0.85], dtype=torch.float64, device=device))
    return {
        "shares": shares,
        "share": fmean(shares),
        "low": unit[0].item(),
        "middle": unit[1].item(),
        "high": unit[2].item(),
    }


def _mean_share(run: Sequence[Row]) -> float:
    return fmean(as_number(row["share"]) for row in run)


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the share of saturated inputs over the whole training."""
    candidate, baseline = compared_norms(rows)
    shares = [per_seed(of_norm(rows, norm), _mean_share) for norm in (candidate, baseline)]
    sides = [of_norm(rows, norm) for norm in (candidate, baseline)]
    return conclude(
        paired(LESS, *shares),
        premises=[learnt(*sides)],
        details=[single(FEW, shares[0]), paired(LAST, *(per_seed(side, _last_layer) for side in sides))],
        compared=f"{candidate} against {baseline}",
    )


def _last_layer(run: Sequence[Row]) -> float:
    return fmean(as_number(row["shares"][-1]) for row in run)


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the share by epoch, the accuracy, and the percentiles of one unit's input."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))

    def panel(title: str, unit: str, columns: Sequence[str]) -> Panel:
        marks = [
            over_epochs(
                of_norm(rows, norm),
                column,
                label=norm_label(norm) if place == 0 else "",
                **look,
                dashed=place > 0,
            )
            for norm, look in zip(norms, looks(norms), strict=True)
            for place, column in enumerate(columns)
        ]
        return Panel(title=title, x_label="epoch", y_label=unit, marks=marks)

    panels = (
        panel("Saturated inputs, all layers", "share", ["share"]),
        panel("One unit's input, layer 3", "median; 15 % and 85 % dashed", ["middle", "low", "high"]),
        panel("Test accuracy", "accuracy", ["test_accuracy"]),
    )
    last = rows[-1]["epoch"]
    lines, words = [], []
    for norm in norms:
        mine = of_norm(rows, norm)
        layers = [
            mean_and_spread([fmean(as_number(row["shares"][place]) for row in mine)])[0] for place in range(LAYERS)
        ]
        accuracy = mean_and_spread([as_number(row["test_accuracy"]) for row in mine if row["epoch"] == last])
        lines.append([norm, *(f"{share:.4f}" for share in layers), f"{accuracy[0]:.4f} ± {accuracy[1]:.4f}"])
        words.append(f"{norm_label(norm)}, share {fmean(layers):.4f} and last accuracy {accuracy[0]:.4f}")
    table = Table(
        title="Share of saturated sigmoid inputs, mean over epochs and seeds",
        header=["norm", *(f"layer {place + 1}" for place in range(LAYERS)), f"test accuracy, epoch {last}"],
        rows=lines,
        note=f"Saturated: further than {SATURATED} from 0, where the slope is below a tenth of its largest.",
    )
    text = f"Curves by epoch of saturated inputs, one unit's percentiles and accuracy. {'; '.join(words).capitalize()}."
    return Chart(name="saturation", title="Inputs of the sigmoids while training", panels=panels, text=text), table


CLAIM = Claim(
    id="saturation",
    number="E7",
    title="With batch normalization a smaller share of sigmoids is saturated",
    statement="In a network of sigmoids batch normalization keeps the inputs of the non-linearity where its slope is "
    "alive; without it more of them drift into saturation.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 4.1 and figure 1; repeated in the sources S1 and S2",
    prediction="The share of saturated inputs, mean over the layers, is smaller with batch normalization than without; "
    "a difference within half a percent is none. Beside it: with the norm it is below 5 % (of a standard normal input "
    "0.028 % would be), and the share of the last layer, which the paper's figure shows.",
    question=LESS,
    premises=(LEARNT,),
    details=(FEW, LAST),
    settings_rule="The paper's network and batch of 60: three hidden layers of 100 sigmoids, initial weights normal "
    "with deviation 0.1, binary images; plain gradient descent at 0.1, for 40 epochs of digits and 5 of FashionMNIST, "
    "which are 5,000 steps. Nothing was searched.",
    meaning={
        "supported": "In this network the norm lowers the share of saturated inputs. That is what the paper's figure "
        "suggests, counted.",
        "refuted": "In this network saturation is not what the norm removes: the share with it is not lower. "
        "Where accuracies differ all the same, look at the scale of the gradients instead (claim "
        "gradient-flow).",
        "inconclusive": "An interval holds its line, or too few seeds were run. More seeds make the intervals "
        "narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=5)},
    measure=measure,
    judge=decide,
    show=show,
)
