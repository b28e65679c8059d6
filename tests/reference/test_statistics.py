"""What is stored for prediction, against closed forms, 50 digits and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit.errors import ArgumentError, ShapeError
from normkit.reference import (
    Running,
    averaged_statistics,
    batch_statistics,
    cumulative_update,
    merge_statistics,
    population_statistics,
    running_update,
)

from .oracle import close, random_array

X = np.array([[1.0, 10.0], [3.0, 10.0], [8.0, 40.0]])  # means 4, 20; biased variances 26/3, 200
START = Running(mean=np.zeros(2), var=np.ones(2))


@pytest.mark.parametrize("steps", [1, 2, 100])
@pytest.mark.parametrize(("words", "kept"), [({"momentum": 0.1}, 0.9), ({"decay": 0.1}, 0.1)], ids=str)
@pytest.mark.parametrize(("unbiased", "var"), [(True, [13.0, 300.0]), (False, [26 / 3, 200.0])])
def test_running_update_reaches_its_closed_form(
    steps: int, words: dict[str, float], kept: float, unbiased: bool, var: list[float]
) -> None:
    running, batch = START, batch_statistics(X)
    for _ in range(steps):
        running = running_update(running, batch, **words, unbiased=unbiased)
    close(running.mean, np.array([4.0, 20.0]) * (1 - kept**steps), "mean")
    close(running.var, np.array(var) + (1 - np.array(var)) * kept**steps, "var")


def test_running_update_agrees_with_torch_over_different_batches() -> None:
    layer, running = torch.nn.BatchNorm1d(3, momentum=0.3).double(), Running(mean=np.zeros(3), var=np.ones(3))
    for seed, samples in enumerate((2, 5, 3)):
        x = random_array(samples, 3, 7, seed=seed)
        layer(torch.tensor(x))
        running = running_update(running, batch_statistics(x), momentum=0.3)
    close(running.mean, layer.running_mean)
    close(running.var, layer.running_var)


def test_cumulative_update_agrees_with_torch_without_momentum() -> None:
    layer, running = torch.nn.BatchNorm1d(3, momentum=None).double(), Running(mean=np.zeros(3), var=np.ones(3))
    for step, samples in enumerate((2, 5, 3), start=1):
        x = random_array(samples, 3, 7, seed=step)
        layer(torch.tensor(x))
        running = cumulative_update(running, batch_statistics(x), step=step)
    close(running.mean, layer.running_mean)
    close(running.var, layer.running_var)


def test_running_update_leaves_the_old_statistics_alone() -> None:
    running_update(START, batch_statistics(X), momentum=0.5)
    assert START.mean.tolist() == [0.0, 0.0]
    assert START.var.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_agree_with_fifty_digits(offset: float) -> None:
    import mpmath

    x = random_array(101, 1) + offset
    with mpmath.workdps(50):
        values = [mpmath.mpf(value) for value in x.ravel()]
        mean = mpmath.fsum(values) / 101
        var = mpmath.fsum((value - mean) ** 2 for value in values) / 101
    found = batch_statistics(x)
    assert abs(found.mean.item() - float(mean)) <= np.spacing(abs(float(mean)) + 1)
    close(found.var, [float(var)])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 2**16), st.sampled_from([0.0, 1e4]))
def test_population_does_not_depend_on_how_samples_are_cut(cuts: list[int], seed: int, offset: float) -> None:
    x = random_array(sum(cuts) + 2, 2, 3, seed=seed) + offset
    whole = batch_statistics(x)
    pooled = population_statistics(np.split(x, np.cumsum(cuts)))
    assert pooled.count == whole.count
    close(pooled.mean, whole.mean, "mean")
    close(pooled.var, whole.var, "var")
    close(pooled.unbiased_var, x.var(axis=(0, 2), ddof=1), "unbiased variance")


def test_population_counts_the_spread_between_batches_and_the_average_does_not() -> None:
    batches = [np.array([[0.0], [2.0]]), np.array([[10.0], [12.0]])]
    assert population_statistics(batches).var.item() == 26.0
    assert averaged_statistics(batches, unbiased=False).var.item() == 1.0


def test_average_is_the_plain_mean_of_the_batches() -> None:
    batches = [random_array(samples, 2, seed=samples) for samples in (2, 3, 7)]
    found = averaged_statistics(batches)
    close(found.mean, np.mean([batch.mean(axis=0) for batch in batches], axis=0))
    close(found.var, np.mean([batch.var(axis=0, ddof=1) for batch in batches], axis=0))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: running_update(START, batch_statistics(X)), ArgumentError, "neither was given"),
        (lambda: running_update(START, batch_statistics(X), momentum=0.1, decay=0.9), ArgumentError, "both momentum"),
        (lambda: running_update(START, batch_statistics(X), momentum=1.5), ArgumentError, "momentum is 1.5"),
        (lambda: running_update(START, batch_statistics(X), decay=float("nan")), ArgumentError, "decay is nan"),
        (lambda: running_update(START, batch_statistics(X[:, :1]), momentum=0.1), ShapeError, "running mean has shape"),
        (lambda: running_update(START, batch_statistics(X[:1]), momentum=0.1), ShapeError, "unbiased=False"),
        (lambda: cumulative_update(START, batch_statistics(X), step=0), ArgumentError, "counted from 1"),
        (lambda: population_statistics([]), ArgumentError, "no sample"),
        (lambda: population_statistics([np.zeros((0, 2))]), ArgumentError, "no sample"),
        (lambda: population_statistics([X, X[:, :1]]), ShapeError, "2 channels and another 1"),
        (lambda: merge_statistics(batch_statistics(X), batch_statistics(X[:, :1])), ShapeError, "must agree"),
    ],
)
def test_bad_input_is_refused_in_words(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
