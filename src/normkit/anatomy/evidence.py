"""Try on data what a layer of another house seems to be: nothing is claimed of it that float64 does not show.

The layer is copied without its hooks, in float64 on the CPU (in float32 where its code computes in that). Each tensor
that the form names gets random values, so that a name that means something else is noticed; then the output in
evaluation, the output in training and what is stored after one training step are compared with the formula. So it goes
once more with random values in everything else that the layer holds, which must make no difference: a gain that still
is 1 is a gain. The layer itself is not run and not written.
"""

import copy
import math
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .forms import NormForm, candidates, misnamed, registered_form
from .frozen import Frozen, thaw
from .rest import rest_of, varied

__all__ = ["Evidence", "bare_copy", "examined", "sample_input", "sample_inputs"]

# Relative; room for a layer that goes through float32 on the way, as many do. What a formula differs from another by is
# thousands of times as much: eps is a thirtieth of the variance here.
_CLOSE = 2e-6
# Of a layer that computes in float32 whatever it is given: some hundred roundings of that type.
_CLOSE_SINGLE = 2e-5

_HOOKS = tuple(name for name in vars(nn.Identity()) if "hook" in name)


@dataclass(frozen=True)
class Evidence:
    """What was found of one layer.

    Attributes:
        form: the form that the data confirm, or None.
        reason: why none is confirmed, in words; empty where one is, and where the layer resembles no normalization.
    """

    form: NormForm | None
    reason: str = ""


# By class and then by what else the answer hangs on; a schedule that rewrites a setting must not let it grow for ever.
_FOUND: WeakKeyDictionary[type[nn.Module], dict[Any, Evidence]] = WeakKeyDictionary()
_MOST = 1000


def examined(module: nn.Module) -> Evidence:
    """Return what the data say of a layer of another house; tried once for each class, size and setting."""
    found = _FOUND.setdefault(type(module), {})
    key = (registered_form(module), *_settings(module))
    if key not in found:
        if len(found) >= _MOST:
            found.clear()
        found[key] = _examine(module)
    return found[key]


def _settings(module: nn.Module) -> Iterator[Any]:
    """Yield what the answer may hang on besides the class: plain settings, functions, names and sizes of the state."""
    for path, inner in module.named_modules():
        yield path, type(inner)
        for name, value in vars(inner).items():
            plain = isinstance(value, str | bool | int | float | None) or (callable(value) and not name.startswith("_"))
            if plain and name != "training" and isinstance(value, Hashable):
                yield path, name, value
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            yield path, name, None if tensor is None or is_lazy(tensor) else tuple(tensor.shape)


def _examine(module: nn.Module) -> Evidence:
    forms = candidates(module)
    first = next(forms, None)
    if first is None:
        return Evidence(None)
    if _is_lazy(module):
        return Evidence(None, "it is lazy and has no channels yet; run the model once first")
    if is_parametrized(module):
        return Evidence(None, "its parameters are computed by a parametrization")
    if "forward" in vars(module):
        return Evidence(None, "its forward was replaced on the object, so that nothing is known of what it computes")
    wrong = misnamed(module)
    if wrong:
        return Evidence(None, wrong)
    reason: str = ""
    with _quietly():
        for form in (first, *forms):
            found = _tried(module, form)
            if isinstance(found, NormForm):
                return Evidence(found)
            # What a form says that the layer does compute, as far as it goes, is nearer than what it does not.
            reason = found if not reason or (isinstance(found, _More) and not isinstance(reason, _More)) else reason
    return Evidence(None, str(reason))


class _More(str):
    """The reason against a layer that computes the formula, and something else besides."""


@contextmanager
def _quietly() -> Iterator[None]:
    """Run code of any house without gradients, autocast, the random numbers of others, and warnings."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _is_lazy(module: nn.Module) -> bool:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return True
    return any(tensor is not None and is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers()))


def bare_copy(module: nn.Module) -> nn.Module:
    """Copy a layer in float64 on the CPU, without hooks: they may hold the whole model, and are not to run."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for name in _HOOKS:
            held = vars(inner).get(name)
            if held:
                memo[id(held)] = type(held)()
    made = copy.deepcopy(module, memo)
    if isinstance(made, Frozen):
        thaw(made)
    return made.to(device="cpu", dtype=torch.float64)


def _tried(module: nn.Module, form: NormForm) -> NormForm | str:
    """Return the form with what a training step shows, or why the layer does not compute it."""
    name = type(module).__name__
    try:
        work = bare_copy(module)
    except Exception as error:
        return f"{name} cannot be copied to be tried ({type(error).__name__})"
    channels = _channels(work, form)
    if channels is None:
        return f"{name} has state whose shape is not one value for each channel"
    reason = f"{name} could not be run on an example"
    has_run = False
    for dtype in (torch.float64, torch.float32):
        for shape in () if has_run else _shapes(work, form, channels):
            try:
                found = _tried_on(bare_copy(module).to(dtype), form, channels, shape)
            except Exception:  # noqa: S112  a forward of any house; the next shape may fit
                continue
            has_run = True
            if isinstance(found, NormForm):
                return _tried_with_the_rest(module, form, found, channels, shape, dtype)
            reason = found
    return reason


def _tried_with_the_rest(
    module: nn.Module, form: NormForm, found: NormForm, channels: int, shape: tuple[int, ...], dtype: torch.dtype
) -> NormForm | str:
    """Try a layer again with other values in all that its form does not name; return what was found, or a reason."""

    def makes_no_difference(names: list[tuple[str, str]]) -> bool:
        work = bare_copy(module).to(dtype)
        try:
            varied(work, names)
            return _tried_on(work, form, channels, shape) == found
        except Exception:  # it takes the shape, so that it is the value that it does not take
            return False

    rest, held = rest_of(module, form)
    name, kind = type(module).__name__, f"{form.method} normalization"
    if rest and not makes_no_difference(rest):
        guilty = [each for each in rest if not makes_no_difference([each])] or rest
        return _More(f"what {name} computes depends on {_listed(guilty)} too, which {kind} does not have")
    if held:
        return _More(
            f"{name} holds {_listed(held)} besides the state of {kind}, which it does not use as it is set now: "
            "what it computes when it does is not known"
        )
    return found


def _listed(names: list[tuple[str, str]]) -> str:
    said = [f"{path}.{name}" if path else name for path, name in names]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")


def _tried_on(work: nn.Module, form: NormForm, channels: int, shape: tuple[int, ...]) -> NormForm | str:
    """Compare a copy with the formula on one shape; an exception says that the layer does not take it."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    _fill(work, form, channels, generator)
    if isinstance(form.momentum, str) and isinstance(vars(work).get(form.momentum), int | float):
        # Neither a usual value, which the code may have of itself, nor the one at which both directions are the same.
        setattr(work, form.momentum, 0.3)
    x = _input(work, form, shape, generator).to(_type_of(work))
    # The formula first: it is to hold of what was stored before the call.
    expected = _expected(work.eval(), form, x, training=not form.stores(work))
    if not _close(_call(work, x), expected, x):
        return f"{type(work).__name__} does not compute {_words(form)}"
    if not form.of_batch or not form.stores(work) or form.method == "sync" or _is_sync(work):
        return form
    try:
        return _after_a_step(work, form, x)
    except Exception as error:
        return f"{type(work).__name__} could not be trained on an example ({type(error).__name__})"


def _type_of(work: nn.Module) -> torch.dtype:
    """Return the type that a copy was given: float64, or float32."""
    state = (*work.parameters(), *work.buffers())
    return next((tensor.dtype for tensor in state if tensor.is_floating_point()), torch.float64)


def _channels(work: nn.Module, form: NormForm) -> int | None:
    """Return the number of channels, if what the form names has one value for each of them."""
    sizes = set()
    for what in ("weight", "bias", "mean", "var"):
        tensor = form.tensor(work, what)
        if tensor is not None:
            if tensor.numel() != max((*tensor.shape, 1)):
                return None
            sizes.add(tensor.numel())
    if len(sizes) == 1:
        return sizes.pop()
    named = next((getattr(work, name, None) for name in ("num_features", "num_channels")), None)
    return named if isinstance(named, int) and not sizes else None


def _fill(work: nn.Module, form: NormForm, channels: int, generator: torch.Generator) -> None:
    """Give what the form names values that no other name would explain; the variance so small that eps is seen."""
    unit = 30 * form.eps_of(work) or 1.0
    for what in ("weight", "bias", "mean", "var"):
        tensor = form.tensor(work, what)
        if tensor is None:
            continue
        values = torch.rand(channels, generator=generator, dtype=torch.float64, device="cpu")
        if what == "weight":
            # Every second one is negative, the first too, however few there are: there are layers that take abs().
            values = (values + 0.5) * torch.where(torch.arange(channels) % 2 == 0, -1.0, 1.0)
        elif what == "var":
            values = (values + 0.5) * unit
        tensor.copy_(((values - 0.5) if what in ("bias", "mean") else values).view(tensor.shape))


def _shapes(work: nn.Module, form: NormForm, channels: int) -> Iterator[tuple[int, ...]]:
    """Yield shapes of inputs, the likeliest first."""
    ranks: tuple[int, ...] = (4, 2, 3, 5)
    state = next((t for t in (form.tensor(work, "mean"), form.tensor(work, "weight")) if t is not None), None)
    if state is not None and state.ndim > 1:
        ranks = (state.ndim + 1 - state.shape.index(channels), state.ndim, *ranks)
    for end, known in (("1d", (3, 2)), ("2d", (4,)), ("3d", (5,))):
        if any(cls.__name__.lower().endswith(end) for cls in type(work).__mro__):
            ranks = (*known, *ranks)
    last = form.method in ("layer", "rms") and form.over == "last"
    for rank in dict.fromkeys(ranks):
        space = (3, 2, 2)[: rank - 2]
        yield (5, *space, channels) if last else (5, channels, *space)


def _input(work: nn.Module, form: NormForm, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    centre = 0.3 if form.of_batch or form.method == "instance" else 0.0
    return x * math.sqrt(30 * form.eps_of(work) or 1.0) + centre


def sample_inputs(work: nn.Module, form: NormForm) -> Iterator[Tensor]:
    """Yield inputs that a copy (:func:`bare_copy`) of a layer may take, the likeliest first, and then in float32."""
    channels = _channels(work, form)
    if channels is None:
        return
    for dtype in (torch.float64, torch.float32):
        for shape in _shapes(work, form, channels):
            yield _input(work, form, shape, torch.Generator(device="cpu").manual_seed(1)).to(dtype)


def sample_input(work: nn.Module, form: NormForm) -> Tensor | None:
    """Return an input that a copy (:func:`bare_copy`) of a layer takes, or None.

    In float64, unless the layer runs in float32 alone; the copy has then been given that type.
    """
    for x in sample_inputs(work, form):
        try:
            with torch.no_grad():
                _call(work.to(x.dtype).eval(), x)
        except Exception:  # noqa: S112  a forward of any house; the next shape may fit
            continue
        return x
    return None


def _call(work: nn.Module, x: Tensor) -> Tensor:
    given = work(x.clone())
    if not isinstance(given, Tensor) or given.shape != x.shape:
        raise TypeError
    output: Tensor = given.double()
    return output


def _expected(work: nn.Module, form: NormForm, x: Tensor, *, training: bool = False) -> Tensor:
    """Compute the formula in float64."""
    eps, x = form.eps_of(work), x.double()
    mean, var = (form.tensor(work, what) for what in ("mean", "var"))
    space, sample = tuple(range(2, x.ndim)), tuple(range(1, x.ndim))
    if form.of_batch and not training:
        assert mean is not None
        assert var is not None
        normalized = (x - _wide(mean, x)) / (_wide(var, x) + eps).sqrt()
    elif form.of_batch:
        normalized = _standardized(x, (0, *space), eps)
    elif form.method == "instance":
        normalized = _standardized(x, space, eps)
    elif form.method == "group":
        groups = int(getattr(work, "num_groups", 1))
        normalized = _standardized(x.reshape(len(x), groups, -1), (2,), eps).view(x.shape)
    else:
        axes = {"last": (-1,), "channels": (1,), "sample": sample}[form.over]
        rms = form.method == "rms"
        normalized = x / (x.square().mean(axes, keepdim=True) + eps).sqrt() if rms else _standardized(x, axes, eps)
    weight, bias = form.multiplier(work), form.tensor(work, "bias")
    along = -1 if form.method in ("layer", "rms") and form.over == "last" else 1
    if weight is not None:
        normalized = normalized * _wide(weight, x, along)
    if bias is not None:
        normalized = normalized + _wide(bias, x, along)
    normalized = normalized.to(_type_of(work)) if form.tail else normalized
    for module in form.tail_of(work):
        normalized = module(normalized)
    return normalized.double()


def _standardized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def _wide(values: Tensor, x: Tensor, along: int = 1) -> Tensor:
    shape = [1] * x.ndim
    shape[along] = values.numel()
    return values.reshape(shape)


def _close(given: Tensor, expected: Tensor, x: Tensor) -> bool:
    """Say whether two are the same up to the rounding of the type that the layer was tried in, which is x's."""
    allowed = _CLOSE if x.dtype == torch.float64 else _CLOSE_SINGLE
    return bool((given - expected).abs().max() <= allowed * expected.abs().max().clamp_min(1e-300))


def _words(form: NormForm) -> str:
    tail = f" and then {', '.join(form.tail)}" if form.tail else ""
    stored = " with its stored statistics" if form.of_batch else ""
    return f"{form.method} normalization{stored}{tail}"


def _is_sync(work: nn.Module) -> bool:
    """Say whether a step might talk to other processes: it is then not tried."""
    return isinstance(work, nn.SyncBatchNorm) or any(hasattr(work, name) for name in ("process_group", "group"))


def _after_a_step(work: nn.Module, form: NormForm, x: Tensor) -> NormForm | str:
    """Train the copy for a step, and read from it what it stores and by which rate."""
    name = type(work).__name__
    counter, steps = form.tensor(work, "counter"), 4
    if counter is not None:
        counter.fill_(steps)
    before = [_own(form, work, what).clone() for what in ("mean", "var")]
    stored = _expected(work, form, x)
    work.train()
    for module in form.tail_of(work):
        module.eval()  # without dropout
    given = _call(work, x)
    after = [_own(form, work, what) for what in ("mean", "var")]
    still = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    if still and _close(given, stored, x):
        return replace(form, frozen=True)
    if form.frozen:
        return f"{name} is said to be frozen, and a training step changes what it gives or stores"
    of_batch = _close(given, _expected(work, form, x, training=True), x)
    if not of_batch:
        return f"{name} does not normalize with the batch's mean and biased variance in training"
    return _with_rate(work, form, before, after, x, steps)


def _own(form: NormForm, work: nn.Module, what: Any) -> Tensor:
    tensor = form.tensor(work, what)
    assert tensor is not None
    return tensor.detach().double().flatten()


def _with_rate(
    work: nn.Module, form: NormForm, before: list[Tensor], after: list[Tensor], x: Tensor, steps: int
) -> NormForm | str:
    """Find the rate from the mean, and which variance moved by it."""
    name, axes = type(work).__name__, (0, *range(2, x.ndim))
    variance, mean = torch.var_mean(x.double(), axes, correction=0)
    count = x.numel() // x.shape[1]
    aim = mean - before[0]
    rate = float(((after[0] - before[0]) * aim).sum() / aim.square().sum())
    if not _close(after[0], before[0] + rate * aim, x):
        return f"{name} stores something other than an average of the batches' means"
    for unbiased in (True, False):
        target = variance * count / (count - 1) if unbiased else variance
        if _close(after[1], before[1] + rate * (target - before[1]), x):
            break
    else:
        return f"{name} stores something other than an average of the batches' variances"
    directed = _directed(work, form, rate, steps, 1e-6 if x.dtype == torch.float64 else 1e-5)
    if directed is None:
        return f"{name} weighs a new batch by {rate:.4g}, which is neither its momentum nor the rest to 1"
    if registered_form(work) is not None and (directed.weighs_new, unbiased) != (form.weighs_new, form.unbiased):
        facts = f"weighs_new={directed.weighs_new}, unbiased={unbiased}"
        return f"{name} is registered otherwise than a training step shows: {facts}"
    return replace(directed, unbiased=unbiased)


def _directed(work: nn.Module, form: NormForm, rate: float, steps: int, close: float) -> NormForm | None:
    """Return the form with the direction of momentum that the rate shows; None where it shows neither."""
    value = getattr(work, form.momentum, None) if isinstance(form.momentum, str) else form.momentum
    if isinstance(value, int | float):
        near = [weighs_new for weighs_new in (form.weighs_new, not form.weighs_new)
                if abs(rate - (value if weighs_new else 1 - value)) < close]  # fmt: skip
        return replace(form, weighs_new=near[0]) if near else None
    if abs(rate - 1 / (steps + 1)) < close / 100:
        return replace(form, momentum=None)
    return replace(form, momentum=round(rate, 9), weighs_new=True)
