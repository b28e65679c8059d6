"""Merge states: weights are averaged, running statistics are pooled."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, SurgeryError

__all__ = ["merge_states"]


def merge_states(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Merge the states of one architecture: federated rounds, model soups, several teachers.

    With the weights ``w`` scaled to the sum 1, in float64::

        running_mean = sum(w * mean)        running_var = sum(w * (var + (mean - running_mean)^2))

    which are the moments of the pooled data. Averaging the variances alone leaves out how far the means are apart.
    All else that is floating is averaged, and a counter becomes the largest. Where the weights differ too, the
    statistics are those of no network that ever ran: :func:`normkit.recalibrate` the result.

    Args:
        states: two or more, with the same names and shapes.
        weights: one for each, not negative, such as the numbers of samples; equal if left out.

    Returns:
        A new state, in the types of the first.

    Raises:
        ArgumentError: fewer than two states, or weights of another number, negative, not finite or all zero.
        SurgeryError: names or shapes differ, or a value is not finite.

    >>> first = {"n.running_mean": torch.tensor([-5.0]), "n.running_var": torch.tensor([1.0])}
    >>> second = {"n.running_mean": torch.tensor([5.0]), "n.running_var": torch.tensor([1.0])}
    >>> merge_states([first, second])
    {'n.running_mean': tensor([0.]), 'n.running_var': tensor([26.])}
    """
    shares = _shares(states, weights)
    _check(states)
    return {name: _merged(name, states, shares).to(tensor.dtype) for name, tensor in states[0].items()}


def _shares(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None) -> list[float]:
    if len(states) < 2:
        raise ArgumentError(f"{len(states)} states were given; two or more can be merged")
    given = [1.0] * len(states) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(states):
        raise ArgumentError(f"{len(given)} weights were given for {len(states)} states")
    if not all(0 <= weight < float("inf") for weight in given) or sum(given) == 0:
        raise ArgumentError(f"weights {given}: each is finite and not negative, and one is above 0")
    return [weight / sum(given) for weight in given]


def _check(states: Sequence[Mapping[str, Tensor]]) -> None:
    first = states[0]
    for number, state in enumerate(states):
        if state.keys() != first.keys():
            odd = sorted(state.keys() ^ first.keys())
            raise SurgeryError(f"state {number} has other names than state 0: {', '.join(odd[:3])}")
        for name, tensor in state.items():
            if tensor.shape != first[name].shape:
                raise SurgeryError(
                    f"{name} is {tuple(tensor.shape)} in state {number} and {tuple(first[name].shape)} in 0"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise SurgeryError(f"{name} is not finite in state {number}; normkit.repair it first")
            if _mean_of(name) and (tensor < 0).any():
                raise SurgeryError(f"{name} is negative in state {number}; normkit.repair it first")


def _merged(name: str, states: Sequence[Mapping[str, Tensor]], shares: list[float]) -> Tensor:
    tensors = [state[name] for state in states]
    if not tensors[0].is_floating_point():
        return torch.stack(tensors).amax(0)
    average = _average(tensors, shares)
    mean_name = _mean_of(name)
    if mean_name not in states[0]:
        return average
    means = [state[mean_name] for state in states]
    center = _average(means, shares)
    return average + _average([(mean.double() - center).square() for mean in means], shares)


def _mean_of(name: str) -> str:
    """Return the name of the mean that goes with a stored variance, torch's or Keras', or an empty string."""
    for variance in ("running_var", "moving_variance", "moving_var"):
        if name.endswith(variance):
            return name.removesuffix(variance) + variance.partition("_")[0] + "_mean"
    return ""


def _average(tensors: Sequence[Tensor], shares: list[float]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total += tensor.double() * share
    return total
