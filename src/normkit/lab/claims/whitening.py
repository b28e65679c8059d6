"""E21: full whitening costs too much for what it gives over batch normalization."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import norm_label, over_epochs
from ..data import Dataset
from ..rows import as_number, last_accuracies, of_norm, per_seed, spread_in_words
from ..search import RATE_RULE, train_at_best_rate
from ..small_network import SmallLeNet
from ..training import TrainingSettings, with_seed
from ..verdicts import Rule, Verdict, combine, judge, judge_values

__all__ = ["CLAIM", "step_milliseconds"]

NORMS = ("batch", "whitening")
RATES = (0.03, 0.1, 0.3)
# The first steps warm up caches and the kernels' compiler, and are not counted.
WARM_STEPS, TIMED_STEPS = 5, 40
COSTS = Rule(
    effect="time per training step, whitening over batch norm, medians of interleaved steps",
    unit="times",
    direction="above",
    threshold=1.5,
)
GIVES_LITTLE = Rule(
    effect="test accuracy after the last epoch, whitening minus batch norm",
    unit="",
    direction="below",
    threshold=0.01,
)
SETTINGS = TrainingSettings(
    epochs=12, batch_size=64, optimizer="sgd", learning_rate=0.0, momentum=0.9, train_images=960
)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train the small LeNet at the norm's best rate; the cells of whitening also time a step of both nets."""
    times = step_milliseconds(cell, dataset) if cell.norm == "whitening" else dict.fromkeys(NORMS)
    columns = {f"milliseconds_{norm}": times[norm] for norm in NORMS}
    for row in train_at_best_rate(SmallLeNet, cell, dataset, RATES):
        yield {**row, **columns}


def step_milliseconds(cell: Cell, dataset: Dataset) -> dict[str, float]:
    """Return the median time of a training step with each norm, the norms taking turns step by step."""
    batch = slice(cell.settings.batch_size)
    images, labels = dataset.train_images[batch].to(cell.device), dataset.train_labels[batch].to(cell.device)
    nets = {norm: with_seed(partial(SmallLeNet, norm), cell.seed).to(cell.device).train() for norm in NORMS}
    steps = {norm: _step(net, images, labels) for norm, net in nets.items()}
    seconds: dict[str, list[float]] = {norm: [] for norm in NORMS}
    for _ in range(WARM_STEPS + TIMED_STEPS):
        for norm, step in steps.items():
            begun = _clock(cell.device)
            step()
            seconds[norm].append(_clock(cell.device) - begun)
    return {norm: 1000 * median(values[WARM_STEPS:]) for norm, values in seconds.items()}


def _step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Return one whole training step of this model: forward, backward, update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _clock(device: str) -> float:
    """Return seconds: of this process's own work on a CPU, which others may share, and of the wall on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _ratio(run: Sequence[Row]) -> float:
    batch, whitening = (as_number(run[0][f"milliseconds_{norm}"]) for norm in NORMS)
    return whitening / batch


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the cost and the gain."""
    batch, whitening = (of_norm(rows, norm) for norm in NORMS)
    parts = [
        judge_values(COSTS, per_seed(whitening, _ratio)),
        judge(GIVES_LITTLE, last_accuracies(whitening), last_accuracies(batch)),
    ]
    return combine(parts, compared="whitening against batch norm")


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show accuracy by epoch, the same against the time it took, and both in numbers."""
    marks, timed, lines = [], [], []
    for colour, norm in enumerate(NORMS):
        mine = of_norm(rows, norm)
        if not mine:
            continue
        line = over_epochs(mine, "test_accuracy", label=norm_label(norm), colour=colour)
        marks.append(line)
        times = [as_number(row[f"milliseconds_{norm}"]) for row in of_norm(rows, "whitening") if row["epoch"] == 1]
        if times:
            timed.append(replace(line, x=[epoch * median(times) for epoch in line.x]))
        accuracy = spread_in_words(list(last_accuracies(mine).values()))
        lines.append([norm, spread_in_words(times, digits=2), f"{mine[0]['rate']:g}", accuracy])
    panels = (
        Panel(title="Accuracy by epoch", x_label="epoch", y_label="test accuracy", marks=marks),
        Panel(
            title="Accuracy by time",
            x_label="epoch times milliseconds per step",
            y_label="test accuracy",
            marks=timed,
        ),
    )
    ratio = spread_in_words(list(per_seed(of_norm(rows, "whitening"), _ratio).values()), digits=2)
    table = Table(
        title="Time per training step, and test accuracy after the last epoch",
        header=["norm", "milliseconds per step", "rate chosen", "test accuracy"],
        rows=lines,
        note=f"Mean ± standard deviation over seeds. A step with whitening takes {ratio} times as long. Rates tried: "
        f"{', '.join(f'{rate:g}' for rate in RATES)}.",
    )
    words = "; ".join(f"{norm_label(line[0])} {line[1]} ms per step, accuracy {line[3]}" for line in lines)
    text = f"Test accuracy by epoch and against the time it took. {words.capitalize()}. Ratio of times: {ratio}."
    return Chart(name="whitening", title="What whitening costs and gives", panels=panels, text=text), table


CLAIM = Claim(
    id="whitening",
    number="E21",
    title="Full whitening costs too much for what it gives over batch normalization",
    statement="Whitening removes the correlation of channels too, which is what batch normalization is the cheap form "
    "of. It makes training steps dearer, and what it adds in accuracy does not pay for that.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 3; repeated in the source S4. Whitening as in Huang et "
    "al. 2018, arXiv:1804.08450",
    prediction="A training step with whitening takes more than 1.5 times as long as one with batch normalization, and "
    "the test accuracy is higher by less than one percentage point. No source gives a number.",
    rules=(COSTS, GIVES_LITTLE),
    settings_rule="A small LeNet (two convolutions, one hidden dense layer, a norm at each). Whitening takes groups of "
    "16 channels at most, so its cost here is less than that of all 32 at once. Gradient descent with momentum 0.9 on "
    f"batches of 64 at a rate of 0.03, 0.1 or 0.3. {RATE_RULE} Steps of both nets take turns on the same batch, one "
    "thread; processor time on a CPU. Times differ from run to run, so this claim's rows do not repeat bit for bit.",
    meaning={
        "supported": "In this net whitening is half as dear again or more, and gains less than a point. In a larger "
        "net the convolutions take a larger part of a step and the ratio is smaller.",
        "refuted": "In this net either whitening is not that dear, or it gains a point or more. The table of rules "
        "says which half fails.",
        "inconclusive": "The time is clear or the accuracy is, but an interval holds the other's line. More seeds "
        "make it narrower.",
    },
    data=("digits", "fashion-mnist"),
    norms=NORMS,
    any_norm=False,
    seeds=5,
    settings={"digits": SETTINGS, "fashion-mnist": replace(SETTINGS, epochs=6, train_images=3200, test_images=2000)},
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
