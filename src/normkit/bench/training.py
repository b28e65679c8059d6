"""Whole training steps: a kernel that wins alone can lose beside torch's own."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import RunError
from .networks import BUILDERS, MLP, Encoder, LeNet, NormAct, ResNet
from .timing import interleave

__all__ = ["CASES", "TrainingCase", "measure_training"]

# Two right steps differ by rounding, which the network's depth multiplies.
_LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TrainingCase:
    """A network to train, and the batch it is trained on.

    Attributes:
        network: its name.
        build: makes it from what builds its normalizations.
        batch: the shape of the input, batch first.
        layout: that of images and filters in memory.
    """

    network: str
    build: Callable[[NormAct], nn.Module]
    batch: tuple[int, ...]
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.network}, batch {'x'.join(map(str, self.batch))}, {self.layout}"


CASES = (
    TrainingCase("LeNet-5", LeNet, (32, 1, 28, 28)),
    TrainingCase("LeNet-5", LeNet, (256, 1, 28, 28)),
    TrainingCase("small ResNet", ResNet, (32, 3, 32, 32)),
    TrainingCase("small ResNet", ResNet, (32, 3, 32, 32), "channels_last"),
    TrainingCase("small MLP", MLP, (128, 784)),
    TrainingCase("transformer encoder block", Encoder, (32, 64, 128)),
)


def measure_training(
    cases: tuple[TrainingCase, ...] = CASES, *, seconds: float, builders: Mapping[str, NormAct] = BUILDERS
) -> Iterator[dict[str, Any]]:
    """Yield the time of one training step with every peer's layers.

    All networks of a case start from the same weights, and two steps must take them to the same loss.

    Args:
        cases: the networks.
        seconds: for the timing of one case, all peers together.
        builders: the peers.

    Raises:
        RunError: the losses differ; nothing of this case is timed.
    """
    for case in cases:
        steps = _steps(case, builders)
        losses = [{name: step().item() for name, step in steps.items()} for _ in range(2)][-1]
        for name, loss in losses.items():
            if not abs(loss - losses["torch"]) <= _LOSS_TOLERANCE * max(1.0, abs(losses["torch"])):
                raise RunError(
                    f"{case.name}: after one step the loss is {loss:.6g} with {name} and {losses['torch']:.6g} with "
                    "torch; nothing was timed"
                )
        timings = interleave(steps, seconds=seconds)
        yield {
            "network": case.network,
            "batch": list(case.batch),
            "layout": case.layout,
            "loss_difference": max(abs(loss - losses["torch"]) for loss in losses.values()),
            "ratio": timings["torch"].median / timings["normkit"].median,
            "peers": {name: asdict(timing) for name, timing in timings.items()},
        }


def _steps(case: TrainingCase, builders: Mapping[str, NormAct]) -> dict[str, Callable[[], Tensor]]:
    """Return one training step per peer, of networks with the same weights on the same batch."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        models = {name: case.build(builder) for name, builder in builders.items()}
        images, labels = torch.randn(case.batch), torch.randint(0, 10, case.batch[:1])
    state = [value.clone() for value in models["torch"].state_dict().values()]
    for model in models.values():
        # A fused layer names its state as a bare batch norm, the others as a part; the order is the same.
        model.load_state_dict(dict(zip(model.state_dict(), state, strict=True)))
        if case.layout == "channels_last":
            nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    if case.layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    return {name: _step(model, images, labels) for name, model in models.items()}


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    # A small rate, so that hundreds of steps on one batch do not end in numbers too small to be normal ones.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
