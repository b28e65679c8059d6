"""What four frameworks call the parts of a normalization layer, and what they mean by them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ArgumentError
from ..spelling import alternatives

__all__ = ["CONVENTIONS", "Convention"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """One framework's words.

    Attributes:
        name: the framework.
        names: for every method our word for an array to the framework's.
        settings: our word for a setting to the framework's.
        defaults: for every method the settings that hold where nothing is said, in our words.
        weighs_new: momentum is the weight of the new value, not of the old.
        unbiased: the unbiased variance is stored.
        channels_last: inputs are ``(N, *, C)`` by default.
        needs_affine: weight and bias must both be there.
        takes_one: one of weight and bias may be there alone.
        whole_state: Python that gives a layer's arrays with their names.
        ignored: settings that say nothing a target needs.
    """

    name: str
    names: Mapping[str, Mapping[str, str]]
    settings: Mapping[str, str]
    defaults: Mapping[str, Mapping[str, Any]]
    weighs_new: bool = False
    unbiased: bool = False
    channels_last: bool = False
    needs_affine: bool = False
    takes_one: bool = False
    whole_state: str
    ignored: frozenset[str] = field(default_factory=frozenset)

    def read_settings(self, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings in our words, defaults filled in.

        Raises:
            ArgumentError: a setting the framework does not have or a value that it cannot have, or several axes.
        """
        ours = {theirs: word for word, theirs in self.settings.items()}
        unknown = sorted(set(given) - set(ours) - self.ignored)
        if unknown:
            words = alternatives(unknown[0], sorted((*ours, *self.ignored)))
            raise ArgumentError(f"{self.name} has no setting {', '.join(unknown)}; {words}")
        self._check_values(method, given, ours)
        said = {ours[name]: value for name, value in given.items() if name in ours}
        return {**self.defaults[method], **said}

    def _check_values(self, method: str, given: Mapping[str, Any], ours: Mapping[str, str]) -> None:
        """Refuse numbers that no layer of the framework can have: they would be carried without a word."""
        axis = given.get("axis")
        axes = axis if isinstance(axis, (tuple, list)) else () if axis is None else (axis,)
        if len(axes) > 1 and method != "layer":
            raise ArgumentError(f"axis is {axis}; only one channel axis can be ported")
        if not all(_is_int(each) and each != 0 and -5 <= each <= 4 for each in axes):
            raise ArgumentError(f"axis is {axis!r}; it counts the channels: -1 for the last, 1 for the first behind N")
        for name, value in given.items():
            word = ours.get(name)
            if word == "eps" and not (_is_number(value) and 0 <= value < float("inf")):
                raise ArgumentError(f"{name} is {value!r}; it is finite and not negative, such as 1e-5")
            is_average = value is None and self.name == "torch"
            if word == "momentum" and not is_average and not (_is_number(value) and 0 <= value <= 1):
                side = "new" if self.weighs_new else "old"
                raise ArgumentError(f"{name} is {value!r}; in {self.name} it is the weight of the {side} value, 0 to 1")
            if word == "groups" and value is not None and not (_is_int(value) and (value >= 1 or value == -1)):
                raise ArgumentError(f"{name} is {value!r}; it is the number of groups, at least 1")
            if name == "unbiased" and not isinstance(value, bool):
                raise ArgumentError(f"unbiased is {value!r}; True or False is needed")

    def read_state(self, method: str, state: Mapping[str, Any]) -> dict[str, Array]:
        """Return the arrays in our words.

        Raises:
            ArgumentError: arrays without names, an array the framework does not have, or one of mean and variance
                alone.
        """
        if not isinstance(state, Mapping):
            raise ArgumentError(
                f"the state is a {type(state).__name__}, and arrays alone do not say which is which; pass a dict with "
                f"the names {', '.join(self.names[method].values())}: {self.whole_state}"
            )
        flat: dict[str, Any] = {}
        for name, value in state.items():
            flat |= value if isinstance(value, Mapping) else {name: value}
        ours = {theirs: word for word, theirs in self.names[method].items()}
        unknown = sorted(set(flat) - set(ours))
        if unknown:
            raise ArgumentError(
                f"{', '.join(unknown)} is no array of {self.name}'s {method} layer; {alternatives(unknown[0], ours)}"
            )
        arrays = {ours[name]: _as_array(name, value) for name, value in flat.items() if value is not None}
        if ("mean" in arrays) != ("var" in arrays):
            missing = "var" if "mean" in arrays else "mean"
            raise ArgumentError(f"{self.names[method][missing]} is missing; pass both stored statistics or neither")
        return arrays

    def write_state(self, method: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the arrays by the framework's names."""
        names = self.names[method]
        written = {names[word]: value for word, value in arrays.items() if word in names}
        if "counter" in names and "mean" in arrays:
            written.setdefault(names["counter"], np.array(0))
        return written

    def write_settings(
        self, method: str, settings: Mapping[str, Any], arrays: Mapping[str, Array], *, biased: bool
    ) -> dict[str, Any]:
        """Return the settings by the framework's names; what it has no word for is left out."""
        shape = np.shape(next(iter(arrays.values()))) if arrays else ()
        said: dict[str, Any] = {}
        if self.name == "torch":
            key = {"layer": "normalized_shape", "group": "num_channels"}.get(method, "num_features")
            if shape:
                said[key] = tuple(shape) if method == "layer" else shape[0]
        said |= {theirs: settings[word] for word, theirs in self.settings.items() if settings.get(word) is not None}
        has = {word: word in arrays for word in ("weight", "bias")}
        if self.name == "torch":
            said["elementwise_affine" if method == "layer" else "affine"] = has["weight"]
        elif self.name == "keras":
            said |= {"scale": has["weight"], "center": has["bias"]}
        elif self.name == "flax":
            said |= {"use_scale": has["weight"], "use_bias": has["bias"]}
        if method != "batch":
            said.pop(self.settings["momentum"], None)
        elif self.name == "torch":
            said["momentum"] = said.pop("momentum", None)
            if biased:
                said["unbiased"] = False
            if "mean" not in arrays:
                said["track_running_stats"] = False
        return said


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _as_array(name: str, value: Any) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16, and float32 holds all of its numbers.
        return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).numpy())
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ArgumentError(f"{name} is no array ({error}); pass one number per channel") from None


def _methods(batch: Mapping[str, str], other: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    return {"batch": batch, "layer": other, "group": other, "instance": other}


def _defaults(batch: float, momentum: float, sample: float, groups: int | None) -> dict[str, dict[str, Any]]:
    """Return the defaults by method: eps of batch normalization, its momentum, eps of the others, and groups."""
    return {
        "batch": {"eps": batch, "momentum": momentum},
        "layer": {"eps": sample},
        "group": {"eps": sample, "groups": groups},
        "instance": {"eps": sample},
    }


CONVENTIONS: Mapping[str, Convention] = {
    "torch": Convention(
        name="torch",
        whole_state="layer.state_dict()",
        names=_methods(
            {
                "weight": "weight",
                "bias": "bias",
                "mean": "running_mean",
                "var": "running_var",
                "counter": "num_batches_tracked",
            },
            {"weight": "weight", "bias": "bias"},
        ),
        settings={"eps": "eps", "momentum": "momentum", "groups": "num_groups"},
        defaults=_defaults(1e-5, 0.1, 1e-5, None),
        weighs_new=True,
        unbiased=True,
        ignored=frozenset(
            {"num_features", "num_channels", "affine", "bias", "normalized_shape", "elementwise_affine"}
            | {"track_running_stats", "unbiased"}
        ),
    ),
    "keras": Convention(
        name="keras",
        whole_state="{v.name: v.numpy() for v in layer.variables}",
        names=_methods(
            {"weight": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
            {"weight": "gamma", "bias": "beta"},
        ),
        settings={"eps": "epsilon", "momentum": "momentum", "groups": "groups"},
        defaults=_defaults(1e-3, 0.99, 1e-3, 32),
        channels_last=True,
        takes_one=True,
        ignored=frozenset({"axis", "center", "scale"}),
    ),
    "flax": Convention(
        name="flax",
        whole_state='variables["params"][layer] | variables["batch_stats"][layer]',
        names=_methods(
            {"weight": "scale", "bias": "bias", "mean": "mean", "var": "var"}, {"weight": "scale", "bias": "bias"}
        ),
        settings={"eps": "epsilon", "momentum": "momentum", "groups": "num_groups"},
        defaults=_defaults(1e-5, 0.99, 1e-6, 32),
        channels_last=True,
        takes_one=True,
        ignored=frozenset({"axis", "use_bias", "use_scale", "use_running_average", "use_fast_variance"}),
    ),
    "onnx": Convention(
        name="onnx",
        whole_state="{name: numpy_helper.to_array(tensor), ...}",
        names={
            "batch": {"weight": "scale", "bias": "B", "mean": "input_mean", "var": "input_var"},
            "layer": {"weight": "Scale", "bias": "B"},
            "group": {"weight": "scale", "bias": "bias"},
            "instance": {"weight": "scale", "bias": "B"},
        },
        settings={"eps": "epsilon", "momentum": "momentum", "groups": "num_groups"},
        defaults=_defaults(1e-5, 0.9, 1e-5, None),
        needs_affine=True,
        ignored=frozenset({"axis", "training_mode"}),
    ),
}
