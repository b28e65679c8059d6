"""Which implementation serves a call, and why not the others.

- ``numba``: vectors on torch's threads, for dense tensors on a CPU.
- ``triton``: for tensors on a GPU.
- ``plain``: torch operations in float64, for everything else: transforms, tracing, other devices.

Left alone, a call takes the first that can serve it. Inside `use_backend` it takes the named one or raises: a request
is honoured or refused, never quietly replaced.
"""

import contextvars
import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..errors import ArgumentError, BackendError
from ..spelling import alternatives
from .threads import unavailable

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Activation",
    "Backend",
    "Explanation",
    "cannot",
    "cannot_compile",
    "choose",
    "explain",
    "is_served_compiled",
    "is_undisturbed",
    "may_be_native",
    "refusals",
    "requested",
    "use_backend",
]

Backend = Literal["numba", "triton", "plain"]
Activation = Literal["relu", "relu6", "leaky_relu", "silu"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
_NUMBA = (None, "numba")
_Function = TypeVar("_Function", bound=Callable[..., Any])
# Who thinks of devices finds the implementation that serves one.
_SERVES = {"cpu": "numba", "cuda": "triton"}
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_REQUESTED: contextvars.ContextVar[str | None] = contextvars.ContextVar("normkit_backend", default=None)
_HAS_NUMBA = importlib.util.find_spec("numba") is not None
_HAS_TRITON = all(map(importlib.util.find_spec, ("triton", "normkit.kernels.triton.channels.passes")))


class _Request:
    """What `use_backend` returns: the request holds inside ``with``, or inside a function that it decorates."""

    _tokens: list[contextvars.Token[str | None]] | None = None

    def __init__(self, name: Backend) -> None:
        self.name = name

    def __enter__(self) -> None:
        self._tokens = self._tokens or []
        self._tokens.append(_REQUESTED.set(self.name))

    def __exit__(self, *_: object) -> None:
        assert self._tokens
        _REQUESTED.reset(self._tokens.pop())

    def __call__(self, function: _Function) -> _Function:
        self._tokens = self._tokens or []

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            # One for each call: calls in two threads do not know of each other.
            with _Request(self.name):
                return function(*args, **kwargs)

        return cast(_Function, inside)

    def __del__(self) -> None:
        # As Python says it of a coroutine that nobody awaited.
        if self._tokens is None:
            warnings.warn(
                f"use_backend({self.name!r}) did nothing, because it was not entered; write "
                f"`with normkit.use_backend({self.name!r}):`",
                RuntimeWarning,
                stacklevel=2,
            )


def use_backend(name: Backend) -> _Request:
    """Run every normalization inside ``with``, or inside a decorated function, with one implementation or not at all.

    Args:
        name: "numba", "triton" or "plain".

    Raises:
        ArgumentError: the name is unknown.
        BackendError: by a call inside, where that implementation cannot serve it; the message says why.

    Warns:
        RuntimeWarning: it was called and never entered, so that it did nothing.

    Example:
        >>> import normkit, torch
        >>> with normkit.use_backend("plain"):
        ...     y = normkit.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))
    """
    if name not in BACKENDS:
        serves = _SERVES.get(str(name).partition(":")[0])
        words = f"{name} is a device, and {serves} serves it" if serves else alternatives(name, BACKENDS)
        raise ArgumentError(f"unknown backend {name!r}; {words}")
    return _Request(name)


def requested() -> str | None:
    """Return the implementation that `use_backend` asks for, or None."""
    return _REQUESTED.get()


def may_be_native() -> bool:
    """Tell whether a call may go the native way to the numba kernels: nothing is compiled, nothing else requested."""
    return not torch.compiler.is_compiling() and _REQUESTED.get() in _NUMBA


def _is_transformed(x: Tensor) -> str | None:
    """Why a tensor's memory must not be touched behind torch's back, or None."""
    kind = type(x)
    if kind is not Tensor and kind is not Parameter:
        return f"the input is a {kind.__name__}, whose memory is not a plain tensor's"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "a forward derivative is being computed"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a torch dispatch mode is active, which must see every operation"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    return None


def is_undisturbed() -> bool:
    """Tell quickly whether only the tensors decide: no request, no transform, no mode. False decides nothing."""
    return (
        _HAS_NUMBA
        and _REQUESTED.get() is None
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and unavailable() is None
    )


@functools.cache
def cannot_compile(dtype: torch.dtype) -> str | None:
    """Return why this processor has no CPU kernel for a type, or None where it has."""
    if dtype is not torch.float16:
        return None
    # Imported where it matters: Numba costs more to import than torch's own layers to run.
    from .numba import processor

    missing: str | None = processor.unavailable(dtype)
    return missing


def _numba_refuses(x: Tensor) -> str | None:
    if not x.is_cpu:
        return f"the input is on {x.device}; these kernels run on a CPU"
    if x.dtype not in _DTYPES:
        return f"the input is {x.dtype}; these kernels take float16, bfloat16, float32 and float64"
    if not _HAS_NUMBA:
        return "numba is not installed; pip install numba"
    # Asked before any size: under torch.jit.trace a size is a tensor.
    reason = _is_transformed(x)
    if reason is not None:
        return reason
    if x.numel() == 0:
        return "the input holds no values"
    return unavailable() or cannot_compile(x.dtype)


def _triton_refuses(x: Tensor) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if x.is_cpu and _REQUESTED.get() != "triton":
        return "the input is on cpu; these kernels run on a GPU"
    reason = _is_transformed(x)
    if reason is not None:
        return reason
    if x.numel() == 0:
        return "the input holds no values"
    from .triton.channels import passes as triton_channels

    missing: str | None = triton_channels.unavailable(x)
    return missing


def refusals(x: Tensor) -> dict[str, str | None]:
    """Return for every implementation why it cannot serve x, or None where it can."""
    return {"numba": _numba_refuses(x), "triton": _triton_refuses(x), "plain": None}


def is_served_compiled(x: Tensor) -> bool:
    """Tell whether a graph being compiled should hold `operators` for x, rather than torch operations.

    Which implementation serves the operator is decided when it runs.
    """
    kind = type(x)
    if (kind is not Tensor and kind is not Parameter) or x.dtype not in _DTYPES:
        return False
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return _HAS_NUMBA and x.device.type == "cpu"


def cannot(backend: str, reason: str) -> str:
    """Say that a request cannot be honoured, and what to do."""
    return f"the {backend} backend cannot serve this call: {reason}; leave use_backend, or choose plain"


def choose(x: Tensor) -> str:
    """Return the name of the implementation that serves a call on x.

    Raises:
        BackendError: the one that `use_backend` asked for cannot.
    """
    requested = _REQUESTED.get()
    if requested is None:
        if x.is_cpu:
            return "plain" if _numba_refuses(x) else "numba"
        return "triton" if x.is_cuda and not _triton_refuses(x) else "plain"
    reason = refusals(x)[requested]
    if reason is not None:
        raise BackendError(cannot(requested, reason))
    return requested


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` found: printed, it is a line for every implementation.

    Attributes:
        backend: the implementation that would run.
        kernel: which of its kernels.
        refused: for every other implementation, why it would not run.
        path: how an ordinary call comes to the numba kernels, through C++ or through Python, and why; else empty.
    """

    backend: str
    kernel: str
    refused: dict[str, str]
    path: str = ""

    def __repr__(self) -> str:
        """Return the implementation and its kernel in one line."""
        return f"<{type(self).__name__}: {self.backend}: {self.kernel}>"

    def __str__(self) -> str:
        """One line for the kernel that runs and one for each that does not."""
        lines = [f"{self.backend}: {self.kernel}", *([f"called {self.path}"] if self.path else [])]
        lines += [f"not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def explain(layer: nn.Module, input: Tensor) -> Explanation:
    """Name the kernel that would run for this layer and input, and why the others would not.

    Args:
        layer: a layer, RMS, group, instance or batch norm of normkit, or a layer that holds a batch norm.
        input: what the layer would be called with. It is not touched.

    Returns:
        The explanation; print it.

    Raises:
        BackendError: inside `use_backend`, where the named implementation cannot serve the call.

    Example:
        >>> import normkit, torch
        >>> print(normkit.explain(normkit.BatchNorm2d(3), torch.randn(8, 3, 5, 5)).backend)
        numba
    """
    chosen, reasons = choose(input), refusals(input)
    kernel, per_sample = "torch operations in float64", _is_per_sample(layer)
    if chosen == "triton" and per_sample:
        from . import forms
        from .triton.samples import passes as triton_samples

        reasons["triton"] = triton_samples.unavailable(input, forms.form_of_layer(layer, input.shape))
        if reasons["triton"] and requested() is not None:
            raise BackendError(cannot("triton", reasons["triton"]))
        chosen = "plain" if reasons["triton"] else chosen
    if chosen == "numba":
        kernel = _describe(layer, input)
    elif chosen == "triton":
        kernel = "per sample on the GPU" if per_sample else "per channel on the GPU"
    asked = requested()
    refused = {}
    for name, reason in reasons.items():
        if name != chosen:
            other = f"use_backend({asked!r}) asks for another" if asked else f"{chosen} comes first"
            refused[name] = reason or other
    return Explanation(chosen, kernel, refused, _path() if chosen == "numba" else "")


def _path() -> str:
    """Say which way an ordinary call goes to the numba kernels, and why not the other."""
    from .native import calls

    reason = calls.unavailable()
    return "through C++" if reason is None else f"through Python: {reason}"


def _is_per_sample(layer: nn.Module) -> bool:
    """Tell whether a layer takes its statistics from each sample by itself."""
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return layer.training or not layer.track_running_stats
    return isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))


def _describe(layer: nn.Module, x: Tensor) -> str:
    """Say which CPU kernel would run, and how its work is cut."""
    if _is_per_sample(layer):
        from .numba.samples import passes as sample_passes

        return sample_passes.describe(layer, x)
    from .numba.channels import passes as channel_passes

    layout = channel_passes.layout_of(x)
    copied = "" if layout else ", after a copy into contiguous memory"
    cut = channel_passes.plan(tuple(x.shape), layout or "contiguous", x.element_size())
    way = "statistics and output in one task" if cut.fused and layer.training else "step by step over blocks"
    return f"{cut.layout}, {way}, {cut.tasks} tasks, {torch.get_num_threads()} threads{copied}"
