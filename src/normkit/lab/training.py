"""The training loop: one, short, the same for every network and every claim."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ArgumentError
from ..spelling import alternatives
from .checkpoints import begin
from .data import Dataset
from .processes import averaged, my_share, wrapped

__all__ = [
    "UNTRAINED",
    "Epoch",
    "TrainingSettings",
    "classified_rightly",
    "deterministic",
    "evaluate",
    "large_batch",
    "seeded",
    "train",
    "with_seed",
]

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a network is trained: the same on both sides of every comparison.

    Attributes:
        epochs: passes over the training data.
        batch_size: images per step; the images that do not fill a last batch sit out the epoch.
        optimizer: ``"adam"`` or ``"sgd"``; ``"none"`` for a claim that trains nothing.
        learning_rate: its rate, the same in every step.
        momentum: of ``"sgd"``.
        weight_decay: the L2 penalty's factor.
        train_images: how many of the training images are used, drawn by class, others for every seed; ``None`` for all
            of them.
        test_images: as for the training images.
        processes: how many share every batch, under torchrun; one otherwise.
    """

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    train_images: int | None = None
    test_images: int | None = None
    processes: int = 1


# For claims that measure without training: one measurement per cell.
UNTRAINED = TrainingSettings(epochs=1, batch_size=256, optimizer="none", learning_rate=0.0)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one pass over the training data measured.

    Attributes:
        epoch: its number, from 1.
        train_loss: mean cross-entropy over the epoch's steps, each taken before its update.
        test_loss: mean cross-entropy over the test data after the epoch.
        test_accuracy: share of the test data classified rightly after the epoch.
        step_losses: the loss of every step.
    """

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    step_losses: tuple[float, ...]


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Make results repeat bit for bit: one thread on the CPU, torch's deterministic algorithms on a GPU.

    One thread, because the order of a sum's additions follows the number of threads; cells run beside each other in
    processes instead. The caller's settings are restored.
    """
    threads, algorithms = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    if device != "cpu":
        # cuBLAS reads this when the first matrix product makes its workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Draw torch's random numbers from this seed, and leave the caller's as they were: for dropout and other noise."""
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        torch.manual_seed(seed)
        yield


def with_seed(build: Callable[[], Module], seed: int) -> Module:
    """Build a network from this seed and leave torch's random numbers as they were."""
    with seeded(seed):
        return build()


def large_batch(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Compute the gradients of a batch's mean cross-entropy, and return that."""
    loss = functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module,
    dataset: Dataset,
    settings: TrainingSettings,
    seed: int,
    device: str = "cpu",
    *,
    gradients: Callable[[nn.Module, Tensor, Tensor], Tensor] = large_batch,
) -> Iterator[Epoch]:
    """Train the model in place and yield what each epoch measured.

    The order of the images comes from the seed alone, so nets that are compared see the same batches. ``gradients``
    computes those of a step from its images and labels, and returns the step's loss.
    """
    model.to(device)
    images, labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    test_images, test_labels = dataset.test_images.to(device), dataset.test_labels.to(device)
    optimizer = _optimizer(model, settings)
    shuffling = torch.Generator().manual_seed(seed)
    checkpoints = begin(model, optimizer, shuffling, (settings, seed, device, dataset.digest, len(labels)))
    first = 1
    for measured in checkpoints.played_back():
        epoch = Epoch(**{**measured, "step_losses": tuple(measured["step_losses"])})
        first = epoch.epoch + 1
        yield epoch
    if first > settings.epochs:
        # Nothing is left to train; whoever looks which kernels the network calls sees them all the same.
        evaluate(model, test_images[:1], test_labels[:1])
    network = wrapped(model)
    for number in range(first, settings.epochs + 1):
        begun = time.perf_counter()
        batches = _batches(len(labels), settings.batch_size, shuffling)
        step_losses = _pass(network, images, labels, optimizer, batches, gradients)
        test_loss, test_accuracy = evaluate(model, test_images, test_labels)
        epoch = Epoch(
            epoch=number,
            train_loss=step_losses.mean().item(),
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            step_losses=tuple(step_losses.tolist()),
        )
        checkpoints.keep(number, asdict(epoch), time.perf_counter() - begun)
        yield epoch


def _pass(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    gradients: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> Tensor:
    """Train on every batch and return the loss of each step, in float64."""
    model.train()
    losses = []
    for batch in batches:
        mine = my_share(batch).to(images.device)
        optimizer.zero_grad(set_to_none=True)
        losses.append(gradients(model, images[mine], labels[mine]))
        optimizer.step()
    # Read once per epoch: a number asked of a GPU in every step would make it wait.
    return averaged(torch.stack(losses).double().cpu())


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000) -> tuple[float, float]:
    """Return the mean cross-entropy and the share of images classified rightly, with the stored statistics."""
    loss, right = 0.0, 0
    for logits, expected in _predicted(model, images, labels, batch_size):
        loss += functional.cross_entropy(logits, expected, reduction="sum").item()
        right += int((logits.argmax(1) == expected).sum().item())
    return loss / len(labels), right / len(labels)


@torch.inference_mode()
def classified_rightly(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000) -> Tensor:
    """Return, image by image, whether it is classified rightly with the stored statistics."""
    return torch.cat([
        (logits.argmax(1) == expected).cpu() for logits, expected in _predicted(model, images, labels, batch_size)
    ])  # fmt: skip


def _predicted(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield the logits of each part of the images, with its labels."""
    model.eval()
    for start in range(0, len(labels), batch_size):
        yield model(images[start : start + batch_size]), labels[start : start + batch_size]


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of each full batch of one shuffled pass."""
    if batch_size > count:
        raise ArgumentError(f"a batch of {batch_size} was asked for, the training data hold {count} images")
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Build the optimiser that the settings name."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    raise ArgumentError(
        f"unknown optimizer {settings.optimizer!r}; {alternatives(settings.optimizer, ('adam', 'sgd'))}"
    )
