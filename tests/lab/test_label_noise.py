"""Wrong labels: as many as asked for, none of them right by chance, the test data untouched."""

import pytest
import torch

from normkit.errors import ArgumentError
from normkit.lab.data import limited, load
from normkit.lab.label_noise import mislabelled


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0), (0.2, 40), (0.333, 67), (1.0, 200)])
def test_share_of_the_labels_is_wrong_and_the_test_data_are_not(share, wrong):
    dataset = limited(load("digits"), 200, 50)
    changed = mislabelled(dataset, share, seed=3)
    assert int((changed.train_labels != dataset.train_labels).sum()) == wrong
    assert changed.train_labels.min() >= 0
    assert changed.train_labels.max() <= 9
    assert torch.equal(changed.test_labels, dataset.test_labels)
    assert torch.equal(changed.train_images, dataset.train_images)


def test_every_other_class_comes_in_the_place_of_a_label():
    dataset = load("digits")
    changed = mislabelled(dataset, 1.0, seed=0)
    for label in range(10):
        given = changed.train_labels[dataset.train_labels == label].unique().tolist()
        assert given == [other for other in range(10) if other != label]


def test_seed_alone_decides_which():
    dataset = limited(load("digits"), 200, 50)
    first, again, other = (mislabelled(dataset, 0.2, seed).train_labels for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_outside_is_refused(share):
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        mislabelled(load("digits"), share, seed=0)
