"""Every peer's result against the float64 reference, a few channels at a time."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import reference
from ..axes import values_per_channel
from .cases import EPS, MOMENTUM, Case

__all__ = ["RELATIVE", "Errors", "compare", "faults"]

Array = NDArray[np.float64]

# What a result may be off by, relative to the largest magnitude of its tensor and at least to 1: those of the tests.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# So many values at a time: small enough for the caches, so that the reference takes seconds on the largest shapes.
_VALUES = 1 << 18

_STATE = ("running_mean", "running_var", "dweight", "dbias")
_SUMS = ("dweight", "dbias")


@dataclass(frozen=True)
class Errors:
    """How far one peer is off, by the name of the result, relative to the largest magnitude and at least to 1."""

    by_name: dict[str, float]

    @property
    def output(self) -> float:
        """The error of the output."""
        return self.by_name["output"]

    @property
    def gradients(self) -> float | None:
        """The largest error of a gradient, None without a backward."""
        found = [error for name, error in self.by_name.items() if name.startswith("d")]
        return float(np.max(found)) if found else None


def compare(case: Case, results: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Errors]:
    """Return each peer's errors. A NaN where the reference has none is an infinite error.

    A sum of n random numbers is of the order of the root of n. Where one happens to cancel further, its own magnitude
    says nothing about the digits that its terms allow.
    """
    typical = math.sqrt(values_per_channel(tuple(case.x.shape)))
    off = {peer: dict.fromkeys(found, 0.0) for peer, found in results.items()}
    largest: dict[str, float] = {}
    for channels, expected in _expected(case):
        for name, value in expected.items():
            least = typical if name in _SUMS else 1.0
            largest[name] = max(largest.get(name, least), float(np.abs(value).max()))
            for peer, found in results.items():
                part = found[name][channels] if name in _STATE else found[name][:, channels]
                difference = float(np.abs(_array(part) - value).max())
                off[peer][name] = max(off[peer][name], math.inf if math.isnan(difference) else difference)
    return {peer: Errors({name: value / largest[name] for name, value in of.items()}) for peer, of in off.items()}


def faults(errors: Errors, dtype: torch.dtype) -> list[str]:
    """Return what exceeds the tolerance of this type of input, in words."""
    allowed = {
        name: RELATIVE[torch.float32] if name.startswith("running") else RELATIVE[dtype] for name in errors.by_name
    }
    return [
        f"{name} is off by {error:.3g}, allowed {allowed[name]:.3g}"
        for name, error in errors.by_name.items()
        if not error <= allowed[name]
    ]


def _expected(case: Case) -> Iterator[tuple[slice, dict[str, Array]]]:
    """Yield slices of channels with what the reference computes for them."""
    shape = tuple(case.x.shape)
    width = max(1, _VALUES // values_per_channel(shape))
    for start in range(0, shape[1], width):
        channels = slice(start, start + width)
        yield channels, _expected_of(case, channels)


def _expected_of(case: Case, channels: slice) -> dict[str, Array]:
    x = _array(case.x[:, channels])
    state = {name: _array(value[channels]) for name, value in case.state.items() if value.dim()}
    training = case.row.work != "eval"
    if training:
        step = reference.batch_norm(x, state["weight"], state["bias"], eps=EPS)
    else:
        stored = state["running_mean"], state["running_var"]
        step = reference.batch_norm_inference(x, *stored, state["weight"], state["bias"], eps=EPS)
    z = step.output if case.residual is None else step.output + _array(case.residual[:, channels])
    found = {"output": np.clip(z, *_range(case.row.activation))}
    if training:
        count = values_per_channel(tuple(case.x.shape))
        running = reference.Running(mean=state["running_mean"], var=state["running_var"])
        batch = reference.Statistics(count=count, mean=step.mean, var=step.var)
        moved = reference.running_update(running, batch, momentum=MOMENTUM)
        found |= {"running_mean": moved.mean, "running_var": moved.var}
    if case.dy is not None:
        low, high = _range(case.row.activation)
        dz = _array(case.dy[:, channels]) * ((z > low) & (z < high))
        back = reference.batch_norm_backward(dz, step)
        found |= {"dx": back.dx, "dweight": back.dweight, "dbias": back.dbias}
        if case.residual is not None:
            found["dresidual"] = dz
    return found


def _range(activation: str | None) -> tuple[float, float]:
    """Where the activation has slope 1: what lies outside is cut off."""
    return {None: (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}[activation]


def _array(value: Tensor) -> Array:
    return value.detach().double().numpy()
