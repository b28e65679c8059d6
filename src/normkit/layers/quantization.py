"""How torch.ao quantizes our layers: as torch's, whose form each takes for it.

torch.ao looks layers up by their exact type. Eager mode reads two tables that list every type it can fuse or convert:
our classes are entered there as rows of their own, and no row of another class changes. Its tracer for graph mode is
handed torch's form of the layer as a node (see `tracing`), so that all of graph mode is torch's own.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ArgumentError
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .batch_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNormAct
from .group import GroupNorm
from .instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer import LayerNorm, SampleLayerNorm
from .tracing import check_quantizable, torch_form

__all__ = ["enter_tables"]

_BATCH: dict[type[nn.Module], type[nn.Module]] = {
    BatchNorm1d: nn.BatchNorm1d,
    BatchNorm2d: nn.BatchNorm2d,
    BatchNorm3d: nn.BatchNorm3d,
}
_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BatchNormAct1d: nn.BatchNorm1d,
    BatchNormAct2d: nn.BatchNorm2d,
    BatchNormAct3d: nn.BatchNorm3d,
}
_CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    BatchNorm2d: nn.BatchNorm2d,
    BatchNorm3d: nn.BatchNorm3d,
    GroupNorm: nn.GroupNorm,
    SampleLayerNorm: nn.GroupNorm,
    LayerNorm: nn.LayerNorm,
    InstanceNorm1d: nn.InstanceNorm1d,
    InstanceNorm2d: nn.InstanceNorm2d,
    InstanceNorm3d: nn.InstanceNorm3d,
}

Fuse = Callable[..., nn.Module]


def enter_tables() -> None:
    """Enter our classes in torch.ao's tables of types that it fuses and converts, where torch.ao is loaded."""
    fusing = _table("fuser_method_mappings", "_DEFAULT_OP_LIST_TO_FUSER_METHOD")
    for types, fuse in list(fusing.items()):
        for ours, theirs in _BATCH.items():
            if theirs in types:
                fusing.setdefault(tuple(ours if kind is theirs else kind for kind in types), _fusing(fuse))
        for ours, theirs in _FUSED.items():
            if types[-2:] == (theirs, nn.ReLU):
                fusing.setdefault((*types[:-2], ours), _fusing_activation(fuse, fusing.get(types[:-1])))
    converting = _table("quantization_mappings", "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS")
    for ours, theirs in _CONVERTED.items():
        if theirs in converting:
            converting.setdefault(ours, converting[theirs])


def _table(module: str, name: str) -> dict[Any, Any]:
    table: dict[Any, Any] = getattr(sys.modules.get(f"torch.ao.quantization.{module}"), name, {})
    return table


def _as_torch(layer: nn.Module, is_qat: bool) -> nn.Module:
    """Return torch's form of a batch norm of ours, and any other layer as it is."""
    if type(layer) not in _BATCH:
        return layer
    check_quantizable(layer, learns=is_qat)
    return torch_form(layer)


def _fusing(fuse: Fuse) -> Fuse:
    """Return torch's way of fusing, given torch's form of our layer."""

    def fused(is_qat: bool, *layers: nn.Module) -> nn.Module:
        return fuse(is_qat, *(_as_torch(each, is_qat) for each in layers))

    return fused


def _fusing_activation(with_relu: Fuse, without: Fuse | None) -> Fuse:
    """Return the same for a layer that brings its activation."""

    def fused(is_qat: bool, *layers: nn.Module) -> nn.Module:
        *before, last = layers
        assert isinstance(last, _BatchNormAct)
        if last.activation not in ("relu", None) or (last.activation is None and without is None):
            raise ArgumentError(
                f"torch.ao fuses a batch norm with relu or with nothing behind it, and this layer has "
                f"activation={last.activation!r}; take it apart with normkit.convert(model, to='torch')"
            )
        norm: Any = _as_torch(last.norm, is_qat)
        if last.activation is None:
            assert without is not None
            return without(is_qat, *before, norm)
        return with_relu(is_qat, *before, norm, nn.ReLU().train(last.training))

    return fused
