"""What autograd hands back to a backward: another memory format, another type, and several threads at once."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import normkit
from normkit import functional as NF
from normkit.errors import DtypeError, NormkitError, ShapeError
from tolerances import RELATIVE, assert_close

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def strided(value: Tensor) -> Tensor:
    """The same values with a gap between neighbours."""
    room = value.new_empty((*value.shape, 2)) if value.dim() else value.new_empty(2)
    room[..., 0] = value
    return room[..., 0]


def unaligned(value: Tensor) -> Tensor:
    """The same values, one element past an aligned address."""
    room = value.new_empty(value.numel() + 1)
    room[1:] = value.flatten()
    return room[1:].view(value.shape)


def turned(value: Tensor) -> Tensor:
    """The same values, with the last two dimensions in the other order in memory."""
    return value.mT.contiguous().mT if value.dim() > 1 else value.clone()


def expanded(value: Tensor) -> Tensor:
    """The same values, with a stride of zero wherever a dimension repeats itself."""
    for axis in range(value.dim()):
        first = value.narrow(axis, 0, 1)
        if torch.equal(first.expand_as(value), value):
            value = first.clone().expand_as(value)
    return value


def imaginary(value: Tensor) -> Tensor:
    """The same values as a negative view, which torch makes of itself in this way."""
    if value.dtype not in (torch.float32, torch.float64):
        return torch._neg_view(-value)
    return torch.complex(torch.zeros_like(value), -value).conj().imag


def made_for_inference(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.clone()


class OfItsOwn(Tensor):
    """A class that its operations pass on."""


# What hooks of real tools do, and what they may do: each hands the same values back.
FAITHFUL: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda value: value.contiguous().clone(memory_format=torch.contiguous_format),
    "channels_last": lambda value: (
        value.clone(memory_format=torch.channels_last) if value.dim() == 4 else value.clone()
    ),
    "strided": strided,
    "turned": turned,
    "unaligned": unaligned,
    "expanded": expanded,
    "float64": lambda value: value.double(),
    "negative": lambda value: torch._neg_view(-value),
    "imaginary": imaginary,
    "requires a gradient": lambda value: value.detach().clone().requires_grad_(),
    "made for inference": made_for_inference,
    "of its own class": lambda value: value.detach().clone().as_subclass(OfItsOwn),
}
# What a compression does: digits are lost, and not all of them.
COARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16 and back": lambda value: value.bfloat16().to(value.dtype),
    "left in bfloat16": lambda value: value.bfloat16(),
}


def in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return NF.batch_norm(x * 1.0, None, None, weight, bias, True, activation="leaky_relu", inplace=True)


def compiled(activation: str, summed: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from normkit.kernels import operators

        other = x.sin() if summed else None
        y, *_ = operators.batch_norm_forward(x, weight, bias, other, None, None, None, 0.0, 1e-5, True, activation)
        return y

    return run


def stored(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, var = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype), torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)
    return NF.batch_norm(x, mean, var, weight, bias)


def plain(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with normkit.use_backend("plain"):
            return norm(x, weight, bias)

    return run


Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
NORMS: dict[str, Norm] = {
    "batch": lambda x, w, b: NF.batch_norm(x, None, None, w, b, True),
    "batch and relu": lambda x, w, b: NF.batch_norm(x, None, None, w, b, True, activation="relu"),
    "batch, sum and relu": lambda x, w, b: NF.batch_norm(
        x, None, None, w, b, True, activation="relu", residual=x.sin()
    ),
    "batch, sum and silu": lambda x, w, b: NF.batch_norm(
        x, None, None, w, b, True, activation="silu", residual=x.sin()
    ),
    "evaluation": stored,
    "in place": in_place,
    "operators": compiled("relu"),
    "operators, sum and relu": compiled("relu", summed=True),
    "operators, sum and silu": compiled("silu", summed=True),
    "group": lambda x, w, b: NF.group_norm(x, 2, w, b),
    "instance": lambda x, w, b: NF.instance_norm(x, None, None, w, b, activation="relu"),
    "layer": lambda x, w, b: NF.layer_norm(x, x.shape[-1:], w[: x.shape[-1]], b[: x.shape[-1]]),
    "rms": lambda x, w, b: NF.rms_norm(x, x.shape[-1:], w[: x.shape[-1]]),
    "plain batch": plain(lambda x, w, b: NF.batch_norm(x, None, None, w, b, True)),
    "plain evaluation": plain(stored),
    "plain group": plain(lambda x, w, b: NF.group_norm(x, 2, w, b)),
}


def inputs(layout: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    x = torch.randn(3, 8, 5, 7).contiguous(memory_format=LAYOUTS[layout])
    x[:, 2] = 0.25  # which an expanded tensor can hold
    values = [x, torch.rand(8) + 0.5, torch.randn(8)]
    return [value.to(dtype).requires_grad_() for value in values], torch.randn(3, 8, 5, 7).to(dtype)


def gradients(
    norm: Norm, leaves: list[Tensor], dy: Tensor, hook: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    used = leaves if norm is not NORMS["rms"] else leaves[:2]
    if hook is None:
        return list(torch.autograd.grad(norm(*leaves), used, dy))
    with saved_tensors_hooks(hook, lambda value: value):
        y = norm(*leaves)
    return list(torch.autograd.grad(y, used, dy))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORMS)
def test_gradients_do_not_depend_on_the_form_that_a_hook_hands_back(name: str, layout: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        if name == "in place" and dtype is torch.bfloat16:
            continue
        leaves, dy = inputs(layout, dtype)
        expected = gradients(NORMS[name], leaves, dy)
        for hook, change in FAITHFUL.items():
            for one, other in zip(gradients(NORMS[name], leaves, dy, change), expected, strict=True):
                assert_close(one, other, dtype=dtype, what=f"{hook} {dtype}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORMS)
def test_a_compression_loses_no_more_than_its_digits(name: str, layout: str) -> None:
    leaves, dy = inputs(layout)
    expected = gradients(NORMS[name], leaves, dy)
    for hook, change in COARSE.items():
        for one, other in zip(gradients(NORMS[name], leaves, dy, change), expected, strict=True):
            assert one.dtype == other.dtype
            lost = (one - other).norm() / other.norm()
            # A mean, a deviation, x and the weight are each rounded once. A relu's kink may move over a value or two.
            assert lost < 8 * RELATIVE[torch.bfloat16], f"{hook}: {lost:.3g} of the gradient"


@pytest.mark.parametrize("name", NORMS)
def test_offloading_changes_no_bit(name: str) -> None:
    leaves, dy = inputs("channels_last")
    expected = gradients(NORMS[name], leaves, dy)
    with save_on_cpu():
        y = NORMS[name](*leaves)
    found = torch.autograd.grad(y, leaves if name != "rms" else leaves[:2], dy)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, dtype=torch.float32)


@pytest.mark.parametrize("name", [name for name in NORMS if not name.startswith(("in place", "operators"))])
def test_a_second_derivative_does_not_depend_on_the_form_either(name: str) -> None:
    leaves, dy = inputs("channels_last", torch.float64)

    def second(hook: Callable[[Tensor], Tensor]) -> Tensor:
        with saved_tensors_hooks(hook, lambda value: value):
            y = NORMS[name](*leaves)
        (first,) = torch.autograd.grad(y, leaves[0], dy, create_graph=True)
        # What is made of torch operations passes a class on, as torch's own norms do.
        assert type(first) is Tensor or name.startswith("plain")
        return torch.autograd.grad(first.square().sum(), leaves[1])[0]

    expected = second(lambda value: value)
    # What was made for inference has no place in a graph that is differentiated again: torch refuses to save it.
    for hook, change in FAITHFUL.items() - {("made for inference", made_for_inference)}:
        assert_close(second(change), expected, dtype=torch.float64, what=hook)


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], type[NormkitError], str]] = {
    "fewer samples": (
        lambda value: value[:1].clone() if value.dim() == 4 else value,
        ShapeError,
        r"shape \(1, 8, 5, 7\)",
    ),
    "flat": (lambda value: value.flatten().clone() if value.dim() == 4 else value, ShapeError, r"shape \(840,\)"),
    "half the statistics": (
        lambda value: value[:1].clone() if value.dtype is torch.float64 else value,
        ShapeError,
        "the saved statistics",
    ),
    "half the weight": (lambda value: value[:4].clone() if value.shape == (8,) else value, ShapeError, r"shape \(4,\)"),
    "another device": (lambda value: value.to("meta"), DtypeError, "on meta, saved was cpu"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "name", ["batch", "batch, sum and silu", "operators, sum and silu", "group", "instance", "in place"]
)
def test_what_is_no_longer_the_tensor_is_refused_in_words(name: str, wrong: str) -> None:
    change, error, said = WRONG[wrong]
    leaves, dy = inputs("contiguous")
    with saved_tensors_hooks(change, lambda value: value):
        y = NORMS[name](*leaves)
    with pytest.raises(error, match=said) as caught:
        torch.autograd.grad(y, leaves[0], dy)
    assert "what a hook unpacks must be what it packed" in str(caught.value)


def node_of(y: Tensor) -> torch.autograd.graph.Node:
    """The norm's own node in the graph, which is the last but for views of its output."""
    node = y.grad_fn
    while node is not None and not hasattr(node, "_raw_saved_tensors"):
        node = node.next_functions[0][0]
    assert node is not None
    return node


def through_one_hook(name: str, leaves: list[Tensor], dy: Tensor, place: int, change: Callable[[Tensor], Tensor]):
    """The gradients where one saved tensor alone goes through a hook, put on it after the forward; None past the last.

    An empty list says that nothing was saved in this place.
    """
    y = NORMS[name](*leaves)
    saved = node_of(y)._raw_saved_tensors
    if place == len(saved):
        return None
    try:
        saved[place].register_hooks(change, lambda value: value)
    except RuntimeError:  # the value is None
        return []
    return list(torch.autograd.grad(y, leaves if name != "rms" else leaves[:2], dy))


@pytest.mark.usefixtures("python_path")  # a native node shows its saved tensors to hooks of all, not one by one
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORMS)
def test_a_hook_on_any_single_saved_tensor_is_seen_too(name: str, layout: str) -> None:
    leaves, dy = inputs(layout)
    expected, place = gradients(NORMS[name], leaves, dy), 0
    while True:
        for hook, change in FAITHFUL.items():
            found = through_one_hook(name, leaves, dy, place, change)
            if not found:
                break
            for one, other in zip(found, expected, strict=True):
                assert_close(one, other, dtype=torch.float32, what=f"{hook} of saved tensor {place}")
                # What is made of torch operations passes a class on, as torch's own norms do.
                assert type(one) is Tensor or (hook == "of its own class" and name.startswith(("plain", "operators")))
                assert not one.requires_grad
        if found is None:
            break
        place += 1
    assert place >= 3  # x, weight and bias at least


OTHERS = {
    "another device": (lambda value: value.to("meta"), DtypeError, "on meta, saved was cpu"),
    "complex": (lambda value: value.to(torch.complex64), DtypeError, "as torch.complex64"),
    "half of it": (lambda value: value.narrow(0, 0, value.shape[0] // 2), ShapeError, "with shape"),
    "twice": (lambda value: torch.cat([value, value]), ShapeError, "with shape"),
}


@pytest.mark.usefixtures("python_path")  # a native node shows its saved tensors to hooks of all, not one by one
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", [name for name in NORMS if "plain" not in name])
def test_a_single_saved_tensor_that_is_another_is_refused_in_words(name: str, other: str) -> None:
    change, error, said = OTHERS[other]
    leaves, dy = inputs("contiguous")
    for place in range(5):
        y = NORMS[name](*leaves)
        saved = node_of(y)._raw_saved_tensors
        try:
            saved[place].register_hooks(change, lambda value: value)
        except (RuntimeError, IndexError):
            assert place > 1  # nothing is saved there
            continue
        with pytest.raises(error, match=said) as caught:
            torch.autograd.grad(y, leaves[0], dy)
        assert "what a hook unpacks must be what it packed" in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORMS)
def test_a_backward_writes_into_nothing_that_was_saved(name: str, layout: str) -> None:
    leaves, dy = inputs(layout)
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value.detach())
        return value.detach()

    with saved_tensors_hooks(pack, lambda value: value):
        y = NORMS[name](*leaves)
    before = [(value.clone(), value._version) for value in kept]
    torch.autograd.grad(y, leaves if name != "rms" else leaves[:2], dy)
    for value, (copy, version) in zip(kept, before, strict=True):
        assert value._version == version
        assert torch.equal(value, copy)


# What the channels' kernels do in one task, by blocks, and over columns; and a few per sample.
SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "batch, whole channels": (lambda: normkit.BatchNorm2d(32), (16, 32, 28, 28), "contiguous"),
    "batch, blocks": (lambda: normkit.BatchNorm2d(4), (16, 4, 64, 64), "contiguous"),
    "batch, channels_last": (lambda: normkit.BatchNorm2d(32), (16, 32, 28, 28), "channels_last"),
    "batch, few rows": (lambda: normkit.BatchNorm2d(128), (8, 128, 7, 7), "channels_last"),
    "group, channels_last": (lambda: normkit.GroupNorm(4, 32), (8, 32, 28, 28), "channels_last"),
    "layer": (lambda: normkit.LayerNorm(28), (16, 32, 28, 28), "contiguous"),
}


@pytest.mark.parametrize("name", SHARED)
def test_threads_that_run_backward_over_one_graph_do_not_meet(name: str) -> None:
    make, shape, layout = SHARED[name]
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    y = make()(x)
    # A thousandfold apart, so that a coefficient of the other thread shows.
    cotangents = [torch.randn(shape) * scale for scale in (1.0, 1e3)]
    expected = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in cotangents]
    together, wrong = threading.Barrier(2), [0, 0]

    def run(turn: int) -> None:
        together.wait(60)
        for _ in range(60):
            (found,) = torch.autograd.grad(y, x, cotangents[turn], retain_graph=True)
            wrong[turn] += not torch.equal(found, expected[turn])

    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0]
