"""Mend stored statistics: not finite, negative, in a narrow type, or without their counter."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, norm_layers, refuse_meta
from ..anatomy.forms import NAMED_STATISTICS
from ..anatomy.frozen import Frozen, remember
from ..anatomy.states import unwrapped
from ..errors import ArgumentError, SurgeryError
from .recalibrate import recalibrate
from .record import Record
from .transaction import restored_on_error

__all__ = ["Repair", "repair"]

_MEAN, _VARIANCE, _COUNTER = "running_mean", "running_var", "num_batches_tracked"
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, repr=False)
class Repair(Record[Any]):
    """The record of :func:`repair`.

    Attributes:
        state: the repaired names and tensors: the model's own, or a new dict where a state was given.
    """

    state: Mapping[str, Tensor]


def repair(
    model_or_state: nn.Module | Mapping[str, Tensor],
    batches: Any = None,
    donor: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    call: Call | None = None,
) -> Repair:
    """Mend running statistics that would make evaluation fail or drift.

    Statistics in float16 or bfloat16, which stop moving, are lifted to float32, and in a model the layer's weight and
    bias with them. Channels that are not finite, or whose variance is negative, are taken from ``donor``; with
    ``batches`` their layers are measured again by :func:`normkit.recalibrate`. In a state also: a prefix that a wrapper
    put before every name goes, a missing counter comes back as the largest of the others, and a counter without
    statistics goes.

    Args:
        model_or_state: a model, changed in place; or a state, of which a repaired copy is made.
        batches: data to measure with, in any form; for a model only.
        donor: another model or state of the same architecture.
        call: ``lambda model, batch: ...``, where a batch does not simply go into the model.

    Returns:
        The record; ``.touched`` names the layers, ``.state`` holds the result.

    Raises:
        ArgumentError: ``batches`` came with a state, which cannot be run.
        SurgeryError: weights themselves are not finite, or bad channels have neither donor nor data. Nothing has
            changed.

    >>> state = nn.BatchNorm1d(2).state_dict()
    >>> state["running_var"][1] = float("nan")
    >>> record = repair(state, donor=nn.BatchNorm1d(2))
    >>> record.state["running_var"], state["running_var"]
    (tensor([1., 1.]), tensor([1., nan]))
    """
    given = donor.state_dict() if isinstance(donor, nn.Module) else donor
    if isinstance(model_or_state, nn.Module):
        return _repair_model(model_or_state, batches, given, call)
    if batches is not None:
        raise ArgumentError(
            "batches= goes with a model; a state cannot be run. Load it into its model, then repair that"
        )
    return _repair_state(dict(model_or_state), given)


def _repair_model(model: nn.Module, batches: Any, donor: Mapping[str, Tensor] | None, call: Call | None) -> Repair:
    """Lift, take from the donor, then measure what is still bad; all or nothing."""
    refuse_meta(model)
    state = {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    layers = {layer.path: layer for layer in norm_layers(model)}
    known = {
        _dotted(layer.path): (layer.form.mean, layer.form.var)
        for layer in layers.values()
        if layer.form is not None and layer.form.stores(layer.module)
    }
    plan = _Plan(
        state, donor, {**_pairs_in(state), **{key: known[key] for key in known if key + known[key][1] in state}}
    )
    _refuse_bad_weights(state, plan)
    if plan.bad and batches is None:
        raise SurgeryError(plan.complaint())
    with restored_on_error(model):
        for prefix in plan.lifted:
            _lift(model.get_submodule(prefix.rstrip(".")))
        with torch.no_grad():
            for name, tensor in plan.mended.items():
                model.get_buffer(name).copy_(tensor)
        for layer in layers.values():
            if isinstance(layer.module, Frozen):
                remember(layer.module)
        if plan.bad:
            names = [prefix.rstrip(".") for prefix in plan.bad]
            names += [f"{name}.norm".lstrip(".") for name in names]  # a BatchNormAct's statistics have its own name
            wanted = {id(layer.module) for layer in layers.values() if set(layer.names) & set(names)}
            recalibrate(model, batches, where=lambda layer: id(layer.module) in wanted, call=call, include_frozen=True)
    return plan.record(model, dict(model.state_dict()))


def _repair_state(given: dict[str, Tensor], donor: Mapping[str, Tensor] | None) -> Repair:
    """Return a repaired copy of a state."""
    state = unwrapped(given, given.keys() if donor is None else donor.keys())
    notes = [] if state.keys() == given.keys() else ["a wrapper's prefix was taken off every name"]
    plan = _Plan(state, donor, _pairs_in(state))
    _refuse_bad_weights(state, plan)
    if plan.bad:
        raise SurgeryError(plan.complaint())
    result = {name: tensor.clone() for name, tensor in state.items()} | plan.mended
    for prefix in plan.lifted:
        for name in plan.names(prefix):
            result[name] = result[name].float()
    counters = [int(tensor) for name, tensor in state.items() if name.endswith(_COUNTER)]
    for prefix, pair in plan.pairs.items():
        # A house with other names has none, nor has a state in which nobody has one: torch fills it in on loading.
        if counters and prefix + _COUNTER not in result and pair == (_MEAN, _VARIANCE):
            result[prefix + _COUNTER] = torch.tensor(max(counters))
            notes.append(f"{prefix + _COUNTER} was missing and is back")
    for name in [name for name in result if name.endswith(_COUNTER)]:
        if name.removesuffix(_COUNTER) not in plan.pairs:
            del result[name]
            notes.append(f"{name} counted for no statistics and is gone")
    return plan.record(None, result, tuple(notes))


class _Plan:
    """What is wrong with the statistics of a state, and what a donor can mend."""

    def __init__(
        self, state: Mapping[str, Tensor], donor: Mapping[str, Tensor] | None, pairs: Mapping[str, tuple[str, str]]
    ) -> None:
        self.pairs = pairs
        self.lifted = [prefix for prefix in pairs if state[self.names(prefix)[1]].dtype in _NARROW]
        self.mended: dict[str, Tensor] = {}
        self.from_donor: list[str] = []
        self.bad: dict[str, Tensor] = {}
        self.reasons: dict[str, str] = {}
        for prefix in pairs:
            names = self.names(prefix)
            bad = _bad_channels(*(state[name] for name in names))
            if not bad.any():
                continue
            reason = "no donor was given" if donor is None else _against_donor(state, donor, names, bad)
            if reason is None and donor is not None:
                self.from_donor.append(prefix)
                for name in names:
                    self.mended[name] = torch.where(bad, donor[name].to(state[name]), state[name])
            else:
                self.bad[prefix], self.reasons[prefix] = bad.flatten(), str(reason)

    def names(self, prefix: str) -> tuple[str, str]:
        """Return the names of a layer's mean and variance in the state."""
        mean, variance = self.pairs[prefix]
        return prefix + mean, prefix + variance

    def complaint(self) -> str:
        """Say which channels are bad and what would mend them."""
        rows = []
        for prefix, bad in list(self.bad.items())[:5]:
            path, channels = prefix.rstrip(".") or "(the model itself)", bad.nonzero().flatten().tolist()[:5]
            rows.append(f"{path}: channels {channels} of {len(bad)} ({self.reasons[prefix]})")
        return f"repair: statistics that are not finite or negative: {'; '.join(rows)}; give batches= or a sound donor="

    def record(self, model: nn.Module | None, state: Mapping[str, Tensor], notes: tuple[str, ...] = ()) -> Repair:
        """Put the outcome into words."""
        from_donor = self.from_donor
        changed = [prefix for prefix in self.pairs if prefix in {*self.lifted, *from_donor, *self.bad}]
        told = [(self.lifted, "lifted to float32"), (from_donor, "mended from the donor"), (self.bad, "measured again")]
        words = tuple(f"{len(prefixes)} of the layers {what}" for prefixes, what in told if prefixes)
        return Repair(
            operation="repair",
            model=model,
            touched=tuple(prefix.rstrip(".") for prefix in changed),
            exactness="approximate" if from_donor or self.bad else "exact",
            notes=(*words, *notes),
            state=state,
        )


def _dotted(path: str) -> str:
    return f"{path}." if path else ""


def _pairs_in(state: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Return the layers of a state by their prefixes, each with what it calls its mean and variance."""
    return {
        name.removesuffix(variance): (mean, variance)
        for mean, variance in NAMED_STATISTICS
        for name in state
        if (name == variance or name.endswith(f".{variance}")) and name.removesuffix(variance) + mean in state
    }


def _bad_channels(mean: Tensor, variance: Tensor) -> Tensor:
    return ~(torch.isfinite(mean) & torch.isfinite(variance) & (variance >= 0))


def _against_donor(
    state: Mapping[str, Tensor], donor: Mapping[str, Tensor], names: tuple[str, str], bad: Tensor
) -> str | None:
    """Say why the donor cannot help with a layer, or return None."""
    if not all(name in donor for name in names):
        return "the donor has no such layer"
    if any(donor[name].shape != state[name].shape for name in names):
        return "the donor's layer has another shape"
    if (_bad_channels(*(donor[name] for name in names)).to(bad.device) & bad).any():
        return "the donor's statistics are bad in the same channels"
    return None


def _refuse_bad_weights(state: Mapping[str, Tensor], plan: "_Plan") -> None:
    """Refuse a state whose learnt part is broken: no statistics mend that."""
    statistics = {name for prefix in plan.pairs for name in plan.names(prefix)}
    for name, tensor in state.items():
        if name in statistics or name.endswith((_MEAN, _VARIANCE)) or not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            raise SurgeryError(
                f"repair: {name} itself is not finite; go back to an earlier checkpoint. Nothing was changed"
            )


def _lift(norm: nn.Module) -> None:
    """Give a layer float32 state, in the parameters and buffers that are there."""
    for tensor in (*norm.parameters(recurse=False), *norm.buffers(recurse=False)):
        if tensor.dtype in _NARROW:
            tensor.data = tensor.data.float()
