"""The whole catalog in graphs: torch.fx, torch.compile, torch.export, torch.jit.trace, at several sizes."""

import copy

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError
from normkit.layers.catalog import METHODS
from tolerances import assert_close
from torch_versions import uses_torchscript

both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

LAYERS = {
    **{f"{row.name}, {d}": (lambda row=row, d=d: row.build(6, d), d) for row in METHODS for d in row.layers if d < 3},
    "ghost, parts of 2": (lambda: normkit.GhostBatchNorm2d(6, ghost_size=2), 2),
    "ghost, parts of 3": (lambda: normkit.GhostBatchNorm1d(6, ghost_size=3), 0),
    "ghost, untracked": (lambda: normkit.GhostBatchNorm2d(6, ghost_size=3, track_running_stats=False), 2),
    "whitening, untracked": (lambda: normkit.WhiteningBatchNorm2d(6, num_groups=2, track_running_stats=False), 2),
    "group, 2": (lambda: normkit.GroupNorm(2, 6), 2),
    "instance, tracked": (lambda: normkit.InstanceNorm2d(6, affine=True, track_running_stats=True), 2),
    "whitening, iterated": (lambda: normkit.WhiteningBatchNorm2d(6, num_groups=2, iterations=3), 2),
    "batch act": (lambda: normkit.BatchNormAct2d(6), 2),
    "average of all": (lambda: normkit.BatchNorm2d(6, momentum=None), 2),
    "biased": (lambda: normkit.BatchNorm2d(6, unbiased=False), 2),
}
# In the first of the three no two sizes are equal: torch would take them for one, and compile again for the second.
TAILS = {0: ((), (), ()), 1: ((5,), (7,), (4,)), 2: ((5, 9), (3, 4), (6, 5))}
BEFORE = {0: lambda: nn.Linear(6, 6), 1: lambda: nn.Conv1d(6, 6, 2), 2: lambda: nn.Conv2d(6, 6, 2)}
every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, training: bool) -> tuple[nn.Module, list[torch.Tensor]]:
    """The layer with parameters and statistics that are not the starting ones, and inputs of three sizes."""
    make, dimensions = LAYERS[name]
    layer = make()
    for value in layer.parameters():
        nn.init.uniform_(value, 0.5, 1.5)
    inputs = [torch.randn(n, 6, *tail) for n, tail in zip((7, 8, 12), TAILS[dimensions], strict=True)]
    layer(inputs[0] * 2 + 1)
    return layer.train(training), inputs


def assert_agree(found: nn.Module, expected: nn.Module) -> None:
    named = dict(found.named_buffers())
    assert sorted(name.rpartition(".")[2] for name in named) == sorted(
        name.rpartition(".")[2] for name, _ in expected.named_buffers()
    )
    for value, other in zip(named.values(), expected.buffers(), strict=True):
        assert_close(value, other, dtype=torch.float32)


@both_modes
@every_layer
def test_fx_keeps_the_layer_as_one_node(name, training):
    layer, inputs = build(name, training)
    model = nn.Sequential(layer)
    twin = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    if "act" not in name:
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    again = torch.fx.symbolic_trace(traced)
    for x, run in zip(inputs, (traced, again, traced), strict=True):
        if x is inputs[-1]:
            run.train(not training), twin.train(not training)
        assert_close(run(x).detach(), twin(x).detach(), dtype=torch.float32)
    assert_agree(traced, twin)


@both_modes
@every_layer
def test_fx_traces_through_a_layer_alone(name, training):
    layer, inputs = build(name, training)
    # An argument left out is None in the graph where it is said so, as for any module.
    optional = {"adaptive": {"style": None}, "batch act": {"residual": None}}.get(name.partition(",")[0])
    twin, traced = copy.deepcopy(layer), torch.fx.symbolic_trace(layer, optional)
    for x in inputs:
        assert_close(traced(x).detach(), twin(x).detach(), dtype=torch.float32)


def test_fx_passes_a_mask_and_a_style_on():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.masked, self.adaptive = normkit.MaskedBatchNorm1d(3), normkit.AdaptiveInstanceNorm(3)

        def forward(self, x, mask, style):
            return self.adaptive(self.masked(x, mask), style)

    net = Net()
    twin, given = copy.deepcopy(net), (torch.randn(4, 3, 5), torch.rand(4, 5) > 0.3, torch.randn(4, 3, 6))
    assert_close(torch.fx.symbolic_trace(net)(*given).detach(), twin(*given).detach(), dtype=torch.float32)


def test_fx_does_not_keep_one_step_of_a_schedule_for_ever():
    layer = normkit.BatchRenorm2d(3, schedule=lambda step: (1.0 + step, float(step)))
    with pytest.raises(ArgumentError, match=r"schedule.*nn.Sequential"):
        torch.fx.symbolic_trace(layer)
    traced, twin = torch.fx.symbolic_trace(nn.Sequential(layer)), copy.deepcopy(layer)
    for x in torch.randn(3, 4, 3, 5, 5) * 3:
        assert_close(traced(x).detach(), twin(x).detach(), dtype=torch.float32)


@both_modes
@every_layer
def test_compiled_at_several_sizes_without_a_graph_break(name, training):
    layer, inputs = build(name, training)
    model = nn.Sequential(BEFORE[LAYERS[name][1]](), layer)
    twin = copy.deepcopy(model)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in inputs:
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = compiled(leaf), twin(other)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
        wanted = torch.autograd.grad(expected, [other, *twin[1].parameters()], dy)
        assert y.stride() == expected.stride()
        for one, two in zip([y, *found], [expected, *wanted], strict=True):
            assert_close(one.detach(), two.detach(), dtype=torch.float32)
    assert graphs["unique_graphs"] == 1, "compiled again for another size"
    assert_agree(layer, twin[1])


@uses_torchscript  # which torch imports for itself, where the first compiling of a process is this one
@pytest.mark.parametrize("name", ["group, 2", "instance, 2"])
def test_torchs_own_compiler_takes_a_second_size_behind_a_convolution(name):
    """There a size is an expression, on which its CPU backend fails where a view splits the channels."""
    layer, _ = build(name, True)
    # Without a bias: the norm takes it out again, so that its gradient would be rounding alone.
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), layer)
    compiled = torch.compile(model)
    for size, height in ((4, 8), (5, 7), (3, 11)):
        x = torch.randn(size, 3, height, height)
        y, expected = compiled(x), model(x)
        assert_close(y.detach(), expected.detach(), dtype=torch.float32)
        dy = torch.randn_like(y)
        exact = copy.deepcopy(model).double()
        wide = torch.autograd.grad(exact(x.double()), exact.parameters(), dy.double())
        for found, wanted in zip(torch.autograd.grad(y, model.parameters(), dy), wide, strict=True):
            assert_close(found, wanted, dtype=torch.float32)


@both_modes
@every_layer
def test_exported_for_any_batch(name, training):
    layer, inputs = build(name, training)
    refused = name in ("biased", "average of all") or name.startswith(("ghost", "renorm", "whitening"))
    if training and refused and not name.endswith("untracked"):
        kept = copy.deepcopy(layer.state_dict())
        with pytest.raises(ArgumentError, match=r"move_exported_model_to_eval.*export after eval\(\)"):
            torch.export.export(layer, (inputs[0],))
        assert all(map(torch.equal, layer.state_dict().values(), kept.values()))
        return
    if name == "ghost, parts of 3":
        inputs = [torch.randn(n, 6) for n in (7, 8, 12)]
    twin = copy.deepcopy(layer)
    batch = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(layer, (inputs[0],), dynamic_shapes=batch).module()
    for x in (inputs[0][:3], inputs[0], inputs[0].repeat(2, *(1 for _ in inputs[0].shape[1:]))[:11]):
        assert_close(exported(x).detach(), twin(x).detach(), dtype=torch.float32)
    assert_agree(exported, twin)


def test_an_export_in_training_that_no_tool_would_find_is_refused_of_masks_and_schedules_too():
    masked, x = normkit.MaskedBatchNorm1d(3), torch.randn(4, 3, 5)
    scheduled = normkit.BatchRenorm1d(3, schedule=lambda step: (1.5, 0.5))
    for layer, given in ((masked, (x, torch.ones(4, 5, dtype=torch.bool))), (scheduled, (x,))):
        with pytest.raises(ArgumentError, match=r"move_exported_model_to_eval.*export after eval\(\)"):
            torch.export.export(layer, given)
        exported = torch.export.export(layer.eval(), given).module()
        assert_close(exported(*given).detach(), layer(*given).detach(), dtype=torch.float32)
    # The batch norm that it is without a mask is torch's operator.
    torch.export.export(masked.train(), (x,))


@uses_torchscript
@both_modes
@every_layer
def test_traced_for_any_batch(name, training):
    layer, inputs = build(name, training)
    traced = torch.jit.trace(layer, inputs[0], check_trace=False)
    twin = copy.deepcopy(layer)
    for x in inputs:
        assert_close(traced(x).detach(), twin(x).detach(), dtype=torch.float32)
    assert_agree(traced, twin)


@uses_torchscript
def test_a_trace_of_equal_parts_takes_unequal_ones():
    layer = normkit.GhostBatchNorm1d(3, ghost_size=4, track_running_stats=False)
    traced = torch.jit.trace(layer, torch.randn(8, 3), check_trace=False)
    for samples in (7, 9, 8):
        x = torch.randn(samples, 3)
        assert_close(traced(x).detach(), layer(x).detach(), dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")  # of the exporter to ONNX about its own parts
@pytest.mark.parametrize("dimensions", TAILS)
def test_evaluation_runs_in_onnxruntime(dimensions):
    """The layers side by side in one model: to begin an export takes longer than most of them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    # ONNX has no eigenvalues, of which whitening by the batch's own statistics takes the root.
    names = [name for name, (_, of) in LAYERS.items() if of == dimensions and name != "whitening, untracked"]
    built = [build(name, False) for name in names]

    class Together(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layer for layer, _ in built)

        def forward(self, x):
            return tuple(layer(x) for layer in self.layers)

    x = built[0][1][0]
    batch = ({0: torch.export.Dim("batch", min=2)},)
    model = Together().eval()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=batch)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for given in (x, x[:3] * 3):
        found = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        for name, y, expected in zip(names, found, model(given), strict=True):
            assert_close(torch.from_numpy(y), expected.detach(), dtype=torch.float32, what=name)


def test_whitening_in_evaluation_is_as_exact_in_a_graph_for_others():
    """Eigenvalues down to 1e-9 of the largest, in groups."""
    layer = normkit.WhiteningBatchNorm1d(6, num_groups=2, eps=1e-9)
    scale = torch.tensor([1.0, 1e-2, 1e-4, 1.0, 1.0, 1e-4])
    layer(torch.randn(64, 6) * scale)
    x = torch.randn(16, 6) * scale
    exported = torch.export.export(layer.eval(), (x,))
    assert not [node for node in exported.graph.nodes if "linalg" in str(node.target)]
    assert_close(exported.module()(x).detach(), layer(x).detach(), dtype=torch.float32)
