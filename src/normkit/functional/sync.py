"""Batch normalization whose statistics are those of all ranks of a process group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..errors import ArgumentError, NormkitError, StatisticsError
from ..kernels.dispatch import Activation
from ..kernels.plain import channels as plain
from ..kernels.repeated import in_backward, is_repeated, may_be_repeated
from . import checks
from .agreement import DTYPES, FORWARD, SyncCall, bring, check_heads, enter
from .averages import Average, Variance, check_law, update_statistics
from .batch import batch_norm, check_arguments
from .exchange import Exchange, exchange_of, fingerprint, merge_moments
from .first_runs import find_first_run, keep_first_run
from .ghost import check_ghost_size, check_parts, ghost_batch_norm
from .inplace import is_recorded
from .masked import check_mask, over_valid
from .pooled import Pool, check_total, local_statistics, merge_parts, normalize_pooled
from .transforms import is_forward_mode

__all__ = ["channels_of", "check_part", "first_pool", "keep_pool", "pool_of_ranks", "sync_batch_norm"]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    unbiased: bool = True,
    num_batches_tracked: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    process_group: Any = None,
    timeout: float | None = None,
    average: Average = "moving",
    variance: Variance = "batch",
    mask: Tensor | None = None,
    ghost_size: int | None = None,
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize each channel over the batches of all ranks together, as if they were one batch.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, then ``activation(y + residual)`` where they are given

    mean and var are those of all values of the channel on all ranks. x and y are ``(N, C, *)``, N and the positions of
    each rank its own, N of 0 included; mean, var, weight and bias are ``(C,)``.

    Conventions:
        As for :func:`normkit.functional.batch_norm`, m the values per channel of all ranks. Without a process group, or
        with one rank, it is that function; in evaluation too, where nothing is exchanged.
        Exchange: one ``all_gather`` of ``2 * C + 10`` float64 in the forward (count, mean, sum of squares) and one in
        the backward (the two sums), merged neighbours first, in rank order: the same bits on every rank. Before a
        layer's first call two more, of 512 bytes and of 10 numbers, in which the ranks see that they mean the same
        layer, and one more wherever the order of the calls is a new one; with ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` before
        every call. So ranks that call different layers get an error, whatever the layers' sizes. Of equal settings they
        are told apart by their names in the model that holds them, as in ``state_dict``, from the first call on. What
        that leaves open (layers that no module holds, those of one name in two models) is known in a first call by the
        order in which each rank calls them.
        Gradients of weight and bias are those of this rank's samples, which data parallelism adds up; dx is that of the
        sum of all ranks' losses.
        A forward that a backward runs again (activation checkpointing) exchanges nothing: the first run's statistics
        are kept for it.
        Masked: m counts the valid positions of all ranks; the others become 0, and neither the activation nor the
        residual changes that. Nothing else is exchanged than without a mask.
        Ghost batches: each rank cuts its own batch as :func:`ghost_batch_norm` does, and each part is normalized by
        itself, so that neither the outputs nor the backward need the other ranks. What the ranks share are the running
        statistics, those of the batches of all ranks, for one exchange in the forward and none in the backward. Where
        ``ghost_size`` divides every rank's batch, that is the ghost normalization of one process that holds them all.
        Parts larger than a rank's batch are groups of ranks: without ``ghost_size``, by ``process_group``.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64.
        running_mean: ``(C,)``, updated in training, used otherwise; None for neither.
        running_var: ``(C,)``, likewise.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: normalize with the statistics of all ranks and update the running ones; otherwise by the running ones.
        momentum: the weight of the new batch, from 0 to 1; None for the plain average of all batches.
        eps: positive in training, not negative otherwise.
        unbiased: store the unbiased variance.
        num_batches_tracked: an int64 counter, advanced by one with each update.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01) or "silu", applied last.
        residual: of the shape and type of the input, added before the activation.
        process_group: of ``torch.distributed``, or a ``DeviceMesh`` of one dimension; None for all processes.
        timeout: seconds to wait for the other ranks in one call; None for the group's own.
        average: as for ``batch_norm``.
        variance: likewise, of all ranks.
        mask: boolean, ``(N, *)``, True for valid positions, as for ``masked_batch_norm``; a rank may have none.
        ghost_size: the largest part of a rank's batch that is normalized by itself; None for the batch of all ranks.
            Not together with a mask.
        caller: the layer that errors should name, and by which the ranks know which layer is called.

    Returns:
        y, in the type and memory format of the input.

    Raises:
        SyncError: the ranks called other layers, in other settings, types or modes, or one failed, or did not come.
        ShapeError: as for ``batch_norm``; one value per channel on all ranks together, or in a part; a mask of another
            shape.
        DtypeError: as for ``batch_norm``; a mask that is not boolean.
        StatisticsError: as for ``batch_norm``.
        ArgumentError: as for ``batch_norm``; a process group without this rank, one that was destroyed, or what is
            none; a transform of ``torch.func``, a derivative in forward mode, or ``torch.jit.trace``.

    Whenever it raises, on every rank that raises the running statistics are as they were.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> sync_batch_norm(x, None, None, training=True, eps=1e-12)
        tensor([[-1., -1.],
                [ 1.,  1.]])

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1 and section 3, over all ranks.
        Peng et al., MegDet, 2018, arXiv:1711.07240, section 3.2, for the exchange between devices.
    """
    if training and torch.compiler.is_compiling():
        # What the disabled function computes is run as it stands; the graph ends before it.
        given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        y: Tensor = _outside_graph(
            *given,
            unbiased=unbiased,
            num_batches_tracked=num_batches_tracked,
            activation=activation,
            residual=residual,
            process_group=process_group,
            timeout=timeout,
            average=average,
            variance=variance,
            mask=mask,
            ghost_size=ghost_size,
            caller=caller,
        )
        return y
    exchange = exchange_of(process_group, timeout) if training else None
    running, law = (running_mean, running_var, num_batches_tracked), (momentum, average, variance)
    settings = _Settings(running, weight, bias, law, eps, unbiased, activation, ghost_size, caller)
    refused = None if mask is None else _refusal(input, mask, residual, settings)
    if exchange is None and refused is not None:
        raise refused
    if exchange is None and mask is not None and not training:
        # Not by rows, whose number a graph would have to know.
        invalid = ~mask.unsqueeze(1)
        return _alone(input.masked_fill(invalid, 0), residual, False, settings).masked_fill(invalid, 0)

    def normalize(x: Tensor, beside: Tensor | None) -> Tensor:
        if exchange is None:
            return _alone(x, beside, training, settings)
        return _together(x, beside, exchange, settings, refused)

    if mask is None or refused is not None:
        return normalize(input, residual)
    return over_valid(input, mask, residual, normalize)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a call was given beside its input, residual and mask."""

    running: tuple[Tensor | None, Tensor | None, Tensor | None]
    weight: Tensor | None
    bias: Tensor | None
    law: tuple[float | None, Average, Variance]
    eps: float
    unbiased: bool
    activation: Activation | None
    ghost_size: int | None
    caller: nn.Module | None


def _refusal(input: Tensor, mask: Tensor, residual: Tensor | None, settings: _Settings) -> Exception | None:
    """Return what is wrong with a mask, which the other ranks have to be told of before it is raised."""
    try:
        if settings.ghost_size is not None:
            said = "a mask and a ghost_size were both given, and there are no ghost batches of valid positions"
            checks.refuse(ArgumentError, f"{said}; pass one of them", settings.caller)
        checks.check_input(input, settings.caller)
        check_mask(mask, input, settings.caller)
        checks.check_fusion(input, settings.activation, residual, settings.caller)
    except NormkitError as error:
        return error
    return None


def _alone(input: Tensor, residual: Tensor | None, training: bool, settings: _Settings) -> Tensor:
    """Normalize with the batch of this process, or with the running statistics."""
    (mean, var, counter), caller = settings.running, settings.caller
    if isinstance(input, Tensor) and input.dim() >= 2:
        checks.check_channels(input, channels_of(input, mean, settings.weight, settings.bias, caller), caller)
    momentum, average, variance = settings.law
    given: dict[str, Any] = {
        "unbiased": settings.unbiased,
        "num_batches_tracked": counter,
        "average": average,
        "variance": variance,
        "caller": caller,
    }
    first = (input, mean, var, settings.weight, settings.bias, training, momentum, settings.eps)
    if settings.ghost_size is None or not training:
        return batch_norm(*first, activation=settings.activation, residual=residual, **given)
    checks.check_fusion(input, settings.activation, residual, caller)
    y = ghost_batch_norm(*first, ghost_size=settings.ghost_size, **given)
    return plain.activate(y if residual is None else y + residual, settings.activation)


def _together(
    input: Tensor, residual: Tensor | None, exchange: Exchange, settings: _Settings, refused: Exception | None
) -> Tensor:
    """Normalize with the batches of all ranks; ``refused`` is raised once the others know of it."""
    (mean, var, counter), caller = settings.running, settings.caller
    weight, bias, eps, activation = settings.weight, settings.bias, settings.eps, settings.activation
    (momentum, average, variance), ghost_size = settings.law, settings.ghost_size

    def check() -> None:
        _check_followable(caller)
        if refused is not None:
            raise refused
        check_law(average, variance, momentum, mean is not None, counter, caller)
        given = (mean, var, weight, bias, True, momentum, eps, counter, caller)
        check_part(input, residual, channels, activation, given)
        if ghost_size is not None:
            check_ghost_size(ghost_size, caller)
            if input.numel():
                check_parts(input, ghost_size, caller)

    def normalize_parts() -> Tensor:
        """Normalize ghost batches, of which nothing has to be known elsewhere."""
        assert ghost_size is not None
        y = ghost_batch_norm(input, None, None, weight, bias, True, 0.0, eps, ghost_size=ghost_size, caller=caller)
        return plain.activate(y if residual is None else y + residual, activation)

    channels = channels_of(input, mean, weight, bias, caller)
    key, again = caller if caller is not None else mean, in_backward() and is_repeated()
    if ghost_size is not None and (again or mean is None):
        check()
        return normalize_parts()
    if again:
        check()
        own_mean, own_var, count = local_statistics(input)
        if count and key is None:
            said = "a backward runs this forward again, and a call without a layer or running statistics is not known"
            checks.refuse(StatisticsError, f"{said} again; pass caller=, or leave it out of the checkpoint", caller)
        call = SyncCall(exchange, eps, activation, _words(caller), -1.0)
        # What an empty batch is normalized with does not matter.
        pool = Pool(own_mean, own_var, 2, True, call)
        if count:
            assert key is not None
            pool = first_pool(key, own_mean, own_var, call, caller)
        return normalize_pooled((input,), weight, bias, (residual,), pool)[0]
    device = input.device if isinstance(input, Tensor) else torch.device("cpu")
    shared: tuple[object, ...] = (momentum, eps, settings.unbiased, average, variance)
    shared = (*shared, mean is None, weight is None, bias is None)
    recorded = is_recorded(input, weight, bias, residual)
    if ghost_size is not None:
        # Ghost batches bring nothing in the backward, which some ranks may do without.
        shared, recorded = (*shared, ghost_size), False
    own, pool = pool_of_ranks((input,), check, recorded, exchange, eps, activation, shared, channels, device, caller)
    if pool.count == 0:
        return plain.activate(plain.pass_empty(input, weight, bias), activation)
    if ghost_size is not None:
        y = normalize_parts()
    else:
        if key is not None and may_be_repeated():
            keep_pool(key, own, pool)
        y = normalize_pooled((input,), weight, bias, (residual,), pool)[0]
    if mean is not None and var is not None:
        stored = pool.stored(settings.unbiased and variance == "batch")
        update_statistics(mean, var, counter, pool.mean, stored, momentum, average, variance)
    return y


# torch.compiler.disable imports dynamo where it stands, this when a graph is compiled.
_outside_graph: Any = _disable_dynamo(sync_batch_norm)


def check_part(
    x: Tensor, residual: Tensor | None, channels: int, activation: Activation | None, given: tuple[Any, ...]
) -> None:
    """Refuse what ``sync_batch_norm`` says it refuses of one input; ``given`` are the arguments behind it."""
    caller = given[-1]
    checks.check_input(x, caller)
    if x.dim() >= 2:
        checks.check_channels(x, channels, caller)
    check_arguments(x, *given, pooled=True)
    checks.check_fusion(x, activation, residual, caller)


def pool_of_ranks(
    inputs: Sequence[Tensor],
    check: Callable[[], None],
    recorded: bool,
    exchange: Exchange,
    eps: float,
    activation: Activation | None,
    settings: tuple[object, ...],
    channels: int,
    device: torch.device,
    caller: nn.Module | None,
) -> tuple[list[tuple[Tensor, Tensor, int]], Pool]:
    """Return the statistics of each input, and those of all inputs of all ranks together.

    Args:
        inputs: this rank's.
        check: refuses them; what it raises the other ranks are told of, so that none waits.
        recorded: whether a gradient is recorded.
        exchange: the ranks.
        eps: of the call.
        activation: of the call.
        settings: what else the ranks must have in common.
        channels: C.
        device: where the inputs are.
        caller: the layer.

    Raises:
        SyncError: as for `sync_batch_norm`.
        ShapeError: one value per channel on all ranks together.
    """
    words = _words(caller)
    number = enter(exchange, caller, words, _settings(caller), device)
    call = SyncCall(exchange, eps, activation, words, float(number))
    refused: Exception | None = None
    header: dict[str, Any] = {"settings": fingerprint(*settings), "recorded": recorded}
    local: tuple[Tensor, ...] = (torch.zeros(2 * channels, dtype=torch.float64, device=device),)
    own: list[tuple[Tensor, Tensor, int]] = []
    try:
        check()
        own = [local_statistics(x) for x in inputs]
        mean, var, count = merge_parts(own)
        local = (mean, var * count)
        wanted = recorded and any(x.requires_grad for x in inputs)
        header |= {"dtype": DTYPES.index(inputs[0].dtype), "count": count, "differentiated": wanted}
    except Exception as error:
        # The others are told, so that none waits.
        refused = error
        header["failed"] = True
    heads, rows = bring(call, FORWARD, header, local)
    if refused is not None:
        raise refused
    check_heads(heads, call)
    counts = heads["count"]
    total = int(sum(counts))
    check_total(total, "ranks", caller)
    merged, squares = merge_moments(rows.new_tensor(counts), rows[:, :channels], rows[:, channels:])
    return own, Pool(merged, squares / max(total, 1), total, any(heads["differentiated"]), call)


def keep_pool(key: Tensor | nn.Module, own: Sequence[tuple[Tensor, Tensor, int]], pool: Pool) -> None:
    """Keep for the backward that runs this forward again what its inputs were normalized with."""
    for mean, var, count in own:
        if count:
            keep_first_run(key, mean, var, (pool.mean, pool.var, torch.tensor(pool.count)))


def first_pool(key: Tensor | nn.Module, mean: Tensor, var: Tensor, call: SyncCall, caller: nn.Module | None) -> Pool:
    """Return what an input with this mean and variance was normalized with in its first run.

    Raises:
        StatisticsError: as for `find_first_run`.
    """
    mean, var, values = find_first_run(key, mean, var, call.eps, caller)
    return Pool(mean, var, int(values), True, call)


def channels_of(
    x: Tensor, running_mean: Tensor | None, weight: Tensor | None, bias: Tensor | None, caller: nn.Module | None
) -> int:
    """Return the number of channels that all ranks reckon with, whatever this rank's input is."""
    known = [len(value) for value in (running_mean, weight, bias) if value is not None and value.dim() == 1]
    if not known and isinstance(getattr(caller, "num_features", None), int):
        known = [int(caller.num_features)]  # type: ignore[union-attr, arg-type]
    if not known:
        checks.check_input(x, caller)
        known = [x.shape[1] if x.dim() > 1 else 0]
    return known[0]


def _words(caller: nn.Module | None) -> str:
    return "sync_batch_norm" if caller is None else f"{type(caller).__name__}({_settings(caller).partition(',')[0]})"


def _settings(caller: nn.Module | None) -> str:
    own: Any = getattr(caller, "settings_of_all_ranks", None)
    return "" if caller is None else str(own() if own is not None else caller.extra_repr())


def _check_followable(caller: nn.Module | None) -> None:
    if torch._C._are_functorch_transforms_active() or is_forward_mode():
        said = "statistics over ranks are not computed under torch.func or in forward mode: an exchange has no tangent"
        checks.refuse(ArgumentError, f"{said}; call eval(), or normkit.convert(model, to='batch')", caller)
    if checks.is_tracing():
        said = "torch.jit.trace cannot record an exchange between ranks"
        checks.refuse(ArgumentError, f"{said}; call eval() before, or normkit.convert(model, to='batch')", caller)
