"""Batch normalization whose statistics are those of all ranks of a process group."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..errors import ArgumentError, StatisticsError
from ..kernels.dispatch import Activation
from ..kernels.plain import channels as plain
from ..kernels.repeated import in_backward, is_repeated, may_be_repeated
from . import checks
from .agreement import DTYPES, FORWARD, SyncCall, bring, check_heads, enter
from .averages import Average, Variance, check_average, update_statistics
from .batch import batch_norm, check_arguments
from .exchange import Exchange, exchange_of, fingerprint, merge_moments
from .first_runs import find_first_run, keep_first_run
from .inplace import is_recorded
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
        layer's first call more, of 512 bytes and of 10 numbers, in which the ranks see that they mean the same layer,
        and one more wherever the order of the calls is a new one; with ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` before every
        call. So ranks that call different layers get an error, whatever the layers' sizes.
        Gradients of weight and bias are those of this rank's samples, which data parallelism adds up; dx is that of the
        sum of all ranks' losses.
        A forward that a backward runs again (activation checkpointing) exchanges nothing: the first run's statistics
        are kept for it.

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
        process_group: of ``torch.distributed``; None for all processes.
        timeout: seconds to wait for the other ranks in one call; None for the group's own.
        average: as for ``batch_norm``.
        variance: likewise, of all ranks.
        caller: the layer that errors should name, and by which the ranks know which layer is called.

    Returns:
        y, in the type and memory format of the input.

    Raises:
        SyncError: the ranks called other layers, in other settings, types or modes, or one failed, or did not come.
        ShapeError: as for ``batch_norm``; one value per channel on all ranks together.
        DtypeError: as for ``batch_norm``.
        StatisticsError: as for ``batch_norm``.
        ArgumentError: as for ``batch_norm``; a process group without this rank; a transform of ``torch.func``, a
            derivative in forward mode, or ``torch.jit.trace``.

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
            caller=caller,
        )
        return y
    exchange = exchange_of(process_group, timeout) if training else None
    if exchange is None:
        if isinstance(input, Tensor) and input.dim() >= 2:
            checks.check_channels(input, channels_of(input, running_mean, weight, bias, caller), caller)
        return batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            unbiased=unbiased,
            num_batches_tracked=num_batches_tracked,
            activation=activation,
            residual=residual,
            average=average,
            variance=variance,
            caller=caller,
        )

    def check() -> None:
        _check_followable(caller)
        check_average(average, variance, momentum, caller)
        given = (running_mean, running_var, weight, bias, True, momentum, eps, num_batches_tracked, caller)
        check_part(input, residual, channels, activation, given)

    channels = channels_of(input, running_mean, weight, bias, caller)
    key = caller if caller is not None else running_mean
    if in_backward() and is_repeated():
        check()
        mean, var, count = local_statistics(input)
        if count and key is None:
            said = "a backward runs this forward again, and a call without a layer or running statistics is not known"
            checks.refuse(StatisticsError, f"{said} again; pass caller=, or leave it out of the checkpoint", caller)
        call = SyncCall(exchange, eps, activation, _words(caller), -1.0)
        # What an empty batch is normalized with does not matter.
        pool = Pool(mean, var, 2, True, call)
        if count:
            assert key is not None
            pool = first_pool(key, mean, var, call, caller)
        return normalize_pooled((input,), weight, bias, (residual,), pool)[0]
    device = input.device if isinstance(input, Tensor) else torch.device("cpu")
    settings = (momentum, eps, unbiased, average, variance, running_mean is None, weight is None, bias is None)
    recorded = is_recorded(input, weight, bias, residual)
    own, pool = pool_of_ranks((input,), check, recorded, exchange, eps, activation, settings, channels, device, caller)
    if pool.count == 0:
        return plain.activate(plain.pass_empty(input, weight, bias), activation)
    if key is not None and may_be_repeated():
        keep_pool(key, own, pool)
    y = normalize_pooled((input,), weight, bias, (residual,), pool)[0]
    if running_mean is not None and running_var is not None:
        stored = pool.stored(unbiased and variance == "batch")
        law = (momentum, average, variance)
        update_statistics(running_mean, running_var, num_batches_tracked, pool.mean, stored, *law)
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
    return "" if caller is None else caller.extra_repr()


def _check_followable(caller: nn.Module | None) -> None:
    if torch._C._are_functorch_transforms_active() or is_forward_mode():
        said = "statistics over ranks are not computed under torch.func or in forward mode: an exchange has no tangent"
        checks.refuse(ArgumentError, f"{said}; call eval(), or normkit.convert(model, to='batch')", caller)
    if checks.is_tracing():
        said = "torch.jit.trace cannot record an exchange between ranks"
        checks.refuse(ArgumentError, f"{said}; call eval() before, or normkit.convert(model, to='batch')", caller)
