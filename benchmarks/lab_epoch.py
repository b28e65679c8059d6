"""A LeNet-5 epoch through the laboratory's loop beside a bare loop of the same work.

    python benchmarks/lab_epoch.py --rounds 9

Both train on scikit-learn's digits, repeated eight times, with Adam and batches of 64, and look at the test data after
each epoch; the bare loop is what one writes by hand. The two take turns, in an order that changes from round to round,
and the medians are compared. The goal is a ratio of 1.05 at most. ``--clock cpu`` counts the time of this process's own
processors, which neighbours on a busy machine disturb less than the wall's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from normkit.lab.backends import seen_backends
from normkit.lab.data import Dataset, load
from normkit.lab.networks import LeNet5
from normkit.lab.training import TrainingSettings, train, with_seed

Clock = Callable[[], float]

GOAL = 1.05
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
SETTINGS = TrainingSettings(epochs=1, batch_size=64, optimizer="adam", learning_rate=0.002)


def data(copies: int = 8) -> Dataset:
    """Return the digits, each so many times: an epoch long enough to be timed."""
    digits = load("digits")
    return replace(
        digits,
        train_images=digits.train_images.repeat(copies, 1, 1, 1),
        train_labels=digits.train_labels.repeat(copies),
    )


def by_hand(model: nn.Module, dataset: Dataset) -> float:
    """Train one epoch as one writes it by hand, and return the mean loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=SETTINGS.learning_rate)
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(0))
    model.train()
    losses = []
    for batch in order.split(SETTINGS.batch_size):
        if len(batch) < SETTINGS.batch_size:
            break
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(dataset.train_images[batch]), dataset.train_labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.inference_mode():
        logits = model(dataset.test_images)
        functional.cross_entropy(logits, dataset.test_labels).item()
        (logits.argmax(1) == dataset.test_labels).sum().item()
    return statistics.fmean(losses)


def by_laboratory(model: nn.Module, dataset: Dataset) -> float:
    """Train one epoch as a cell of the laboratory does, and return the mean loss."""
    with seen_backends():
        (epoch,) = train(model, dataset, SETTINGS, seed=0)
    return epoch.train_loss


def seconds(
    run: Callable[[nn.Module, Dataset], float], norm: str, dataset: Dataset, clock: Clock
) -> tuple[float, float]:
    """Return how long a fresh network's epoch takes, and its loss."""
    model = with_seed(lambda: LeNet5(norm), 0)
    begun = clock()
    loss = run(model, dataset)
    return clock() - begun, loss


def compare(norm: str, dataset: Dataset, rounds: int, clock: Clock) -> float:
    """Time both loops in turn, print the medians, and return their ratio."""
    loops = {"laboratory": by_laboratory, "by hand": by_hand}
    losses = {name: seconds(loop, norm, dataset, clock)[1] for name, loop in loops.items()}
    # The same work gives the same loss: read off the same steps, summed in another order.
    assert abs(losses["laboratory"] - losses["by hand"]) < 1e-6, losses
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds):
        for name in loops if turn % 2 else reversed(loops):
            times[name].append(seconds(loops[name], norm, dataset, clock)[0])
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    ratio = medians["laboratory"] / medians["by hand"]
    spread = ", ".join(f"{name} {min(taken):.3f} to {max(taken):.3f} s" for name, taken in times.items())
    print(
        f"LeNet-5, norm {norm}: laboratory {medians['laboratory']:.3f} s, by hand {medians['by hand']:.3f} s, ratio "
        f"{ratio:.3f} (goal {GOAL}); {spread}"
    )
    return ratio


def main() -> None:
    """Compare the loops for a network without and with batch normalization."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.clock} clock, {given.rounds} epochs each"
    )
    dataset = data()
    worst = max(compare(norm, dataset, given.rounds, CLOCKS[given.clock]) for norm in ("none", "batch"))
    print("within the goal" if worst <= GOAL else "above the goal")


if __name__ == "__main__":
    main()
