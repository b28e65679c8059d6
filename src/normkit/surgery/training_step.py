"""How far a training step of a changed model is from that of the given one."""

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, run, without_exchange
from ..anatomy.batches import tensors
from .entries import own_copy
from .outputs import as_double, plain
from .transaction import copied

__all__ = ["training_change"]


def training_change(before: nn.Module, after: nn.Module, example: Any, call: Call | None) -> float:
    """Return how far one training step of ``after`` is from that of ``before``: outputs, gradients and statistics.

    Both run in float64 where they can, with the same random numbers and a random cotangent. Each tensor counts
    relative to its own largest value, or to a ten-thousandth of the largest of its kind: the gradient of a bias before
    a batch norm is nothing but rounding. A model that cannot be trained on the example is not compared: 0.
    """
    for double in (True, False):
        try:
            expected = _step(before, example, call, double=double)
        except Exception:  # noqa: S112  whatever the model's code raises in training, as a detector's without targets
            continue
        try:
            actual = _step(after, example, call, double=double)
        except Exception:  # the changed model does not run where the given one does
            return float("inf")
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
    work = copied(model).train()
    work = work.double() if double else work
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), without_exchange(work):
        torch.manual_seed(0)
        outputs = list(tensors(plain(run(work, own_copy(as_double(example) if double else example), call))))
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
