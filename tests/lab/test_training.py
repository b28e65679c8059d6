from collections import OrderedDict

import pytest
import torch
from torch import nn

from normkit.errors import ArgumentError
from normkit.lab.data import load
from normkit.lab.networks import LeNet5, known_norms, norm_layer
from normkit.lab.training import TrainingSettings, deterministic, evaluate, train, with_seed
from small_fashion_mnist import write_small_fashion_mnist

SETTINGS = TrainingSettings(epochs=2, batch_size=32, optimizer="adam", learning_rate=0.002)

# SPEC C1, written out as the source has it.
SHAPES = OrderedDict(
    [
        ("conv1.weight", (6, 1, 5, 5)), ("conv1.bias", (6,)), ("conv2.weight", (16, 6, 5, 5)), ("conv2.bias", (16,)),
        ("fc1.weight", (120, 400)), ("fc1.bias", (120,)), ("fc2.weight", (84, 120)), ("fc2.bias", (84,)),
        ("fc3.weight", (10, 84)), ("fc3.bias", (10,)),
    ]
)  # fmt: skip
NORM_SHAPES = {"norm1": 6, "norm2": 16, "norm3": 120, "norm4": 84}


@pytest.fixture
def small(tmp_path):
    return load("fashion-mnist", write_small_fashion_mnist(tmp_path / "data"))


def test_lenet_without_norm_has_the_parameters_of_the_source():
    assert {name: tuple(value.shape) for name, value in LeNet5("none").state_dict().items()} == SHAPES


def test_lenet_with_batch_norm_adds_the_norms_and_nothing_else():
    shapes = {name: tuple(value.shape) for name, value in LeNet5("batch").named_parameters()}
    added = {f"{name}.{part}": (size,) for name, size in NORM_SHAPES.items() for part in ("weight", "bias")}
    assert shapes == {**SHAPES, **added}


def test_lenet_equals_the_network_of_the_source():
    model = LeNet5("batch").eval()
    layers = [
        model.conv1, model.norm1, nn.ReLU(), nn.MaxPool2d(2, 2), model.conv2, model.norm2, nn.ReLU(),
        nn.MaxPool2d(2, 2), nn.Flatten(), model.fc1, model.norm3, nn.ReLU(), model.fc2, model.norm4, nn.ReLU(),
        model.fc3,
    ]  # fmt: skip
    images = torch.randn(5, 1, 28, 28)
    assert torch.equal(model(images), nn.Sequential(*layers)(images))


@pytest.mark.parametrize("norm", known_norms())
def test_lenet_takes_every_norm_of_the_catalog(norm):
    assert LeNet5(norm)(torch.randn(4, 1, 28, 28)).shape == (4, 10)


def test_unknown_norm_lists_the_known_ones():
    with pytest.raises(ArgumentError, match=r"'bach'; did you mean 'batch'. Known are: none, batch"):
        norm_layer("bach", 3, dimensions=2)


def test_nets_of_one_seed_start_from_the_same_weights():
    plain, normed = (with_seed(lambda norm=norm: LeNet5(norm), 3) for norm in ("none", "batch"))
    other = with_seed(LeNet5, 4)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, normed.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])


def test_with_seed_leaves_the_random_numbers_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    with_seed(LeNet5, 5)
    assert torch.equal(torch.rand(3), expected)


def trained(dataset, seed, settings=SETTINGS):
    model = with_seed(lambda: LeNet5("batch"), seed)
    with deterministic("cpu"):
        return list(train(model, dataset, settings, seed)), model.state_dict()


def test_training_repeats_bit_for_bit(small):
    first, weights = trained(small, seed=1)
    torch.rand(5)
    again, same = trained(small, seed=1)
    other, _ = trained(small, seed=2)
    assert first == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert first != other


def test_training_follows_the_plain_loop(small):
    # The same steps written out, with torch's own pieces.
    settings = TrainingSettings(epochs=1, batch_size=50, optimizer="sgd", learning_rate=0.1, momentum=0.9)
    model = with_seed(LeNet5, 0)
    (epoch,) = train(model, small, settings, seed=6)
    plain = with_seed(LeNet5, 0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(6))
    losses = []
    for batch in (order[:50], order[50:100]):
        optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(plain(small.train_images[batch]), small.train_labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert list(epoch.step_losses) == losses
    assert epoch.train_loss == sum(losses) / 2
    assert torch.equal(model.fc3.weight, plain.fc3.weight)


def test_training_learns_what_is_there_to_learn(small):
    epochs, _ = trained(small, 0, TrainingSettings(epochs=6, batch_size=32, optimizer="adam", learning_rate=0.005))
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].train_loss < 0.5 * epochs[0].train_loss
    assert epochs[-1].test_accuracy > 0.8


def test_evaluate_counts_over_batches_that_do_not_divide(small):
    model = LeNet5("batch")
    model.eval()
    logits = model(small.test_images)
    loss, accuracy = evaluate(model, small.test_images, small.test_labels, batch_size=7)
    assert accuracy == (logits.argmax(1) == small.test_labels).sum().item() / 40
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, small.test_labels).item(), rel=1e-5)


def test_deterministic_restores_the_threads():
    before, inside = torch.get_num_threads(), []

    def broken():
        inside.append(torch.get_num_threads())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), deterministic("cpu"):
        broken()
    assert inside == [1]
    assert torch.get_num_threads() == before


def test_training_refuses_a_batch_larger_than_the_data(small):
    with pytest.raises(ArgumentError, match="a batch of 131 was asked for, the training data hold 130"):
        trained(small, 0, TrainingSettings(epochs=1, batch_size=131, optimizer="adam", learning_rate=0.1))


def test_training_refuses_an_unknown_optimizer(small):
    with pytest.raises(ArgumentError, match=r"'adamm'; did you mean 'adam'. Known are: adam, sgd"):
        trained(small, 0, TrainingSettings(epochs=1, batch_size=32, optimizer="adamm", learning_rate=0.1))
