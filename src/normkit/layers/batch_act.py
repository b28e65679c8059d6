"""Batch normalization, a residual and an activation in one pass over memory.

The layer *holds* a batch norm and is not one: a tool that swaps every batch norm it finds, such as torch's conversion
to SyncBatchNorm, swaps the part and cannot lose the activation.

The part's parameters and buffers are the layer's own too: both have the same two dictionaries. So there is one set of
names, a bare batch norm's: whoever lists parameters, saves a state, calls the model with a state or exports it sees
``weight``, and what is written under that name the part has too.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..functional import checks
from ..kernels.dispatch import Activation
from ..kernels.plain import channels as plain_channels
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from .sync import SyncBatchNorm
from .tracing import Unscriptable

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]

# What a part's forward is where nobody has another in its place.
_OWN = (_BatchNorm.forward, SyncBatchNorm.forward)
_HELD = "norm."
_COUNTER = "num_batches_tracked"


class _BatchNormAct(Unscriptable):
    """What the three layers share."""

    # torch's version of a batch norm's state, whose keys these are.
    _version = 2
    _part: type[_BatchNorm]
    norm: nn.Module

    def __init__(
        self,
        num_features: int,
        *settings: Any,
        activation: Activation | None = "relu",
        inplace: bool = False,
        **named: Any,
    ) -> None:
        super().__init__()
        checks.check_activation(activation, None)
        self.activation = activation
        self.inplace = inplace
        self.norm = self._part(num_features, *settings, **named)
        self.register_state_dict_post_hook(_leave_out_the_part)
        self.register_load_state_dict_pre_hook(_give_to_the_part)
        self.register_load_state_dict_post_hook(_own_what_was_loaded)

    def __setattr__(self, name: str, value: Any) -> None:
        """Take over a new part's tensors; hand a new tensor on to the part, which may refuse it."""
        if name in self._parameters or name in self._buffers:
            # While a state is loaded the part gets its own share, and a frozen one takes none but that.
            if not self.__dict__.get("_is_loading"):
                setattr(self.norm, name, value)
            super().__setattr__(name, value)
            return
        super().__setattr__(name, value)
        if name == "norm":
            self._own_the_parts()

    def _load_from_state_dict(self, *given: Any) -> None:
        self.__dict__["_is_loading"] = True
        try:
            super()._load_from_state_dict(*given)
        finally:
            del self.__dict__["_is_loading"]

    def _own_the_parts(self) -> None:
        """Have the part's tensors under the layer's own names."""
        for name in ("_parameters", "_buffers"):
            self.__dict__[name] = getattr(self.norm, name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the modules as torch does; the part only where each is listed once.

        From all places torch lists every name of a tensor (``named_parameters(remove_duplicate=False)``), and those
        are the names in an exported program; the part has the layer's own tensors and no other name for them.
        """
        shared = all(getattr(self, name) is getattr(self.norm, name) for name in ("_parameters", "_buffers"))
        if remove_duplicate or not shared or self.norm._modules:
            yield from super().named_modules(memo, prefix, remove_duplicate)
        else:
            yield prefix, self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert once and share: torch makes a new buffer of each one it meets."""
        super()._apply(fn, recurse)
        self._own_the_parts()
        return self

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return ``activation(norm(input) + residual)``."""
        norm = self.norm
        # A part that was swapped, frozen or hooked runs as it wants to; only our own untouched one is fused.
        if type(norm).forward in _OWN and not _is_hooked(norm):
            assert isinstance(norm, _BatchNorm)
            return norm.normalize(input, self.activation, residual, self.inplace)
        y: Tensor = norm(input)
        return plain_channels.activate(y if residual is None else y + residual, self.activation)

    def extra_repr(self) -> str:
        """Return the activation, and inplace where it is set."""
        return f"activation={self.activation!r}" + (", inplace=True" if self.inplace else "")


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _leave_out_the_part(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    """Name the state as a bare batch norm's, with the values of the part, which is what runs."""
    for key in [key for key in state if key.startswith(prefix + _HELD)]:
        state[prefix + key[len(prefix + _HELD) :]] = state.pop(key)


def _give_to_the_part(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Take the state of a bare batch norm for the part too."""
    counter = module._buffers.get(_COUNTER)
    if metadata.get("version", 1) < 2 and counter is not None and prefix + _COUNTER not in state:
        # As torch's batch norm does with a state of before torch 0.4.1, or a plain dict.
        state[prefix + _COUNTER] = torch.tensor(0) if counter.is_meta else counter
    for name in (*module._parameters, *module._buffers):
        if prefix + name in state:
            state[prefix + _HELD + name] = state[prefix + name]


def _own_what_was_loaded(module: nn.Module, _incompatible: Any) -> None:
    """Loading with ``assign=True`` gives the part objects of its own."""
    assert isinstance(module, _BatchNormAct)
    module._own_the_parts()


class BatchNormAct1d(_BatchNormAct):
    """``activation(BatchNorm1d(x) + residual)`` in one pass over memory.

    The activation and the residual cost no pass of their own, forward or backward, and no copy of what stands before
    the activation is kept. ``state_dict`` has the keys of a bare batch norm: the checkpoint of ``Sequential(conv, bn,
    relu)`` loads where the ReLU is gone.

    Args:
        num_features: C of an input ``(N, C)`` or ``(N, C, L)``.
        *settings: those of :class:`normkit.BatchNorm1d`, in its order.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01), "silu", or None.
        inplace: let the output take the place of the input, which then need not be kept: in training for "leaky_relu"
            or None, without a residual, as :func:`normkit.functional.batch_norm` says. A part that was swapped or
            hooked runs out of place.
        **named: those of :class:`normkit.BatchNorm1d`.

    Raises:
        ArgumentError: an unknown activation, or a setting that the batch norm refuses; in the forward with ``inplace``
            where the backward could not be computed from the output.

    Example:
        >>> import torch
        >>> layer = BatchNormAct1d(2)
        >>> layer(torch.tensor([[1.0, 30.0], [3.0, 10.0]])).detach().round()
        tensor([[0., 1.],
                [1., 0.]])
        >>> sorted(layer.state_dict())
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """

    _part = BatchNorm1d


class BatchNormAct2d(_BatchNormAct):
    """``activation(BatchNorm2d(x) + residual)`` in one pass over memory; see :class:`BatchNormAct1d`.

    Example:
        >>> import torch
        >>> layer = BatchNormAct2d(64, activation="relu")
        >>> x, shortcut = torch.randn(2, 64, 7, 7), torch.randn(2, 64, 7, 7)
        >>> bool((layer(x, shortcut) >= 0).all())
        True
    """

    _part = BatchNorm2d


class BatchNormAct3d(_BatchNormAct):
    """``activation(BatchNorm3d(x) + residual)`` in one pass over memory; see :class:`BatchNormAct1d`."""

    _part = BatchNorm3d
