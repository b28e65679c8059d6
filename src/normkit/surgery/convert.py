"""Give a model's normalization layers another form, with everything carried over."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..anatomy import Call, NormLayer, norm_layers, preserved
from ..anatomy.frozen import is_frozen
from ..anatomy.select import Where
from ..errors import ArgumentError, SurgeryError
from .convert_classes import KINDS, OURS, TORCHS, dimensions_of, same_family
from .convert_layers import Rebuild, rebuilt
from .freeze import freeze
from .fuse import Fusions
from .fuse import fuse as fuse_activations
from .fused import unfuse
from .observe import Observed, observe
from .record import Exactness, Record, refuse_if_nothing_is_left
from .transaction import copied
from .verify import Judge, second_size

__all__ = ["Conversion", "convert"]


@dataclass(frozen=True, kw_only=True)
class Conversion(Record):
    """The record of :func:`convert`.

    Attributes:
        fused: with ``to="normkit"``, by the path of each batch norm what it computes besides: ``"relu"``, ``"residual
            and relu"``, ...
        unfused: why nothing was fused with the others.
    """

    fused: Mapping[str, str] = field(default_factory=dict)
    unfused: Mapping[str, str] = field(default_factory=dict)


def convert(
    model: nn.Module,
    to: str,
    example: Any = None,
    *,
    where: Where = None,
    groups: int | None = None,
    process_group: Any = None,
    fuse: bool = True,
    call: Call | None = None,
) -> Conversion:
    """Return a copy of a model with other normalization layers in it.

    ======================  ===========  =====================================================================
    ``to``                  exactness    what becomes of a batch norm
    ======================  ===========  =====================================================================
    ``normkit``, ``torch``  exact        our class, or torch's
    ``sync``, ``batch``     exact        ``SyncBatchNorm``, and back to the class that fits the input
    ``frozen``              exact        :func:`normkit.freeze` of the copy: its evaluation function
    ``ghost``, ``renorm``   approximate  the family's layer: evaluation is kept, training is another function
    ``group``               retrain      ``GroupNorm``, by default with 8 channels or more in a group
    ``layer``               retrain      ``GroupNorm`` of one group: layer normalization over channels and space
    ``instance``            retrain      ``InstanceNorm``
    ======================  ===========  =====================================================================

    Between batch norms only the class of the layer object changes, so that parameters, buffers, hooks, settings, mode,
    device, type and a module that stands in several places stay as they are: torch's own conversion to
    ``SyncBatchNorm`` drops hooks, doubles shared modules and forgets what a subclass computes. The other forms get the
    parameters, hooks, mode and eps of the layer they replace. A subclass, a lazy layer and a parametrized one are
    refused.

    With ``to="normkit"`` and an example, a batch norm and the activation after it, or the sum with a shortcut and the
    activation, become one :class:`normkit.BatchNormAct2d` where nobody else sees what is between them. The state keeps
    its names. In a container an empty place stays for the activation; a block whose code does it, as a ResNet's does,
    keeps its object and class and gets a forward written anew from its traced graph, which is refused where a graph
    does not hold all that the code does. The result is compared with the given model in evaluation and in a training
    step, gradients and statistics included. ``to="torch"`` takes it apart again.

    Args:
        model: not changed.
        to: the new form, as above.
        example: one batch; with it the change of the whole model's output is measured on two sizes. Needed where the
            number of dimensions cannot be read off the class, as for ``SyncBatchNorm``.
        where: which layers, as for ``norm_layers``; None takes all that can become the new form.
        groups: the number of groups, for ``group``.
        process_group: for ``sync``; torch's default group if left out.
        fuse: for ``normkit``: False only swaps classes.
        call: ``lambda model, batch: ...``, where the example does not simply go into the model.

    Returns:
        The record, with the new ``model``. Its parameters are new objects, so that it needs a new optimizer.

    Raises:
        ArgumentError: ``to``, ``groups`` or ``where`` is not as above.
        SurgeryError: no layer can be converted, or an exact conversion was measured not to be. The model is as before.

    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    >>> convert(model, "group").model[1].num_groups
    2
    >>> record = convert(model, "normkit", torch.randn(2, 3, 8, 8))
    >>> record.fused, type(record.model[1]).__name__, record.largest_change <= 1e-5
    ({'1': 'relu'}, 'BatchNormAct2d', True)
    >>> convert(record.model, "torch").model[1]
    BatchNorm2d(16, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    if to not in KINDS:
        raise ArgumentError(f"to={to!r}; allowed are {', '.join(KINDS)}")
    if groups is not None and to != "group":
        raise ArgumentError(f"groups={groups} goes with to='group', not with {to!r}")
    with preserved(model):
        work = copied(model)
        job = _Job(model, work, to, where, example, call)
        touched, refused = job.convert(Rebuild(to, groups, process_group))
        fusions = job.fuse() if to == "normkit" and fuse and example is not None else Fusions()
        touched += [path for path in fusions.fused if path not in touched]
        refused = {path: reason for path, reason in refused.items() if path not in fusions.fused}
        refuse_if_nothing_is_left("convert", len(touched), refused)
        change = None if example is None else _measured(model, work, to, example, call)
    return Conversion(
        operation="convert",
        model=work,
        touched=tuple(touched),
        refused=refused,
        largest_change=change,
        measure="" if change is None else "of the output in evaluation, relative to its largest value",
        exactness=_exactness(to),
        notes=_notes(to, fusions, asked=fuse, measured=example is not None),
        fused=fusions.fused,
        unfused=fusions.left,
    )


def _notes(to: str, fusions: Fusions, *, asked: bool, measured: bool) -> tuple[str, ...]:
    """Say what the numbers of a record do not."""
    if KINDS[to] == "retrain":
        return ("the function is another one: train the model again",)
    if to != "normkit" or not asked:
        return ()
    if not measured:
        return ("no activation was fused: a fusion is compared on an example; give example=",)
    sums = sum(words.startswith("residual") for words in fusions.fused.values())
    said = f"{len(fusions.fused)} batch norms compute the activation after them too, {sums} of them also a sum"
    return (said, *(f"not fused {path}: {reason}" for path, reason in fusions.left.items()))


class _Job:
    """One model, its copy, and what the copy is to become."""

    def __init__(
        self, model: nn.Module, work: nn.Module, to: str, where: Where, example: Any, call: Call | None
    ) -> None:
        self.model, self.work, self.to, self.where = model, work, to, where
        self.example, self.call = example, call
        self.chosen = {id(layer.module) for layer in norm_layers(work, where)}
        if to == "torch":
            unfuse(work, self.chosen)

    def convert(self, rebuild: Rebuild) -> tuple[list[str], dict[str, str]]:
        """Convert the layers; return the paths of those that were, and the reasons for the others."""
        observed = None if self.example is None else observe(self.work, self.example, self.call)
        if self.to == "frozen":
            frozen = freeze(self.work, self.where)
            return list(frozen.touched), dict(frozen.refused)
        # By the modules: taking a fusion apart has given them other paths.
        where = None if self.where is None else lambda layer: id(layer.module) in self.chosen
        return _convert_all(self.work, self.to, where, observed, rebuild)

    def fuse(self) -> Fusions:
        """Fuse the chosen norms with what comes after them."""
        layers = [layer for layer in norm_layers(self.work) if id(layer.module) in self.chosen]
        with torch.no_grad():
            other, _ = second_size(self.model, self.example, self.call)
        return fuse_activations(self.model, self.work, layers, [self.example, other], self.call)


def _convert_all(
    work: nn.Module, to: str, where: Where, observed: Observed | None, rebuild: Rebuild
) -> tuple[list[str], dict[str, str]]:
    """Convert every layer that can be, and say of the others why not."""
    touched, refused = [], {}
    for layer in norm_layers(work, where):
        shape = None if observed is None else observed.inputs.get(id(layer.module))
        reason = _reason_against(layer, to, shape)
        if reason is None:
            swaps = to in ("normkit", "torch", "batch", "sync")
            reason = _swap_class(layer, shape, rebuild) if swaps else _replace(work, layer, shape, rebuild)
        if reason is None:
            touched.append(layer.path)
        elif where is not None or isinstance(layer.module, _BatchNorm):
            refused[layer.path] = reason
    return touched, refused


def _reason_against(layer: NormLayer, to: str, shape: tuple[int, ...] | None) -> str | None:
    """Say what in the layer itself stands against any conversion, or return None."""
    module, name = layer.module, type(layer.module).__name__
    if is_frozen(module):
        return "it is frozen; normkit.unfreeze it first"
    if layer.lazy:
        return "it is lazy and has no channels yet; run the model once first"
    if layer.parametrized:
        return "its parameters are computed by a parametrization, which the new layer would not have"
    if not same_family(module):
        if isinstance(module, _BatchNorm):
            return f"{name} is a subclass, and what it adds would be lost"
        return f"a {name} is not one of the batch norms that can become another form"
    if type(module) is _target(to, layer, shape):
        return f"it is a {name} already"
    return None


def _target(to: str, layer: NormLayer, shape: tuple[int, ...] | None) -> type[nn.Module] | None:
    """Return the class that a batch norm gets, or None where that cannot be known."""
    if to == "sync":
        return nn.SyncBatchNorm
    if to == "batch" and type(layer.module) is not nn.SyncBatchNorm:
        return type(layer.module)
    dimensions = dimensions_of(layer.module, shape)
    classes = OURS if to == "normkit" else TORCHS if to in ("torch", "batch") else {}
    return None if dimensions is None else classes.get(dimensions)


def _swap_class(layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> str | None:
    """Give the layer object another class of the family; return why not, if so."""
    module, target = layer.module, _target(rebuild.to, layer, shape)
    if target is None:
        return "its class does not say how many dimensions its input has; give example="
    if not getattr(module, "unbiased", True) and target not in OURS.values():
        return "it stores the biased variance (unbiased=False), which torch's layers cannot"
    if target is nn.SyncBatchNorm:
        reason = _against_sync(module)
        if reason is not None:
            return reason
    vars(module).pop("unbiased", None)
    vars(module).pop("process_group", None)
    module.__class__ = target
    if isinstance(module, nn.SyncBatchNorm):
        module.process_group = rebuild.process_group
    return None


def _against_sync(module: nn.Module) -> str | None:
    """Say why a layer cannot be synchronized where it is."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    if any(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return "it is on the CPU, where torch's SyncBatchNorm refuses to run with more than one process"
    return None


def _replace(work: nn.Module, layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> str | None:
    """Put a newly built layer in the place of another, under all its names; return why not, if so."""
    new = rebuilt(layer, shape, rebuild)
    if isinstance(new, str):
        return new
    for name in layer.names:
        if name == "":
            return "it is the model itself, which cannot be replaced in itself; put it into a Sequential"
        work.set_submodule(name, new)
    return None


def _measured(model: nn.Module, work: nn.Module, to: str, example: Any, call: Call | None) -> float:
    """Measure the change of the output in evaluation, on two sizes; refuse an exact conversion that is not.

    Raises:
        SurgeryError: the function was to be kept and has changed.
    """
    judge = Judge(copied(model).eval(), example, call)
    verdict = judge(copied(work).eval())
    if KINDS[to] == "exact" and verdict.wrong is not None:
        raise SurgeryError(f"convert: to={to!r} should keep the function, and {verdict.wrong.removeprefix('it ')}")
    return verdict.change


def _exactness(to: str) -> Exactness:
    return "exact" if KINDS[to] == "exact" else "approximate" if KINDS[to] == "approximate" else "retrain"
