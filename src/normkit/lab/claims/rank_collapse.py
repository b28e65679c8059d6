"""E24: batch normalization keeps the rank of what a deep random network puts out."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_variants
from ..data import Dataset
from ..networks import DenseNetwork, he_initialized
from ..probes import recorded
from ..rows import as_number, compared_norms, of_norm, per_seed, spread_in_words, where
from ..training import UNTRAINED, with_seed
from ..verdicts import Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "effective_rank"]

DEPTHS = (5, 10, 20, 50)
DEEPEST = 50
WIDTH = 100
KEEPS = Rule(
    effect=f"log2 of the effective rank behind {DEEPEST} layers, with the norm minus without",
    unit="octaves",
    direction="above",
    line=1.0,
)
COLLAPSES = Rule(effect=f"effective rank behind {DEEPEST} layers, without a norm", unit="", direction="below", line=2.0)


def effective_rank(outputs: Tensor) -> float:
    """Return ``(tr C)^2 / |C|_F^2`` of the uncentred covariance C: the number of directions, each as far as it counts.

    >>> effective_rank(torch.eye(4)), effective_rank(torch.ones(4, 3))
    (4.0, 1.0)
    """
    x = outputs.double()
    covariance = x.T @ x
    return float(covariance.trace().square() / covariance.square().sum())


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the effective rank of what the last activation puts out in a fresh network, on one batch."""
    depth = int(dict(cell.variant)["depth"])
    model = with_seed(lambda: he_initialized(DenseNetwork([WIDTH] * depth, cell.norm)), cell.seed)
    model.to(cell.device).train()
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(cell.seed))
    images = dataset.train_images[order[: cell.settings.batch_size]].to(cell.device)
    with recorded(model, ["head"]) as seen, torch.no_grad():
        model(images)
    yield {"rank": effective_rank(seen["head"][0])}


def _rank(run: Sequence[Row]) -> float:
    return as_number(run[0]["rank"])


def _octaves(run: Sequence[Row]) -> float:
    return math.log2(_rank(run))


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the deepest networks."""
    candidate, baseline = compared_norms(rows)
    sides = [where(of_norm(rows, norm), depth=DEEPEST) for norm in (candidate, baseline)]
    return conclude(
        paired(KEEPS, *(per_seed(side, _octaves) for side in sides)),
        details=[single(COLLAPSES, per_seed(sides[1], _rank))],
        compared=f"{candidate} against {baseline}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the rank against the depth."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    marks = [
        over_variants(of_norm(rows, norm), "depth", _rank, label=norm_label(norm), **look)
        for norm, look in zip(norms, looks(norms), strict=True)
    ]
    panel = Panel(
        title="At initialization", x_label="hidden layers", y_label="effective rank", marks=marks, x_ticks=DEPTHS
    )
    lines = [
        [
            norm,
            *(spread_in_words(list(per_seed(where(of_norm(rows, norm), depth=d), _rank).values()), 2) for d in DEPTHS),
        ]
        for norm in norms
    ]
    table = Table(
        title="Effective rank of what the last activation puts out",
        header=["norm", *(f"depth {depth}" for depth in DEPTHS)],
        rows=lines,
        note=f"Mean ± standard deviation over seeds; of {WIDTH} directions at most.",
    )
    words = "; ".join(f"{norm_label(line[0])} {', '.join(line[1:])}" for line in lines)
    text = f"The effective rank against the depth, {', '.join(map(str, DEPTHS))}: {words}."
    return Chart(name="rank-collapse", title="Rank by depth", panels=(panel,), text=text), table


CLAIM = Claim(
    id="rank-collapse",
    number="E24",
    title="Batch normalization keeps the outputs of a deep random network at a higher rank",
    statement="In a deep network with random weights all samples come out in nearly the same direction; with batch "
    "normalization the outputs keep a rank that grows with the width.",
    source="Daneshmand et al. 2020, Batch normalization provably avoids rank collapse for randomly initialised deep "
    "networks, arXiv:2003.01652",
    prediction=f"Behind {DEEPEST} layers of {WIDTH} with ReLU the effective rank of a batch's outputs is more than "
    "twice as large with batch normalization. Beside it: without a norm it is below 2.",
    question=KEEPS,
    details=(COLLAPSES,),
    settings_rule="Nothing is trained: networks of width 100 with He's initial weights, on one batch of 256 images. "
    "The effective rank is the squared trace of the uncentred covariance over its squared norm.",
    meaning={
        "supported": "At the start of training the norm keeps samples apart that a deep plain net makes nearly the "
        "same up to their length. It is one reason why very deep plain nets are hard to begin with.",
        "refuted": "The rank with the norm is not twice that of the plain net in these networks.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={"digits": UNTRAINED, "fashion-mnist": UNTRAINED},
    variants=tuple((("depth", depth),) for depth in DEPTHS),
    measure=measure,
    judge=decide,
    show=show,
)
