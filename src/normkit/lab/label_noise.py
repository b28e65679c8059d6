"""Wrong labels among the training data, so that a net which fits them all does badly: something to regularise."""

from dataclasses import replace

import torch

from ..errors import ArgumentError
from .dataset import Dataset

__all__ = ["mislabelled"]


def mislabelled(dataset: Dataset, share: float, seed: int) -> Dataset:
    """Return the data set with a share of its training labels replaced by another class, drawn from this seed.

    Every wrong label is one of the other classes, all equally likely. The test data stay as they are. Zhang et al.
    2017, arXiv:1611.03530, and Arpit et al. 2017, arXiv:1706.05394, train on such labels to see what a net memorises
    and what keeps it from that.

    Args:
        dataset: its labels are 0 to the number of its classes.
        share: how many of the training labels are wrong, from 0 to 1, rounded to whole images.
        seed: of which labels, and of what stands in their place.

    Raises:
        ArgumentError: the share is outside 0 to 1.

    >>> from normkit.lab.data import load
    >>> digits = load("digits")
    >>> wrong = mislabelled(digits, 0.2, seed=0)
    >>> int((wrong.train_labels != digits.train_labels).sum()), len(digits.train_labels)
    (287, 1437)
    """
    if not 0 <= share <= 1:
        raise ArgumentError(f"share={share}: expected a share of the labels, from 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    count, classes = len(dataset.train_labels), len(dataset.classes)
    hit = torch.randperm(count, generator=generator)[: round(share * count)]
    labels = dataset.train_labels.clone()
    labels[hit] = (labels[hit] + torch.randint(1, classes, (len(hit),), generator=generator)) % classes
    return replace(dataset, train_labels=labels)
