import math

import pytest
import torch
from torch import nn

from normkit.lab.data import limited, load
from normkit.lab.search import WIDENED_AT_MOST, best_rate
from normkit.lab.training import TrainingSettings

SETTINGS = TrainingSettings(epochs=2, batch_size=32, optimizer="sgd", learning_rate=math.nan)


def linear(norm):
    assert norm == "none"
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


@pytest.mark.parametrize("rates", [(1e-7, 0.01, 1e6), (1e6, 1e-7, 0.01)])
def test_best_rate_is_neither_the_one_that_learns_nothing_nor_the_one_that_diverges(rates):
    assert best_rate(linear, "none", limited(load("digits"), 400, None), SETTINGS, rates) == 0.01


def test_best_rate_on_an_edge_widens_the_grid():
    rates = (1e-4, 3e-4, 1e-3)
    found = best_rate(linear, "none", limited(load("digits"), 400, None), SETTINGS, rates)
    assert found > max(rates)


def test_grid_grows_a_few_times_at_most():
    # Nothing is learnt at these rates: the best of them stays the largest.
    rates = (1e-12, 1e-11)
    found = best_rate(linear, "none", limited(load("digits"), 400, None), SETTINGS, rates)
    assert found <= 1e-11 * 10**WIDENED_AT_MOST * 1.01


def test_searched_is_on_images_of_no_judged_run():
    digits = load("digits")
    rates = (0.1, 0.001, 0.01)
    drawn = [limited(digits, 400, None, seed) for seed in (0, 1)]
    assert not torch.equal(drawn[0].train_images, drawn[1].train_images)
    assert len({best_rate(linear, "none", part, SETTINGS, rates) for part in drawn}) == 1
    poisoned = limited(digits, 400, None, 3)
    poisoned.train_images.fill_(math.nan)
    assert best_rate(linear, "none", poisoned, SETTINGS, rates) == best_rate(linear, "none", drawn[0], SETTINGS, rates)


def test_best_rate_does_not_look_at_the_test_data():
    digits = limited(load("digits"), 400, None)
    blind = limited(load("digits"), 400, 20)
    blind.test_images.fill_(math.nan)
    rates = (0.1, 0.001, 0.01)
    assert best_rate(linear, "none", digits, SETTINGS, rates) == best_rate(linear, "none", blind, SETTINGS, rates)


def test_best_rate_leaves_torchs_random_numbers_alone():
    before = torch.get_rng_state()
    best_rate(linear, "none", limited(load("digits"), 300, None), SETTINGS, (0.1, 0.01))
    assert torch.equal(before, torch.get_rng_state())


def test_limited_keeps_every_class_and_draws_the_same_images_again():
    digits = load("digits")
    few = limited(digits, 100, 50)
    assert torch.bincount(few.train_labels).tolist() == [10] * 10
    assert len(few.test_labels) == 50
    limited.cache_clear()
    again = limited(digits, 100, 50)
    assert torch.equal(few.train_images, again.train_images)
    assert torch.equal(few.test_labels, again.test_labels)
    assert "100 training and 50 test images" in few.description


def test_limited_keeps_all_where_there_are_no_more():
    digits = load("digits")
    assert torch.equal(limited(digits, 10**6, None).train_images, digits.train_images)
