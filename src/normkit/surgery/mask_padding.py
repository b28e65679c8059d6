"""Keep padding out of the statistics: masked layers in the place of batch norms, and the mask handed to them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..anatomy import NormLayer, norm_layers
from ..anatomy.frozen import is_frozen
from ..anatomy.select import Where
from ..errors import ArgumentError, ShapeError
from ..layers import MaskedBatchNorm1d, SyncBatchNorm
from ..layers.laws import law_of
from .record import Model, Record, refuse_if_nothing_is_left
from .transaction import restored_on_error

__all__ = ["mask_padding"]


def mask_padding(model: Model, mask: Callable[..., Tensor], where: Where = None) -> Record[Model]:
    """Replace batch norms over sequences by masked ones, and hand each the mask of the batch under way.

    Padding then counts neither in a batch's statistics nor in the running ones, and comes out as zero (see
    :func:`normkit.functional.masked_batch_norm`). The running statistics still hold what was counted before: call
    :func:`normkit.recalibrate` next, and train again, since the function is another one.

    Args:
        model: changed in place. Parameters and buffers stay the same objects under the same names.
        mask: is called with what the model is called with, and returns ``(N, L)`` booleans, True where there are data.
        where: which layers, as for ``norm_layers``; None takes every ``BatchNorm1d`` and every
            :class:`normkit.SyncBatchNorm`, which stays what it is and takes masks itself.

    Returns:
        The record; ``exactness`` is ``"retrain"``.

    Raises:
        ArgumentError: ``where`` takes nothing, or ``mask`` cannot be called; in the forward, a mask of another shape
            than the layer's input has positions.
        SurgeryError: no layer can be masked; the model is as before.

    >>> import torch
    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> print(mask_padding(model, lambda x: (x != 0).any(1)))
    mask_padding: 1 layer touched, retrain
      touched 0
    >>> model(torch.tensor([[[1.0, 3.0, 0.0]]])).detach().round()
    tensor([[[-1.,  1.,  0.]]])
    """
    if not callable(mask):
        raise ArgumentError(f"mask is a {type(mask).__name__}; give a function of what the model is called with")
    chosen, refused, aside = [], {}, {}
    for layer in norm_layers(model, where):
        reason = _reason_against(layer)
        if reason is None:
            chosen.append(layer)
        elif where is not None or layer.kind in ("batch", "sync"):
            refused[layer.path] = reason
        else:
            aside[layer.path] = reason
    refuse_if_nothing_is_left("mask_padding", len(chosen), refused | aside, model, where)
    with restored_on_error(model):
        now = _Now(mask)
        model.register_forward_pre_hook(_Ask(now), with_kwargs=True)
        for layer in chosen:
            masked = _masked(layer.module)
            masked.register_forward_pre_hook(_Hand(now, str(layer)), with_kwargs=True)
            for name in layer.names:
                model.set_submodule(name, masked)
    touched = tuple(layer.path for layer in chosen)
    return Record(operation="mask_padding", model=model, touched=touched, refused=refused, exactness="retrain")


def _reason_against(layer: NormLayer) -> str | None:
    module = layer.module
    reasons = (
        (
            not isinstance(module, (nn.BatchNorm1d, SyncBatchNorm)),
            f"a {type(module).__name__} has no masked form; a BatchNorm1d and a normkit.SyncBatchNorm have",
        ),
        (getattr(module, "ghost_size", None) is not None, "there are no ghost batches of valid positions"),
        (layer.overridden, f"a {type(module).__name__} has a forward of its own, which would be lost"),
        (is_frozen(module), "it is frozen; unfreeze it first"),
        (layer.lazy, "it is lazy and has no channels yet; run the model once first"),
        (layer.hooked or layer.parametrized, "its hooks or parametrizations would be lost"),
        (not layer.path, "it is the model itself; put it into a container, such as nn.Sequential"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _masked(norm: nn.Module) -> nn.Module:
    """Return a masked layer with a batch norm's settings, parameters and buffers; a synchronized one takes masks."""
    if isinstance(norm, SyncBatchNorm):
        # What it becomes when it is converted back takes masks too.
        norm.source_class = MaskedBatchNorm1d  # type: ignore[assignment]
        return norm
    assert isinstance(norm, nn.BatchNorm1d)
    made = MaskedBatchNorm1d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        unbiased=bool(getattr(norm, "unbiased", True)),
    )
    made.average, made.variance = law_of(norm)
    made._parameters.update(norm._parameters)
    made._buffers.update(norm._buffers)
    return made.train(norm.training)


class _Now:
    """The mask of the batch under way. An object, so that a copied model's hooks share the copy's own."""

    def __init__(self, mask: Callable[..., Tensor]) -> None:
        self.mask = mask
        self.value: Tensor | None = None


class _Ask:
    """Before the model: ask for the mask."""

    def __init__(self, now: _Now) -> None:
        self.now = now

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now.value = self.now.mask(*args, **kwargs)


class _Hand:
    """Before a layer: hand over the mask, unless it was given one."""

    def __init__(self, now: _Now, name: str) -> None:
        self.now = now
        self.name = name

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        mask = self.now.value
        if mask is None or len(args) != 1 or "mask" in kwargs:
            return None
        positions = (len(args[0]), *args[0].shape[2:])
        if tuple(mask.shape) != positions:
            raise ShapeError(
                f"{self.name} was given {tuple(args[0].shape)}, and the mask of mask_padding is {tuple(mask.shape)}; "
                f"needed is {positions}: leave layers of another length out by where="
            )
        return (args[0], mask), kwargs
