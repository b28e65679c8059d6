"""The native path and Python's path to the same kernels: equal in every bit, and nothing bypassed."""

import hashlib
import itertools
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
from normkit import functional as NF
from normkit import native
from normkit.kernels import dispatch
from normkit.kernels.native import build, calls
from torch_versions import uses_torchscript

pytestmark = [
    pytest.mark.skipif(not native.status().loaded, reason=str(native.status())),
    # torch itself scripts the rules of its forward derivatives; and it deprecates the trace that is tested here.
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

CALLS = ("batch_norm", "trailing_norm", "group_norm")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Paths:
    """Runs a function by either path, and counts the native launches of the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.launched: list[str] = []
        calls.watch(lambda name, *_: self.launched.append(name))

    def python(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Run it as where the native part is not built."""
        with self._monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(calls, name, None)
            patch.setattr(calls.memory, "_native", None)
            before = len(self.launched)
            found = function()
            assert len(self.launched) == before, "a native kernel ran on Python's path"
        return found

    def both(self, function: Callable[[], list[Tensor]], *, served: bool = True) -> list[Tensor]:
        """Run it by both, and compare every bit; ``served`` says whether the native path serves it."""
        self.launched.clear()
        found = function()
        assert bool(self.launched) is served, f"launched: {self.launched}"
        for index, (one, other) in enumerate(zip(found, self.python(function), strict=True)):
            assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride()), f"result {index}"
            assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5)), f"result {index}"
            assert torch.equal(one.isnan(), other.isnan()), f"result {index}"
        return found


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    yield Paths(monkeypatch)
    calls.watch(None)


def laid_out(x: Tensor, last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return laid_out(torch.randn(shape, generator=generator).to(dtype), last)


def step(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    last: bool = False,
    *,
    training: bool = True,
    activation: str | None = None,
    residual: bool = False,
    affine: str = "both",
    tracked: bool = True,
    momentum: float | None = 0.3,
    wide: bool = True,
    unbiased: bool = True,
    wanted: str = "xwbr",
    double: bool = False,
) -> list[Tensor]:
    """Forward and backward of batch norm: output, state, gradients."""
    channels, of = shape[1], torch.float32 if wide and dtype in DTYPES[2:] else dtype
    leaves = {
        "x": numbers(0, *shape, dtype=dtype, last=last),
        "w": numbers(1, channels, dtype=of) if affine in ("both", "weight") else None,
        "b": numbers(2, channels, dtype=of) if affine in ("both", "bias") else None,
        "r": numbers(3, *shape, dtype=dtype, last=last) if residual else None,
    }
    graded = [value.requires_grad_() for name, value in leaves.items() if value is not None and name in wanted]
    state = [torch.full((channels,), 0.25, dtype=of), torch.full((channels,), 2.0, dtype=of), torch.tensor(3)]
    y = NF.batch_norm(
        leaves["x"], *(state[:2] if tracked else (None, None)), leaves["w"], leaves["b"], training, momentum,
        unbiased=unbiased, num_batches_tracked=state[2], activation=activation, residual=leaves["r"],
    )  # fmt: skip
    found = [y.detach(), *state, torch.tensor([value._version for value in state])]
    if graded:
        dy = numbers(4, *shape, dtype=dtype, last=last)
        found += torch.autograd.grad(y, graded, dy, create_graph=double)
    if double:
        second = torch.autograd.grad(sum(each.square().sum() for each in found[5:]), graded, allow_unused=True)
        found += [each for each in second if each is not None]
    return [value.detach() for value in found]


SHAPES = {
    "matrix": (37, 5), "one vector": (9, 16), "fused rows": (20, 66), "whole channels": (4, 18, 5, 3),
    "few channels": (5, 3, 67, 41), "line": (6, 7, 11), "volume": (2, 5, 3, 2, 3), "blocks of rows": (3, 24, 31, 29),
    "folded": (2, 6, 40, 9),
}  # fmt: skip
every_shape = pytest.mark.parametrize("name", SHAPES)


@every_shape
def test_every_layout_type_activation_and_residual_has_the_same_bits(name, paths):
    shape = SHAPES[name]
    for dtype, last in itertools.product(DTYPES, (False, True)):
        paths.both(partial(step, shape, dtype, last))
        paths.both(partial(step, shape, dtype, last, training=False))
    for last, residual in itertools.product((False, True), (False, True)):
        for activation in ("relu", "relu6", "leaky_relu", "silu") if name == "whole channels" else ("relu", "silu"):
            ways = {"activation": activation, "residual": residual}
            paths.both(partial(step, shape, last=last, **ways))
            paths.both(partial(step, shape, last=last, training=False, **ways))
    paths.both(partial(step, shape, residual=True))


SETTINGS = {
    "weight alone": {"affine": "weight"}, "bias alone": {"affine": "bias"}, "neither": {"affine": "none"},
    "untracked": {"tracked": False}, "plain average": {"momentum": None}, "momentum 1": {"momentum": 1.0},
    "biased": {"unbiased": False}, "nothing recorded": {"wanted": ""}, "x alone": {"wanted": "x"},
    "weight's gradient": {"wanted": "w"}, "bias's gradient": {"wanted": "b"},
    "residual's gradient": {"wanted": "r", "residual": True, "activation": "relu"},
    "narrow, stored": {"dtype": torch.bfloat16, "wide": False, "training": False},
    "narrow, untracked": {"dtype": torch.float16, "wide": False, "tracked": False},
    "twice": {"double": True, "dtype": torch.float64},
    "twice, sum and silu": {"double": True, "dtype": torch.float64, "activation": "silu", "residual": True},
    "twice, stored": {"double": True, "dtype": torch.float64, "training": False},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_the_same_bits(name, paths):
    for shape, last in (((4, 18, 5, 3), False), ((4, 18, 5, 3), True), ((37, 5), False)):
        paths.both(partial(step, shape, last=last, **SETTINGS[name]))


def test_statistics_narrower_than_what_is_computed_in_go_by_python(paths):
    paths.both(partial(step, (37, 5), torch.bfloat16, wide=False), served=False)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])
def test_special_values_have_the_same_bits(special, paths):
    def run() -> list[Tensor]:
        x = numbers(0, 4, 6, 5).requires_grad_()
        with torch.no_grad():
            x[1, 2, 3] = special
        mean, var = torch.zeros(6), torch.ones(6)
        y = NF.batch_norm(x, mean, var, training=True, activation="relu")
        return [y.detach(), mean, var, *torch.autograd.grad(y, x, numbers(1, 4, 6, 5))]

    paths.both(run)


ROWS = {
    "layer": lambda x, w, b, a: NF.layer_norm(x, x.shape[-1:], w, b, activation=a),
    "rms": lambda x, w, b, a: NF.rms_norm(x, x.shape[-1:], w, activation=a),
    "two dimensions": lambda x, w, b, a: NF.layer_norm(x, x.shape[-2:], activation=a),
    "group": lambda x, w, b, a: NF.group_norm(x, 3, w, b, activation=a),
    "one group": lambda x, w, b, a: NF.group_norm(x, 1, w, b, activation=a),
    "instance": lambda x, w, b, a: NF.instance_norm(x, weight=w, bias=b, activation=a),
}


@pytest.mark.parametrize("name", ROWS)
def test_norms_per_sample_have_the_same_bits(name, paths):
    def run(shape, dtype, last, activation, affine, wanted) -> list[Tensor]:
        size = shape[-1] if name in ("layer", "rms") else shape[1]
        given = [numbers(k, size, dtype=dtype) if affine else None for k in (1, 2)]
        leaves = [numbers(0, *shape, dtype=dtype, last=last), *(value for value in given if value is not None)]
        used = [leaf.requires_grad_() for k, leaf in enumerate(leaves) if str(k) in wanted]
        y = ROWS[name](leaves[0], *given, activation)
        found = torch.autograd.grad(y, used, numbers(3, *shape, dtype=dtype, last=last), allow_unused=True)
        return [y.detach(), *(value for value in found if value is not None)]

    shapes = ((5, 6, 7), (3, 6, 5, 9), (3, 66, 41, 37), (2, 6, 96, 90))
    served = name in ("group", "one group", "instance")  # a row that is not contiguous goes by Python
    for shape, last in itertools.product(shapes, (False, True)):
        for dtype, activation in ((torch.float32, None), (torch.float32, "silu"), (torch.bfloat16, None)):
            if dtype is torch.float32 or shape == shapes[1]:
                paths.both(partial(run, shape, dtype, last, activation, True, "012"), served=served or not last)
    for affine, wanted in ((False, "0"), (True, "0"), (True, "1"), (True, "12")):
        if name != "two dimensions" or wanted == "0":
            paths.both(partial(run, shapes[1], torch.float64, False, "relu", affine, wanted))


def unaligned(x: Tensor) -> Tensor:
    room = x.new_empty(x.numel() + 1)
    return room[1:].as_strided(x.shape, x.stride(), room.storage_offset() + 1).copy_(x)


ODD: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "an element on": (unaligned, True),
    "every second": (lambda x: torch.stack((x, x), -1)[..., 0], False),
    "negative": (lambda x: torch._neg_view(-x), False),
    "turned": (lambda x: x.mT.contiguous().mT, False),
    "ZeroTensor": (lambda x: torch._efficientzerotensor(x.shape), False),
    "a parameter": (nn.Parameter, True),
}


@pytest.mark.parametrize("odd", ODD)
def test_views_have_the_same_bits_and_odd_ones_go_by_python(odd, paths):
    change, served = ODD[odd]
    x, dy = numbers(0, 4, 18, 6, 6), numbers(1, 4, 18, 6, 6)

    def run() -> list[Tensor]:
        leaf = change(x).detach().requires_grad_()
        y = NF.batch_norm(leaf, torch.zeros(18), torch.ones(18), training=True)
        z = NF.group_norm(leaf, 2)
        return [y.detach(), z.detach(), *torch.autograd.grad((y, z), leaf, (dy, change(dy)))]

    paths.both(run, served=served)


def test_large_outputs_are_streamed_alike_and_their_memory_is_kept(paths):
    x = numbers(0, 2, 64, 200, 200)
    paths.both(
        lambda: [NF.batch_norm(each, None, None, training=True) for each in (x, unaligned(x), laid_out(x, True))]
    )
    torch.utils.deterministic.fill_uninitialized_memory = False
    y = NF.batch_norm(x, None, None, training=True)
    before = calls.memory.kept()
    del y
    assert calls.memory.kept() > before, "what the native part frees is not kept for the next output"


def test_cotangents_in_another_memory_format_are_laid_out(paths):
    def run() -> list[Tensor]:
        x, dy = numbers(0, 4, 18, 5, 3).requires_grad_(), numbers(1, 4, 18, 5, 3)
        y, z = NF.batch_norm(x, None, None, training=True), NF.group_norm(x, 2)
        ways = (dy, laid_out(dy, True), dy.mT.contiguous().mT, dy[:1].expand_as(dy), torch._neg_view(dy))
        return [torch.autograd.grad(out, x, way, retain_graph=True)[0] for out in (y, z) for way in ways]

    paths.both(run)


def test_hooks_on_saved_tensors_see_and_change_what_is_kept(paths):
    def run() -> list[Tensor]:
        found, seen = [], []
        for change in (Tensor.double, lambda value: value.clone(memory_format=torch.contiguous_format)):

            def pack(value: Tensor, change: Callable[[Tensor], Tensor] = change) -> Tensor:
                seen.append(value)
                return change(value)

            x, w = numbers(0, 4, 18, 5, 3, last=True).requires_grad_(), numbers(1, 18).requires_grad_()
            with saved_tensors_hooks(pack, lambda value: value):
                y, z = NF.batch_norm(x, None, None, w, training=True, activation="relu"), NF.group_norm(x, 2, w)
            found += torch.autograd.grad((y, z), (x, w), (numbers(2, 4, 18, 5, 3),) * 2)
        assert sum(value.shape == (36,) for value in seen) == 2  # mean and rstd, for each hook
        with save_on_cpu():
            y = NF.batch_norm(x, None, None, w, training=True)
        return [*found, *torch.autograd.grad(y, x, numbers(2, 4, 18, 5, 3))]

    paths.both(run)


def test_what_was_saved_may_not_change_before_the_backward(paths):
    x, running = numbers(0, 4, 6).requires_grad_(), [torch.zeros(6), torch.ones(6)]
    for change, training in ((x, True), (running[1], False)):
        y = NF.batch_norm(x, *running, training=training)
        with torch.no_grad():
            change.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    assert paths.launched


def test_hooks_on_tensors_and_retained_gradients_are_called(paths):
    def run() -> list[Tensor]:
        seen = []
        x = numbers(0, 4, 6).requires_grad_()
        middle = x * 2
        middle.retain_grad()
        y = NF.batch_norm(middle, None, None, training=True)
        y.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 3)
        y.backward(numbers(1, 4, 6), retain_graph=True)
        y.backward(numbers(2, 4, 6))
        return [*seen, middle.grad, x.grad]

    paths.both(run)


def test_autocast_and_inference_mode_have_the_same_bits(paths):
    def run() -> list[Tensor]:
        layer, x = normkit.BatchNorm2d(18), numbers(0, 4, 18, 5, 3, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        with torch.inference_mode():
            z = layer.eval()(x)
            assert z.is_inference()
        return [y.detach(), z.clone(), layer.running_mean, layer.running_var]

    paths.both(run)


def test_threads_at_once_have_the_same_bits(paths):
    def run() -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in range(4)]

        def work(index: int) -> None:
            for _ in range(5):
                found[index] = step((4, 18 + index, 31, 29), last=index % 2 == 0)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        return [value for each in found for value in each]

    paths.both(run)


def _in_the_child(connection) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    with torch.no_grad():
        y = NF.batch_norm(numbers(0, 4, 18, 61, 59), None, None, training=True)
    connection.send(y.numpy())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_child_has_the_same_bits_and_ends(paths):
    expected = NF.batch_norm(numbers(0, 4, 18, 61, 59), None, None, training=True)
    assert paths.launched
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_in_the_child, args=(sender,), daemon=True)
    child.start()
    try:
        assert receiver.poll(60), "the child waits for threads that the fork did not take along"
        assert torch.equal(torch.from_numpy(receiver.recv()), expected)
    finally:
        child.join(60)
        child.kill()


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


class Noting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **kwargs or {})


class Own(Tensor):
    pass


def dual() -> object:
    with forward_ad.dual_level():
        return NF.batch_norm(forward_ad.make_dual(numbers(0, 4, 6), numbers(1, 4, 6)), None, None, training=True)


def dual_cotangent() -> object:
    """A gradient that carries a tangent: what the backward makes of it must carry one too."""
    x = numbers(0, 4, 6).requires_grad_()
    y = NF.batch_norm(x, None, None, training=True)
    calls.watch(None)  # the forward is native, and should be
    calls.watch(lambda name, *_: pytest.fail(f"{name} lost a tangent"))
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(numbers(1, 4, 6), numbers(2, 4, 6)))
        assert forward_ad.unpack_dual(dx).tangent is not None


def batched_cotangents() -> object:
    x = numbers(0, 4, 6).requires_grad_()
    y = NF.batch_norm(x, None, None, training=True)
    calls.watch(lambda name, *_: pytest.fail(f"{name} lost a dimension"))
    many = torch.autograd.grad(y, x, numbers(1, 3, 4, 6), is_grads_batched=True, retain_graph=True)[0]
    calls.watch(None)
    one = torch.autograd.grad(y, x, numbers(1, 3, 4, 6)[1])[0]
    assert torch.allclose(many[1], one, atol=1e-6)


def normalized(x: Tensor) -> Tensor:
    return NF.batch_norm(x, None, None, training=True)


BYPASSED: dict[str, Callable[[], object]] = {
    "compile": lambda: torch.compile(normkit.BatchNorm1d(6), backend="eager", fullgraph=True)(numbers(0, 4, 6)),
    "export": lambda: torch.export.export(normkit.BatchNorm1d(6).eval(), (numbers(0, 4, 6),)),
    "fx": lambda: torch.fx.symbolic_trace(normkit.BatchNorm1d(6)),
    "make_fx": lambda: make_fx(normalized)(numbers(0, 4, 6)),
    "vmap": lambda: torch.func.vmap(normalized)(numbers(0, 3, 4, 6)),
    "func.grad": lambda: torch.func.grad(lambda x: normalized(x).square().sum())(numbers(0, 4, 6)),
    "func.jvp": lambda: torch.func.jvp(normalized, (numbers(0, 4, 6),), (numbers(1, 4, 6),)),
    "dual numbers": dual,
    "fake tensors": lambda: _fake(),
    "a subclass": lambda: normalized(numbers(0, 4, 6).as_subclass(Own)),
    "meta": lambda: normalized(numbers(0, 4, 6).to("meta")),
    "use_backend": lambda: _under(normkit.use_backend("plain")),
    "in place": lambda: NF.batch_norm(numbers(0, 4, 6), None, None, training=True, inplace=True),
}


def _under(mode) -> Tensor:
    with mode:
        return normalized(numbers(0, 4, 6))


def _fake() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        normalized(torch.empty(4, 6))


@pytest.mark.parametrize("name", BYPASSED)
def test_what_must_see_every_operation_is_never_bypassed(name, paths):
    BYPASSED[name]()
    assert not paths.launched


@uses_torchscript  # torch's forward mode scripts its own decompositions, once in a process
@pytest.mark.parametrize("run", [dual_cotangent, batched_cotangents])
def test_a_native_node_hands_odd_cotangents_to_python(run, paths):
    run()


def test_a_function_mode_sees_the_call(paths):
    with Noting() as mode:
        normalized(numbers(0, 4, 6))
    assert NF.batch_norm in mode.seen


def test_a_dispatch_mode_sees_the_operations(paths):
    with Counting() as mode:
        normalized(numbers(0, 4, 6))
    assert mode.seen
    assert not paths.launched


@uses_torchscript
def test_a_trace_holds_torch_s_operator(paths):
    traced = torch.jit.trace(normkit.BatchNorm1d(6).eval(), numbers(0, 4, 6), check_trace=False)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    assert not paths.launched


def test_a_repeated_forward_moves_nothing(paths):
    for reentrant in (True, False):
        layer, x = normkit.BatchNorm1d(6), numbers(0, 4, 6).requires_grad_()
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert layer.num_batches_tracked == 1
    assert paths.launched


def test_refusals_are_python_s_and_move_nothing(paths):
    mean, var, count = torch.zeros(6), torch.ones(6), torch.tensor(0)
    for wrong in (
        {"eps": 0.0},
        {"momentum": 2.0},
        {"eps": float("nan")},
        {"activation": "tanh"},
        {"weight": torch.ones(5)},
    ):
        with pytest.raises(normkit.errors.NormkitError):
            NF.batch_norm(numbers(0, 4, 6), mean, var, training=True, num_batches_tracked=count, **wrong)
    for momentum in (2.0, "a"):
        with pytest.raises(normkit.errors.NormkitError):
            NF.batch_norm(numbers(0, 4, 6), mean, var, momentum=momentum)
    assert (mean.sum(), var.sum(), int(count)) == (0, 6, 0)
    assert not paths.launched


def test_compiled_autograd_runs_a_native_node(paths):
    x = numbers(0, 4, 6).requires_grad_()
    y = normalized(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(numbers(1, 4, 6))
    expected = torch.autograd.grad(normalized(x), x, numbers(1, 4, 6))[0]
    assert torch.allclose(x.grad, expected, atol=1e-6)
    assert paths.launched


STATUS = "import normkit, normkit.native as n; print(n.status().loaded, n.status().reason)"


def test_a_type_that_the_processor_has_no_kernel_for_goes_by_python(paths, monkeypatch):
    from normkit.kernels.numba import processor

    def refused(dtype):
        return "the reason" if dtype is torch.float16 else None

    monkeypatch.setattr(processor, "unavailable", refused)
    # Which keeps the processor's answer as long as the process lives: it must not keep this one.
    monkeypatch.setattr(dispatch, "cannot_compile", refused)
    x = numbers(0, 3, 7, 2, dtype=torch.float16)  # of a shape that nothing else here has
    NF.batch_norm(x, torch.zeros(7), torch.ones(7)), NF.group_norm(x, 7)
    assert not paths.launched
    NF.batch_norm(x.float(), torch.zeros(7), torch.ones(7))
    assert paths.launched


def test_explain_says_which_path_runs(paths, monkeypatch):
    layer, x = normkit.BatchNorm2d(3), torch.randn(2, 3, 5, 5)
    assert "called through C++" in str(normkit.explain(layer, x)).split("\n")
    monkeypatch.setattr(calls, "batch_norm", None)
    monkeypatch.setattr(calls, "_reason", "the reason")
    assert normkit.explain(layer, x).path == "through Python: the reason"
    with normkit.use_backend("plain"):
        assert normkit.explain(layer, x).path == ""


WHY = {
    "turned off by NORMKIT_NATIVE=0": {"NORMKIT_NATIVE": "0"},
    "type: normkit native build": {"NORMKIT_NATIVE_FOLDER": "/nowhere"},
}


@pytest.mark.parametrize("said", WHY)
def test_status_says_why_calls_go_through_python(said, monkeypatch):
    for name, value in WHY[said].items():
        monkeypatch.setenv(name, value)
    ended = subprocess.run([sys.executable, "-c", STATUS], capture_output=True, text=True, timeout=240, check=True)
    assert ended.stdout.startswith("False")
    assert said in ended.stdout


LIBRARY = b"\x7fELF" + bytes(10_000)
SOUND = LIBRARY + b"normkit native sha256 " + hashlib.sha256(LIBRARY).hexdigest().encode()


def test_what_others_could_have_written_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path))
    file = tmp_path / build.filename()
    file.write_bytes(SOUND)
    assert build.path() == file
    file.chmod(0o777)
    assert build.path() is None
    assert build.not_loaded().endswith(f"other users may write to {file}; type: chmod go-w {file}")
    file.chmod(0o755)
    tmp_path.chmod(0o777)
    assert build.path() is None
    assert build.not_loaded().endswith(f"other users may write to {tmp_path}; type: chmod o-w {tmp_path}")
    tmp_path.chmod(0o1777)  # as /tmp: others cannot replace what is not theirs
    assert build.path() == file


@pytest.mark.parametrize("left", [0, 100, 5000, -1])
def test_a_damaged_file_is_not_loaded_and_is_built_anew(left, tmp_path, monkeypatch):
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path))
    file = tmp_path / build.filename()
    file.write_bytes(SOUND[:left])
    assert build.path() is None
    assert build.not_loaded().endswith(f"{file} is damaged; type: normkit native build")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(normkit.errors.BackendError, match="could not be compiled"):
        build.build()
    file.write_bytes(SOUND)
    assert build.build() == file


@pytest.mark.parametrize("word", ["0", "false", "Off", "no"])
def test_words_that_turn_it_off(word, monkeypatch):
    monkeypatch.setenv(build.VARIABLE, word)
    assert build.load() is None
    assert build.not_loaded() == f"the native part is turned off by NORMKIT_NATIVE={word}"


def test_a_counter_below_zero_is_left_to_python(paths):
    layer = normkit.BatchNorm1d(3, momentum=None)
    layer.num_batches_tracked.fill_(-1)
    with pytest.raises(ZeroDivisionError):
        layer(torch.randn(5, 3))
    assert not paths.launched
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_no_compiler_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(normkit.errors.BackendError, match="no C\\+\\+ compiler"):
        build.build(tmp_path / "in")
    assert not (tmp_path / "in").exists()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(normkit.errors.BackendError, match="could not be compiled"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())
