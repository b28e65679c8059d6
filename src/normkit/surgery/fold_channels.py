"""Through which operations an affine map of the channels passes, and where each channel comes out.

Dropout in evaluation, flattening, average pooling, resizing and permuting are linear, treat every channel alike and
leave a constant channel constant. Which channel comes out where is not derived but tried: each operation runs on a
tensor that holds the number of the channel everywhere, and on one that holds a random number for each.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd

__all__ = ["MIXED", "channels_through", "passes"]

MIXED = "mixed"

_MODULES = (
    nn.Identity,
    _DropoutNd,
    _AvgPoolNd,
    _AdaptiveAvgPoolNd,
    nn.Flatten,
    nn.Unflatten,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
)
_FUNCTIONS = {
    "flatten",
    "unflatten",
    "reshape",
    "reshape_as",
    "view",
    "view_as",
    "squeeze",
    "unsqueeze",
    "transpose",
    "permute",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "contiguous",
    "clone",
    "detach",
    "rot90",
    "flip",
    "roll",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "mean",
    "interpolate",
    "upsample",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
    "__getitem__",
}


def passes(node: fx.Node, module: nn.Module | None) -> bool:
    """Say whether an operation is of the kind that an affine map of the channels may pass through."""
    if module is not None:
        return isinstance(module, _MODULES) and not (module._forward_hooks or module._forward_pre_hooks)
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in _FUNCTIONS and "again" in node.meta


def channels_through(
    operations: list[fx.Node], shape: tuple[int, ...], axis: int, axis_after: int
) -> Tensor | str | None:
    """Return which channel of a tensor each channel after the operations is.

    Args:
        operations: in the order of the data; each has ``again``.
        shape: of the tensor before them.
        axis: its channels.
        axis_after: the channels after them.

    Returns:
        The numbers, None where every channel stays what it was, or :data:`MIXED`.
    """
    numbers = torch.arange(shape[axis], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(shape[axis], generator=generator, dtype=torch.float64)
    found = _tried(operations, numbers, shape, axis, axis_after)
    if found is None:
        return MIXED
    came = found.round().long()
    again = _tried(operations, values, shape, axis, axis_after)
    if again is None or came.min() < 0 or came.max() >= shape[axis]:
        return MIXED
    if not torch.allclose(found, came.double(), rtol=0, atol=1e-6):
        return MIXED
    if not torch.allclose(again, values[came], rtol=1e-9, atol=1e-9):
        return MIXED
    return None if torch.equal(came, torch.arange(shape[axis])) else came


def _tried(
    operations: list[fx.Node], values: Tensor, shape: tuple[int, ...], axis: int, axis_after: int
) -> Tensor | None:
    """Return the value of each channel after the operations; None where one channel holds several."""
    axis, axis_after = axis % len(shape), axis_after
    probe = values.view([-1 if place == axis else 1 for place in range(len(shape))]).expand(shape).contiguous()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for operation in operations:
                probe = operation.meta["again"](probe)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    if not isinstance(probe, Tensor) or probe.ndim <= axis_after or not probe.numel():
        return None
    flat = probe.movedim(axis_after, 0).flatten(1) if probe.ndim > 1 else probe.view(-1, 1)
    spread = (flat - flat[:, :1]).abs().max()
    return flat.mean(1) if bool(spread <= 1e-9 * max(1.0, float(flat.abs().max()))) else None
