"""Give a model's normalization layers another form, with everything carried over."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..anatomy import Call, NormForm, NormLayer, norm_layers, preserved, refuse_meta, unwrapped
from ..anatomy.batches import left_out
from ..anatomy.frozen import Frozen, frozen_class, is_frozen, thaw
from ..anatomy.select import Where
from ..anatomy.tails import TAILED, Tailed
from ..errors import ArgumentError, SurgeryError
from ..functional.averages import is_plain_law
from ..functional.exchange import group_of
from ..layers import SyncBatchNorm
from ..layers.laws import law_of
from ..spelling import alternatives
from .convert_check import Before
from .convert_classes import BIASED, KINDS, OURS, SYNCS, TORCHS, Kind, dimensions_of
from .convert_layers import UNKNOWN, Rebuild, carried, held_unseen, put, rebuilt, renamed
from .convert_relatives import APART, is_relative, of_parted, reason_of_relative, swap_relative, was_relative
from .freeze import freeze
from .fuse import Fusions
from .fuse import fuse as fuse_activations
from .fused import unfuse
from .observe import observe
from .record import Model, Record, refuse_if_nothing_is_left
from .sizes import second_size
from .transaction import copied, restored_on_error
from .verify import Compare, Judge, check_judgement

__all__ = ["Conversion", "convert"]

# Kinds of layers that are told of where they are left alone: whoever converts a model means these.
_BATCH_KINDS = ("batch", "sync", "frozen", "unknown")


@dataclass(frozen=True, kw_only=True, repr=False)
class Conversion(Record[Model]):
    """The record of :func:`convert`.

    Attributes:
        fused: with ``to="normkit"``, by the path of each batch norm what it computes besides: ``"relu"``, ``"residual
            and relu"``, ...
        unfused: why nothing was fused with the others.
    """

    fused: Mapping[str, str] = field(default_factory=dict)
    unfused: Mapping[str, str] = field(default_factory=dict)


def convert(
    model: Model,
    to: Kind,
    example: Any = None,
    *,
    where: Where = None,
    groups: int | None = None,
    process_group: Any = None,
    fuse: bool = True,
    call: Call | None = None,
    inplace: bool = False,
    tolerance: float | None = None,
    compare: Compare | None = None,
) -> Conversion[Model]:
    """Return a copy of a model with other normalization layers in it.

    ======================  ===========  =====================================================================
    ``to``                  exactness    what becomes of a batch norm
    ======================  ===========  =====================================================================
    ``normkit``, ``torch``  exact        our class, or torch's; of a synchronized layer the one of a single process
    ``sync``, ``batch``     exact        :class:`normkit.SyncBatchNorm`, and back to the class it was or that fits;
                                         of masked and ghost layers too, whose masks and sizes it keeps
    ``frozen``              exact        :func:`normkit.freeze` of the copy: its evaluation function
    ``ghost``, ``renorm``   approximate  the family's layer: evaluation is kept, training is another function
    ``group``               retrain      ``GroupNorm``, by default with 8 channels or more in a group
    ``layer``               retrain      ``GroupNorm`` of one group: layer normalization over channels and space
    ``instance``            retrain      ``InstanceNorm``
    ======================  ===========  =====================================================================

    Between batch norms only the class of the layer object changes, so that parameters, buffers, hooks, settings, mode,
    device, type and a module that stands in several places stay as they are: torch's own conversion to
    ``SyncBatchNorm`` drops hooks, doubles shared modules and forgets what a subclass computes. The other forms get the
    parameters, hooks, mode and eps of the layer they replace.

    Batch norms of other houses are converted where the data confirm what they compute (:func:`normkit.register_norm`):
    the activation and dropout that timm's or inplace_abn's bring along stay, as children of the same names; a layer
    with its own names for its state gets torch's, momentum turned round where it weighs the old value, and
    ``unbiased=False`` where it stores the biased variance; a frozen layer of a detection library becomes a batch norm
    that :func:`normkit.freeze` holds still. A layer that computes something else, a lazy one and a parametrized one
    are refused.

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
            number of dimensions cannot be read off the class, as for a ``SyncBatchNorm`` that was not converted.
        where: which layers, as for ``norm_layers``; None takes all that can become the new form.
        groups: the number of groups, for ``group``.
        process_group: for ``sync``: the ranks that share statistics, a group of ``torch.distributed`` or a
            ``DeviceMesh`` of one dimension; all of them if left out.
        fuse: for ``normkit``: False only swaps classes.
        call: ``lambda model, batch: ...``, where the example does not simply go into the model.
        inplace: change the given model instead of a copy. Parameters stay the objects that they are, so that an
            optimizer goes on; if anything is refused, the model is bit for bit as before.
        tolerance: the largest change of an exact conversion, relative to the largest output, in float64 and in the
            model's own type; without it 1e-9 where both compute in float64, and ten times the model's own rounding in
            its own type.
        compare: ``lambda first, second: ...``, which returns how far two outputs are from each other, for outputs that
            are sorted or of varying number, as a detector's.

    Returns:
        The record, with the new ``model``. Unless ``inplace``, its parameters are new objects, so that it needs a new
        optimizer. Of a model in torch.compile's, DataParallel's or DistributedDataParallel's wrapping the model inside
        is converted, and ``notes`` says so.

    Raises:
        ArgumentError: ``to``, ``groups``, ``process_group``, ``where`` or ``tolerance`` is not as above, the example
            holds no sample, or the model is a program (a ScriptModule, an exported program).
        SurgeryError: no layer can be converted, an exact conversion was measured not to be, or the model does not run
            with it. The model is as before.

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
        raise ArgumentError(f"to={to!r} is no form of a layer; {alternatives(to, KINDS)}")
    if groups is not None and to != "group":
        raise ArgumentError(f"groups={groups} goes with to='group', not with {to!r}")
    check_judgement(example, tolerance)
    if process_group is not None and to != "sync":
        raise ArgumentError(f"process_group goes with to='sync', not with {to!r}; leave it out")
    process_group = group_of(process_group)
    given, wrapping = unwrapped(model)
    norm_layers(given)  # refuses what is no model to be read
    if example is not None:
        refuse_meta(given)
    before = copied(given) if inplace else given
    work = given if inplace else copied(given)
    guard: AbstractContextManager[Any] = restored_on_error(given) if inplace else preserved(given)
    with guard:
        job = _Job(before, work, to, where, example, call)
        touched, refused = job.convert(Rebuild(to, groups, process_group))
        fusions = job.fuse() if to == "normkit" and fuse and example is not None else Fusions()
        touched += [path for path in fusions.fused if path not in touched]
        refused = {path: reason for path, reason in refused.items() if path not in fusions.fused}
        refuse_if_nothing_is_left("convert", len(touched), refused | job.aside, given, where)
        change, judged = (None, ()) if example is None else _measured(before, work, job, tolerance, compare)
    return Conversion(
        operation="convert",
        model=model if inplace else cast(Model, work),
        touched=tuple(touched),
        refused=refused,
        largest_change=change,
        measure="" if change is None else "of the output in evaluation, relative to its largest value",
        exactness=KINDS[to],
        notes=(
            *_notes(to, fusions, asked=fuse, measured=example is not None),
            *job.renamed,
            *of_parted(job.parted, to),
            *judged,
            *_of_wrapping(wrapping, inplace),
            *(() if example is None else left_out(given, example, call)),
        ),
        example=example,
        called=call is not None,
        fused=fusions.fused,
        unfused=fusions.left,
    )


def _of_wrapping(words: str, inplace: bool) -> tuple[str, ...]:
    """Say of a model in a wrapping what the record's paths and model are."""
    taken = words.partition(";")[0]
    return () if not words else (f"{taken}, in place; paths are those inside",) if inplace else (words,)


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
        self.renamed: list[str] = []
        self.parted: list[str] = []  # layers that were synchronized
        self.aside: dict[str, str] = {}  # why a layer was left that nobody asked to be converted
        self.chosen = {id(layer.module) for layer in norm_layers(work, where)}
        if to == "torch":
            unfuse(work, self.chosen)
        self.unseen = held_unseen(work)

    def convert(self, rebuild: Rebuild) -> tuple[list[str], dict[str, str]]:
        """Convert the layers; return the paths of those that were, and the reasons for the others."""
        shapes = {} if self.example is None else observe(self.work, self.example, self.call).inputs
        # By the modules: taking a fusion apart has given them other paths.
        layers = [layer for layer in norm_layers(self.work) if id(layer.module) in self.chosen]
        if self.to == "frozen":
            return self._freeze(layers, shapes, rebuild)
        touched, refused = [], {}
        for layer in layers:
            shape = shapes.get(id(layer.module))
            reason = _reason_against(layer, self.to, shape) or self._converted(layer, shape, rebuild)
            if reason is None:
                touched.append(layer.path)
                self.parted += [layer.path] * (layer.kind == "sync")
            elif self.where is not None or layer.kind in _BATCH_KINDS or (self.to == "sync" and layer.kind in APART):
                refused[layer.path] = reason
            else:
                self.aside[layer.path] = reason
        return touched, refused

    def _freeze(
        self, layers: list[NormLayer], shapes: Mapping[int, tuple[int, ...]], rebuild: Rebuild
    ) -> tuple[list[str], dict[str, str]]:
        """Give frozen layers of other libraries the form of ours, and freeze the rest."""
        foreign = [layer for layer in layers if layer.form is not None and layer.form.frozen]
        touched, refused = [], {}
        for layer in foreign:
            reason = self._converted(layer, shapes.get(id(layer.module)), replace(rebuild, to="torch"))
            if reason is None:
                touched.append(layer.path)
            else:
                refused[layer.path] = reason
        others = {id(layer.module) for layer in layers} - {id(layer.module) for layer in foreign}
        if others or not foreign:
            everything = self.where is None and not foreign
            frozen = freeze(self.work, None if everything else lambda layer: id(layer.module) in others)
            touched, refused = [*touched, *frozen.touched], refused | dict(frozen.refused)
        return touched, refused

    def _converted(self, layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> str | None:
        """Convert one layer, and hold it against what it was; return why it was not converted, if so.

        Raises:
            SurgeryError: its evaluation was to be kept, and is another.
        """
        before = None if KINDS[rebuild.to] == "retrain" else Before(layer, shape)
        reason = self._convert(layer, shape, rebuild)
        if reason is None and before is not None:
            wrong = before.changed_to(self.work.get_submodule(layer.path))
            if wrong is not None:
                raise SurgeryError(f"convert: to={self.to!r} should keep the function, and {wrong}")
        return reason

    def _convert(self, layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> str | None:
        """Convert one layer; return why not, if so."""
        if rebuild.to not in ("normkit", "torch", "batch", "sync"):
            return put(self.work, layer, rebuilt(layer, shape, rebuild), self.unseen)
        if is_relative(layer.module) or (rebuild.to == "batch" and was_relative(layer.module)):
            return swap_relative(layer, shape, rebuild)
        if isinstance(layer.module, Frozen):
            return _swap_below(layer.module, layer, shape, rebuild)
        if _only_the_class_differs(layer):
            return _swap_class(layer, shape, rebuild)
        target = _target(rebuild.to, layer, shape)
        if target is None:
            return UNKNOWN
        made = carried(layer, target)
        if isinstance(made, SyncBatchNorm):
            made.process_group = rebuild.process_group
        reason = put(self.work, layer, made, self.unseen)
        if reason is None:
            self.renamed += renamed(layer)
        return reason

    def fuse(self) -> Fusions:
        """Fuse the chosen norms with what comes after them."""
        layers = [layer for layer in norm_layers(self.work) if id(layer.module) in self.chosen]
        with torch.no_grad():
            other, _ = second_size(self.model, self.example, self.call)
        return fuse_activations(self.model, self.work, layers, [self.example, other], self.call)


def _only_the_class_differs(layer: NormLayer) -> bool:
    """Say whether a layer keeps its state as torch's batch norms do, so that another class can read it."""
    form, module = layer.form, layer.module
    if form is None or not isinstance(module, _BatchNorm) or form.frozen:
        return False
    called = all(callable(getattr(module, name, None)) for name in form.tail)
    return called and replace(form, method="batch", tail=()) == NormForm()


def _reason_against(layer: NormLayer, to: str, shape: tuple[int, ...] | None) -> str | None:
    """Say what in the layer itself stands against any conversion, or return None."""
    module, name = layer.module, type(layer.module).__name__
    if is_frozen(module) and not (to in ("normkit", "torch", "batch", "sync") and _only_the_class_differs(layer)):
        return "it is frozen; normkit.unfreeze it first"
    if layer.lazy:
        return "it is lazy and has no channels yet; run the model once first"
    if layer.parametrized:
        return "its parameters are computed by a parametrization, which the new layer would not have"
    if layer.form is None:
        if isinstance(module, _BatchNorm):
            return f"{name} is a subclass, and what it adds would be lost: {layer.unread}"
        return layer.unread
    if to == "sync" and is_relative(module):
        return None
    reason = reason_of_relative(layer, to)
    if reason is not None:
        return reason
    if not layer.form.of_batch:
        return f"a {name} is none of the batch norms, which alone are given another form"
    if to == "renorm" and not layer.tracks:
        return (
            "it keeps no running statistics (track_running_stats is off), and batch renormalization limits the batch's "
            "by the running ones; convert it to 'ghost', or build it with track_running_stats=True"
        )
    if isinstance(module, _BatchNorm) and _is_there_already(module, to, _target(to, layer, shape)):
        return f"it is a {name} already"
    return None


def _is_there_already(module: nn.Module, to: str, target: type[nn.Module] | None) -> bool:
    """Say whether a layer has the wanted form, a subclass of torch's class included."""
    if target is None or to not in ("normkit", "torch", "batch", "sync"):
        return False
    if type(module) in (target, TAILED.get(target)):
        return getattr(module, "source_class", None) is None or target in OURS.values() or to != "torch"
    return isinstance(module, target) and not (target in TORCHS.values() and isinstance(module, tuple(OURS.values())))


def _target(to: str, layer: NormLayer, shape: tuple[int, ...] | None) -> type[nn.Module] | None:
    """Return the class that a batch norm gets, or None where that cannot be known."""
    if to == "sync":
        return SyncBatchNorm
    if to == "batch" and isinstance(layer.module, _BatchNorm) and not isinstance(layer.module, SYNCS):
        return next((cls for cls in (*OURS.values(), *TORCHS.values()) if isinstance(layer.module, cls)), None)
    dimensions = dimensions_of(layer, shape)
    classes = OURS if to == "normkit" else TORCHS if to in ("torch", "batch") else {}
    if to == "batch" and isinstance(layer.module, SyncBatchNorm):
        before = getattr(layer.module, "source_class", None)
        classes = TORCHS if before is not None and not issubclass(before, tuple(OURS.values())) else OURS
    return None if dimensions is None else classes.get(dimensions)


def _swap_class(layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> str | None:
    """Give the layer object another class of the family; return why not, if so."""
    module, target = layer.module, _target(rebuild.to, layer, shape)
    if target is None:
        return UNKNOWN
    if not getattr(module, "unbiased", True) and target not in BIASED:
        return "it stores the biased variance (unbiased=False), which torch's layers cannot"
    law = law_of(module)
    if not is_plain_law(*law) and target not in BIASED:
        return f"its statistics follow average={law[0]!r}, variance={law[1]!r}, which torch's layers cannot"
    lost = _lost_methods(type(module), target)
    if lost:
        return f"{type(module).__name__} is a subclass, and its methods would be lost: {', '.join(lost)}"
    source = vars(module).pop("source_class", None)
    # A synchronized layer's class does not say for which inputs it was made.
    forgotten = _is_plain(type(module)) and (target is not SyncBatchNorm or isinstance(module, SYNCS))
    source = source if source is not None or forgotten else type(module)
    restored = rebuild.to in ("torch", "batch") and source is not None and issubclass(source, target)
    tail = layer.form.tail if layer.form is not None and layer.tail else ()
    if target not in BIASED:
        for name in ("unbiased", "average", "variance", "half_life"):
            vars(module).pop(name, None)
    vars(module).pop("process_group", None)
    vars(module).pop("timeout", None)
    vars(module).pop("tail_names", None)
    module.__class__ = source if restored else TAILED[target] if tail else target
    if tail and not restored:
        module.tail_names = tail  # type: ignore[assignment]
    if source is not None and not restored and (target is SyncBatchNorm or not _is_plain(source)):
        module.source_class = source  # type: ignore[assignment]
    if isinstance(module, SyncBatchNorm):
        module.process_group = rebuild.process_group
    return None


def _swap_below(module: Frozen, layer: NormLayer, shape: tuple[int, ...] | None, rebuild: Rebuild) -> str | None:
    """Give a frozen layer another class below its frozen one; it stays frozen as it is."""
    own: nn.Module = module
    kept = (module.frozen_statistics, module.frozen_track, module.frozen_parameters)
    thaw(module)
    reason = _swap_class(layer, shape, rebuild)
    own.__class__ = frozen_class(type(own))
    module.frozen_statistics, module.frozen_track, module.frozen_parameters = kept
    return reason


def _lost_methods(cls: type[nn.Module], target: type[nn.Module]) -> list[str]:
    """Name the public methods of a subclass that somebody may call on the layer."""
    if _is_plain(cls):
        return []
    known = {*dir(target), *dir(nn.SyncBatchNorm)}
    return [name for name in dir(cls) if name[0] != "_" and name not in known and callable(getattr(cls, name))]


def _is_plain(cls: type[nn.Module]) -> bool:
    """Say whether a class is exactly torch's or ours, so that nothing has to be remembered of it."""
    known = {*TORCHS.values(), *OURS.values(), *SYNCS}
    return cls in known or issubclass(cls, Tailed)


def _measured(
    model: nn.Module, work: nn.Module, job: _Job, tolerance: float | None, compare: Compare | None
) -> tuple[float, tuple[str, ...]]:
    """Measure the change of the output in evaluation, and say on what; refuse an exact conversion that is not.

    Raises:
        SurgeryError: the function was to be kept and has changed, or the model does not run any more.
    """
    judge = Judge(copied(model).eval(), job.example, job.call, tolerance=tolerance, compare=compare)
    verdict = judge(copied(work).eval())
    if verdict.fails is not None:
        raise SurgeryError(f"convert: with to={job.to!r} the model fails on the example: {verdict.fails}")
    if KINDS[job.to] == "retrain":
        return verdict.change, ()
    if verdict.wrong is not None:
        kept = "the function" if KINDS[job.to] == "exact" else "the function in evaluation"
        raise SurgeryError(f"convert: to={job.to!r} should keep {kept}, and {verdict.wrong.removeprefix('it ')}")
    return verdict.change, (judge.words, str(verdict))
