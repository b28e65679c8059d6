"""Sick models to try the doctor on, each made by the mistake that people make. ``normkit doctor demo:stale`` is one.

The data are four patterns of 8 x 8 pixels with noise, made here; a demo takes a fraction of a second to make.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from ..anatomy import Call
from ..errors import ArgumentError
from ..spelling import alternatives

__all__ = ["DEMOS", "Demo", "Patient", "build"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Patient:
    """A model, or the state of one, and what the doctor is given with it."""

    model: nn.Module | Mapping[str, Any]
    batches: Any
    optimizer: Optimizer | None = None
    call: Call | None = None


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One sick model.

    Attributes:
        name: what stands behind ``demo:``.
        story: the mistake, in one sentence.
        check: the check that finds it.
        make: makes it.
    """

    name: str
    story: str
    check: str
    make: Callable[[], Patient]


def build(name: str) -> Patient:
    """Make a sick model; the random state of torch is as before.

    Raises:
        ArgumentError: the name is unknown; the message lists the known ones.

    >>> build("forgotten").model.training
    False
    """
    for demo in DEMOS:
        if demo.name == name:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return demo.make()
    raise ArgumentError(f"unknown demo {name!r}; {alternatives(name, [demo.name for demo in DEMOS])}")


def patterns(count: int = 1024, scale: float = 1.0, shift: float = 0.0) -> TensorDataset:
    """Draw images ``(N, 1, 8, 8)`` of four patterns with noise, and their labels."""
    random = torch.Generator().manual_seed(7)
    shapes = torch.randn(4, 1, 8, 8, generator=random)
    labels = torch.randint(4, (count,), generator=random)
    images = shapes[labels] + 2.0 * torch.randn(count, 1, 8, 8, generator=random)
    return TensorDataset(scale * images + shift, labels)


def loader(data: TensorDataset, batch_size: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffle and batch, as in training."""
    return DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)


def network(momentum: float | None = 0.1) -> nn.Sequential:
    """Two convolutions with batch normalization and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, momentum=momentum),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def train(
    model: nn.Module,
    batches: DataLoader[tuple[Tensor, ...]],
    epochs: int = 2,
    optimizer: Optimizer | None = None,
    after: Callable[[], object] | None = None,
) -> Optimizer:
    """Train as every tutorial does, and leave the model in evaluation mode."""
    optimizer = optimizer or SGD((p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        model.train()
        for images, labels in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            if bool(torch.isfinite(loss)):  # what a gradient scaler does
                optimizer.step()
                if after is not None:
                    after()
    model.eval()
    return optimizer


def _stale() -> Patient:
    model, batches = network(), loader(patterns())
    train(model, batches)
    averaged = copy.deepcopy(model)

    def average() -> None:
        with torch.no_grad():
            for mine, theirs in zip(averaged.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

    train(model, batches, epochs=5, optimizer=SGD(model.parameters(), lr=0.3, momentum=0.9), after=average)
    return Patient(model=averaged, batches=batches)


def _forgotten() -> Patient:
    student, batches = network(), loader(patterns())
    train(student, batches)
    teacher = network().eval()
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.copy_(theirs)
    return Patient(model=teacher, batches=batches)


def _poisoned() -> Patient:
    model, data = network(), patterns()
    train(model, loader(data))
    images, labels = (tensor.clone() for tensor in data.tensors)
    images[3] = 1e38  # one damaged file among a thousand
    train(model, loader(TensorDataset(images, labels)), epochs=1)
    train(model, loader(data))  # good data again: what follows the layer recovers, an infinity stays
    return Patient(model=model, batches=loader(data))


def _frozen_leak() -> Patient:
    model, batches = network(), loader(patterns())
    train(model, batches)
    for parameter in model[:6].parameters():
        parameter.requires_grad_(False)
    train(model, loader(patterns(scale=3.0, shift=2.0)))
    return Patient(model=model.train(), batches=batches)


def _small_batch() -> Patient:
    batches = loader(patterns(128), batch_size=4)
    model = network()
    return Patient(model=model, batches=batches, optimizer=train(model, batches))


class NeverEvaluates(nn.Sequential):
    """A model whose train() forgets the mode that it is given, as eval() calls it."""

    def train(self, mode: bool = True) -> "NeverEvaluates":
        """Meant to say something at the start of training."""
        return super().train()


def _never_evaluates() -> Patient:
    model, batches = NeverEvaluates(*network()), loader(patterns())
    train(model, batches)
    return Patient(model=model, batches=batches)


def _short_window() -> Patient:
    model, batches = network(momentum=0.01), loader(patterns())
    train(model, batches, epochs=2)
    return Patient(model=model, batches=batches)


def _keras_momentum() -> Patient:
    model, batches = network(momentum=0.99), loader(patterns())
    train(model, batches)
    return Patient(model=model, batches=batches)


class Checkpointed(nn.Module):
    """A network whose first half is recomputed in the backward, to save memory."""

    def __init__(self) -> None:
        super().__init__()
        whole = network()
        self.first, self.second, self.third = whole[:3], whole[3:6], whole[6:]
        self.last = nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        """Classify."""
        hidden = checkpoint(self.first, images, use_reentrant=False)
        return self.last(self.third(self.second(hidden)))  # type: ignore[no-any-return]  # modules return Any


def _checkpointed() -> Patient:
    model, batches = Checkpointed(), loader(patterns())
    train(model, batches)
    return Patient(model=model, batches=batches)


def _tiny_units() -> Patient:
    model, batches = nn.Sequential(nn.BatchNorm2d(1), *network()), loader(patterns(scale=3e-3))
    train(model, batches, epochs=5)
    return Patient(model=model, batches=batches)


def _low_precision() -> Patient:
    model = network()
    train(model, loader(patterns()))
    images, labels = patterns().tensors
    data = TensorDataset(images.bfloat16(), labels)
    model.bfloat16()
    train(model, loader(data), epochs=1)
    return Patient(model=model.train(), batches=loader(data))


def _padded() -> Patient:
    random = torch.Generator().manual_seed(7)
    signals = 2.0 + torch.randn(512, 6, 24, generator=random)
    lengths = torch.randint(6, 25, (512,), generator=random)
    signals *= (torch.arange(24) < lengths[:, None])[:, None]
    labels = (signals[:, 0].sum(1) > signals[:, 1].sum(1)).long()
    model = nn.Sequential(
        nn.BatchNorm1d(6),
        nn.Conv1d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    batches = loader(TensorDataset(signals, labels))
    train(model, batches, epochs=4)
    return Patient(model=model, batches=batches)


def _mixed() -> Patient:
    judge, real = network(), loader(patterns())
    optimizer = SGD(judge.parameters(), lr=0.05)
    judge.train()
    for images, labels in real:
        optimizer.zero_grad()
        generated = 0.3 * images.flip(2) - 3.0  # of a generator that has only begun
        loss = functional.cross_entropy(judge(images), labels) + functional.softplus(judge(generated)).mean()
        loss.backward()
        optimizer.step()
    judge.eval()

    def call(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return model(batch[0]), model(0.3 * batch[0].flip(2) - 3.0)

    return Patient(model=judge, batches=real, call=call)


def _swapped() -> Patient:
    model, batches = network(), loader(patterns())
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    model[4] = nn.BatchNorm2d(16, momentum=0.05)
    train(model, batches, optimizer=optimizer)
    return Patient(model=model, batches=batches, optimizer=optimizer)


DEMOS: tuple[Demo, ...] = (
    Demo(
        name="stale",
        story="The weights are an average of the training; the statistics are those of its beginning.",
        check="drift",
        make=_stale,
    ),
    Demo(
        name="forgotten",
        story="A teacher got the student's parameters; running statistics are not parameters.",
        check="never-updated",
        make=_forgotten,
    ),
    Demo(
        name="poisoned",
        story="One damaged image overflowed; the step was skipped, the statistics were not.",
        check="nonfinite",
        make=_poisoned,
    ),
    Demo(
        name="frozen-leak",
        story="The backbone was frozen with requires_grad_(False), then fine-tuned on other data in train().",
        check="freeze-leak",
        make=_frozen_leak,
    ),
    Demo(name="small-batch", story="Trained with four samples per batch.", check="effective-n", make=_small_batch),
    Demo(
        name="never-evaluates",
        story="train() was overridden and forgets its argument, so that eval() trains.",
        check="batch-dependence",
        make=_never_evaluates,
    ),
    Demo(
        name="short-window",
        story="Momentum was lowered to 0.01 and the training was short.",
        check="ema-window",
        make=_short_window,
    ),
    Demo(
        name="keras-momentum",
        story="Momentum 0.99 was copied from Keras, where it weighs the old value.",
        check="ema-window",
        make=_keras_momentum,
    ),
    Demo(
        name="checkpointed",
        story="Activation checkpointing ran half of the model twice per step.",
        check="update-count",
        make=_checkpointed,
    ),
    Demo(
        name="tiny-units",
        story="The inputs are thousandths: their variance is not large beside eps.",
        check="dead-channel",
        make=_tiny_units,
    ),
    Demo(
        name="low-precision",
        story="The whole model was cast to bfloat16, statistics too, and trained on.",
        check="precision",
        make=_low_precision,
    ),
    Demo(
        name="padded",
        story="Sequences of different lengths were filled up with zeros.",
        check="padding",
        make=_padded,
    ),
    Demo(
        name="mixed",
        story="A discriminator sees real and generated images one after the other.",
        check="mixed-populations",
        make=_mixed,
    ),
    Demo(
        name="swapped",
        story="A layer was replaced after the optimizer had been made.",
        check="optimizer",
        make=_swapped,
    ),
)
