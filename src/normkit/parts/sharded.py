"""Weights that several processes share out (torch's ``fully_shard``), seen from the norms between them."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..anatomy import NormLayer
from ..errors import ArgumentError

__all__ = ["Gathered", "gathered_around"]


class Gathered:
    """The modules around a norm whose weights are gathered for a forward, and whether they still are.

    Args:
        paths: the modules, outermost first.
        places: for each, the modules and names of the parameters that it gathers.
    """

    def __init__(self, paths: Sequence[str], places: Sequence[Sequence[tuple[nn.Module, str]]]) -> None:
        self._paths, self._places = paths, places

    def check(self, call: object) -> None:
        """Refuse to go on behind a norm where another micro-batch's forward has ended and let the weights go.

        Raises:
            ArgumentError: it has.
        """
        shared: Any = sys.modules["torch.distributed.tensor"].DTensor
        for path, places in zip(self._paths, self._places, strict=True):
            if any(isinstance(module._parameters[name], shared) for module, name in places):
                raise ArgumentError(
                    f"accumulate: {path or 'the model'} holds {call} and lets its weights go after each micro-batch's "
                    "forward, while others are inside it; build it by fully_shard(..., reshard_after_forward=False), "
                    "or call its set_reshard_after_forward(False)"
                )


def gathered_around(model: nn.Module, layers: Sequence[NormLayer]) -> Mapping[nn.Module, Gathered]:
    """Return for each norm inside modules of ``fully_shard`` what is gathered around it; nothing for other models."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    sharded = {} if kind is None else {path: each for path, each in model.named_modules() if isinstance(each, kind)}
    found = {}
    for layer in layers if sharded else ():
        around = [path for path in sharded if _is_within(layer.path, path)]
        if around:
            found[layer.module] = Gathered(around, [_own(sharded, path) for path in around])
    return found


def _own(sharded: Mapping[str, nn.Module], path: str) -> list[tuple[nn.Module, str]]:
    """Return the parameters that a module gathers: those inside that no sharded module further inside gathers."""
    inner = [_below(other, path) for other in sharded if other != path and _is_within(other, path)]
    return [
        (module, name)
        for place, module in sharded[path].named_modules()
        if not any(_is_within(place, each) for each in inner)
        for name, value in module._parameters.items()
        if value is not None
    ]


def _is_within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _below(path: str, outer: str) -> str:
    return path[len(outer) + 1 :] if outer else path
