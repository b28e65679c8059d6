"""What would really run: for one layer, or for every normalization layer of a model."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import ArgumentError, NormkitError
from ..kernels import dispatch
from ..kernels.dispatch import BACKENDS, Explanation
from ..layers.batch_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..printable import printable
from .batches import Call, run
from .frozen import Frozen
from .layers import NormLayer, norm_layers
from .snapshot import preserved

__all__ = ["ModelExplanation", "explain"]

# These compute their own statistics with torch operations; renorm and ghost only while they train.
_WITHOUT_KERNELS = frozenset({"whitening", "adaptive", "response"})
_WITHOUT_KERNELS_IN_TRAINING = frozenset({"renorm", "ghost"})
_FUSED = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)


@dataclass(frozen=True, repr=False)
class ModelExplanation(Explanation):
    """What `explain` found in a model: printed, a line for every normalization layer.

    Attributes:
        layers: the explanation of each layer by its path, in the order of ``named_modules``. One that the forward did
            not reach has the backend "none". `backend` names all that run.
    """

    layers: Mapping[str, Explanation] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for every layer, and below it why another backend was refused."""
        lines = [self.kernel]
        for path, found in self.layers.items():
            first, *others = str(found).split("\n")
            lines += [f"{path}: {first}", *(f"    {other}" for other in others)]
        return "\n".join(printable(line, keep="") for line in lines)


def explain(layer: nn.Module, input: Any, *, call: Call | None = None) -> Explanation:
    """Name the kernel that would run for this layer and input, and why the others would not.

    A model is run once on the input, and its state is put back: the layers get what they would get. A layer by itself
    is not run; a wrong input is told by the layer's own words.

    Args:
        layer: a normalization layer, or a model that holds some. torch's own layers run torch's own kernels, which is
            what is said of them.
        input: what the layer or the model would be called with, a tuple where a layer takes more. It is not touched.
        call: ``lambda model, input: ...``, where the model is called otherwise.

    Returns:
        The explanation; print it. That of a model is a `ModelExplanation` and has one for every layer.

    Raises:
        ArgumentError: there is no normalization layer, or the model fails on the input.
        ShapeError, DtypeError, StatisticsError: the layer would refuse the input.
        BackendError: inside `use_backend`, where the named implementation cannot serve the call.

    Example:
        >>> import normkit, torch
        >>> print(normkit.explain(normkit.BatchNorm2d(3), torch.randn(8, 3, 5, 5)).backend)
        numba
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), normkit.GroupNorm(2, 4))
        >>> found = normkit.explain(model, torch.randn(8, 3, 5, 5))
        >>> [(path, layer.backend) for path, layer in found.layers.items()]
        [('1', 'torch'), ('3', 'numba')]
    """
    if not isinstance(layer, nn.Module):
        raise ArgumentError(f"explain: layer is a {type(layer).__name__}; pass a layer or a model")
    model = getattr(layer, "_orig_mod", layer)  # what torch.compile wraps
    found = norm_layers(model)
    if not found:
        raise ArgumentError(
            f"explain: {type(layer).__name__} holds no normalization layer; pass a layer, or a model with some"
        )
    if isinstance(model, _FUSED) or found[0].path == "":
        if call is None:
            arguments = input if isinstance(input, tuple) else (input,)
            _check_input(model, found[0], arguments)
            return _of_layer(model, found[0], arguments[0])
        found = found[:1]
    return _of_model(model, found, input, call)


def _of_model(model: nn.Module, found: list[NormLayer], input: Any, call: Call | None) -> ModelExplanation:
    """Run the model once and ask at every layer."""
    layers: dict[str, Explanation] = {}
    with preserved(model):
        handles = [
            module.register_forward_pre_hook(_asking(path, layer, layers))
            for path, module, layer in _called(model, found)
        ]
        try:
            run(model, tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), input), call)
        except NormkitError:
            raise
        except Exception as error:
            raise ArgumentError(
                f"explain: {type(model).__name__} fails on this input: {type(error).__name__}: {error}; pass what it "
                "is called with, or call=lambda model, input: ..."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    ordered = {
        path: layers.get(path, Explanation("none", "not reached by this input", {}))
        for path, _, _ in _called(model, found)
    }
    backends = ", ".join(dict.fromkeys(one.backend for one in layers.values()))
    count = f"{len(layers)} of {len(ordered)} normalization layers run"
    return ModelExplanation(backends or "none", count, {}, layers=ordered)


def _called(model: nn.Module, found: list[NormLayer]) -> Iterator[tuple[str, nn.Module, NormLayer]]:
    """Yield path, module and layer: a layer that computes an activation too is called instead of the norm in it."""
    for layer in found:
        path, _, _ = layer.path.rpartition(".")
        holder = model.get_submodule(path)
        yield (path, holder, layer) if isinstance(holder, _FUSED) else (layer.path, layer.module, layer)


def _asking(path: str, layer: NormLayer, layers: dict[str, Explanation]) -> Callable[[nn.Module, Any], None]:
    def ask(module: nn.Module, arguments: Any) -> None:
        if path not in layers and arguments and isinstance(arguments[0], Tensor):
            layers[path] = _of_layer(module, layer, arguments[0])

    return ask


def _of_layer(module: nn.Module, layer: NormLayer, x: Tensor) -> Explanation:
    """Say what serves one layer on what it is called with."""
    name, cls = type(layer.module).__name__, _computing(layer.module)
    if cls is None:
        return Explanation("unknown", f"the forward of {name} is its own", {})
    if not cls.__module__.startswith("normkit.") or _tracks_while_frozen(layer.module):
        reason = f"{name} runs torch's operators"
        return Explanation("torch", f"torch's own kernels for {name}", dict.fromkeys(BACKENDS, reason))
    kind = layer.kind
    if kind in _WITHOUT_KERNELS or (kind in _WITHOUT_KERNELS_IN_TRAINING and layer.module.training):
        reason = f"there are no kernels for {name}{' while it trains' if kind in _WITHOUT_KERNELS_IN_TRAINING else ''}"
        return Explanation("plain", "torch operations", {name: reason for name in BACKENDS if name != "plain"})
    return dispatch.explain(layer.module if kind == "frozen" else module, x)


def _tracks_while_frozen(module: nn.Module) -> bool:
    """Say whether a frozen layer normalizes with a copy of its statistics, which it does with torch's operator."""
    moves = isinstance(module, Frozen) and module.frozen_track and bool(vars(module)["training"])
    return moves and module.frozen_statistics == "running"


def _computing(module: nn.Module) -> type[nn.Module] | None:
    """Return the class whose forward computes a layer, torch's or ours, or None where it is somebody else's."""
    if "forward" in vars(module):
        return None
    for cls in type(module).__mro__:
        if "forward" in vars(cls) and cls is not Frozen:
            return cls if cls.__module__.startswith(("torch.nn.", "normkit.")) else None
    return None


def _check_input(module: nn.Module, layer: NormLayer, arguments: tuple[Any, ...]) -> None:
    """Let the layer look at the input, on a copy without memory."""
    if not arguments or not isinstance(arguments[0], Tensor):
        given = type(arguments[0]).__name__ if arguments else "tuple of nothing"
        raise ArgumentError(f"explain: input is a {given}; pass the tensor that {type(module).__name__} is called with")
    if layer.lazy or type(arguments[0]) is not Tensor:
        return
    twin = copy.deepcopy(module).to("meta")
    with dispatch.use_backend("plain"):
        try:
            twin.forward(*tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), arguments))
        except NormkitError:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            # torch's layers say here what they would say; a step that needs a number of the data proves nothing.
            if "meta" not in str(error).lower():
                raise
