"""E14: with batch normalization the L2 penalty can be five times lower."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from ..charts import Chart, Panel, Table
from ..claim import Cell, Claim, Row
from ..curves import looks, norm_label, over_variants
from ..data import Dataset, validation_split
from ..label_noise import mislabelled
from ..networks import DenseNetwork
from ..premises import LEARNT, learnt
from ..rows import as_number, compared_norms, of_norm, per_seed, spread_in_words, where
from ..training import TrainingSettings, evaluate, train, with_seed
from ..verdicts import Rule, Verdict, conclude, paired

__all__ = ["CLAIM", "build", "chosen_decay"]

FACTOR = 5
# Each but the first has its fifth in the grid.
POSITIVE = (0.002, 0.01, 0.05, 0.25)
DECAYS = (0.0, *POSITIVE)
# The share of training labels that are wrong.
WRONG = 0.2
# At a constant rate on wrong labels the accuracy moves from epoch to epoch: it is read as the mean over so many.
LATE = 10
CAN = Rule(
    effect="test accuracy of the last ten epochs with the norm, at a fifth of the decay that is best without it minus "
    "at that decay",
    unit="",
    direction="above",
    line=-0.01,
)
HELPS = Rule(
    effect="test accuracy of the last ten epochs without the norm, at the decay that is best held out minus without "
    "decay",
    unit="",
    direction="above",
    line=0.0,
)
SPARED = Rule(
    effect="test accuracy of the last ten epochs gained by a fifth of the decay that is best without a norm, with the "
    "norm minus without",
    unit="",
    direction="above",
    line=0.0,
)
SETTINGS = TrainingSettings(epochs=40, batch_size=32, optimizer="sgd", learning_rate=0.1, train_images=600)


def build(norm: str) -> DenseNetwork:
    """Return two hidden layers of 256 with ReLU."""
    return DenseNetwork([256] * 2, norm)


def measure(cell: Cell, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Train on one half, a share of it labelled wrongly, and yield the accuracy on the other half and on the test."""
    halves = mislabelled(validation_split(dataset, share=0.5), WRONG, cell.seed)
    settings = replace(cell.settings, weight_decay=float(dict(cell.variant)["decay"]))
    model = with_seed(lambda: build(cell.norm), cell.seed)
    test = dataset.test_images.to(cell.device), dataset.test_labels.to(cell.device)
    held_out: deque[float] = deque(maxlen=LATE)
    tested: deque[float] = deque(maxlen=LATE)
    for epoch in train(model, halves, settings, cell.seed, cell.device):
        held_out.append(epoch.test_accuracy)
        tested.append(evaluate(model, *test)[1])
        yield {
            "epoch": epoch.epoch,
            "train_loss": epoch.train_loss,
            "test_accuracy": tested[-1],
            "late_accuracy": fmean(tested),
            "late_validation_accuracy": fmean(held_out),
        }


def _last(column: str, run: Sequence[Row]) -> float:
    return as_number(run[-1][column])


def chosen_decay(rows: Sequence[Row]) -> float:
    """Return the decay with the best held-out accuracy, mean over seeds, of those whose fifth is in the grid.

    Of equals the smallest; the smallest as well where nothing has been run.
    """

    def quality(decay: float) -> float:
        accuracies = per_seed(where(rows, decay=decay), partial(_last, "late_validation_accuracy"))
        return fmean(accuracies.values()) if accuracies else 0.0

    return max(POSITIVE[1:], key=quality)


def _accuracy(rows: Sequence[Row], decay: float) -> dict[int, float]:
    return per_seed(where(rows, decay=decay), partial(_last, "late_accuracy"))


def _fifth(decay: float) -> float:
    return POSITIVE[POSITIVE.index(decay) - 1]


def decide(rows: Sequence[Row]) -> Verdict:
    """Judge the step from the decay that is best without a norm to a fifth of it, on either side."""
    candidate, baseline = compared_norms(rows)
    sides = [of_norm(rows, norm) for norm in (candidate, baseline)]
    decay = chosen_decay(sides[1])
    lower, usual = ([_accuracy(side, value) for side in sides] for value in (_fifth(decay), decay))
    gained = [{seed: a[seed] - b[seed] for seed in a.keys() & b.keys()} for a, b in zip(lower, usual, strict=True)]
    return conclude(
        paired(CAN, lower[0], usual[0]),
        premises=[
            learnt(*(where(side, decay=decay) for side in sides)),
            paired(HELPS, usual[1], _accuracy(sides[1], 0.0)),
        ],
        details=[paired(SPARED, *gained)],
        compared=f"{candidate}, decay {_fifth(decay):g} against {decay:g}",
    )


def show(rows: Sequence[Row]) -> tuple[Chart | Table, ...]:
    """Show the final accuracy against the decay, on the test data and on the half that the choice was made on."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    positive = [row for row in rows if row["decay"] > 0] or list(rows)
    panels = [
        Panel(
            title=title,
            x_label="weight decay",
            y_label="accuracy, last ten epochs",
            marks=[
                over_variants(of_norm(positive, norm), "decay", partial(_last, column), label=norm_label(norm), **look)
                for norm, look in zip(norms, looks(norms), strict=True)
                if of_norm(positive, norm)
            ],
            log_x=positive[0]["decay"] > 0,
            x_ticks=POSITIVE,
        )
        for title, column in (("Test accuracy", "late_accuracy"), ("Held-out accuracy", "late_validation_accuracy"))
    ]
    lines = []
    for norm in norms:
        mine = of_norm(rows, norm)
        accuracies = [spread_in_words(list(_accuracy(mine, decay).values())) for decay in DECAYS]
        lines.append([norm, f"{chosen_decay(mine):g}", *accuracies])
    table = Table(
        title="Test accuracy of the last ten epochs, by weight decay",
        header=["norm", "best held out", *(f"{decay:g}" for decay in DECAYS)],
        rows=lines,
        note="Mean ± standard deviation over seeds. Best held out: of the decays whose fifth was run, the one with the "
        "best accuracy on the half of the training data that no net was trained on.",
    )
    words = "; ".join(f"{norm_label(line[0])} {', '.join(line[2:])}" for line in lines)
    text = f"Curves of accuracy against weight decay. Test accuracy at {', '.join(table.header[2:])}: {words}."
    return Chart(name="weight-decay", title="Accuracy by weight decay", panels=panels, text=text), table


CLAIM = Claim(
    id="weight-decay",
    number="E14",
    title="With batch normalization the L2 penalty can be five times lower",
    statement="A net with batch normalization does as well with a fifth of the weight decay that the net without it "
    "needs.",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167, section 4.2.1; repeated in the sources S3 and S4",
    prediction="From the decay that is best without a norm to 1/5 of it, the net with batch normalization loses less "
    "than 1 point of test accuracy. The premise: without the norm this decay helps. Beside it: the net with the norm "
    "loses less than the net without.",
    question=CAN,
    premises=(LEARNT, HELPS),
    details=(SPARED,),
    design=3,
    settings_rule="Two hidden layers of 256 with ReLU, trained on half of few training images (300 of digits, 1000 of "
    f"FashionMNIST), a fifth of whose labels is wrong ({WRONG:.0%}, drawn anew for every seed, the same for both), "
    "for long enough to fit them: there is something to regularise. The other half, with its right labels, chooses the "
    "decay, by the mean accuracy over seeds and the last ten epochs of the nets without a norm. The penalty is on all "
    "parameters, as torch's SGD has it. Plain gradient descent on batches of 32 at a constant rate of 0.1 on both "
    "sides; at a constant rate the accuracy moves from epoch to epoch, so "
    "the mean of the last ten is judged. Net, images, labels, rate and the grid of decays were chosen before any net "
    "with a norm was trained, by the gain of decay in the plain net alone, on the seeds 1001 and 1002, which no judged "
    "run has.",
    meaning={
        "supported": "With the norm a fifth of the decay is enough here. The curve shows how flat the accuracy is on "
        "either side.",
        "refuted": "Here the decay cannot be lowered so far for nothing. With a norm the decay also sets the rate at "
        "which weights turn.",
        "inconclusive": "A point is inside the interval. More seeds or harder data decide.",
        "not testable here": "No decay is shown to help the plain net on these data, so there is nothing to lower.",
    },
    data=("digits", "fashion-mnist"),
    norms=("none", "batch"),
    seeds=5,
    settings={
        "digits": SETTINGS,
        "fashion-mnist": replace(SETTINGS, train_images=2000, test_images=2000),
    },
    variants=tuple((("decay", decay),) for decay in DECAYS),
    keeps_last=True,
    measure=measure,
    judge=decide,
    show=show,
)
