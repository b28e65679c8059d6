"""Models that are programs or wrappers and not what somebody wrote: told, or looked into."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from ..errors import ArgumentError

__all__ = ["eagerly", "refuse_lazy", "refuse_meta", "refuse_programs", "unwrapped"]

_INSTEAD = "give the torch.nn.Module that it was made from, and make the program again from the result"


def refuse_programs(model: Any) -> None:
    """Refuse what has no layers that can be read: it would be said to have none.

    Raises:
        ArgumentError: a ScriptModule, or a model that holds one with a batch norm in it; an exported program, or the
            module of one; or no module at all. The words say what to give instead.

    >>> refuse_programs(nn.BatchNorm1d(2))
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, torch.export.ExportedProgram):
            raise ArgumentError(f"the model is an exported program, whose layers have become operators; {_INSTEAD}")
        raise ArgumentError(f"the model is of type {type(model).__name__}; a torch.nn.Module is needed")
    for path, module in model.named_modules():
        where = f"{path} in the model" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            if path and not _scripted_norm(module):
                continue
            raise ArgumentError(
                f"{where} is a ScriptModule (torch.jit.script or torch.jit.trace), whose layers cannot be read or "
                f"changed; {_INSTEAD}"
            )
        if isinstance(module, fx.GraphModule) and _calls_batch_norm(module):
            raise ArgumentError(
                f"{where} is an exported program's module, whose batch norms have become operators; {_INSTEAD}"
            )


def refuse_meta(model: nn.Module) -> None:
    """Refuse a model of which only the shapes are there.

    Raises:
        ArgumentError: a parameter or buffer is on the meta device.

    >>> refuse_meta(nn.BatchNorm1d(2))
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ArgumentError(
                f"{name} is on the meta device and holds no values; give the model memory and weights first: "
                "model.to_empty(device='cpu'), then model.load_state_dict(...)"
            )


def refuse_lazy(model: nn.Module, caller: str, call: str = "model(batch)") -> None:
    """Refuse a model of which no shapes are known yet.

    Raises:
        ArgumentError: a layer waits for its first batch.

    >>> refuse_lazy(nn.BatchNorm1d(2), "watch")
    """
    for path, module in model.named_modules():
        if any(map(is_lazy, chain(module.parameters(recurse=False), module.buffers(recurse=False)))):
            raise ArgumentError(
                f"{caller}: {path or type(module).__name__} is lazy and has not seen a batch; call {call} once before"
            )


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Run parts of a model that ``torch.compile`` wraps as the code that they were, inside."""
    if not any(isinstance(getattr(part, "_orig_mod", None), nn.Module) for part in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _scripted_norm(module: nn.Module) -> bool:
    """Say whether a scripted module is or holds a normalization."""
    return any("Norm" in str(getattr(inner, "original_name", "")) for inner in module.modules())


def _calls_batch_norm(module: fx.GraphModule) -> bool:
    """Say whether a graph normalizes by torch's operators, as torch.export leaves them."""
    return any(
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and "batch_norm" in str(node.target)
        for node in module.graph.nodes
    )


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the model inside torch.compile's, DataParallel's and DistributedDataParallel's wrapping, and words for it.

    Raises:
        ArgumentError: the model is sharded over processes (FSDP): no process has its whole layers.

    >>> inner = nn.BatchNorm1d(2)
    >>> unwrapped(nn.DataParallel(inner))[0] is inner, unwrapped(inner)[1]
    (True, '')
    """
    words = []
    while True:
        name = type(model).__name__
        if name == "FullyShardedDataParallel":
            raise ArgumentError(
                "the model is sharded by FullyShardedDataParallel, so that no process has its whole layers; "
                "work on the model before it is wrapped"
            )
        inner = getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            words.append("torch.compile")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
            words.append(name)
        else:
            break
        model = inner
    again = " and ".join(reversed(words))
    return model, f"the model inside {again} was taken; wrap the result again" if words else ""
