"""Micro-batches that advance together: each call of a batch norm is one node of autograd over all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..axes import channel_shape
from ..errors import ArgumentError
from ..functional.agreement import SyncCall
from ..functional.inplace import is_recorded
from ..functional.pooled import Pool, apply_pooled, local_statistics, normalize_pooled
from ..functional.sync import first_pool
from ..kernels.plain import channels as plain
from ..kernels.repeated import in_backward, is_inside_function, is_repeated, may_be_repeated, repeats_function
from . import strangers
from .lineage import Lineage
from .lockstep import Lockstep
from .module_state import ModuleState
from .norm_calls import NormCall, answered, pooled_norms
from .pooling import Updates, pool_calls, stores_unbiased
from .sharded import gathered_around
from .turns import in_one_thread
from .weights import Weights

__all__ = ["Together"]

_REENTRANT = (
    "the forward runs inside an autograd function (activation checkpointing with use_reentrant=True, or a library's "
    "own), which cuts the graphs of the micro-batches apart; pass use_reentrant=False"
)


@dataclass(frozen=True, slots=True)
class _Brought:
    """A call of a norm in one micro-batch, and what its thread knows of it."""

    call: NormCall
    number: int
    recorded: bool
    repeated: bool


class Together:
    """The forwards of all micro-batches side by side, with what their backward needs.

    Args:
        model: whose batch norms are to see one batch.
        parts: how many micro-batches.
        updates: takes what the running statistics are to be moved by.
    """

    def __init__(self, model: nn.Module, parts: int, updates: Updates) -> None:
        self.layers = pooled_norms(model, exactly=True)
        self._model, self._state = model, ModuleState(model, parts)
        turns = in_one_thread()
        self._lineage = Lineage(parts, turns.ordered)
        self._together = Lockstep(parts, self._combine, self._missed, turns, self)
        self._updates = updates
        self._gathered = gathered_around(model, self.layers)
        self._calls = [0] * parts
        self._advancing = False

    def answered(self) -> Any:
        """Let the norms' calls come here, inside: in the forwards and in the backward."""
        return answered(self.layers, self._answer)

    def run(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        """Return the losses of all micro-batches."""
        self._advancing = True
        self._state.begin()
        self._lineage.begin()
        self._weights = Weights(self._model)

        enter = strangers.inside(self._model)

        def checked(part: int) -> Tensor:
            enter()
            value = work(part)
            self._weights.check(part, "at its end")
            self._lineage.check(part, (value,))
            return value

        try:
            with strangers.refused():
                return self._together.run(checked, apart=True)
        finally:
            self._state.end()
            self._lineage.begin()
            self._advancing = False

    def take_off(self, part: int) -> None:
        """Keep what a part has for itself, as it begins to wait."""
        self._state.take_off(part)

    def put_on(self, part: int) -> None:
        """Give a part what it has for itself, as it goes on."""
        self._state.put_on(part)
        self._lineage.turn(part)

    def _answer(self, call: NormCall) -> Tensor:
        part = self._together.part()
        if in_backward():
            return self._answer_in_backward(call)
        if part is None:
            said = f"{call} was called in a thread that is no micro-batch's"
            raise ArgumentError(f"accumulate: {said}; loss must compute in the thread that it is called in")
        if not call.uses_batch:
            return call.ordinary()
        recorded = torch.is_grad_enabled()
        if is_inside_function():
            raise ArgumentError(f"accumulate: {call}: {_REENTRANT}")
        self._weights.check(part, f"before {call}")
        self._lineage.check(part, (call.input, call.residual, call.weight, call.bias))
        self._calls[part] += 1
        y: Tensor = self._together.meet(_Brought(call, self._calls[part], recorded, recorded and may_be_repeated()))
        if call.layer in self._gathered:
            self._gathered[call.layer].check(call)
        return y

    def _answer_in_backward(self, call: NormCall) -> Tensor:
        if not is_repeated() or not call.uses_batch:
            return call.ordinary()
        if repeats_function():
            raise ArgumentError(f"accumulate: {call}: {_REENTRANT}")
        layer, x = call.layer, call.input
        mean, var, count = local_statistics(x)
        settings = SyncCall(None, layer.eps, call.activation, str(call), -1.0)
        pool = first_pool(layer, mean, var, settings, layer) if count else Pool(mean, var, 2, True, settings)
        # In its first run the node that normalizes all micro-batches was made outside the checkpoint, and kept nothing
        # there. What comes after the norm must see that a gradient is recorded, as it did then.
        with torch.no_grad():
            y = apply_pooled(x, layer.weight, layer.bias, call.residual, pool)
        return y.requires_grad_(is_recorded(x, layer.weight, layer.bias, call.residual))

    def _combine(self, brought: list[_Brought]) -> list[Tensor]:
        calls, first = [each.call for each in brought], brought[0]
        self._check_alike(brought)
        layer = first.call.layer
        with self._state.seen_by(0), torch.set_grad_enabled(first.recorded):
            pool = pool_calls(calls, [each.repeated for each in brought])
            pool = replace(pool, check_backward=self._check_backward)
            outputs = self._normalize(calls, pool)
            if first.call.tracks:
                self._updates.add(layer, first.call.running, pool.mean, pool.stored(stores_unbiased(layer)), pool.count)
        return list(outputs)

    def _normalize(self, calls: list[NormCall], pool: Pool) -> Sequence[Tensor]:
        """Normalize all micro-batches in one node, but for weights and biases that each of them brought for itself."""
        first, inputs, residuals = calls[0], [call.input for call in calls], [call.residual for call in calls]
        if all(call.weight is first.weight and call.bias is first.bias for call in calls):
            outputs = normalize_pooled(inputs, first.weight, first.bias, residuals, pool)
            self._lineage.join(outputs)
            return outputs
        bare = replace(pool, call=replace(pool.call, activation=None))
        outputs = normalize_pooled(inputs, None, None, [None] * len(calls), bare)
        self._lineage.join(outputs)
        scaled = []
        for part, (y, call) in enumerate(zip(outputs, calls, strict=True)):
            self._lineage.turn(part)
            scaled.append(_scaled(y, call))
        return scaled

    def _check_alike(self, brought: list[_Brought]) -> None:
        def kind(each: _Brought) -> tuple[object, ...]:
            call = each.call
            residual = call.residual is not None
            return id(call.layer), call.training, call.activation, residual, call.input.dtype, each.recorded

        if len({kind(each) for each in brought}) > 1:
            words = ("recorded" if each.recorded else "not recorded" for each in brought)
            each = "; ".join(
                f"micro-batch {place}: {one.call}, {one.call.input.dtype}, {said}, call {one.number}"
                for place, (one, said) in enumerate(zip(brought, words, strict=True))
            )
            raise ArgumentError(
                "accumulate: the micro-batches called their norms otherwise, as where a branch hangs on the data or on "
                f"a random number, and are no one batch. {each}"
            )

    def _missed(self, brought: list[_Brought | None]) -> ArgumentError:
        ended = ", ".join(str(place) for place, each in enumerate(brought) if each is None)
        waiting = next(each for each in brought if each is not None)
        return ArgumentError(
            f"accumulate: micro-batch {ended} came to its end without call {waiting.number} of a norm, of "
            f"{waiting.call}, in which others wait: a branch hangs on the data, and the micro-batches are no one batch"
        )

    def _check_backward(self) -> None:
        if self._advancing:
            raise ArgumentError(
                "accumulate: a gradient is computed inside loss, through a batch norm, while the other micro-batches "
                "are not there yet: it would not be the large batch's. Leave gradient penalties to a large batch, or "
                'use kind="statistics"'
            )


def _scaled(y: Tensor, call: NormCall) -> Tensor:
    shape = channel_shape(y.dim(), y.shape[1])
    if call.weight is not None:
        y = y * call.weight.reshape(shape)
    if call.bias is not None:
        y = y + call.bias.reshape(shape)
    if call.residual is not None:
        y = y + call.residual
    return plain.activate(y, call.activation).to(call.input.dtype)
