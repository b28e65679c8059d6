"""Compare two models on an example and on a second size of it."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, preserved, run
from ..anatomy.batches import tensors
from ..errors import SurgeryError

__all__ = ["change_between", "second_size", "training_change"]


def change_between(before: nn.Module, after: nn.Module, example: Any, call: Call | None) -> tuple[float, float]:
    """Return how far ``after`` and ``before`` themselves are from ``before`` computed in float64.

    The second number is the rounding that the model had all along. A model that cannot run in float64 is compared in
    its own type, and the second number is then 0.

    Raises:
        SurgeryError: the outputs hold no tensors, or differ in number or shape.
    """
    own, changed = _outputs(before, example, call), _outputs(after, example, call)
    try:
        exact = _outputs(copy.deepcopy(before).double(), _as_double(example), call)
    except RuntimeError:
        exact = own
    return _largest(exact, changed), _largest(exact, own)


def second_size(model: nn.Module, example: Any, call: Call | None) -> tuple[Any, str]:
    """Return the example in another size that the model takes, and what was made of it.

    Tried in order: all spatial sizes doubled, halved, and two samples more; the model decides.
    """
    for other, words in _other_sizes(example):
        try:
            _outputs(model, other, call)
        except (RuntimeError, ValueError, IndexError):
            continue
        return other, words
    return example, "the model takes no other size of it"


def _outputs(model: nn.Module, example: Any, call: Call | None) -> list[Tensor]:
    with preserved(model), torch.no_grad():
        found = [tensor.detach().clone() for tensor in tensors(_plain(run(model, example, call)))]
    if not found:
        raise SurgeryError(f"the output of {type(model).__name__} holds no tensor, so that nothing can be compared")
    return found


def _plain(output: Any) -> Any:
    """Look into objects that hold their outputs as attributes."""
    if isinstance(output, Tensor | Mapping | list | tuple) or not hasattr(output, "__dict__"):
        return output
    return dict(vars(output))


def _largest(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Return the largest relative difference over all outputs; not finite where one is and the other is not."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise SurgeryError("the outputs differ in number or shape")
    return max(_relative(first, second) for first, second in zip(expected, actual, strict=True))


def _relative(expected: Tensor, actual: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    first, second = expected.double(), actual.double()
    same = (first == second) | (first.isnan() & second.isnan())
    difference = torch.where(same, 0.0, (first - second).abs()).max().item()
    scale = first[torch.isfinite(first)].abs().max().item() if torch.isfinite(first).any() else 0.0
    return difference / max(scale, torch.finfo(torch.float32).tiny) if difference == difference else float("inf")


def _as_double(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _other_sizes(example: Any) -> Iterator[tuple[Any, str]]:
    if any(tensor.ndim > 2 for tensor in tensors(example)):
        yield _mapped(example, _doubled), "twice the size"
        yield _mapped(example, _halved), "half the size"
    yield _mapped(example, _longer), "two samples more"


def _doubled(tensor: Tensor) -> Tensor:
    """Tile space by two, so that the values keep their range."""
    return tensor.repeat(1, 1, *(2 for _ in tensor.shape[2:])) if tensor.ndim > 2 else tensor


def _halved(tensor: Tensor) -> Tensor:
    return tensor[(slice(None), slice(None), *(slice((size + 1) // 2) for size in tensor.shape[2:]))]


def _longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.flip(0)[:1], tensor[:1]]) if tensor.ndim else tensor


def _mapped(value: Any, function: Any) -> Any:
    """Apply a function to every tensor of a batch."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(entry, function) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(entry, function) for entry in value)
    return value


def training_change(before: nn.Module, after: nn.Module, example: Any, call: Call | None) -> float:
    """Return how far one training step of ``after`` is from that of ``before``: outputs, gradients and statistics.

    Both run in float64 where they can, with the same random numbers and a random cotangent. Each tensor counts
    relative to its own largest value, or to a ten-thousandth of the largest of its kind: the gradient of a bias before
    a batch norm is nothing but rounding. A model that cannot be trained on the example is not compared: 0.
    """
    for double in (True, False):
        try:
            expected, actual = (_step(model, example, call, double=double) for model in (before, after))
        except (RuntimeError, ValueError):
            continue
        return max(_of_one_kind(first, second) for first, second in zip(expected, actual, strict=True))
    return 0.0


def _of_one_kind(expected: list[Tensor], actual: list[Tensor]) -> float:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return float("inf")
    scales = [tensor.detach().abs().max().item() if tensor.numel() else 0.0 for tensor in expected]
    least = max(1e-4 * max(scales, default=0.0), torch.finfo(torch.float32).tiny)
    gaps = [
        (first - second).detach().abs().max().item() / max(scale, least) if first.numel() else 0.0
        for first, second, scale in zip(expected, actual, scales, strict=True)
    ]
    return max((gap if gap == gap else float("inf") for gap in gaps), default=0.0)


def _step(model: nn.Module, example: Any, call: Call | None, *, double: bool) -> tuple[list[Tensor], ...]:
    """Return what a forward and a backward in training give: outputs, gradients and statistics."""
    work = copy.deepcopy(model).train()
    work = work.double() if double else work
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        outputs = list(tensors(_plain(run(work, _as_double(example) if double else example, call))))
        learnt = [parameter for parameter in work.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(1)
        scores = [
            (output * torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output.device)).sum()
            for output in outputs
            if output.requires_grad
        ]
        gradients = torch.autograd.grad(scores, learnt, allow_unused=True) if scores and learnt else ()
    statistics = [buffer for buffer in work.buffers() if buffer.is_floating_point()]
    return outputs, [gradient for gradient in gradients if gradient is not None], statistics
