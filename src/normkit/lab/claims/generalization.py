"""E5: AlexNet with batch normalization and no dropout generalises better than AlexNet with dropout (figure 6)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from statistics import fmean
from typing import Any

from ..charts import Chart, Line, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, over_epochs
from ..data import Dataset
from ..networks import AlexNet
from ..premises import LEARNT, learnt
from ..rows import as_number, compared_norms, matched, of_norm, per_seed, spread_in_words, where
from ..search import RATE_RULE, best_rate
from ..training import TrainingSettings, evaluate, seeded, train, with_seed
from ..verdicts import Reproduced, Rule, Verdict, conclude, paired, single

__all__ = ["CLAIM", "builder"]

# The last epoch of the source's figure 6, on CIFAR-100.
SOURCE = {"batch": {"train": 0.999, "test": 0.58}, "none": {"train": 0.973, "test": 0.40}}
DROPOUT = 0.5
DROPOUTS = (0.0, DROPOUT)
WITHIN = 0.02
# Channels of the first convolution; 96 is the original's.
WIDTHS = {"cifar-100": 96}
SMALL_WIDTH = 6
RATES = (0.0003, 0.001, 0.003)
TEST = Rule(
    effect="test accuracy of the last epoch, the norm without dropout minus dropout without a norm",
    unit="",
    direction="above",
    line=0.0,
    band=(-0.005, 0.005),
)
TRAIN = Rule(
    effect="training accuracy of the last epoch, the norm without dropout minus dropout without a norm",
    unit="",
    direction="above",
    line=0.0,
)
FITTED = Rule(
    effect="training accuracy of the last epoch, of the side that fits less",
    unit="",
    direction="above",
    line=0.8,
)
MATCHED = Rule(
    effect="test accuracy at the same training accuracy, the norm without dropout minus dropout without a norm",
    unit="",
    direction="above",
    line=0.0,
)
GAP = Rule(
    effect="training minus test accuracy of the last epoch, the norm without dropout minus dropout without a norm",
    unit="",
    direction="below",
    line=0.0,
)
NORM = Rule(
    effect="test accuracy of the last epoch without dropout, with the norm minus without",
    unit="",
    direction="above",
    line=0.0,
)
BOTH = Rule(
    effect="test accuracy of the last epoch with the norm, without dropout minus with it",
    unit="",
    direction="above",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=60, batch_size=32, optimizer="adam", learning_rate=0.0, train_images=320)


def build(dropout: float, width: int, in_channels: int, size: int, classes: int, norm: str) -> AlexNet:
    """Return a side's AlexNet."""
    return AlexNet(norm, dropout=dropout, width=width, in_channels=in_channels, size=size, classes=classes)


@cache
def builder(dropout: float, width: int, in_channels: int, size: int, classes: int) -> Callable[[str], AlexNet]:
    """Return the function that makes a side's AlexNet from the norm's name; the same for the same sizes."""
    return partial(build, dropout, width, in_channels, size, classes)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train one side's AlexNet and yield each epoch's accuracy on the training and on the test data."""
    in_channels, size = dataset.train_images.shape[1:3]
    dropout = float(dict(cell.variant)["dropout"])
    side = builder(dropout, WIDTHS.get(cell.data, SMALL_WIDTH), in_channels, size, len(dataset.classes))
    rate = best_rate(side, cell.norm, dataset, cell.settings, RATES, cell.device)
    model = with_seed(lambda: side(cell.norm), cell.seed)
    images, labels = dataset.train_images.to(cell.device), dataset.train_labels.to(cell.device)
    with seeded(cell.seed, cell.device):
        for epoch in train(model, dataset, replace(cell.settings, learning_rate=rate), cell.seed, cell.device):
            train_accuracy = evaluate(model, images, labels)[1]
            errors = {"train_accuracy": train_accuracy, "train_error": 1 - train_accuracy}
            yield {"rate": rate, **errors, **asdict(replace(epoch, step_losses=()))}


def _last(column: str, run: Sequence[Row]) -> float:
    return as_number(run[-1][column])


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the test accuracy of the source's two nets; beside it what else the four nets show."""
    candidate, baseline = compared_norms(rows)
    nets = {
        (norm, dropout): where(of_norm(rows, norm), dropout=dropout)
        for norm in (candidate, baseline)
        for dropout in DROPOUTS
    }
    sides = [nets[candidate, 0.0], nets[baseline, DROPOUT]]
    test, trained, gap = ([per_seed(side, read) for side in sides] for read in (_test, _train, _gap))
    plain, both = (per_seed(nets[side], _test) for side in ((baseline, 0.0), (candidate, DROPOUT)))
    fitted = {seed: min(trained[0][seed], trained[1][seed]) for seed in trained[0].keys() & trained[1].keys()}
    return conclude(
        paired(TEST, *test),
        premises=[learnt(*sides), single(FITTED, fitted)],
        details=[
            paired(MATCHED, *matched(*sides, fit="train_error", read="test_accuracy")),
            paired(GAP, *gap),
            paired(TRAIN, *trained),
            paired(NORM, test[0], plain),
            paired(BOTH, test[0], both),
        ],
        reproduced=_reproduced(rows),
        compared=f"AlexNet with {candidate} norm against AlexNet with dropout",
    )


def _reproduced(rows: Sequence[Row]) -> list[Reproduced]:
    """Put our last accuracies on CIFAR-100 beside those of the source's figure 6."""
    found = []
    for norm, numbers in SOURCE.items():
        side = where(of_norm(rows, norm), dropout=_source_dropout(norm), data="cifar-100")
        for part, read in (("train", _train), ("test", _test)):
            ours = list(per_seed(side, read).values())
            what = f"{part} accuracy on CIFAR-100, {_label(norm, _source_dropout(norm))} (figure 6)"
            mean = fmean(ours) if ours else None
            found.append(Reproduced(what=what, source=numbers[part], ours=mean, within=WITHIN))
    return found


def _source_dropout(norm: str) -> float:
    """Return the dropout that the source's net of this norm has."""
    return DROPOUT if norm == "none" else 0.0


_test, _train = partial(_last, "test_accuracy"), partial(_last, "train_accuracy")


def _gap(run: Sequence[Row]) -> float:
    return _train(run) - _test(run)


def _label(norm: str, dropout: float) -> str:
    return f"{'no' if norm == 'none' else norm} norm, {'dropout' if dropout else 'no dropout'}"


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show figure 6, training and test accuracy by epoch, with the source's last numbers where the data are its own."""
    nets = list(dict.fromkeys((row["norm"], row["dropout"]) for row in rows))
    of_source = rows[0]["data"] == "cifar-100"
    titles = {"train": "Training accuracy", "test": "Test accuracy"}
    panels, lines = [], []
    for part, title in titles.items():
        marks = []
        for (norm, dropout), look in zip(nets, looks([norm for norm, _ in nets]), strict=True):
            mine = where(of_norm(rows, norm), dropout=dropout)
            marks.append(over_epochs(mine, f"{part}_accuracy", label=_label(norm, dropout), **look))
            if of_source and norm in SOURCE and dropout == _source_dropout(norm):
                ends = [1, mine[-1]["epoch"]]
                label = f"{_label(norm, dropout)}, source"
                marks.append(Line(label=label, x=ends, y=[SOURCE[norm][part]] * 2, **look, dashed=True))
        panels.append(Panel(title=title, x_label="epoch", y_label="accuracy", marks=marks))
    for norm, dropout in nets:
        mine = where(of_norm(rows, norm), dropout=dropout)
        cells = [spread_in_words(list(per_seed(mine, read).values())) for read in (_train, _test, _gap)]
        lines.append([_label(norm, dropout), f"{mine[0]['rate']:g}", *cells])
    table = Table(
        title="Accuracy after the last epoch",
        header=["net", "learning rate", "training", "test", "training minus test"],
        rows=lines,
        note="Mean ± standard deviation over seeds.",
    )
    words = "; ".join(f"{line[0]}: training {line[2]}, test {line[3]}" for line in lines)
    text = f"Curves by epoch of training and test accuracy of AlexNet. After the last epoch, {words}."
    title = "AlexNet with batch normalization and with dropout"
    return Chart(name="generalization", title=title, panels=panels, text=text), table


CLAIM = Claim(
    id="generalization",
    number="E5",
    title="AlexNet with batch normalization and no dropout classifies test data better than AlexNet with dropout",
    statement="With batch normalization in the place of dropout AlexNet fits the training data better and the test "
    "data as well: on CIFAR-100 0.999 against 0.973 in training, about 0.58 against 0.40 in the test.",
    source="Batch normalization built from scratch, section 3.4, figure 6",
    prediction="The test accuracy after the last epoch is higher with batch normalization and no dropout than with "
    "dropout and no norm, by 0.18 in the source's figure; within half a point is no difference. The premise: both nets "
    "have fitted the training data. Beside it: the same at equal training accuracy, the gap, and the other two nets of "
    "the four.",
    question=TEST,
    premises=(LEARNT, FITTED),
    details=(MATCHED, GAP, TRAIN, NORM, BOTH),
    design=2,
    settings_rule="The source names no optimiser, batch size or rate, and does not print its net. This AlexNet has "
    "3x3 kernels for small images, and on grey images 6 channels in its first convolution in the place of 96. Adam at "
    f"0.0003, 0.001 or 0.003. {RATE_RULE} Few training images on digits and FashionMNIST (320 and 1600), so that "
    "there is something to generalise; all of CIFAR-100 for the source's 100 epochs.",
    meaning={
        "supported": "On these data the net with the norm is ahead in the test. It says that the norm "
        "can take dropout's place in this net, not that the two cannot go together (claims dropout, variance-shift).",
        "refuted": "On these data the net with dropout is ahead in the test: dropout is the better regulariser here.",
        "inconclusive": "An interval holds its line: both nets may fit these data as well. More seeds or harder data, "
        "CIFAR-100 itself, decide.",
    },
    data=("digits", "fashion-mnist", "cifar-100"),
    norms=("none", "batch"),
    seeds=5,
    settings={
        "digits": SETTINGS,
        "fashion-mnist": replace(SETTINGS, epochs=40, train_images=1600, test_images=1000),
        "cifar-100": replace(SETTINGS, epochs=100, batch_size=128, train_images=None),
    },
    variants=tuple((("dropout", dropout),) for dropout in DROPOUTS),
    rates=RATES,
    measure=measure,
    judge=decide,
    show=show,
)
