"""The rule by which a claim chooses a learning rate: for each side the best of a grid, on held-out training data.

The images that the rate is chosen on are drawn from a seed that no judged run has. A rate on the grid's edge widens the
grid, a few times at most.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from typing import Any

from torch import nn

from .claim import Cell
from .data import Dataset, limited, validation_split
from .searches import made_once
from .training import TrainingSettings, seeded, train, with_seed

__all__ = ["RATE_RULE", "best_rate", "train_at_best_rate", "train_at_rate"]

# No judged run has this seed.
SEARCH_SEED = 1000
HELD_OUT = 0.2
# How often the grid may grow, each time by one rate beyond the edge that was best.
WIDENED_AT_MOST = 4

RATE_RULE = (
    "Each side has the rate of its own grid that is best on a stratified fifth held out of the training data: by "
    "accuracy after the last epoch, ties by loss, one run per rate. Images and weights are those of seed 1000, which "
    "no judged run has. While the best rate is an edge of the grid, the grid grows by one more, four times at most. "
    "The test data have no part in it."
)


def best_rate(
    build: Callable[[str], nn.Module],
    norm: str,
    dataset: Dataset,
    settings: TrainingSettings,
    rates: tuple[float, ...],
    device: str = "cpu",
) -> float:
    """Return the rate with the best held-out accuracy; each rate is tried once in a run, whatever the processes.

    Args:
        build: makes the network, given the norm's name; a function of a module or a `partial` of one, so that calls
            are known to be alike.
        norm: the side.
        dataset: its test data are not looked at; where it was drawn from a larger one, as many images are drawn anew.
        settings: everything but the rate.
        rates: the grid to begin with, in the order in which ties are broken.
        device: ``"cpu"`` or ``"cuda"``.
    """
    drawn = dataset if dataset.whole is None else _drawn_for_search(dataset)
    return _best_rate(build, norm, drawn, settings, rates, device)


@lru_cache(maxsize=64)
def _best_rate(
    build: Callable[[str], nn.Module],
    norm: str,
    drawn: Dataset,
    settings: TrainingSettings,
    rates: tuple[float, ...],
    device: str,
) -> float:
    """Search on images that are the same for every seed."""
    held_out = validation_split(drawn, share=HELD_OUT)
    grid = list(rates)

    def trial(place: int) -> dict[str, Any]:
        model = with_seed(lambda: build(norm), SEARCH_SEED)
        with seeded(SEARCH_SEED, device):
            *_, last = train(model, held_out, replace(settings, learning_rate=grid[place]), SEARCH_SEED, device)
        return {"accuracy": last.test_accuracy, "loss": last.test_loss if math.isfinite(last.test_loss) else None}

    common = {
        "network": _spoken(build), "norm": norm, "data": _digest(held_out), "device": device,
        "seed": SEARCH_SEED, "settings": asdict(replace(settings, learning_rate=0.0)),
    }  # fmt: skip

    def best() -> float:
        outcomes = made_once([{**common, "rate": rate} for rate in grid], trial)

        def quality(place: int) -> tuple[float, float]:
            loss = outcomes[place]["loss"]
            return outcomes[place]["accuracy"], -math.inf if loss is None else -loss

        return grid[max(range(len(grid)), key=quality)]

    for _ in range(WIDENED_AT_MOST):
        beyond = _beyond(best(), grid)
        if beyond is None:
            break
        grid.append(beyond)
    return best()


def _drawn_for_search(dataset: Dataset) -> Dataset:
    """Draw as many training images as the data set has, anew from the seed of searches."""
    assert dataset.whole is not None
    return limited(dataset.whole, len(dataset.train_labels), len(dataset.test_labels), SEARCH_SEED)


def _beyond(rate: float, grid: Sequence[float]) -> float | None:
    """Return the rate one step outside a grid whose edge is this rate; ``None`` for a rate inside.

    >>> _beyond(0.4, [0.1, 0.2, 0.4]), _beyond(0.2, [0.1, 0.2, 0.4])
    (0.8, None)
    """
    ordered = sorted(grid)
    if len(ordered) < 2 or rate not in (ordered[0], ordered[-1]):
        return None
    inner = ordered[1] if rate == ordered[0] else ordered[-2]
    return float(f"{rate * rate / inner:.3g}")


def _spoken(build: Callable[..., nn.Module]) -> str:
    """Return a function's name, with what a `partial` gives it, so that no two that differ are called alike.

    >>> _spoken(partial(int, base=2))
    'builtins.int(base=2)'
    """
    if isinstance(build, partial):
        given = [*map(repr, build.args), *(f"{name}={value!r}" for name, value in sorted(build.keywords.items()))]
        return f"{_spoken(build.func)}({', '.join(given)})"
    assert "<" not in build.__qualname__, f"{build.__qualname__} has no name of its own in its module"
    return f"{build.__module__}.{build.__qualname__}"


def _digest(dataset: Dataset) -> str:
    """Return the SHA-256 of the images and labels themselves: parts of one data set have its digest in common."""
    digest = hashlib.sha256()
    for part in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def train_at_best_rate(
    build: Callable[[str], nn.Module], cell: Cell, dataset: Dataset, rates: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    """Train the cell's network at its side's best rate and yield, per epoch, what most claims are judged by."""
    rate = best_rate(build, cell.norm, dataset, cell.settings, rates, cell.device)
    return train_at_rate(rate, build, cell, dataset)


def train_at_rate(
    rate: float, build: Callable[[str], nn.Module], cell: Cell, dataset: Dataset
) -> Iterator[dict[str, Any]]:
    """Train the cell's network at this rate and yield, per epoch, what most claims are judged by."""
    model = with_seed(lambda: build(cell.norm), cell.seed)
    with seeded(cell.seed, cell.device):
        for epoch in train(model, dataset, replace(cell.settings, learning_rate=rate), cell.seed, cell.device):
            yield {
                "rate": rate,
                "epoch": epoch.epoch,
                "train_loss": epoch.train_loss,
                "test_accuracy": epoch.test_accuracy,
            }
