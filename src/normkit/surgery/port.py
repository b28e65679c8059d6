"""Carry a normalization layer's state between frameworks that use the same words for different things."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..anatomy import norm_layers
from ..errors import ArgumentError, ShapeError
from ..functional.averages import is_plain_law
from ..layers import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..layers.laws import law_of
from ..spelling import alternatives
from .conventions import CONVENTIONS, Convention

__all__ = ["Ported", "port_state"]

Array = NDArray[Any]
Framework = Literal["torch", "keras", "flax", "onnx"]
Method = Literal["batch", "layer", "group", "instance"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Ported:
    """A layer's state in the target's words.

    Attributes:
        state: the arrays, by the target's names.
        settings: what the target's layer must be built with, by the target's names.
        changes: what is different now, in words.
    """

    state: dict[str, Array]
    settings: dict[str, Any]
    changes: tuple[str, ...]

    def __repr__(self) -> str:
        """Return the names and shapes in one line."""
        arrays = ", ".join(f"{name} {np.shape(value)}" for name, value in self.state.items())
        return f"<Ported: {arrays}; {len(self.settings)} settings, {len(self.changes)} changes>"


def port_state(
    state: Mapping[str, Any] | nn.Module,
    *,
    source: Framework | None = None,
    target: Framework,
    method: Method = "batch",
    settings: Mapping[str, Any] | None = None,
    convert_variance: bool = False,
    count: int | None = None,
) -> Ported:
    """Translate one layer's arrays and settings; predictions stay the same.

    Conventions:
        Momentum: torch weighs the new value, Keras, Flax and ONNX the old one; the number is turned round.
        eps: the defaults differ (Keras 1e-3, Flax 1e-6 for layers and groups), so it is always in the new settings.
        Variance: torch stores the unbiased one, the others the biased one. Predictions use what is stored, so it is
        carried as it is, and the new settings say ``unbiased=False`` where that keeps later training alike. With
        ``convert_variance=True`` it is multiplied by m / (m - 1) or its inverse, and predictions change by that.
        Missing weight or bias are filled with 1 and 0 where the target has only both or must have them.

    Args:
        state: the arrays by the source's names: Keras gamma, beta, moving_mean, moving_variance; Flax scale, bias,
            mean, var, flat or under ``params`` and ``batch_stats``; ONNX scale, B, input_mean, input_var; torch weight,
            bias, running_mean, running_var, num_batches_tracked. Or a layer in PyTorch of any house, read as
            :func:`normkit.register_norm` says, which has its own method and settings.
        source: "torch", "keras", "flax" or "onnx"; not with a layer.
        target: likewise.
        method: "batch", "layer", "group" or "instance".
        settings: the source layer's, by its own names; what is left out has the source's default. Those that this
            function returned for a torch layer are among them.
        convert_variance: translate the stored variance too. Needs ``count``.
        count: values per channel in a training batch: samples times positions.

    Raises:
        ArgumentError: an unknown framework, method, name or setting; a setting out of range; several axes; no arrays; a
            variance to convert without the count; a negative variance, NaN or infinity; arrays without names; or a
            layer that cannot be read.
        ShapeError: arrays that do not fit each other.

    Example:
        >>> keras = {"gamma": [2.0], "beta": [1.0], "moving_mean": [0.5], "moving_variance": [4.0]}
        >>> ported = port_state(keras, source="keras", target="torch")
        >>> sorted(ported.state)
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
        >>> ported.settings
        {'num_features': 1, 'eps': 0.001, 'affine': True, 'momentum': 0.01, 'unbiased': False}
    """
    taking = _convention("target", target)
    changes: list[str] = []
    kind: str
    layer, is_frozen = state, False
    if isinstance(state, nn.Module):
        if source is not None or settings is not None:
            raise ArgumentError("source= and settings= go with arrays; a layer says them itself")
        giving, kind, state, settings, is_frozen = _of_layer(state, changes)
    else:
        giving, kind = _convention("source", source), method
    if kind not in giving.names:
        raise ArgumentError(f"method is {kind!r}; {alternatives(kind, giving.names)}")
    settings = settings or {}
    given = giving.read_settings(kind, settings)
    if settings.get("unbiased") is False:
        giving = replace(giving, unbiased=False)
    arrays = giving.read_state(kind, state)
    if not arrays and kind == "batch" and not isinstance(layer, nn.Module):
        raise ArgumentError(f"the state is empty: pass one layer's arrays, {', '.join(giving.names[kind].values())}")
    _check_shapes(arrays)
    _check_values(arrays, giving.names[kind])
    if "var" in arrays:
        arrays["var"] = _variance(arrays["var"], giving, taking, convert_variance, count, changes)
    if given.get("momentum") is not None and giving.weighs_new != taking.weighs_new:
        before = given["momentum"]
        # In decimal, so that 0.9 becomes 0.1 and not 0.09999999999999998.
        given["momentum"] = float(1 - Decimal(repr(float(before))))
        side = "new" if taking.weighs_new else "old"
        changes.append(f"momentum {before} becomes {given['momentum']}: it weighs the {side} value")
    if kind == "batch":
        changes.extend(_unsaid(giving, taking, given, arrays, is_frozen=is_frozen))
    _fill(arrays, taking, kind, changes)
    was_last = giving.channels_last and settings.get("axis") not in (1, [1], (1,))
    if was_last != taking.channels_last and kind != "layer":
        order = ("(N, *, C)", "(N, C, *)")
        changes.append(f"input {order[not was_last]} becomes {order[not taking.channels_last]}")
    kept_biased = "var" in arrays and not giving.unbiased and not convert_variance
    return Ported(
        state=taking.write_state(kind, arrays),
        settings=taking.write_settings(kind, given, arrays, biased=kept_biased),
        changes=tuple(changes),
    )


def _of_layer(module: nn.Module, changes: list[str]) -> tuple[Convention, str, dict[str, Any], dict[str, Any], bool]:
    """Read a layer in PyTorch by the registry, in torch's words; say what its state does not hold."""
    name = type(module).__name__
    if isinstance(module, (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)):
        if module.activation is not None:
            changes.append(f"the {module.activation} after the layer is no part of it")
        module = module.norm
    layer = next((layer for layer in norm_layers(module) if layer.path == ""), None)
    if layer is None or layer.form is None:
        reason = "it is no normalization layer that is known" if layer is None else layer.unread
        raise ArgumentError(f"a {name} cannot be ported: {reason}; normkit.register_norm says how a layer is read")
    if layer.lazy:
        raise ArgumentError(f"a {name} cannot be ported: it has no channels yet; run the model once first")
    giving = replace(CONVENTIONS["torch"], unbiased=layer.unbiased)
    method = "batch" if layer.form.of_batch else layer.form.method
    of_layers = method == "layer"
    parts = {"weight": layer.effective_weight, "bias": layer.bias}
    if layer.form.of_batch:
        parts |= {"mean": layer.mean, "var": layer.var, "counter": layer.counter}
    words = giving.names.get(method, {})
    arrays = {
        words[word]: _values(value, of_layers) for word, value in parts.items() if word in words and value is not None
    }
    settings = {"eps": layer.eps} | ({"momentum": layer.momentum} if layer.form.of_batch else {})
    if method == "group":
        settings["num_groups"] = getattr(module, "num_groups", None)
    law = law_of(module)
    if not is_plain_law(*law):
        said = f"the statistics were averaged by average={law[0]!r}, variance={law[1]!r}"
        changes.append(f"{said}, which the state does not say: they are carried as they are, and go on by momentum")
    changes.extend(f"the {type(step).__name__} after the layer is no part of it" for step in layer.tail)
    if method not in giving.names:
        raise ArgumentError(f"a {name} cannot be ported: {method} normalization has no word in other frameworks here")
    return giving, method, arrays, settings, layer.form.frozen


def _unsaid(
    giving: Convention, taking: Convention, given: Mapping[str, Any], arrays: Mapping[str, Array], *, is_frozen: bool
) -> Iterator[str]:
    """Say of a batch norm what the target has no word for."""
    if "momentum" in given and given["momentum"] is None and taking.name != "torch" and not is_frozen:
        default = taking.defaults["batch"]["momentum"]
        said = f"momentum None, the plain average of all batches, has no word in {taking.name}"
        yield f"{said}: its layer goes on with {default}"
    if "mean" not in arrays:
        names = f"{taking.names['batch']['mean']} and {taking.names['batch']['var']}"
        if taking.name == "torch":
            yield "the state has no stored statistics: track_running_stats=False, normalized with the batch's always"
        else:
            yield f"the state has no {names}, which a layer of {taking.name} has: measure them before it predicts"
    if given.get("eps") == 0:
        yield "eps is 0: a channel whose variance is 0 has no finite output"


def _values(tensor: Tensor, of_layers: bool) -> Tensor:
    return tensor.detach() if of_layers or tensor.ndim == 0 else tensor.detach().flatten()


def _convention(role: str, name: str | None) -> Convention:
    if name is None or name not in CONVENTIONS:
        raise ArgumentError(f"{role} is {name!r}; {alternatives(name, CONVENTIONS)}")
    return CONVENTIONS[name]


def _check_shapes(arrays: Mapping[str, ArrayLike]) -> None:
    shapes = {name: np.shape(value) for name, value in arrays.items() if name != "counter"}
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ShapeError(f"the arrays have different shapes: {said}; pass the state of one layer")


def _check_values(arrays: Mapping[str, Array], names: Mapping[str, str]) -> None:
    """Refuse numbers that no layer can have: they would be carried without a word, and predictions be nonsense."""
    for word, value in arrays.items():
        name = names[word]
        if value.dtype.kind not in "fiuV":  # V: what NumPy knows from others, such as JAX's bfloat16
            raise ArgumentError(f"{name} holds {value.dtype}; pass an array of real numbers")
        numbers = value.astype(np.float64)
        if not np.isfinite(numbers).all():
            raise ArgumentError(
                f"{name} holds NaN or infinity at {_places(~np.isfinite(numbers))}; pass a sound state, or mend the "
                "layer where it comes from, in torch by normkit.repair"
            )
        if word == "var" and (numbers < 0).any():
            raise ArgumentError(
                f"{name} is negative at {_places(numbers < 0)}, which no variance is: are {names['mean']} and {name} "
                f"swapped? Pass the variance as {name}"
            )


def _places(wrong: Array) -> str:
    """Name the first places of a mask."""
    found = np.flatnonzero(wrong)
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"index {', '.join(map(str, found[:5]))}{more} of {wrong.size}"


def _variance(
    var: Array, giving: Convention, taking: Convention, convert: bool, count: int | None, changes: list[str]
) -> Array:
    if giving.unbiased == taking.unbiased:
        return var
    words = ("biased", "unbiased")
    if not convert:
        changes.append(f"the stored variance is the {words[giving.unbiased]} one, carried as it is")
        return var
    if count is None or count < 2:
        raise ArgumentError(
            f"the {words[giving.unbiased]} variance becomes the {words[taking.unbiased]} one by the number of values "
            f"per channel, and count is {count}; pass count=batch size times positions, at least 2, or leave "
            "convert_variance=False"
        )
    factor = count / (count - 1) if taking.unbiased else (count - 1) / count
    changes.append(f"the stored variance was multiplied by {factor:.6g}: it is now the {words[taking.unbiased]} one")
    converted: Array = var * factor
    return converted


def _fill(arrays: dict[str, Array], taking: Convention, method: str, changes: list[str]) -> None:
    """Add a weight or bias that the target cannot do without."""
    missing = [name for name in ("weight", "bias") if name not in arrays]
    if not missing or (len(missing) == 2 and not taking.needs_affine) or (taking.takes_one and not taking.needs_affine):
        return
    like = next(iter(arrays.values()), None)
    if like is None:
        raise ArgumentError("the state is empty, so the number of channels is unknown; pass at least one array")
    for name in missing:
        arrays[name] = np.ones_like(like) if name == "weight" else np.zeros_like(like)
        changes.append(f"{name} was missing and is filled with {1 if name == 'weight' else 0}")
