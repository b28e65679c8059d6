"""E19: small batches cost batch normalization more accuracy than group normalization."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..charts import Chart, Line, Panel, Table, norm_colour
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_variants
from ..data import Dataset
from ..premises import LEARNT, learnt
from ..rows import as_number, last_accuracies, of_norm, spread_in_words, where
from ..search import RATE_RULE, best_rate, train_at_rate
from ..small_network import SmallLeNet, SmallResidual
from ..training import TrainingSettings
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "lost"]

BATCH_SIZES = (2, 8, 32)
SMALLEST, LARGEST = 2, 32
OTHERS = ("group", "layer")
RATES = (0.03, 0.1, 0.3)
LITTLE = 0.02
# Wu and He 2018, table 2: validation error of ResNet-50 on ImageNet by batch per GPU.
IMAGENET_ERRORS = {
    "batch": {32: 0.236, 16: 0.237, 8: 0.248, 4: 0.273, 2: 0.347},
    "group": {32: 0.241, 16: 0.242, 8: 0.240, 4: 0.242, 2: 0.241},
}
PREDICTED = {norm: errors[SMALLEST] - errors[LARGEST] for norm, errors in IMAGENET_ERRORS.items()}
SUFFERS = {
    norm: Rule(
        effect=f"test accuracy lost from batches of {LARGEST} to batches of {SMALLEST}, batch minus {norm} norm",
        unit="",
        direction="above",
        line=0.0,
        band=(-0.01, 0.01),
    )
    for norm in OTHERS
}
DENSE = Rule(
    effect=f"share of seeds in which batches of {SMALLEST} cost batch norm more than group norm, in the net whose "
    "dense layer is normalized too",
    unit="",
    direction="above",
    line=0.5,
    kind="sign",
)
HOLDS = {
    norm: Rule(
        effect=f"test accuracy lost from batches of {LARGEST} to batches of {SMALLEST}, {norm} norm",
        unit="",
        direction="below",
        line=LITTLE,
    )
    for norm in OTHERS
}
SETTINGS = TrainingSettings(
    epochs=20, batch_size=LARGEST, optimizer="sgd", learning_rate=0.0, momentum=0.9, train_images=240
)


# The residual net has norms on convolutions alone; in the small LeNet a dense layer has one too, which at batches of
# two normalizes two numbers.
NETS: Mapping[str, Callable[[str], nn.Module]] = {"residual": SmallResidual, "dense": SmallLeNet}


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the cell's net on batches of the cell's size, at a rate in proportion to the size."""
    variant = dict(cell.variant)
    batch_size, build = int(variant["batch_size"]), NETS[str(variant["net"])]
    largest = replace(cell.settings, batch_size=LARGEST)
    rate = best_rate(build, cell.norm, dataset, largest, RATES, cell.device) * batch_size / LARGEST
    mine = replace(cell, settings=replace(cell.settings, batch_size=batch_size))
    return train_at_rate(rate, build, mine, dataset)


def lost(rows: Sequence[Row]) -> dict[int, float]:
    """Return what each seed's accuracy loses between the largest and the smallest batch."""
    large, small = (last_accuracies(where(rows, batch_size=size)) for size in (LARGEST, SMALLEST))
    return {seed: large[seed] - small[seed] for seed in sorted(large.keys() & small.keys())}


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge what the smallest batch costs each norm."""
    residual, dense = where(rows, net="residual"), where(rows, net="dense")
    norms = ("batch", *OTHERS)
    costs = {norm: lost(of_norm(residual, norm)) for norm in norms}
    against_group, against_layer = (paired(SUFFERS[norm], costs["batch"], costs[norm]) for norm in OTHERS)
    return conclude(
        against_group,
        premises=[learnt(*(where(of_norm(residual, norm), batch_size=LARGEST) for norm in norms))],
        details=[
            against_layer,
            *(single(HOLDS[norm], costs[norm]) for norm in OTHERS),
            paired(DENSE, lost(of_norm(dense, "batch")), lost(of_norm(dense, "group"))),
        ],
        compared="batch against group norm",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the test error against the batch size, with the published one beside it."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    ours = {
        net: [
            over_variants(side, "batch_size", _last_error, label=norm_label(norm), **look)
            for norm, look in zip(norms, looks(norms), strict=True)
            if (side := where(of_norm(rows, norm), net=net))
        ]
        for net in NETS
    }
    published = [
        Line(
            label=f"{norm_label(norm)}, Wu and He",
            x=sorted(errors),
            y=[errors[size] for size in sorted(errors)],
            colour=norm_colour(norm),
            dashed=True,
        )
        for norm, errors in IMAGENET_ERRORS.items()
    ]
    axes = partial(Panel, x_label="images per batch", y_label="test error", log_x=True)
    panels = (
        axes(title="Here, norms on convolutions", marks=ours["residual"], x_ticks=BATCH_SIZES),
        axes(title="Here, a dense layer normalized too", marks=ours["dense"], x_ticks=BATCH_SIZES),
        axes(title="ResNet-50 on ImageNet, published", marks=published, x_ticks=sorted(IMAGENET_ERRORS["batch"])),
    )
    lines = []
    for net, norm in ((net, norm) for net in NETS for norm in norms):
        mine = where(of_norm(rows, norm), net=net)
        if not mine:
            continue
        parts = [where(mine, batch_size=size) for size in BATCH_SIZES]
        cells = [
            f"{spread_in_words(list(last_accuracies(part).values()))} ({part[0]['rate']:.2g})" if part else "not run"
            for part in parts
        ]
        lines.append([net, norm, *cells, spread_in_words(list(lost(mine).values()))])
    table = Table(
        title="Test accuracy after the last epoch (and the rate), by batch size",
        header=["net", "norm", *(f"batches of {size}" for size in BATCH_SIZES), f"lost from {LARGEST} to {SMALLEST}"],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. Rates tried at batches of {LARGEST}: "
        f"{', '.join(f'{rate:g}' for rate in RATES)}. ResNet-50 on ImageNet lost {PREDICTED['batch']:.3f} with batch "
        f"norm and {PREDICTED['group']:.3f} with group norm (Wu and He 2018).",
    )
    words = "; ".join(f"{line[0]} net {norm_label(line[1])} {line[-1]}" for line in lines)
    text = f"Test error against the batch size, ours and the published one. Lost from {LARGEST} to {SMALLEST}: {words}."
    return Chart(name="small-batch", title="Test error by batch size", panels=panels, text=text), table


def _last_error(run: Sequence[Row]) -> float:
    return 1 - as_number(run[-1]["test_accuracy"])


CLAIM = Claim(
    id="small-batch",
    number="E19",
    title="Small batches cost batch normalization more accuracy than group normalization",
    statement="With batches of two images batch normalization loses accuracy, because its statistics are estimated "
    "from too few values; group and layer normalization do not use the batch and lose little.",
    source="Wu and He 2018, arXiv:1803.08494, section 4.1, table 2; repeated in the source S2",
    prediction=f"From batches of 32 to batches of 2, ResNet-50 on ImageNet loses {PREDICTED['batch']:.3f} of accuracy "
    f"with batch norm and {PREDICTED['group']:.3f} with group norm. Here: batch norm loses more than group norm in a "
    "residual net; within a point is no difference. Beside it: more than layer norm, these two lose less than "
    f"{LITTLE:g}, and the seeds in which batch norm loses more where a dense layer is normalized too.",
    question=SUFFERS["group"],
    premises=(LEARNT,),
    details=(SUFFERS["layer"], *HOLDS.values(), DENSE),
    design=3,
    settings_rule="A small residual net with norms on its convolutions alone, and beside it a small LeNet (two "
    "convolutions, one hidden dense layer, a norm at each), on few training images, because all digits together are "
    "too easy to lose anything on. As many epochs as bring the nets at batches of 32 to their plateau: with fewer, "
    "large batches lose by the number of their steps. Gradient descent with momentum 0.9; as in the paper, every batch "
    "size has the same number of epochs and a rate in proportion to the batch. The rate for batches of 32 is 0.03, 0.1 "
    "or 0.3. "
    f"{RATE_RULE}",
    meaning={
        "supported": "In this net small batches hurt batch normalization more than group normalization. Where memory "
        "allows only few images, take group norm, or freeze the statistics.",
        "refuted": "In this net small batches cost batch normalization less than group normalization.",
        "inconclusive": "An interval holds its line: the losses differ too much from seed to seed, or are near two "
        "points. More seeds, or harder data, decide.",
    },
    data=("digits", "fashion-mnist"),
    norms=("batch", "group", "layer"),
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, train_images=1120, test_images=2000)},
    variants=tuple((("net", net), ("batch_size", size)) for net in NETS for size in BATCH_SIZES),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
