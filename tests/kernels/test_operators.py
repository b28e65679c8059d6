"""The operators that torch.compile sees: opcheck, no graph break, and eager's results in every bit."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.functional import batch_norm
from normkit.kernels import operators
from tolerances import assert_close

# opcheck's fourth test, tracing with AOTAutograd, is what every compiled layer below goes through.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")

CASES = (
    (torch.float32, torch.contiguous_format, "relu", True),
    (torch.float32, torch.contiguous_format, None, False),
    (torch.float32, torch.channels_last, "silu", True),
    (torch.float64, torch.channels_last, None, True),
    (torch.bfloat16, torch.contiguous_format, None, False),
    (torch.float16, torch.channels_last, None, False),
)


class Graphs:
    """A backend that keeps what it was given, and runs it through AOTAutograd, forward and backward."""

    def __init__(self):
        self.operators: list[str] = []

    def __call__(self, graph, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def note(graph, _inputs):
            self.operators += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=note, bw_compiler=note)(graph, inputs)

    def holds(self, name: str) -> bool:
        return any(f"normkit.{name}" in found for found in self.operators)


def sample(dtype=torch.float32, memory_format=torch.contiguous_format, gradients=True):
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    x, residual = (torch.randn(4, 3, 5, 7).to(dtype).to(memory_format=memory_format) for _ in range(2))
    weight, bias = torch.rand(3, dtype=exact) + 0.5, torch.randn(3, dtype=exact)
    leaves = [value.requires_grad_(gradients) for value in (x, weight, bias, residual)]
    return leaves, (torch.randn(3, dtype=exact), torch.rand(3, dtype=exact) + 0.5)


# By operator of form 2: what it takes, and the shape and type of what it returns for the sample with statistics.
FORMS = {
    "repeated": ("(Tensor x, str refusal) -> Tensor", [((), "bool")]),
    "batch_norm_forward": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, Tensor? running_var, "
        "Tensor? num_batches_tracked, float? momentum, float eps, bool unbiased, str? activation) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        [((4, 3, 5, 7), "float32"), ((2, 3), "float64"), ((3,), "float32"), ((3,), "float32"), ((), "int64")],
    ),
    "batch_norm_inference": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor running_var, "
        "float eps, str? activation) -> (Tensor, Tensor)",
        [((4, 3, 5, 7), "float32"), ((2, 3), "float64")],
    ),
    "batch_norm_backward": (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor saved, Tensor? other, str? activation, "
        "bool residual, bool frozen) -> (Tensor, Tensor, Tensor)",
        [((4, 3, 5, 7), "float32"), ((2, 3), "float32"), ((4, 3, 5, 7), "float32")],
    ),
}


def test_an_operator_that_changes_gets_another_name():
    """Else graphs that torch has kept on a user's disk are run with it; this fails: raise FORM, then write it anew."""
    assert operators.FORM == 2
    (x, weight, bias, residual), (mean, var) = sample(gradients=False)
    saved = torch.zeros(2, 3, dtype=torch.float64)
    arguments = {
        "repeated": (x, ""),
        "batch_norm_forward": (x, weight, bias, residual, mean, var, torch.tensor(2), 0.1, 1e-5, True, "relu"),
        "batch_norm_inference": (x, weight, bias, residual, mean, var, 1e-5, "relu"),
        "batch_norm_backward": (x, x, weight, bias, saved, residual, "relu", True, False),
    }
    for name, (schema, returned) in FORMS.items():
        operator = getattr(operators, name)
        assert operator._opoverload._schema.name == f"normkit::{name}_2"
        assert str(operator._opoverload._schema).removeprefix(f"normkit::{name}_2") == schema
        found = operator(*arguments[name])
        found = [found] if isinstance(found, Tensor) else found
        assert [(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for each in found] == returned


@pytest.mark.parametrize(("dtype", "memory_format", "activation", "with_residual"), CASES, ids=str)
def test_opcheck_passes(dtype, memory_format, activation, with_residual):
    (x, weight, bias, residual), (mean, var) = sample(dtype, memory_format)
    residual = residual if with_residual else None
    given = (x, weight, bias, residual)
    forward = (*given, mean, var, None, 0.1, 1e-5, True, activation)
    torch.library.opcheck(operators.batch_norm_forward, forward, test_utils=CHECKS)
    torch.library.opcheck(operators.batch_norm_inference, (*given, mean, var, 1e-5, activation), test_utils=CHECKS)
    detached = [None if value is None else value.detach() for value in given]
    y, saved, *_ = operators.batch_norm_forward(*detached, *forward[4:])
    other = None if residual is None or activation is None else (y if activation == "relu" else detached[3])
    backward = (torch.randn_like(y), *detached[:3], saved, other, activation, with_residual)
    for frozen in (False, True):
        torch.library.opcheck(operators.batch_norm_backward, (*backward, frozen), test_utils=CHECKS)


def test_opcheck_passes_without_parameters_and_for_a_strided_input():
    x = torch.randn(4, 6, 5, 7)[:, ::2].requires_grad_()
    rest = (None, None, None, None, None, None, 0.1, 1e-5, True, None)
    torch.library.opcheck(operators.batch_norm_forward, (x, *rest), test_utils=CHECKS)
    torch.library.opcheck(
        operators.batch_norm_forward, (x, *rest[:5], torch.tensor(2), None, *rest[7:]), test_utils=CHECKS
    )


def run(layer, x, residual=None, called=None):
    """Everything a step gives; with ``called`` through that, the layer's compiled twin."""
    called = layer if called is None else called
    leaf = x.clone().requires_grad_()
    shortcut = None if residual is None else residual.clone().requires_grad_()
    y = called(leaf) if residual is None else called(leaf, shortcut)
    leaves = [leaf, *layer.parameters(), *([] if residual is None else [shortcut])]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), *layer.buffers()]


def assert_identical(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"result {index}"
        assert one.stride() == other.stride(), f"result {index}"


def layers(training, **settings):
    for make, shortcut in (
        (normkit.BatchNorm2d, False),
        (normkit.BatchNormAct2d, False),
        (normkit.BatchNormAct2d, True),
    ):
        layer = make(3, **settings)
        for value in layer.parameters():
            nn.init.normal_(value)
        layer(torch.randn(4, 3, 2, 2))
        yield layer.train(training), shortcut


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_layer_is_eager_in_every_bit_and_holds_one_operator(training, momentum, memory_format):
    x, shortcut = (torch.randn(4, 3, 5, 7).to(memory_format=memory_format) for _ in range(2))
    for layer, with_residual in layers(training, momentum=momentum):
        twin, graphs = copy.deepcopy(layer), Graphs()
        compiled = torch.compile(layer, fullgraph=True, backend=graphs)
        residual = shortcut if with_residual else None
        for _ in range(2):
            expected = run(twin, x, residual)
            found = run(layer, x, residual, compiled)
            assert_identical(found, expected)
        assert graphs.holds("batch_norm_forward" if training else "batch_norm_inference")
        assert graphs.holds("batch_norm_backward")


def test_use_backend_holds_inside_a_compiled_graph():
    (layer, _), x = next(layers(True)), torch.randn(4, 3, 5, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    with normkit.use_backend("plain"):
        y = compiled(x)
        expected = layer(x)
    assert torch.equal(y, expected)
    with normkit.use_backend("triton"), pytest.raises(normkit.errors.BackendError, match="triton"):
        compiled(x)


def test_compiled_vmap_still_runs():
    x = torch.randn(5, 4, 3, 7)
    function = torch.func.vmap(lambda one: batch_norm(one, None, None, training=True))
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert_close(found, function(x), dtype=torch.float32)


def test_compiled_graph_follows_the_batch_size():
    layer = normkit.BatchNormAct2d(3)
    twin, compiled = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size, height in itertools.product((4, 9), (5, 11)):
        x = torch.randn(size, 3, height, 7)
        assert torch.equal(compiled(x), twin(x))


def test_export_of_the_fused_layer_holds_torchs_operators_alone():
    x, shortcut = torch.randn(4, 3, 5, 7), torch.randn(4, 3, 5, 7)
    for training in (True, False):
        layer = normkit.BatchNormAct2d(3).train(training)
        exported = torch.export.export(layer, (x, shortcut))
        names = [node.target.name() for node in exported.graph.nodes if node.op == "call_function"]
        assert "aten::batch_norm" in names
        assert all(name.startswith("aten::") for name in names)
        assert_close(exported.module()(x, shortcut), copy.deepcopy(layer)(x, shortcut), dtype=torch.float32)
