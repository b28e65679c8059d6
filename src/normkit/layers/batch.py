"""Batch normalization as modules: torch's classes, with our functions below them."""

import operator
import warnings
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .. import functional
from ..errors import ArgumentError
from ..functional import checks
from ..functional.averages import Average, Variance, check_average, is_plain_law, momentum_of_half_life
from ..kernels.dispatch import Activation
from ..kernels.plain import channels as plain_channels
from .laws import KeepsAverages, law_in_words, momentum_in_words
from .tracing import StateInTables, path_in_graph, torch_form, torch_forward

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]


class _DefaultMomentum(float):
    """The default of ``momentum``: a plain 0.1 that tells whether the caller typed one beside ``decay``."""


DEFAULT_MOMENTUM = _DefaultMomentum(0.1)


def resolve_momentum(momentum: float | None, decay: float | None, half_life: float | None = None) -> float | None:
    """Return torch's momentum from one of the three ways to say it."""
    if half_life is not None:
        if momentum is not DEFAULT_MOMENTUM or decay is not None:
            other = f"momentum={momentum}" if decay is None else f"decay={decay}"
            raise ArgumentError(f"{other} and half_life={half_life} were both given, which say the same: pass one")
        return momentum_of_half_life(half_life)
    if decay is None:
        checks.check_momentum(momentum)
        return float(momentum) if momentum is not None else None
    if momentum is not DEFAULT_MOMENTUM:
        raise ArgumentError(
            f"momentum={momentum} and decay={decay} were both given; momentum is the weight of the new batch and decay "
            "that of the old value: pass one"
        )
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise ArgumentError(
            f"decay must be a number from 0 to 1, got {decay!r}; it is the weight of the old value: pass decay=0.9"
        )
    # In decimal, so that decay=0.9 is momentum=0.1 and not 0.09999999999999998.
    return float(1 - Decimal(repr(float(decay))))


def resolve_num_features(num_features: int) -> int:
    """Return C as an integer of at least 1, or refuse it."""
    try:
        size = operator.index(num_features)
    except TypeError:
        given: object = num_features
        kind = type(given).__name__
        whole = int(given) if isinstance(given, float) and given.is_integer() and given >= 1 else "C of (N, C, *)"
        raise ArgumentError(
            f"num_features must be an integer, got {kind} {given!r}; pass num_features={whole}"
        ) from None
    if isinstance(num_features, bool) or not 1 <= size < 2**63:
        bound = "at least 1" if size < 2 else "below 2**63"
        raise ArgumentError(f"num_features must be {bound}, got {num_features!r}; it is C of an input (N, C, *)")
    return size


class _BatchNorm(KeepsAverages, StateInTables, nn.modules.batchnorm._BatchNorm):
    """What the three layers and their lazy forms share. State only: the arithmetic is functional.batch_norm."""

    _ranks: tuple[int, ...]
    _layout: str
    _torch_forward = torch_forward(nn.modules.batchnorm._BatchNorm)
    _torch_layer: ClassVar[type[nn.Module]]
    __jit_unused_properties__: ClassVar[list[str]] = ["torch_form"]
    unbiased: bool = True
    # Average and Variance, words that TorchScript does not know.
    average: str = "moving"
    variance: str = "batch"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = DEFAULT_MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        decay: float | None = None,
        unbiased: bool = True,
        half_life: float | None = None,
        average: Average = "moving",
        variance: Variance = "batch",
    ) -> None:
        # A lazy layer passes 0 here and learns its size from the first input.
        size = 0 if isinstance(self, nn.modules.lazy.LazyModuleMixin) else resolve_num_features(num_features)
        checks.check_eps(eps)
        weighed = resolve_momentum(momentum, decay, half_life)
        check_average(average, variance, weighed)
        super().__init__(size, eps, weighed, affine, track_running_stats, device, dtype)
        self.unbiased, self.average, self.variance = unbiased, average, variance
        if half_life is not None:
            self.half_life = half_life
        if affine and not bias:
            # torch before 2.13 has no bias= of its own.
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, *)``; see :func:`normkit.functional.batch_norm` for formula and conventions."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            # Scripted in evaluation, and put back into training.
            stored = self.unbiased and self.average == "moving" and self.variance == "batch"
            assert stored or not self.training, "torch's kernel cannot store these statistics; call eval()"
            return self._torch_forward(input)
        else:  # TorchScript compiles what follows a return
            return self.normalize(input)

    def normalize(
        self, input: Tensor, activation: Activation | None = None, residual: Tensor | None = None, inplace: bool = False
    ) -> Tensor:
        """Return ``activation(forward(input) + residual)`` in one pass, written over the input with ``inplace``."""
        # torch.fx passes a stand-in that has no shape.
        given: object = input
        ordinary = type(given) is Tensor and torch._C._get_tracing_state() is None
        traced = not ordinary and isinstance(given, torch.fx.Proxy)
        if not ordinary and isinstance(given, torch.fx.Proxy) and isinstance(given.tracer, torch.fx.Tracer):
            tracer = given.tracer
            if tracer.root is not self:
                # A node that is this layer, as for torch's own: the graph still follows train() and eval().
                y = cast(Tensor, tracer.create_proxy("call_module", path_in_graph(self, tracer), (given,), {}))
                return plain_channels.activate(y if residual is None else y + residual, activation)
        # What the checks find, at a fraction of their cost.
        try:
            fits = ordinary and input.dim() in self._ranks and input.shape[1] == self.num_features
        except RuntimeError:
            # A nested tensor of strided layout has no shape. To catch this costs nothing, to ask every tensor does.
            fits = False
        if not fits and not traced:
            self._check_input(input)
        try:
            # Out of the tables at once: asked for by name, nn.Module looks through every class before it looks here.
            parameters, buffers = (self._parameters, self._buffers) if self._in_tables else ({}, {})
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:
            # Parametrized, pruned, put in as an attribute, or made by a class of the user's.
            weight, bias = self.weight, self.bias
            mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        training = self.training
        batch_statistics = training or (mean is None and var is None)
        if training and not self.track_running_stats:
            mean = var = counter = None
        return functional.batch_norm(
            input,
            mean,
            var,
            weight,
            bias,
            batch_statistics,
            self.momentum,
            self.eps,
            unbiased=self.unbiased,
            num_batches_tracked=counter,
            activation=activation,
            residual=residual,
            inplace=inplace,
            average=self.average,  # type: ignore[arg-type]
            variance=self.variance,  # type: ignore[arg-type]
            caller=None if traced else self,
        )

    @property
    def torch_form(self) -> nn.Module:
        """The form in which torch.ao quantizes this layer, made anew."""
        return torch_form(self)

    def _check_input(self, input: Tensor) -> None:
        if checks.is_tracing():
            with checks.constant_while_tracing():
                return self._check_shape(input)
        return self._check_shape(input)

    def _check_shape(self, input: Tensor) -> None:
        checks.check_input(input, self)
        checks.check_rank(input, self._ranks, self._layout, self)
        checks.check_channels(input, self.num_features, self)

    def extra_repr(self) -> str:
        """Return torch's description, with the stored variance named where it is not torch's."""
        described = momentum_in_words(super().extra_repr(), self)
        return described + ("" if self.unbiased else ", unbiased=False") + law_in_words(self)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in ("running_mean", "running_var"):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and not value.is_meta and _is_poisoned(name, value):
                warnings.warn(
                    f"{prefix + name} was loaded with values that are not finite or below zero; evaluation will give "
                    "NaN in their channels. Train on, or compute the statistics again, before you predict",
                    stacklevel=2,
                )

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse what torch's kernel, which TorchScript runs, cannot store."""
        if not self.unbiased and self.training:
            raise ArgumentError(
                "TorchScript runs torch's own kernel, which cannot store the biased variance; call eval(), use "
                'torch.export, or normkit.convert(model, to="torch")'
            )
        if self.training and not is_plain_law(self.average, self.variance):
            raise ArgumentError(
                f"TorchScript runs torch's own kernel, which cannot store average={self.average!r}, "
                f"variance={self.variance!r}; call eval()"
            )
        return self


def _is_poisoned(name: str, value: Tensor) -> bool:
    return not bool(torch.isfinite(value).all()) or (name == "running_var" and bool((value < 0).any()))


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch normalization of ``(N, C)`` or ``(N, C, L)``: torch's layer, exact statistics, clearer refusals.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, mean and var per channel: those of the batch in training, the
    running ones in evaluation. The formula and every convention stand at :func:`normkit.functional.batch_norm`.
    ``state_dict`` is torch's, in both directions. A forward that a backward runs again (activation checkpointing) moves
    neither statistics nor counter; nor does one in the ``backward`` of an autograd function, but inside
    :func:`normkit.functional.first_forward`. That holds for every layer here that keeps running statistics.

    Args:
        num_features: C, at least 1.
        eps: added to the variance; its unit is that of the input squared. Not negative, and not 0 in training.
        momentum: the weight of the **new** batch in the running statistics, from 0 to 1; None for the plain average of
            all batches.
        affine: learn weight and bias, which start at 1 and 0.
        track_running_stats: keep running statistics; without them the batch's own are used in evaluation too.
        device: where the state lives.
        dtype: the type of the state.
        bias: False for a layer that learns only a weight.
        decay: the weight of the **old** value, as Keras, Flax and ONNX count: ``momentum = 1 - decay``. Refused
            together with momentum.
        unbiased: store the variance divided by m - 1, as torch does; False divides by m, as Keras, Flax and ONNX do.
        half_life: after how many batches one weighs half; ``momentum = 1 - 2^(-1 / half_life)``. Refused with momentum
            or decay.
        average: ``"moving"``, which remembers its start of 0 and 1 by ``(1 - momentum)^t`` after t batches; or
            ``"debiased"``, without the start from the first batch on, as Adam's: batch t weighs
            ``momentum / (1 - (1 - momentum)^t)``.
        variance: ``"batch"`` stores the average of the batches' variances; ``"total"`` the variance of all values under
            the average's weights, that of the batch means included, as the data's own: needs ``average="debiased"`` or
            ``momentum=None``, and divides by m whatever ``unbiased`` says. Both laws need no state but torch's.

    Raises:
        ArgumentError: num_features, eps, momentum, decay or half_life out of range, or a law that contradicts itself.

    Example:
        >>> layer = BatchNorm1d(2, decay=0.9)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach().round()
        tensor([[-1., -1.],
                [ 1.,  1.]])
        >>> layer.running_mean
        tensor([0.2000, 2.0000])

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithms 1 and 2.
    """

    _ranks, _layout = (2, 3), "(N, C) or (N, C, L)"
    _torch_layer = nn.BatchNorm1d


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of ``(N, C, H, W)``: statistics per channel over samples and positions.

    Arguments, conventions and errors are those of :class:`BatchNorm1d`.

    Example:
        >>> BatchNorm2d(16, decay=0.9, unbiased=False)
        BatchNorm2d(16, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, unbiased=False)
    """

    _ranks, _layout = (4,), "(N, C, H, W)"
    _torch_layer = nn.BatchNorm2d


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of ``(N, C, D, H, W)``: statistics per channel over samples and positions.

    Arguments, conventions and errors are those of :class:`BatchNorm1d`.
    """

    _ranks, _layout = (5,), "(N, C, D, H, W)"
    _torch_layer = nn.BatchNorm3d


class _LazyBatchNorm(nn.modules.batchnorm._LazyNormBase, _BatchNorm):
    """A layer that learns ``num_features`` from its first input, and refuses a bad first input unchanged."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = DEFAULT_MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        decay: float | None = None,
        unbiased: bool = True,
        half_life: float | None = None,
        average: Average = "moving",
        variance: Variance = "batch",
    ) -> None:
        weighed = resolve_momentum(momentum, decay, half_life)
        check_average(average, variance, weighed)
        super().__init__(eps, weighed, affine, track_running_stats, device, dtype)
        self.unbiased, self.average, self.variance = unbiased, average, variance
        if half_life is not None:
            self.half_life = half_life
        if affine and not bias:
            self.register_parameter("bias", None)

    def initialize_parameters(self, input: Tensor) -> None:
        """Take the number of channels from the first input, once nothing about it would be refused later."""
        state = {name: getattr(self, name) for name in ("weight", "bias", "running_mean", "running_var")}
        given = {name: value for name, value in state.items() if value is not None}
        # A state dict may have been loaded before the first input; then the channels are known.
        loaded = [value.shape[0] for value in given.values() if not nn.parameter.is_lazy(value)]
        checks.check_input(input, self)
        checks.check_rank(input, self._ranks, self._layout, self)
        checks.check_channels(input, loaded[0] if loaded else input.shape[1], self)
        for name, value in given.items():
            checks.check_match(name, value, input, self)
        batch_statistics = self.training or not self.track_running_stats
        checks.check_eps(self.eps, positive=batch_statistics, caller=self)
        if batch_statistics:
            checks.check_values_per_channel(input, self)
        super().initialize_parameters(input)
        # torch leaves 0 where it had no parameter to make.
        self.num_features = input.shape[1]


class LazyBatchNorm1d(_LazyBatchNorm, nn.LazyBatchNorm1d, BatchNorm1d):
    """:class:`BatchNorm1d` that takes ``num_features`` from its first input, and then becomes one."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, nn.LazyBatchNorm2d, BatchNorm2d):
    """:class:`BatchNorm2d` that takes ``num_features`` from its first input, and then becomes one."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, nn.LazyBatchNorm3d, BatchNorm3d):
    """:class:`BatchNorm3d` that takes ``num_features`` from its first input, and then becomes one."""

    cls_to_become = BatchNorm3d
