"""The rule by which a claim chooses a learning rate: for each side the best of a grid, on held-out training data."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache, partial
from typing import Any

from torch import nn

from .claim import Cell
from .data import Dataset, validation_split
from .searches import made_once
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
    """Return the rate with the best held-out accuracy; each rate is tried once in a run, whatever the processes.

    Args:
        build: makes the network, given the norm's name; a function of a module or a `partial` of one, so that calls
            are known to be alike.
        norm: the side.
        dataset: its test data are not looked at.
        settings: everything but the rate.
        rates: the grid, in the order in which ties are broken.
        device: ``"cpu"`` or ``"cuda"``.
    """
    held_out = validation_split(dataset, share=HELD_OUT)

    def trial(place: int) -> dict[str, Any]:
        model = with_seed(lambda: build(norm), SEARCH_SEED)
        with seeded(SEARCH_SEED, device):
            *_, last = train(model, held_out, replace(settings, learning_rate=rates[place]), SEARCH_SEED, device)
        return {"accuracy": last.test_accuracy, "loss": last.test_loss if math.isfinite(last.test_loss) else None}

    common = {
        "network": _spoken(build), "norm": norm, "data": _digest(held_out), "device": device,
        "seed": SEARCH_SEED, "settings": asdict(replace(settings, learning_rate=0.0)),
    }  # fmt: skip
    outcomes = made_once([{**common, "rate": rate} for rate in rates], trial)

    def quality(place: int) -> tuple[float, float]:
        loss = outcomes[place]["loss"]
        return outcomes[place]["accuracy"], -math.inf if loss is None else -loss

    return rates[max(range(len(rates)), key=quality)]


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
    model = with_seed(lambda: build(cell.norm), cell.seed)
    with seeded(cell.seed, cell.device):
        for epoch in train(model, dataset, replace(cell.settings, learning_rate=rate), cell.seed, cell.device):
            yield {
                "rate": rate,
                "epoch": epoch.epoch,
                "train_loss": epoch.train_loss,
                "test_accuracy": epoch.test_accuracy,
            }
