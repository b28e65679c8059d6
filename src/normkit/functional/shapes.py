"""What normalization per sample refuses: shapes that leave it nothing to average, or parameters that do not fit.

As in ``checks``, nothing has changed when one of these raises, and `caller` is the layer or None.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import ArgumentError, DtypeError, ShapeError
from . import checks

__all__ = ["check_divides", "check_elementwise", "check_group_input", "check_positions", "check_trailing"]


def check_elementwise(
    name: str, value: object, shape: tuple[int, ...], x: Tensor, caller: nn.Module | None = None
) -> None:
    """Refuse a weight or bias that is not of this shape, or does not match x in type or device.

    Raises:
        ShapeError: another shape.
        DtypeError: no tensor, or a mix of types or devices.
    """
    if value is None:
        return
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        checks.refuse(DtypeError, f"{name} must be a tensor, got {kind}; pass torch.as_tensor({name})", caller)
    if tuple(value.shape) != shape:
        got = tuple(value.shape)
        checks.refuse(ShapeError, f"Expected {name} to be of same shape as normalized_shape {shape}, got {got}", caller)
    checks.check_match(name, value, x, caller)


def check_trailing(x: Tensor, normalized_shape: Sequence[int], caller: nn.Module | None = None) -> tuple[int, ...]:
    """Return ``normalized_shape`` as a tuple, or refuse an input that does not end in it.

    Raises:
        ShapeError: the shapes differ, or ``normalized_shape`` is empty.
    """
    shape = tuple(normalized_shape)
    if not shape:
        checks.refuse(
            ShapeError, "Expected normalized_shape to be at least 1-dimensional, got (); pass input.shape[-1:]", caller
        )
    if tuple(x.shape[-len(shape) :]) != shape:
        got = tuple(x.shape)
        wanted = ", ".join(map(str, shape))
        checks.refuse(
            ShapeError,
            f"Given normalized_shape={list(shape)}, expected input with shape (*, {wanted}), got {got}"
            f"; for these last {len(shape)} dimensions pass normalized_shape={list(got[-len(shape) :])}",
            caller,
        )
    return shape


def check_divides(num_groups: int, channels: int, caller: nn.Module | None = None) -> None:
    """Refuse a number of groups that does not divide the channels; the message lists those that do.

    Raises:
        ArgumentError: num_groups is below 1 or no divisor. The words are torch's.
    """
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1:
        checks.refuse(ArgumentError, f"num_groups must be an integer of at least 1, got {num_groups!r}", caller)
    if channels % num_groups:
        divisors = ", ".join(str(size) for size in range(1, channels + 1) if channels % size == 0)
        checks.refuse(
            ArgumentError,
            f"num_channels ({channels}) must be divisible by num_groups ({num_groups}); {channels} channels go into "
            f"{divisors} groups{_swapped(num_groups, channels)}",
            caller,
        )


def _swapped(num_groups: int, channels: int) -> str:
    """Ask whether two numbers that would fit the other way round were given in the wrong order."""
    if num_groups % channels:
        return ""
    return f". The number of groups comes first: did you mean num_groups={channels}, num_channels={num_groups}?"


def check_group_input(x: Tensor, num_groups: int, caller: nn.Module | None = None) -> None:
    """Refuse an input that has no groups, or one value in each.

    Raises:
        ShapeError: fewer than two dimensions, channels that the groups do not divide, or one value per group.
        ArgumentError: num_groups is below 1 or no integer.
    """
    if x.dim() < 2:
        got = f"{x.dim()}, shape {tuple(x.shape)}"
        checks.refuse(
            ShapeError, f"Expected at least 2 dimensions for input tensor but received {got}; pass (N, C, *)", caller
        )
    checks.check_channels(x, x.shape[1], caller)
    if isinstance(num_groups, int) and num_groups > 0 and x.shape[1] % num_groups:
        divisors = ", ".join(str(size) for size in range(1, x.shape[1] + 1) if x.shape[1] % size == 0)
        checks.refuse(
            ShapeError,
            "Expected number of channels in input to be divisible by num_groups, but got input of shape "
            f"{list(x.shape)} and num_groups={num_groups}; {x.shape[1]} channels go into {divisors} groups",
            caller,
        )
    check_divides(num_groups, x.shape[1], caller)
    if x.numel() == x.shape[0] * num_groups > 0:
        checks.refuse(
            ShapeError,
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}: with "
            f"num_groups={num_groups} every group is one value, and one value has no variance. Use fewer groups",
            caller,
        )


def check_positions(x: Tensor, caller: nn.Module | None = None) -> None:
    """Refuse an input ``(N, C, *)`` with a single position, which has no variance.

    Raises:
        ShapeError: one position.
    """
    if x.numel() == x.shape[0] * x.shape[1] > 0:
        checks.refuse(
            ShapeError,
            f"Expected more than 1 spatial element when training, got input size {list(x.shape)}; one value has no "
            "variance. Normalize before the pooling, or use layer normalization",
            caller,
        )
