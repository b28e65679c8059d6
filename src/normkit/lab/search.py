"""The rule by which a claim chooses a learning rate: for each side the best of a grid, on held-out training data."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn

from .claim import Cell
from .data import Dataset, validation_split
from .training import TrainingSettings, seeded, train, with_seed

__all__ = ["RATE_RULE", "best_rate", "train_at_best_rate"]

# No judged run has this seed.
SEARCH_SEED = 1000
HELD_OUT = 0.2

RATE_RULE = (
    "Each side has the rate of its own grid that is best on a stratified fifth held out of the training data: by "
    "accuracy after the last epoch, ties by loss, one run per rate with seed 1000, which no judged run has. The test "
    "data have no part in it."
)


@lru_cache(maxsize=16)
def best_rate(
    build: Callable[[str], nn.Module],
    norm: str,
    dataset: Dataset,
    settings: TrainingSettings,
    rates: tuple[float, ...],
    device: str = "cpu",
) -> float:
    """Return the rate with the best held-out accuracy; the search runs once per process and side.

    Args:
        build: makes the network, given the norm's name; a function of a module, so that calls are known to be alike.
        norm: the side.
        dataset: its test data are not looked at.
        settings: everything but the rate.
        rates: the grid, in the order in which ties are broken.
        device: ``"cpu"`` or ``"cuda"``.
    """
    held_out = validation_split(dataset, share=HELD_OUT)

    def quality(rate: float) -> tuple[float, float]:
        model = with_seed(lambda: build(norm), SEARCH_SEED)
        with seeded(SEARCH_SEED, device):
            *_, last = train(model, held_out, replace(settings, learning_rate=rate), SEARCH_SEED, device)
        return last.test_accuracy, -last.test_loss if math.isfinite(last.test_loss) else -math.inf

    return max(rates, key=quality)


def train_at_best_rate(
    build: Callable[[str], nn.Module], cell: Cell, dataset: Dataset, rates: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    """Train the cell's network at its side's best rate and yield, per epoch, what most claims are judged by."""
    rate = best_rate(build, cell.norm, dataset, cell.settings, rates, cell.device)
    model = with_seed(lambda: build(cell.norm), cell.seed)
    with seeded(cell.seed, cell.device):
        for epoch in train(model, dataset, replace(cell.settings, learning_rate=rate), cell.seed, cell.device):
            yield {
                "rate": rate,
                "epoch": epoch.epoch,
                "train_loss": epoch.train_loss,
                "test_accuracy": epoch.test_accuracy,
            }
