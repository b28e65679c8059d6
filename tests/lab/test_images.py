import pytest
import torch

from normkit.lab.data import load
from normkit.lab.images import as_bits, share_won
from normkit.lab.networks import LeNet5
from normkit.lab.training import classified_rightly, evaluate, with_seed


def counted(ours, theirs):
    """Count with arrays what the bits say."""
    only_ours, only_theirs = (ours & ~theirs).sum().item(), (theirs & ~ours).sum().item()
    return only_ours / (only_ours + only_theirs)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1009])
def test_share_won_is_counted_from_the_images_on_which_the_two_differ(count):
    generator = torch.Generator().manual_seed(count)
    pairs = [(torch.rand(2, count, generator=generator) < 0.6) for _ in range(3)]
    pairs[0][0, 0], pairs[0][1, 0] = True, False
    rows = [{"a": as_bits(ours), "b": as_bits(theirs)} for ours, theirs in pairs]
    ours, theirs = torch.cat(pairs, 1)
    assert share_won("a", "b", rows) == pytest.approx(counted(ours, theirs), abs=1e-15)
    assert share_won("b", "a", rows) == pytest.approx(1 - counted(ours, theirs), abs=1e-15)


def test_nobody_is_ahead_where_all_images_come_out_the_same():
    bits = as_bits(torch.tensor([True, False, True]))
    assert share_won("a", "b", [{"a": bits, "b": bits}]) == 0.5


def test_images_are_those_that_the_accuracy_counts():
    dataset = load("digits")
    model = with_seed(lambda: LeNet5("batch"), 0)
    images, labels = dataset.test_images, dataset.test_labels
    right = classified_rightly(model, images, labels, batch_size=37)
    assert right.tolist() == (model(images).argmax(1) == labels).tolist()
    assert int(right.sum()) / len(right) == evaluate(model, images, labels)[1]
