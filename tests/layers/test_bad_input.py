"""Input and settings that a batch norm must refuse: with which words, and with nothing changed.

Every row also says what torch 2.13 does with the same, and that is run too: where torch accepts, or has already
counted the batch when it raises, ours is better and stays so.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit
from normkit.errors import ArgumentError, DtypeError, ShapeError, StatisticsError
from normkit.functional import batch_norm

ACCEPTS = None
X = torch.arange(420.0).reshape(4, 3, 5, 7).sin()


def fingerprint(module: nn.Module) -> dict[str, object]:
    """Every bit of the state, and the settings."""
    state = {name: value.detach().clone().view(torch.uint8).tolist() for name, value in _real(module).items()}
    settings = {name: repr(getattr(module, name)) for name in ("training", "momentum", "eps", "track_running_stats")}
    return {**state, **settings, "class": type(module), "names": list(module.state_dict())}


def _real(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.reshape(-1)
        for name, value in module.state_dict().items()
        if not value.is_meta and not nn.parameter.is_lazy(value)
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """A forward that must be refused.

    Attributes:
        name: what is wrong with it.
        build: makes the layer from ``normkit`` or ``torch.nn``.
        input: what is passed.
        error: what ours raises.
        words: what the message must say: what was wrong, what came, what is allowed or to type.
        torch: what torch raises, or ACCEPTS.
        touched: whether torch has changed its state by then.
        change: done to the layer once it is built.
        call: how the layer is called.
    """

    name: str
    build: Callable[[Any], nn.Module]
    input: object
    error: type[Exception]
    words: tuple[str, ...]
    torch: type[Exception] | None
    touched: bool = False
    change: Callable[[nn.Module], object] = field(default=lambda module: None)
    call: Callable[[nn.Module, Any], object] = field(default=lambda module, x: module(x))


def _two(lib):
    return lib.BatchNorm2d(3)


def _one(lib):
    return lib.BatchNorm1d(3)


def _bare(lib):
    return lib.BatchNorm2d(3, affine=False, track_running_stats=False)


def _with_inference_buffer(name):
    def change(module):
        with torch.inference_mode():
            setattr(module, name, getattr(module, name) + 0)

    return change


def _vmapped(module, x):
    return torch.func.vmap(module)(x[:, None])


ROWS = (
    Row(name="0-D", build=_two, input=torch.tensor(1.0), error=ShapeError, torch=ValueError,
        words=("BatchNorm2d(3)", "expected 4D input (got 0D input)", "shape ()", "(N, C, H, W)")),
    Row(name="1-D", build=_two, input=torch.ones(3), error=ShapeError, torch=ValueError,
        words=("expected 4D input (got 1D input)", "shape (3,)", "(N, C, H, W)", "reshape")),
    Row(name="2-D", build=_two, input=torch.ones(4, 3), error=ShapeError, torch=ValueError,
        words=("expected 4D input (got 2D input)", "shape (4, 3)", "(N, C, H, W)", "reshape")),
    Row(name="3-D, batch dimension forgotten", build=_two, input=X[0], error=ShapeError, torch=ValueError,
        words=("expected 4D input (got 3D input)", "shape (3, 5, 7)", "input.unsqueeze(0)")),
    Row(name="5-D", build=_two, input=X[..., None], error=ShapeError, torch=ValueError,
        words=("expected 4D input (got 5D input)", "shape (4, 3, 5, 7, 1)", "input.flatten(3)")),
    Row(name="4-D to 1d", build=_one, input=X, error=ShapeError, torch=ValueError,
        words=("BatchNorm1d(3)", "expected 2D or 3D input (got 4D input)", "(N, C) or (N, C, L)", "input.flatten(2)")),
    Row(name="1-D to 1d", build=_one, input=X[0, :, 0, 0], error=ShapeError, torch=ValueError,
        words=("expected 2D or 3D input (got 1D input)", "input.unsqueeze(0)")),
    Row(name="4-D to 3d", build=lambda lib: lib.BatchNorm3d(3), input=X, error=ShapeError, torch=ValueError,
        words=("BatchNorm3d(3)", "expected 5D input (got 4D input)", "(N, C, D, H, W)", "input.unsqueeze(0)")),
    Row(name="None", build=_two, input=None, error=DtypeError, torch=AttributeError,
        words=("must be a tensor", "got NoneType", "pass the output of the layer before")),
    Row(name="ndarray", build=_two, input=np.ones((4, 3, 5, 7)), error=DtypeError, torch=AttributeError,
        words=("must be a tensor", "got ndarray", "torch.as_tensor(input)")),
    Row(name="list", build=_two, input=[[1.0]], error=DtypeError, torch=AttributeError,
        words=("must be a tensor", "got list", "torch.as_tensor(input)")),
    Row(name="sparse", build=_two, input=X.to_sparse(), error=DtypeError, torch=RuntimeError, touched=True,
        words=("dense tensor", "torch.sparse_coo", "input.to_dense()")),
    Row(name="int64", build=_two, input=X.long(), error=DtypeError, torch=RuntimeError, touched=True,
        words=("must be floating point", "torch.int64", "input.float()")),
    Row(name="uint8", build=_two, input=X.byte(), error=DtypeError, torch=RuntimeError, touched=True,
        words=("must be floating point", "torch.uint8", "input.float()")),
    Row(name="bool", build=_two, input=X > 0, error=DtypeError, torch=RuntimeError, touched=True,
        words=("must be floating point", "torch.bool", "input.float()")),
    Row(name="complex", build=_two, input=X.to(torch.complex64), error=DtypeError, torch=RuntimeError, touched=True,
        words=("complex", "torch.complex64", "view_as_real")),
    Row(name="float8", build=_bare, input=X.to(torch.float8_e4m3fn), error=DtypeError, torch=RuntimeError,
        words=("torch.float8_e4m3fn", "float16, bfloat16, float32 or float64", "input.float()")),
    Row(name="double into float", build=_two, input=X.double(), error=DtypeError, torch=RuntimeError, touched=True,
        words=("mixed dtype", "torch.float64", "torch.float32", "input.to(torch.float32)")),
    Row(name="float into half", build=lambda lib: _two(lib).half(), input=X, error=DtypeError, torch=RuntimeError,
        touched=True, words=("mixed dtype", "torch.float32", "torch.float16", "input.to(torch.float16)")),
    Row(name="bfloat16 into half", build=lambda lib: _two(lib).half(), input=X.bfloat16(), error=DtypeError,
        torch=RuntimeError, touched=True, words=("mixed dtype", "torch.bfloat16", "torch.float16")),
    Row(name="double in evaluation", build=lambda lib: _two(lib).eval(), input=X.double(), error=DtypeError,
        torch=RuntimeError, words=("mixed dtype", "torch.float64", "torch.float32")),
    Row(name="another channel count", build=_two, input=X[:, :2], error=ShapeError, torch=RuntimeError, touched=True,
        words=("expected 3 channels in dimension 1, got 2", "(4, 2, 5, 7)", "num_features=2")),
    Row(name="channels last", build=_two, input=X.permute(0, 2, 3, 1), error=ShapeError, torch=RuntimeError,
        touched=True, words=("expected 3 channels in dimension 1, got 5", "(4, 5, 7, 3)", "input.movedim(3, 1)")),
    Row(name="another channel count, no state", build=_bare, input=X[:, :2], error=ShapeError, torch=ACCEPTS,
        words=("expected 3 channels", "got 2", "num_features=2")),
    Row(name="no channels", build=_bare, input=X[:, :0], error=ShapeError, torch=ACCEPTS,
        words=("no channels", "(4, 0, 5, 7)", "at least one")),
    Row(name="one value per channel", build=_one, input=torch.ones(1, 3), error=ShapeError, torch=ValueError,
        touched=True, words=("Expected more than 1 value per channel when training", "[1, 3]", "drop_last=True")),
    Row(name="one value per channel, 2d", build=_two, input=X[:1, :, :1, :1], error=ShapeError, torch=ValueError,
        touched=True, words=("Expected more than 1 value per channel when training", "[1, 3, 1, 1]", "eval()")),
    Row(name="one value per channel, untracked", build=lambda lib: _bare(lib).eval(), input=X[:1, :, :1, :1],
        error=ShapeError, torch=ValueError, words=("Expected more than 1 value per channel", "[1, 3, 1, 1]")),
    Row(name="eps 0", build=lambda lib: lib.BatchNorm2d(3, eps=0.0), input=X, error=ArgumentError, torch=ValueError,
        touched=True, words=("eps must be positive during training", "got 0.0", "eps=1e-5")),
    Row(name="eps set to NaN", build=_two, input=X, error=ArgumentError, torch=ACCEPTS, touched=True,
        words=("eps must be positive", "got nan", "eps=1e-5"), change=lambda m: setattr(m, "eps", float("nan"))),
    Row(name="eps set below 0 in evaluation", build=lambda lib: _two(lib).eval(), input=X, error=ArgumentError,
        torch=ValueError, words=("eps must be finite and non-negative", "got -0.1", "eps=1e-5"),
        change=lambda m: setattr(m, "eps", -0.1)),
    Row(name="momentum set to 1.5", build=_two, input=X, error=ArgumentError, torch=ACCEPTS, touched=True,
        words=("momentum must be from 0 to 1", "got 1.5", "decay="), change=lambda m: setattr(m, "momentum", 1.5)),
    Row(name="momentum set to NaN", build=_two, input=X, error=ArgumentError, torch=ACCEPTS, touched=True,
        words=("momentum must be from 0 to 1", "got nan"), change=lambda m: setattr(m, "momentum", float("nan"))),
    Row(name="momentum set to a word", build=_two, input=X, error=ArgumentError, torch=TypeError, touched=True,
        words=("momentum must be a number", "str 'a'", "momentum=0.1"), change=lambda m: setattr(m, "momentum", "a")),
    Row(name="weight of another size", build=_two, input=X, error=ShapeError, torch=RuntimeError, touched=True,
        words=("weight must have shape (3,)", "got (4,)"),
        change=lambda m: setattr(m, "weight", nn.Parameter(torch.ones(4)))),
    Row(name="running_var of another size", build=_two, input=X, error=ShapeError, torch=RuntimeError, touched=True,
        words=("running_var must have shape (3,)", "got (1,)"),
        change=lambda m: setattr(m, "running_var", torch.ones(1))),
    Row(name="running_mean gone", build=_two, input=X, error=ArgumentError, torch=ValueError, touched=True,
        words=("running_mean is None", "both or neither"), change=lambda m: setattr(m, "running_mean", None)),
    Row(name="running_mean with a gradient", build=_two, input=X, error=StatisticsError, torch=RuntimeError,
        touched=True, words=("running_mean", "not differentiable", "running_mean.detach()"),
        change=lambda m: m.running_mean.requires_grad_()),
    Row(name="running_var with a gradient, evaluation", build=lambda lib: _two(lib).eval(), input=X,
        error=StatisticsError, torch=RuntimeError, words=("running_var", "not differentiable", "running_var.detach()"),
        change=lambda m: m.running_var.requires_grad_()),
    Row(name="running_mean made under inference_mode", build=_two, input=X, error=StatisticsError, torch=RuntimeError,
        touched=True, words=("running_mean", "inference", "clone()"), change=_with_inference_buffer("running_mean")),
    Row(name="running_var made under inference_mode", build=_two, input=X, error=StatisticsError, torch=RuntimeError,
        touched=True, words=("running_var", "inference", "clone()"), change=_with_inference_buffer("running_var")),
    Row(name="counter made under inference_mode", build=_two, input=X, error=StatisticsError, torch=RuntimeError,
        touched=True, words=("num_batches_tracked", "inference", "clone()"),
        change=_with_inference_buffer("num_batches_tracked")),
    Row(name="running_var expanded from one number", build=_two, input=X, error=StatisticsError, torch=ACCEPTS,
        touched=True, words=("running_var", "share memory", "running_var.clone()"),
        change=lambda m: setattr(m, "running_var", torch.ones(1).expand(3))),
    Row(name="state on another device", build=lambda lib: lib.BatchNorm2d(3, device="meta"), input=X, error=DtypeError,
        torch=RuntimeError, words=("input is on cpu", "on meta", ".to(device)")),
    Row(name="vmap over samples", build=_two, input=X, error=StatisticsError, torch=RuntimeError, touched=True,
        words=("vmap", "track_running_stats=False", "replace_all_batch_norm_modules_"), call=_vmapped),
    Row(name="nested", build=_two, input=torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged),
        error=DtypeError, torch=RuntimeError, touched=True,
        words=("dense tensor", "torch.jagged", "input.unbind()", "MaskedBatchNorm1d")),
    Row(name="momentum None without counter", error=ArgumentError, torch=ACCEPTS, input=X,
        build=lambda lib: lib.BatchNorm2d(3, momentum=None), words=("momentum=None", "num_batches_tracked"),
        change=lambda m: setattr(m, "num_batches_tracked", None)),
)  # fmt: skip

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@every_row
def test_bad_forward_is_refused_with_nothing_changed(row):
    module = row.build(normkit)
    row.change(module)
    before = fingerprint(module)
    with pytest.raises(row.error) as caught:
        row.call(module, row.input)
    message = str(caught.value)
    assert [word for word in row.words if word not in message] == [], message
    assert fingerprint(module) == before
    if row.torch in (ValueError, RuntimeError):
        assert isinstance(caught.value, row.torch), "code that catches torch's error must catch ours"


@every_row
def test_torch_with_the_same_bad_forward(row):
    module = row.build(nn)
    row.change(module)
    before = fingerprint(module)
    if row.torch is ACCEPTS:
        row.call(module, row.input)
    else:
        with pytest.raises(row.torch):
            row.call(module, row.input)
    assert (fingerprint(module) != before) is row.touched


SETTINGS = (
    ({"num_features": 0}, ("num_features", "at least 1", "got 0"), ACCEPTS),
    ({"num_features": -1}, ("num_features", "at least 1", "got -1"), RuntimeError),
    ({"num_features": 3.0}, ("num_features", "integer", "float 3.0", "num_features=3"), TypeError),
    ({"num_features": "3"}, ("num_features", "integer", "str '3'"), TypeError),
    ({"num_features": None}, ("num_features", "integer", "NoneType"), TypeError),
    ({"num_features": True}, ("num_features", "got True"), TypeError),
    ({"num_features": 2**70}, ("num_features", "2**63"), TypeError),
    ({"eps": -1e-5}, ("eps", "non-negative", "got -1e-05", "eps=1e-5"), ACCEPTS),
    ({"eps": float("nan")}, ("eps", "finite", "got nan", "eps=1e-5"), ACCEPTS),
    ({"eps": float("inf")}, ("eps", "finite", "got inf", "eps=1e-5"), ACCEPTS),
    ({"eps": "1e-5"}, ("eps", "number", "str '1e-5'", "eps=1e-5"), ACCEPTS),
    ({"eps": None}, ("eps", "number", "NoneType", "eps=1e-5"), ACCEPTS),
    ({"eps": True}, ("eps", "number", "bool True", "eps=1e-5"), ACCEPTS),
    ({"momentum": 1.5}, ("momentum", "from 0 to 1", "got 1.5", "decay="), ACCEPTS),
    ({"momentum": -0.1}, ("momentum", "from 0 to 1", "got -0.1"), ACCEPTS),
    ({"momentum": float("nan")}, ("momentum", "from 0 to 1", "got nan"), ACCEPTS),
    ({"momentum": "a"}, ("momentum", "number", "str 'a'", "momentum=0.1"), ACCEPTS),
    ({"momentum": True}, ("momentum", "number", "bool True"), ACCEPTS),
    ({"decay": 1.5}, ("decay", "from 0 to 1", "got 1.5", "decay=0.9"), TypeError),
    ({"decay": float("nan")}, ("decay", "from 0 to 1", "got nan"), TypeError),
    ({"decay": "a"}, ("decay", "from 0 to 1", "got 'a'"), TypeError),
    ({"decay": 0.9, "momentum": 0.1}, ("momentum=0.1", "decay=0.9", "both", "pass one"), TypeError),
    ({"decay": 0.9, "momentum": None}, ("momentum=None", "decay=0.9", "pass one"), TypeError),
)  # fmt: skip


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
@pytest.mark.parametrize(("settings", "words", "theirs"), SETTINGS, ids=lambda value: str(value)[:40])
def test_bad_setting_is_refused_at_construction(name, settings, words, theirs):
    settings = {"num_features": 3, **settings}
    with pytest.raises(ArgumentError) as caught:
        getattr(normkit, name)(**settings)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    if "num_features" in words:
        return
    lazy = {key: value for key, value in settings.items() if key != "num_features"}
    with pytest.raises(ArgumentError):
        getattr(normkit, f"Lazy{name}")(**lazy)


@pytest.mark.parametrize(("settings", "words", "theirs"), SETTINGS, ids=lambda value: str(value)[:40])
def test_torch_with_the_same_bad_setting(settings, words, theirs):
    settings = {"num_features": 3, **settings}
    if theirs is ACCEPTS:
        nn.BatchNorm2d(**settings)
    else:
        with pytest.raises(theirs):
            nn.BatchNorm2d(**settings)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        ((torch.ones(3), None, None), {"training": True}, ShapeError, ("at least 2D", "got 1D", "unsqueeze(0)")),
        ((X, None, torch.ones(3)), {"training": True}, ArgumentError, ("running_mean is None", "both or neither")),
        ((X, torch.ones(3), None), {}, ArgumentError, ("running_var is None", "both or neither")),
        ((X, None, None), {}, ArgumentError, ("training=False", "running_mean and running_var", "training=True")),
        ((X, [0] * 3, [1] * 3), {}, DtypeError, ("running_mean must be a tensor", "got list", "torch.as_tensor")),
        ((X, torch.zeros(3).long(), torch.ones(3)), {}, DtypeError, ("torch.int64", "running_mean.to(torch.float32)")),
        ((X, torch.zeros(3), torch.ones(3), 2.0), {}, DtypeError, ("weight must be a tensor", "got float")),
        ((X, torch.zeros(3), torch.ones(3)), {"training": True, "momentum": None}, ArgumentError, ("momentum=None",)),
        ((X, torch.zeros(3), torch.ones(3)), {"training": True, "num_batches_tracked": 3}, DtypeError,
         ("num_batches_tracked must be a tensor", "got int")),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_bad_argument_of_the_function_is_refused(arguments, keywords, error, words):
    kept = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    with pytest.raises(error) as caught:
        batch_norm(*arguments, **keywords)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    for value, before in zip(arguments, kept, strict=True):
        assert torch.equal(value, before) if isinstance(value, Tensor) else value == before


@pytest.mark.parametrize("bad", [torch.ones(1, 3), torch.ones(4, 3).long(), torch.ones(4, 3).double(), torch.ones(3)])
def test_lazy_layer_stays_lazy_after_a_bad_first_input(bad):
    layer = normkit.LazyBatchNorm1d()
    before = fingerprint(layer)
    with pytest.raises((ShapeError, DtypeError), match="LazyBatchNorm1d"):
        layer(bad)
    assert fingerprint(layer) == before
    assert layer.has_uninitialized_params()
    assert layer(torch.ones(4, 5)).shape == (4, 5)


def test_a_synchronized_layer_alone_names_the_channels_it_expects_and_moves_nothing():
    layer = normkit.SyncBatchNorm(3)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ShapeError, match=r"expected 3 channels in dimension 1, got 2 .*num_features=2"):
        layer(X[:, :2])
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


def test_lazy_layer_with_a_loaded_state_refuses_other_channels():
    layer = normkit.LazyBatchNorm2d()
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict())
    with pytest.raises(ShapeError, match="expected 3 channels in dimension 1, got 2"):
        layer(X[:, :2])
    assert layer(X).shape == X.shape
    assert type(layer) is normkit.BatchNorm2d
    assert layer.num_features == 3


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_poisoned_statistics_warn_when_loaded(name, value):
    state = nn.BatchNorm2d(3).state_dict()
    state[name][1] = value
    layer = normkit.BatchNorm2d(3)
    if name == "running_mean" and value == -1.0:
        layer.load_state_dict(state)
    else:
        with pytest.warns(UserWarning, match=f"{name} was loaded with values that are not finite or below zero"):
            layer.load_state_dict(state)
    assert torch.equal(layer.state_dict()[name].nan_to_num(7), state[name].nan_to_num(7))


def test_frozen_parameters_do_not_stop_the_statistics():
    """As torch: freezing the affine part is not freezing the layer."""
    ours, theirs = normkit.BatchNorm2d(3).requires_grad_(False), nn.BatchNorm2d(3).requires_grad_(False)
    ours(X), theirs(X)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 1
    assert torch.allclose(ours.running_mean, theirs.running_mean)


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (4, 3, 0, 7)])
def test_empty_batch_is_not_counted(shape):
    ours, theirs = normkit.BatchNorm2d(3), nn.BatchNorm2d(3)
    before = fingerprint(ours)
    assert ours(torch.ones(shape)).shape == theirs(torch.ones(shape)).shape == shape
    assert fingerprint(ours) == before
    assert theirs.num_batches_tracked == 1


def test_counter_at_its_end_does_not_crash():
    layer = normkit.BatchNorm2d(3)
    layer.num_batches_tracked.fill_(2**63 - 1)
    assert torch.isfinite(layer(X)).all()


def test_eps_zero_is_allowed_in_evaluation():
    ours, theirs = normkit.BatchNorm2d(3, eps=0.0).eval(), nn.BatchNorm2d(3, eps=0.0).eval()
    assert torch.equal(ours(X), theirs(X))


def test_torch_gives_nan_where_ours_refuses():
    """What the rows that torch accepts lead to."""
    layer = nn.BatchNorm2d(3, momentum=float("nan"))
    layer(X)
    assert layer.running_mean.isnan().all()
    assert F.batch_norm(X, None, None, training=True, eps=float("nan")).isnan().all()
