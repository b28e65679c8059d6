"""E5: AlexNet with batch normalization and no dropout generalises better than AlexNet with dropout (figure 6)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

from ..charts import Chart, Line, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import over_epochs
from ..data import Dataset
from ..networks import AlexNet
from ..rows import as_number, compared_norms, of_norm, per_seed, spread_in_words
from ..search import RATE_RULE, best_rate
from ..training import TrainingSettings, evaluate, seeded, train, with_seed
from ..verdicts import Rule, Verdict, combine, judge

__all__ = ["CLAIM", "builder"]

# The last epoch of the source's figure 6, on CIFAR-100.
SOURCE = {"batch": {"train": 0.999, "test": 0.58}, "none": {"train": 0.973, "test": 0.40}}
DROPOUT = 0.5
# Channels of the first convolution; 96 is the original's.
WIDTHS = {"cifar-100": 96}
SMALL_WIDTH = 6
RATES = (0.0003, 0.001, 0.003)
TEST = Rule(
    effect="test accuracy of the last epoch, the norm without dropout minus dropout without a norm",
    unit="",
    direction="above",
    threshold=0.0,
    predicted=SOURCE["batch"]["test"] - SOURCE["none"]["test"],
)
TRAIN = Rule(
    effect="training accuracy of the last epoch, the norm without dropout minus dropout without a norm",
    unit="",
    direction="above",
    threshold=0.0,
    predicted=SOURCE["batch"]["train"] - SOURCE["none"]["train"],
)
SETTINGS = TrainingSettings(epochs=20, batch_size=32, optimizer="adam", learning_rate=0.0, train_images=320)


def build(width: int, in_channels: int, size: int, classes: int, norm: str) -> AlexNet:
    """Return a side's AlexNet: with a norm there is no dropout, without one there is."""
    dropout = DROPOUT if norm == "none" else 0.0
    return AlexNet(norm, dropout=dropout, width=width, in_channels=in_channels, size=size, classes=classes)


@cache
def builder(width: int, in_channels: int, size: int, classes: int) -> Callable[[str], AlexNet]:
    """Return the function that makes a side's AlexNet from the norm's name; the same for the same sizes."""
    return partial(build, width, in_channels, size, classes)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train one side's AlexNet and yield each epoch's accuracy on the training and on the test data."""
    in_channels, size = dataset.train_images.shape[1:3]
    side = builder(WIDTHS.get(cell.data, SMALL_WIDTH), in_channels, size, len(dataset.classes))
    rate = best_rate(side, cell.norm, dataset, cell.settings, RATES, cell.device)
    model = with_seed(lambda: side(cell.norm), cell.seed)
    images, labels = dataset.train_images.to(cell.device), dataset.train_labels.to(cell.device)
    with seeded(cell.seed, cell.device):
        for epoch in train(model, dataset, replace(cell.settings, learning_rate=rate), cell.seed, cell.device):
            train_accuracy = evaluate(model, images, labels)[1]
            yield {"rate": rate, "train_accuracy": train_accuracy, **asdict(replace(epoch, step_losses=()))}


def _last(column: str, run: Sequence[Row]) -> float:
    return as_number(run[-1][column])


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge both accuracies of the last epoch."""
    candidate, baseline = compared_norms(rows)
    sides = [of_norm(rows, candidate), of_norm(rows, baseline)]
    parts = [
        judge(rule, *(per_seed(side, partial(_last, f"{part}_accuracy")) for side in sides))
        for rule, part in ((TEST, "test"), (TRAIN, "train"))
    ]
    return combine(parts, compared=f"AlexNet with {candidate} norm against AlexNet with dropout")


def _label(norm: str) -> str:
    return "dropout, no norm" if norm == "none" else f"{norm} norm, no dropout"


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show figure 6, training and test accuracy by epoch, with the source's last numbers where the data are its own."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    titles = {"train": "Training accuracy", "test": "Test accuracy"}
    panels, lines = [], []
    for part, title in titles.items():
        marks = []
        for colour, norm in enumerate(norms):
            mine = of_norm(rows, norm)
            marks.append(over_epochs(mine, f"{part}_accuracy", label=_label(norm), colour=colour))
            if norm in SOURCE and rows[0]["data"] == "cifar-100":
                ends = [1, mine[-1]["epoch"]]
                label = f"{_label(norm)}, source"
                marks.append(Line(label=label, x=ends, y=[SOURCE[norm][part]] * 2, colour=colour, dashed=True))
        panels.append(Panel(title=title, x_label="epoch", y_label="share right", marks=marks))
    for norm in norms:
        mine = of_norm(rows, norm)
        cells = [spread_in_words(list(per_seed(mine, partial(_last, f"{part}_accuracy")).values())) for part in titles]
        source = [f"{SOURCE[norm][part]:g}" if norm in SOURCE else "" for part in titles]
        lines.append([_label(norm), f"{mine[0]['rate']:g}", cells[0], source[0], cells[1], source[1]])
    table = Table(
        title="Accuracy after the last epoch",
        header=["net", "learning rate", "training", "training, source", "test", "test, source"],
        rows=lines,
        note="Mean ± standard deviation over seeds. The source's numbers are one run of 100 epochs on CIFAR-100; on "
        "other data they stand here for the direction only.",
    )
    words = "; ".join(f"{line[0]}: training {line[2]}, test {line[4]}" for line in lines)
    text = f"Curves by epoch of training and test accuracy of AlexNet. After the last epoch, {words}."
    title = "AlexNet with batch normalization and with dropout"
    return Chart(name="generalization", title=title, panels=panels, text=text), table


CLAIM = Claim(
    id="generalization",
    number="E5",
    title="AlexNet with batch normalization and no dropout beats AlexNet with dropout",
    statement="With batch normalization in the place of dropout AlexNet fits the training data better and the test "
    "data as well: on CIFAR-100 0.999 against 0.973 in training, about 0.58 against 0.40 in the test.",
    source="Batch normalization built from scratch, section 3.4, figure 6",
    prediction=f"From the source's figure: test accuracy after the last epoch is higher by {TEST.predicted:.2f}, "
    f"training accuracy by {TRAIN.predicted:.3f}. Held to be supported here if both are higher.",
    rules=(TEST, TRAIN),
    settings_rule="The source names no optimiser, batch size or rate, and does not print its net. This AlexNet has "
    "3x3 kernels for small images, and on grey images 6 channels in its first convolution in the place of 96. Adam at "
    f"0.0003, 0.001 or 0.003. {RATE_RULE} Few training images on digits and FashionMNIST (320 and 1600), so that "
    "there is something to generalise; all of CIFAR-100 for the source's 100 epochs.",
    meaning={
        "supported": "On these data the net with the norm is ahead in training and in the test. It says that the norm "
        "can take dropout's place in this net, not that the two cannot go together (claims dropout, variance-shift).",
        "refuted": "On these data at least one of both accuracies is not higher with the norm. Where it is the test's, "
        "dropout is the better regulariser here; the source's figure does not carry over.",
        "inconclusive": "An interval holds its line: both nets may fit these data as well. More seeds or harder data, "
        "CIFAR-100 itself, decide.",
    },
    data=("digits", "fashion-mnist", "cifar-100"),
    norms=("none", "batch"),
    seeds=5,
    settings={
        "digits": SETTINGS,
        "fashion-mnist": replace(SETTINGS, epochs=8, train_images=1600, test_images=1000),
        "cifar-100": replace(SETTINGS, epochs=100, batch_size=128, train_images=None),
    },
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
