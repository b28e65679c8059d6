"""Our layers where torch's are used: graph makers, checkpoints, autocast, vmap, in-place changes.

What torch does is run beside ours wherever ours differs on purpose.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, replace_all_batch_norm_modules_, stack_module_state, vmap
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import normkit
from tolerances import assert_close
from torch_versions import uses_torchscript

# torch calls TorchScript deprecated; the table of promises still has it.
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
both_momenta = pytest.mark.parametrize("momentum", [0.1, None])


@pytest.fixture
def x():
    return torch.randn(4, 3, 5, 7)


def twins(training=True, **settings):
    """Our layer and torch's, with equal parameters that are not the starting ones."""
    ours, theirs = normkit.BatchNorm2d(3, **settings), nn.BatchNorm2d(3, **settings)
    with torch.no_grad():
        for value in theirs.parameters():
            value.uniform_(0.5, 1.5)
    theirs(torch.randn(4, 3, 2, 2))
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def assert_agree(ours, theirs, outputs=()):
    for found, expected in [*outputs, *zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)]:
        assert_close(found.detach(), expected.detach(), dtype=torch.float32)


@uses_torchscript
@both_momenta
@both_modes
def test_script_matches_torch(x, training, momentum):
    ours, theirs = twins(training, momentum=momentum)
    scripted = torch.jit.script(ours)
    assert_agree(ours, theirs, [(scripted(x), theirs(x))])


@uses_torchscript
def test_script_refuses_what_torchscript_cannot_store():
    with pytest.raises(normkit.errors.ArgumentError, match=r"TorchScript.*biased variance"):
        torch.jit.script(normkit.BatchNorm2d(3, unbiased=False))


@uses_torchscript
@pytest.mark.parametrize("layer", [normkit.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 3, 1), normkit.BatchNorm2d(3))])
@both_modes
def test_trace_warns_of_nothing_and_can_be_saved(x, training, layer):
    layer = copy.deepcopy(layer).train(training)
    traced = torch.jit.trace(layer, x, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other, twin = torch.randn(2, 3, 9, 4), copy.deepcopy(layer)
    loaded = torch.jit.load(file)
    assert_close(loaded(other), twin(other), dtype=torch.float32)
    for name, value in twin.state_dict().items():
        assert_close(loaded.state_dict()[name], value, dtype=torch.float32, what=name)


@uses_torchscript
@pytest.mark.parametrize("settings", [{"unbiased": False}, {"momentum": None}], ids=str)
def test_trace_of_what_torch_has_no_operator_for_matches(x, settings):
    layer = normkit.BatchNorm2d(3, **settings)
    twin = copy.deepcopy(layer)
    traced = torch.jit.trace(layer, x, check_trace=False)
    twin(x)
    assert_close(traced(x), twin(x), dtype=torch.float32)
    for name, value in twin.state_dict().items():
        assert_close(traced.state_dict()[name], value, dtype=torch.float32, what=name)


@both_modes
def test_fx_trace_matches_and_holds_one_node(x, training):
    ours, theirs = twins(training)
    traced = torch.fx.symbolic_trace(nn.Sequential(ours))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_agree(ours, theirs, [(traced(x), theirs(x))])
    inside = torch.fx.symbolic_trace(ours)
    assert [node.op for node in inside.graph.nodes if node.op.startswith("call")] == ["call_function"]
    assert_agree(ours, theirs, [(inside(x), theirs(x))])


def test_fx_graph_follows_train_and_eval(x):
    ours, theirs = twins()
    traced = torch.fx.symbolic_trace(nn.Sequential(ours)).eval()
    assert_agree(ours, theirs, [(traced(x), theirs.eval()(x))])
    assert traced.train()(x).mean().abs() < 2
    assert ours.num_batches_tracked == 2


@both_momenta
@both_modes
def test_compiled_layer_has_no_graph_break(x, training, momentum):
    ours, theirs = twins(training, momentum=momentum)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    leaf, twin, dy = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn_like(x)
    y, expected = compiled(leaf), theirs(twin)
    named, wanted = [leaf, *ours.parameters()], [twin, *theirs.parameters()]
    pairs = zip(torch.autograd.grad(y, named, dy), torch.autograd.grad(expected, wanted, dy), strict=True)
    assert_agree(ours, theirs, [(y, expected), *pairs])


def test_torch_cannot_compile_the_plain_average(x):
    with pytest.raises(RuntimeError, match="data-dependent"):
        torch.compile(nn.BatchNorm2d(3, momentum=None), fullgraph=True, backend="aot_eager")(x)


@both_modes
def test_compiled_layer_takes_any_batch_size(training):
    ours, theirs = twins(training)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(4, 3, 5, 7), (9, 3, 2, 11), (2, 3, 4, 4)]:
        x = torch.randn(shape)
        assert_close(compiled(x).detach(), theirs(x).detach(), dtype=torch.float32)
    assert_agree(ours, theirs)


def test_compiled_layer_refuses_with_nothing_changed():
    layer = normkit.BatchNorm2d(3)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    compiled = torch.compile(layer, backend="aot_eager")
    with pytest.raises(normkit.errors.ShapeError, match="expected 3 channels"):
        compiled(torch.randn(4, 2, 5, 7))
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


def _operators(exported):
    return [node.target.name() for node in exported.graph.nodes if node.op == "call_function"]


def test_exported_graph_is_torchs(x):
    for training in (True, False):
        ours, theirs = twins(training)
        batch = {"input": {0: torch.export.Dim("batch", min=2)}}
        mine, other = (torch.export.export(layer, (x,), dynamic_shapes=batch) for layer in (ours, theirs))
        assert _operators(mine) == _operators(other)
        assert "aten::batch_norm" in _operators(mine)
        y = torch.randn(2, 3, 5, 7)
        assert_close(mine.module()(y), other.module()(y), dtype=torch.float32)


@pytest.mark.parametrize("settings", [{"unbiased": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("make", [normkit.BatchNorm2d, normkit.BatchNormAct2d])
def test_export_in_training_refuses_what_torchs_operator_cannot_store(x, make, settings):
    """A graph of plain operations would not follow move_exported_model_to_eval, and stay in training unseen."""
    layer = make(3, **settings)
    kept = copy.deepcopy(layer.state_dict())
    with pytest.raises(normkit.errors.ArgumentError, match=r"move_exported_model_to_eval.*export after eval\(\)"):
        torch.export.export(layer, (x,), strict=False)
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())
    exported = torch.export.export(layer.eval(), (x,))
    assert "aten::batch_norm" in _operators(exported)
    untracked = make(3, track_running_stats=False, **settings)
    assert "aten::batch_norm" in _operators(torch.export.export(untracked, (x,)))


def test_autocast_follows_the_layer_before(x):
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 3, 1), layer) for layer in twins())
    theirs[0].load_state_dict(ours[0].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert ours[1](x).dtype is theirs[1](x).dtype is torch.float32
        found, expected = ours(x), theirs(x)
    assert found.dtype is expected.dtype is torch.bfloat16
    dy = torch.randn_like(x).bfloat16()
    for net, y in ((ours, found), (theirs, expected)):
        y.backward(dy)
        assert [value.grad.dtype for value in net.parameters()] == [torch.float32] * 4
    assert_close(ours[1].bias.grad, theirs[1].bias.grad, dtype=torch.bfloat16)


def test_half_input_with_a_float_layer_keeps_both_types(x):
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = twins()
        assert ours(x.to(dtype)).dtype is theirs(x.to(dtype)).dtype is dtype
        assert ours.running_mean.dtype is torch.float32
        assert_close(ours.running_mean, theirs.running_mean, dtype=torch.float32)


def test_vmap_works_where_torchs_does(x):
    samples = x[:, None]
    for make in (
        lambda library: library.BatchNorm2d(3, track_running_stats=False),
        lambda library: library.BatchNorm2d(3).eval(),
    ):
        assert_close(vmap(make(normkit))(samples), vmap(make(nn))(samples), dtype=torch.float32)
    replaced = [replace_all_batch_norm_modules_(nn.Sequential(library.BatchNorm2d(3))) for library in (normkit, nn)]
    assert_close(vmap(replaced[0])(samples), vmap(replaced[1])(samples), dtype=torch.float32)


def test_stacked_layers_run_as_an_ensemble(x):
    layers = [twins(False)[0] for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    assert_close(found, torch.stack([layer(x) for layer in layers]), dtype=torch.float32)


@pytest.mark.parametrize("library", [normkit, nn], ids=["normkit", "torch"])
@both_modes
@pytest.mark.parametrize("changed", ["input", "weight"])
def test_change_between_forward_and_backward_raises(x, library, training, changed):
    layer = library.BatchNorm2d(3).train(training)
    value = x.requires_grad_() * 1
    y = layer(value)
    with torch.no_grad():
        (value if changed == "input" else layer.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn_like(y))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_changed_statistics_raise_where_the_gradient_needs_them(x, name):
    for library in (normkit, nn):
        layer = library.BatchNorm2d(3).eval()
        y = layer(x.clone().requires_grad_())
        getattr(layer, name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.randn_like(y))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_a_forward_moved_raise_too(x, name):
    """A kernel wrote them, past what autograd sees. torch's own layer is silent here, and its gradient then wrong."""
    layer = normkit.BatchNorm2d(3)
    held = {"running_mean": layer.running_mean.clone(), "running_var": layer.running_var.clone()}
    held[name] = getattr(layer, name)
    y = normkit.functional.batch_norm(x.clone().requires_grad_(), **held)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn_like(y))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_changed_statistics_do_not_matter_to_the_gradient_of_training(x, name):
    """A broadcast of buffers between forward and backward, as DDP does it, is no error: the gradient is the same."""
    ours, theirs = twins()
    dy, gradients = torch.randn_like(x), []
    for change in (False, True):
        leaf = x.clone().requires_grad_()
        y = copy.deepcopy(ours).requires_grad_(False)
        output = y(leaf)
        if change:
            getattr(y, name).add_(1)
        gradients.append(torch.autograd.grad(output, leaf, dy)[0])
    assert torch.equal(*gradients)
    y = theirs(x.clone().requires_grad_())
    getattr(theirs, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_layer_used_twice_before_the_backward(x):
    ours, theirs = twins()
    leaf, twin, dy = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn_like(x)
    found = torch.autograd.grad(ours(ours(leaf) * 2), leaf, dy)[0]
    expected = torch.autograd.grad(theirs(theirs(twin) * 2), twin, dy)[0]
    assert_agree(ours, theirs, [(found, expected)])
    assert ours.num_batches_tracked == 3


def test_no_grad_in_training_still_updates(x):
    ours, theirs = twins()
    with torch.no_grad():
        ours(x), theirs(x)
    with torch.inference_mode():
        ours(x), theirs(x)
    assert_agree(ours, theirs)
    assert ours.num_batches_tracked == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once_where_torch_counts_twice(x, reentrant):
    for layer, counted in zip(twins(), (2, 3), strict=True):  # one from the set-up
        leaf = x.clone().requires_grad_()
        # Something follows the layer, or the repetition may stop before it counts.
        checkpoint(nn.Sequential(layer, nn.Sigmoid()), leaf, use_reentrant=reentrant).sum().backward()
        assert layer.num_batches_tracked == counted


def test_evaluation_never_writes_a_buffer(x):
    ours, _ = twins(False)
    kept = {name: (value.clone(), value._version) for name, value in ours.state_dict().items()}
    ours(x), ours(x * 1e30), ours(x[:0])
    for name, value in ours.state_dict().items():
        assert torch.equal(value, kept[name][0])
        assert value._version == kept[name][1]


@pytest.mark.parametrize("kind", ["version 1", "plain", "version 2", "none"])
def test_state_dict_without_a_counter_loads_as_in_torch(kind):
    """The three ways, in both directions: ours reads torch's, torch reads ours."""
    for source, target in ((nn, normkit), (normkit, nn), (nn, nn)):
        state = source.BatchNorm2d(3).state_dict()
        del state["num_batches_tracked"]
        layer = target.BatchNorm2d(3)
        layer.num_batches_tracked.fill_(5)
        if kind == "version 2":
            with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
                layer.load_state_dict(state)
            continue
        if kind == "plain":
            state = dict(state)
        else:
            state._metadata[""]["version"] = 1 if kind == "version 1" else None
        assert str(layer.load_state_dict(state)) == "<All keys matched successfully>"
        expected = nn.BatchNorm2d(3)
        expected.num_batches_tracked.fill_(5)
        expected.load_state_dict(state)
        assert layer.num_batches_tracked == expected.num_batches_tracked


@pytest.mark.parametrize("fault", ["missing", "unexpected", "size"])
def test_strict_loading_names_the_key_as_torch(fault):
    messages = []
    for library in (normkit, nn):
        state = nn.BatchNorm2d(3).state_dict()
        if fault == "missing":
            del state["running_var"]
        elif fault == "unexpected":
            state["gamma"] = torch.ones(3)
        else:
            state["weight"] = torch.ones(4)
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for BatchNorm2d") as caught:
            library.BatchNorm2d(3).load_state_dict(state)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_half_state_dict_is_cast(x):
    layer = normkit.BatchNorm2d(3)
    layer.load_state_dict(nn.BatchNorm2d(3).half().state_dict())
    assert layer.weight.dtype is torch.float32


def test_state_dict_can_be_assigned_to_a_meta_layer(x):
    _, theirs = twins(False)
    layer = normkit.BatchNorm2d(3, device="meta").eval()
    layer.load_state_dict(theirs.state_dict(), assign=True)
    assert_close(layer(x), theirs(x), dtype=torch.float32)


def test_settings_survive_copies():
    layer = normkit.BatchNorm2d(3, decay=0.75, unbiased=False, bias=False)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.momentum, twin.unbiased, twin.bias) == (0.25, False, None)
        assert repr(twin) == repr(layer)


def test_lazy_layer_can_be_pickled_before_its_first_input(x):
    lazy = normkit.LazyBatchNorm2d(decay=0.75, unbiased=False)
    layer = pickle.loads(pickle.dumps(lazy))
    assert layer(x).shape == x.shape
    assert repr(layer) == repr(normkit.BatchNorm2d(3, decay=0.75, unbiased=False))


@pytest.mark.parametrize("settings", [{"affine": False, "track_running_stats": False}, {"affine": False}, {}], ids=str)
def test_lazy_layer_learns_its_channels_whatever_state_it_has(x, settings):
    lazy = normkit.LazyBatchNorm2d(**settings)
    assert lazy(x).shape == x.shape
    assert lazy.num_features == 3


def test_whole_module_is_not_loaded_without_trust():
    file = io.BytesIO()
    torch.save(normkit.BatchNorm2d(3), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file)


@both_momenta
def test_fake_and_meta_tensors_give_the_shape(momentum):
    with FakeTensorMode():
        y = normkit.BatchNorm2d(3, momentum=momentum)(torch.randn(4, 3, 5, 7))
        assert y.shape == (4, 3, 5, 7)
    layer = normkit.BatchNorm2d(3, momentum=momentum, device="meta")
    assert layer(torch.randn(4, 3, 5, 7, device="meta")).is_meta
    if momentum is None:
        with pytest.raises(RuntimeError, match="meta tensors"):
            nn.BatchNorm2d(3, momentum=None, device="meta")(torch.randn(4, 3, 5, 7, device="meta"))


@pytest.mark.parametrize(("decay", "momentum"), [(0.9, 0.1), (0.99, 0.01), (0.999, 0.001), (1, 0.0), (0.0, 1.0)])
def test_decay_is_the_weight_of_the_old_value(decay, momentum):
    layer = normkit.BatchNorm1d(2, decay=decay)
    assert layer.momentum == momentum
    layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    assert_close(layer.running_mean, torch.tensor([2.0, 20.0]) * momentum, dtype=torch.float32)
    assert normkit.LazyBatchNorm1d(decay=decay).momentum == momentum


def test_unbiased_false_stores_the_variance_that_keras_and_onnx_store():
    x = torch.tensor([[1.0], [3.0]])
    stored = {}
    for unbiased in (True, False):
        layer = normkit.BatchNorm1d(1, momentum=1.0, unbiased=unbiased)
        layer(x)
        stored[unbiased] = layer.running_var.item()
    assert stored == {True: 2.0, False: 1.0}
    assert "unbiased=False" in repr(layer)


def test_torchs_tools_know_our_layers():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), normkit.BatchNorm2d(3, momentum=0.3))
    assert isinstance(net[1], nn.BatchNorm2d)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))[1]) is nn.SyncBatchNorm
    x = torch.randn(8, 3, 4, 4)
    net.train()(x)
    net.eval()
    fused = torch.nn.utils.fuse_conv_bn_eval(net[0], net[1])
    assert_close(fused(x), net(x), dtype=torch.float32)


def through_parametrization(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    parametrize.register_parametrization(layer, "running_var", nn.Identity())
    return layer


def through_pruning(layer):
    prune.identity(layer, "weight")
    return layer


def through_attributes(layer):
    """As replicas of a layer hold them, and models that make their weights."""
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        value = getattr(layer, name).detach().clone()
        delattr(layer, name)
        setattr(layer, name, value)
    return layer


def with_a_property_by_hand(layer):
    """A class of the user's that makes its weight; the table holds another."""
    layer.__class__ = type("Doubled", (type(layer),), {"weight": property(lambda self: self._parameters["weight"] * 2)})
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "put", [through_parametrization, through_pruning, through_attributes, with_a_property_by_hand, copy.deepcopy]
)
def test_state_is_found_wherever_it_is_kept(put, training):
    x = torch.randn(8, 3)
    found = []
    for make in (nn.BatchNorm1d, normkit.BatchNorm1d):
        layer = make(3).train(training)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
            layer.running_var.copy_(torch.tensor([0.5, 2.0, 3.0]))
        layer = put(layer)
        found.append([layer(x), layer.running_mean, layer.running_var, layer.num_batches_tracked])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
