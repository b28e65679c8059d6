"""One step of several micro-batches that is the step of the large batch."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..anatomy import norm_layers
from ..anatomy.programs import refuse_programs
from ..errors import ArgumentError
from ..spelling import alternatives
from .exact import Together
from .offload import Offload, check_offload, offloaded
from .pooled_updates import Apart
from .pooling import Updates
from .shares import micro_batches, shares
from .surroundings import refuse_modes

__all__ = ["accumulate"]

Loss = Callable[[Any, Any], Tensor]


def accumulate(
    model: nn.Module,
    batches: Any,
    loss: Loss,
    *,
    kind: Literal["statistics", "exact"] = "statistics",
    offload: Offload | None = None,
    samples: Callable[[Any], int] | None = None,
) -> Tensor:
    """Take one step's gradients from several micro-batches, with the batch statistics of all of them together.

    With ``n_i`` samples in micro-batch ``i`` and ``N`` in all, to ``.grad`` is added the gradient of::

        sum_i n_i / N * loss(model, batch_i)

    which for the large batch is the gradient of its mean loss. What differs is what batch normalization sees:

    - ``"statistics"``: each micro-batch normalizes by itself, one after another, as in plain accumulation. Running
      statistics move once, by mean and variance of all the micro-batches' values together, where k forwards would move
      them k times. It costs nothing.
    - ``"exact"``: all micro-batches normalize with the statistics of the large batch, and the backward goes through
      them: loss, gradients and running statistics are those of the large batch, to rounding. The micro-batches advance
      together, in turns from one norm to the next (in the caller's thread by ``greenlet``; where that is missing in a
      thread each); each call of a batch norm is one node of autograd over all of them. What a forward changes on the
      model's modules is each micro-batch's own, and the last one's stays. The graphs of all micro-batches
      live until the backward: without ``offload`` they take the memory of the large batch, less what its largest
      operation needs. Activation checkpointing inside goes on working (``use_reentrant=False``).

    Conventions:
        The mean over samples: a batch's samples are the length that its tensors have in common, those of no dimension
            aside. Where lengths differ (tokens beside sentences, weights of classes), ``samples`` says which it is,
            and for lists with an entry for each sample, ``samples=len``.
        Layers: batch norms of torch's and ours, with activation and residual, masked ones, and
        :class:`normkit.SyncBatchNorm`, whose ranks each bring their micro-batches. A layer called several times is
        pooled call by call. Several models go as one: ``nn.ModuleList([D, G])``.
        Statistics that :func:`normkit.hold_statistics` holds do not move.
        DistributedDataParallel averages gradients over ranks: where ranks hold different numbers of samples, ``loss``
            must be the sum over the batch's samples / those of all ranks * the number of ranks.
        DistributedDataParallel sends buffers round in every forward: give every rank equally many micro-batches, or
            build it with ``forward_sync_buffers=False`` (``broadcast_buffers`` in older versions of torch).
        fully_shard gathers weights in every forward and backward: give every rank equally many micro-batches; with
            ``"exact"``, a sharded module that holds a norm keeps its weights until the backward
            (``reshard_after_forward=False``), and is refused otherwise.
        Random numbers: each micro-batch draws its own, the first continues the caller's. A dropout's masks are not
        those that the large batch would have drawn.
        Whatever it raises, gradients and running statistics are as they were.

    Args:
        model: what trains; it is called by ``loss``, as often as that likes.
        batches: the micro-batches of one step, of different sizes if need be: tensors, dicts, lists, tuples,
            dataclasses or other objects that hold tensors. A generator is read to its end before the first forward.
        loss: ``lambda model, batch: ...``, the mean over the batch's samples, a scalar. What it computes besides, such
            as a penalty on weights, is averaged.
        kind: ``"statistics"`` or ``"exact"``.
        offload: where what autograd keeps waits for the backward: ``"cpu"`` for a model on another device, ``"disk"``
            for a file in the system's temporary folder (``TMPDIR`` chooses another), mapped back into memory.
        samples: ``lambda batch: ...``, the number over which ``loss`` takes its mean in this batch (samples, tokens,
            pixels that count); None where the lengths of the tensors tell it.

    Returns:
        The mean loss over all samples, detached.

    Raises:
        ArgumentError: no micro-batch, an empty one or one whose samples cannot be told; a loss that is no scalar, has
            no gradient or reaches no parameter; a layer whose statistics cannot be put together; a compiled or wrapped
            model; with ``"statistics"`` a micro-batch of one value per channel; or, with ``"exact"``, micro-batches
            that call different norms or use what another computed, weights changed in place inside ``loss``, batch
            norms that are no layers of the model, a scripted part that assigns an attribute, a sharded module that lets
            its weights go, reentrant checkpointing, or a gradient through a norm inside ``loss``.
        SyncError: ranks accumulate in other kinds, or by ``"statistics"`` with other numbers of micro-batches.
        ShapeError, DtypeError, StatisticsError: as for the layer.

    Warns:
        UserWarning: another layer changed a buffer in every micro-batch, as spectral normalization does.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
        >>> x, loss = torch.randn(12, 3).double(), lambda model, x: model(x).square().mean()
        >>> together = accumulate(model, x.split([5, 1, 6]), loss, kind="exact")
        >>> gradient, counted = model[0].weight.grad, model[1].num_batches_tracked.item()
        >>> model.zero_grad()
        >>> large = loss(model, x)
        >>> large.backward()
        >>> torch.allclose(together, large), torch.allclose(gradient, model[0].weight.grad), counted
        (True, True, 1)

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3, for the two sums of the backward.
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    if kind not in ("statistics", "exact"):
        raise ArgumentError(f"kind={kind!r}; {alternatives(kind, ('statistics', 'exact'))}")
    _check_order(model, batches, loss)
    _check_loss(loss)
    _check_model(model)
    if kind == "exact":
        _refuse_programs_that_remember(model)
    refuse_modes("accumulate")
    if not torch.is_grad_enabled():
        raise ArgumentError("accumulate: gradients are not recorded here; call it outside torch.no_grad()")
    stays = list(chain(model.parameters(), model.buffers()))
    check_offload(offload, stays)
    parts = micro_batches(batches)
    weights = shares(parts, samples)
    updates, versions = Updates(), _versions(model)

    def part(place: int) -> Tensor:
        return _weighed(loss(model, parts[place]), weights[place], place, model)

    if kind == "exact":
        together = Together(model, len(parts), updates)
        with _gradients_kept(model), together.answered(), offloaded(offload, stays):
            losses = together.run(part)
            mean = torch.stack([one.reshape(()) for one in losses]).sum()
            mean.backward()
    else:
        apart, losses = Apart(model, len(parts), updates), []
        with _gradients_kept(model), apart.answered(), offloaded(offload, stays):
            for place in range(len(parts)):
                apart.begin()
                one = part(place)
                one.backward()
                losses.append(one.detach().reshape(()))
        apart.end()
        mean = torch.stack(losses).sum()
    updates.apply()
    _tell_of_others(model, versions, len(parts))
    return mean.detach()


def _check_order(model: Any, batches: Any, loss: Any) -> None:
    """Refuse the three arguments in another order.

    Raises:
        ArgumentError: each is what another one should be.
    """
    given = {"model": _role(model), "batches": _role(batches), "loss": _role(loss)}
    swapped = [name for name, role in given.items() if name != role]
    if swapped and set(given.values()) == set(given):
        named = " and ".join(filter(None, (", ".join(swapped[:-1]), swapped[-1])))
        raise ArgumentError(f"accumulate: {named} are swapped; call accumulate(model, batches, loss)")


def _role(value: Any) -> str:
    """Return which of the three arguments a value can be."""
    if isinstance(value, nn.Module):
        return "model"
    return "loss" if inspect.isroutine(value) or isinstance(value, functools.partial) else "batches"


def _check_loss(loss: Any) -> None:
    """Refuse what cannot be called with a model and a batch.

    Raises:
        ArgumentError: it cannot.
    """
    given = "lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
    if not callable(loss):
        # The words of a list are all the numbers in it.
        came = f"={loss!r} is" if loss is None or isinstance(loss, str) else f" is a {type(loss).__name__}, and"
        raise ArgumentError(f"accumulate: loss{came} no function; give {given}")
    kind = loss if inspect.isroutine(loss) else type(loss)
    if str(getattr(kind, "__module__", "")).startswith(("torch.nn.", "torch._C")):
        raise ArgumentError(
            f"accumulate: loss is torch's {kind.__name__}, which takes an output and a target; give {given}"
        )
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise ArgumentError(
            f"accumulate: loss takes {signature}, and is called as loss(model, batch); give {given}"
        ) from None


def _check_model(model: nn.Module) -> None:
    """Refuse a program, a compiled model, and one that spreads a call over devices by itself.

    Raises:
        ArgumentError: the model is or holds one.
    """
    refuse_programs(model)
    for path, module in model.named_modules():
        words = ""
        if (hasattr(module, "_orig_mod") or module._compiled_call_impl is not None) and norm_layers(module):
            words = "is compiled, and its norms are no calls any more; give the model without torch.compile"
        elif isinstance(module, nn.DataParallel):
            words = "spreads a call over devices in threads of its own; give the model inside"
        elif type(module).__name__ == "FullyShardedDataParallel":
            words = (
                "is sharded by FullyShardedDataParallel, which gathers weights call by call; use torch's fully_shard"
            )
        elif any(is_lazy(value) for value in chain(module.parameters(recurse=False), module.buffers(recurse=False))):
            words = "has not seen its first input; call the model once before"
        if words:
            raise ArgumentError(f"accumulate: {path or 'the model'} {words}")


def _refuse_programs_that_remember(model: nn.Module) -> None:
    """Refuse a scripted part that keeps what it saw: nothing in a program can be each micro-batch's own.

    Raises:
        ArgumentError: there is one.
    """
    for path, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule) and hasattr(module, "forward")
        if scripted and module.inlined_graph.findNode("prim::SetAttr") is not None:
            raise ArgumentError(
                f"accumulate: {path} is a ScriptModule that assigns an attribute in its forward, which all "
                'micro-batches would have in common; give the module that it was made from, or kind="statistics"'
            )


def _weighed(value: object, share: float, place: int, model: nn.Module) -> Tensor:
    """Return a micro-batch's part of the mean loss.

    Raises:
        ArgumentError: its loss is no scalar, or has no gradient.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ArgumentError(
            f"accumulate: the loss of micro-batch {place} is {got}; return the mean over the batch's samples, a scalar"
        )
    if not value.requires_grad:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ArgumentError(
                f"accumulate: the loss of micro-batch {place} has no gradient, and no parameter of the model asks for "
                "one; call model.requires_grad_() for those that are to learn"
            )
        raise ArgumentError(
            f"accumulate: the loss of micro-batch {place} has no gradient; return it as it is, not detached"
        )
    return value * share


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Add to the gradients that there are what is computed inside; where that fails, leave them as they were."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    # DistributedDataParallel may gather the new gradients in the memory of the old ones.
    shared = any(getattr(module, "gradient_as_bucket_view", False) for module in model.modules())
    values = [gradient.clone() if shared and gradient is not None else None for _, gradient in before]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
        # A weight that ranks share out gets its gradient later, where they add up.
        learning = [parameter for parameter, _ in before if parameter.requires_grad]
        if learning and all(type(each) is nn.Parameter and each.grad is None for each in learning):
            raise ArgumentError(
                "accumulate: loss reached no parameter of the model; it is to call the model that it is given, its "
                "first argument"
            )
    except BaseException:
        with torch.no_grad():
            for (parameter, gradient), value in zip(before, values, strict=True):
                parameter.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
        raise
    with torch.no_grad():
        for (parameter, gradient), value in zip(before, values, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None and value is not None:
                gradient.copy_(value.add_(parameter.grad))
            elif parameter.grad is not None:
                gradient.add_(parameter.grad)
            parameter.grad = gradient


def _versions(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    return {name: (buffer, buffer._version) for name, buffer in model.named_buffers() if not buffer.is_inference()}


def _tell_of_others(model: nn.Module, before: dict[str, tuple[Tensor, int]], parts: int) -> None:
    """Warn of buffers that moved and are no running statistics of a batch norm."""
    of_norms = {id(buffer) for layer in norm_layers(model) for buffer in layer.module.buffers(recurse=False)}
    moved = [
        name
        for name, buffer in model.named_buffers()
        if id(buffer) not in of_norms
        and name in before
        and (buffer is not before[name][0] or buffer._version != before[name][1])
    ]
    if moved and parts > 1:
        warnings.warn(
            f"accumulate: {', '.join(moved)} changed in the forwards of {parts} micro-batches, where one large batch "
            "would have changed them once; such a layer (spectral normalization, a codebook) is not exact",
            stacklevel=3,
        )
