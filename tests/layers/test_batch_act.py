"""BatchNormAct: state, surgery by others, and when it runs fused or in parts."""

import copy
import re

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError, BackendError
from normkit.functional import batch_norm
from normkit.kernels.native import calls as native
from normkit.kernels.numba.channels import launch as channel_launch
from tolerances import assert_close


@pytest.fixture
def fused(monkeypatch):
    """Every activation that a kernel applied, by either path."""
    found, kernel = set(), channel_launch.kernel

    def noted(name, dtype, activation, residual):
        found.add(activation)
        return kernel(name, dtype, activation, residual)

    monkeypatch.setattr(channel_launch, "kernel", noted)
    native.watch(lambda name, dtype, activation, residual: found.add(activation))
    yield found
    native.watch(None)


@pytest.fixture
def x():
    return torch.randn(4, 3, 5, 7)


def trained(layer, x):
    for value in layer.parameters():
        nn.init.normal_(value)
    layer(x)
    return layer


def test_state_dict_has_the_keys_of_a_bare_batch_norm(x):
    layer, bare = trained(normkit.BatchNormAct2d(3), x), nn.BatchNorm2d(3)
    assert list(layer.state_dict()) == list(bare.state_dict())
    bare.load_state_dict(layer.state_dict())
    assert torch.equal(bare.running_var, layer.norm.running_var)


def test_checkpoint_of_conv_bn_relu_loads(x):
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    plain(x)
    fused = nn.Sequential(nn.Conv2d(3, 6, 3), normkit.BatchNormAct2d(6))
    assert str(fused.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    assert_close(fused.eval()(x), plain.eval()(x), dtype=torch.float32)


def test_missing_key_is_named_as_the_checkpoint_names_it():
    state = nn.BatchNorm2d(3).state_dict()
    del state["running_var"]
    with pytest.raises(RuntimeError, match=r"running_var"):
        normkit.BatchNormAct2d(3).load_state_dict(state)


def test_our_own_part_runs_fused(x, fused):
    normkit.BatchNormAct2d(3)(x)
    assert "relu" in fused


def test_conversion_to_sync_batch_norm_keeps_the_activation(x, fused):
    layer = trained(normkit.BatchNormAct2d(3, activation="leaky_relu"), x).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer)).eval()
    assert type(converted.norm) is nn.SyncBatchNorm
    fused.clear()
    y = converted(x, x)
    assert not fused
    assert_close(y, layer(x, x), dtype=torch.float32)
    assert list(converted.state_dict()) == list(layer.state_dict())


def test_swapped_part_runs_unfused(x, fused):
    layer = normkit.BatchNormAct2d(3)
    layer.norm = nn.Identity()
    assert torch.equal(layer(x, x), torch.relu(x + x))
    assert not fused


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooked_part_runs_unfused_and_its_hook_is_called(x, fused, kind):
    layer, seen = normkit.BatchNormAct2d(3), []
    getattr(layer.norm, f"register_{kind}_hook")(lambda *given: seen.append(given))
    leaf = x.requires_grad_()
    layer(leaf).square().sum().backward()
    assert len(seen) == 1
    assert fused == {None}


def test_fx_trace_runs_alike_and_follows_eval(x):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), normkit.BatchNormAct2d(3, activation="silu"))
    trained(model, x)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert_close(traced(x), copy.deepcopy(model)(x), dtype=torch.float32)
    assert_close(traced.eval()(x), traced.eval()(x), dtype=torch.float32)


def test_requested_backend_is_honoured(x, fused):
    layer = normkit.BatchNormAct2d(3)
    with normkit.use_backend("plain"):
        assert normkit.explain(layer.norm, x).backend == "plain"
        plain = layer(x)
    assert not fused
    with normkit.use_backend("numba"):
        assert_close(layer(x), plain, dtype=torch.float32)
    assert fused


def test_requested_backend_that_cannot_serve_is_refused_with_the_reason(x):
    layer = normkit.BatchNormAct2d(3)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    with normkit.use_backend("numba"), pytest.raises(BackendError, match="transform is active"):
        torch.func.vmap(lambda one: batch_norm(one, None, None, training=True))(x[None])
    with normkit.use_backend("triton"), pytest.raises(BackendError, match="triton"):
        layer(x.double().float())
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())
    with pytest.raises(ArgumentError, match="unknown backend"), normkit.use_backend("cuda"):
        pass


def test_unknown_activation_is_refused():
    with pytest.raises(ArgumentError, match=r"unknown activation 'gelu'; did you mean 'relu'. Known are: relu, relu6"):
        normkit.BatchNormAct2d(3, activation="gelu")


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (nn.ReLU(), "pass its name, 'relu'"),
        (nn.LeakyReLU, "pass its name, 'leaky_relu'"),
        (nn.functional.silu, "pass its name, 'silu'"),
        (nn.Tanh(), "pass a name; known are: relu"),
        (["relu"], "pass a name; known are: relu"),
    ],
)
def test_an_activation_that_is_no_name_is_told_its_name(given, advice):
    with pytest.raises(ArgumentError, match=re.escape(advice)):
        normkit.BatchNormAct2d(3, activation=given)
    with pytest.raises(ArgumentError, match=re.escape(advice)):
        batch_norm(torch.randn(2, 3), None, None, training=True, activation=given)
