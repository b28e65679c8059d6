"""Ported layers predict the same: against Keras, against ONNX's reference evaluator, and there and back."""

import itertools
import os

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "numpy")
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import normkit
from normkit.errors import ArgumentError, ShapeError
from normkit.surgery.port import port_state
from tolerances import assert_close

FRAMEWORKS = ("torch", "keras", "flax", "onnx")
STATES = {
    "torch": {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
    "keras": {"weight": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
    "flax": {"weight": "scale", "bias": "bias", "mean": "mean", "var": "var"},
    "onnx": {"weight": "scale", "bias": "B", "mean": "input_mean", "var": "input_var"},
}


@pytest.fixture(scope="module")
def keras():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "numpy")
        import keras

        assert keras.backend.backend() == "numpy"
        yield keras


def arrays(channels: int = 3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    made = {
        name: generator.uniform(0.5, 1.5, channels).astype(np.float32) for name in ("weight", "bias", "mean", "var")
    }
    return made


def named(framework: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {STATES[framework][name]: value for name, value in values.items()}


def load(layer: torch.nn.Module, ported) -> torch.nn.Module:
    layer.load_state_dict({name: torch.as_tensor(value) for name, value in ported.state.items()})
    return layer.eval()


def batch_layer(ported) -> torch.nn.Module:
    return load(normkit.BatchNorm2d(**ported.settings), ported)


PROBE = np.random.default_rng(1).standard_normal((4, 5, 6, 3)).astype(np.float32) * 3 + 1  # (N, H, W, C)
FIRST = np.ascontiguousarray(PROBE.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("scale", "center"), list(itertools.product([True, False], repeat=2)))
def test_keras_batch_norm_predicts_and_trains_the_same_here(keras, scale, center):
    theirs = keras.layers.BatchNormalization(momentum=0.8, epsilon=2e-3, scale=scale, center=center)
    theirs.build(PROBE.shape)
    for variable in theirs.variables:
        variable.assign(np.random.default_rng(2).uniform(0.5, 1.5, variable.shape).astype(np.float32))
    state = {variable.name: np.asarray(variable) for variable in theirs.variables}
    ours = batch_layer(
        port_state(state, source="keras", target="torch", settings={"momentum": 0.8, "epsilon": 2e-3, "axis": -1})
    )
    expected = np.asarray(theirs(PROBE, training=False)).transpose(0, 3, 1, 2)
    assert_close(ours(torch.tensor(FIRST)).detach(), torch.tensor(expected), dtype=torch.float32)
    ours.train()(torch.tensor(FIRST))
    theirs(PROBE, training=True)
    assert_close(ours.running_mean, torch.tensor(np.asarray(theirs.moving_mean)), dtype=torch.float32)
    assert_close(ours.running_var, torch.tensor(np.asarray(theirs.moving_variance)), dtype=torch.float32)


def test_our_batch_norm_predicts_the_same_in_keras(keras):
    layer = normkit.BatchNorm2d(3, momentum=0.3)
    for value in layer.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5 if value.dim() else value)
    ported = port_state(layer.state_dict(), source="torch", target="keras", settings={"momentum": 0.3})
    theirs = keras.layers.BatchNormalization(**ported.settings)
    theirs.build(PROBE.shape)
    for variable in theirs.variables:
        variable.assign(ported.state[variable.name])
    assert theirs.momentum == 0.7
    expected = np.asarray(theirs(PROBE, training=False)).transpose(0, 3, 1, 2)
    assert_close(layer.eval()(torch.tensor(FIRST)).detach(), torch.tensor(expected), dtype=torch.float32)


@pytest.mark.parametrize("method", ["layer", "group", "instance"])
def test_keras_sample_norms_predict_the_same_here(keras, method):
    if method == "layer":
        theirs = keras.layers.LayerNormalization(epsilon=1e-3)
    else:
        theirs = keras.layers.GroupNormalization(groups=3 if method == "group" else -1)
    theirs.build(PROBE.shape)
    for variable in theirs.variables:
        variable.assign(np.random.default_rng(2).uniform(0.5, 1.5, variable.shape).astype(np.float32))
    state = {variable.name: np.asarray(variable) for variable in theirs.variables}
    settings = {"groups": 3} if method == "group" else {}
    ported = port_state(state, source="keras", target="torch", method=method, settings=settings)
    kind = {"layer": normkit.LayerNorm, "group": normkit.GroupNorm, "instance": normkit.InstanceNorm2d}[method]
    ours = load(kind(**ported.settings), ported)
    expected = np.asarray(theirs(PROBE))
    last = method == "layer"
    found = ours(torch.tensor(PROBE)) if last else ours(torch.tensor(FIRST)).permute(0, 2, 3, 1)
    assert_close(found.detach(), torch.tensor(expected), dtype=torch.float32)


NODES = {
    "batch": ("BatchNormalization", ("scale", "B", "input_mean", "input_var"), 15),
    "layer": ("LayerNormalization", ("Scale", "B"), 17),
    "group": ("GroupNormalization", ("scale", "bias"), 21),
    "instance": ("InstanceNormalization", ("scale", "B"), 22),
}


def run_onnx(method: str, ported, x: np.ndarray) -> np.ndarray:
    operator, inputs, opset = NODES[method]
    settings = {name: value for name, value in ported.settings.items() if value is not None}
    node = helper.make_node(operator, ["x", *inputs], ["y"], **settings)
    values = [onnx.numpy_helper.from_array(ported.state[name].astype(np.float32), name) for name in inputs]
    graph = helper.make_graph(
        [node],
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        values,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("method", NODES)
@pytest.mark.parametrize("affine", [True, False])
def test_our_layers_predict_the_same_in_onnx(method, affine):
    build = {
        "batch": lambda: normkit.BatchNorm2d(4, eps=1e-4, affine=affine),
        "layer": lambda: normkit.LayerNorm(6, eps=1e-4, elementwise_affine=affine),
        "group": lambda: normkit.GroupNorm(2, 4, eps=1e-4, affine=affine),
        "instance": lambda: normkit.InstanceNorm2d(4, eps=1e-4, affine=affine),
    }
    layer = build[method]()
    for value in layer.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5 if value.dim() else value)
    x = torch.randn(3, 4, 5, 6)
    settings = {"eps": 1e-4} | ({"num_groups": 2} if method == "group" else {})
    state = layer.state_dict()
    if not affine and method != "batch":
        with pytest.raises(ArgumentError, match="the state is empty"):
            port_state(state, source="torch", target="onnx", method=method, settings=settings)
        return
    ported = port_state(state, source="torch", target="onnx", method=method, settings=settings)
    expected = run_onnx(method, ported, x.numpy())
    assert_close(layer.eval()(x).detach(), torch.tensor(expected), dtype=torch.float32)


def test_onnx_batch_norm_predicts_the_same_here():
    state = named("onnx", arrays())
    there = port_state(state, source="onnx", target="onnx", settings={"epsilon": 1e-3})
    ours = batch_layer(port_state(state, source="onnx", target="torch", settings={"epsilon": 1e-3}))
    assert_close(ours(torch.tensor(FIRST)).detach(), torch.tensor(run_onnx("batch", there, FIRST)), dtype=torch.float32)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FRAMEWORKS, 2)))
def test_there_and_back_is_the_identity(source, target):
    values = named(source, arrays())
    settings = {"momentum": 0.3}
    there = port_state(values, source=source, target=target, settings=settings, convert_variance=True, count=50)
    words = {"eps", "epsilon", "momentum"}
    kept = {name: value for name, value in there.settings.items() if name in words}
    back = port_state(there.state, source=target, target=source, settings=kept, convert_variance=True, count=50)
    for name, value in values.items():
        np.testing.assert_allclose(back.state[name], value, rtol=1e-6)
    assert back.settings["momentum"] == 0.3


def test_conversion_of_the_variance_is_the_known_factor():
    state = named("keras", arrays())
    ported = port_state(state, source="keras", target="torch", convert_variance=True, count=5)
    np.testing.assert_allclose(ported.state["running_var"], state["moving_variance"] * 5 / 4, rtol=1e-6)
    assert "unbiased" not in ported.settings
    assert any("multiplied by 1.25" in change for change in ported.changes)


def test_flax_trees_are_read():
    values = named("flax", arrays())
    tree = {
        "params": {"scale": values["scale"], "bias": values["bias"]},
        "batch_stats": {"mean": values["mean"], "var": values["var"]},
    }
    ported = port_state(tree, source="flax", target="torch")
    assert ported.settings["momentum"] == 0.01
    np.testing.assert_array_equal(ported.state["weight"], values["scale"])


def test_what_changed_is_said():
    ported = port_state({"gamma": np.ones(2)}, source="keras", target="torch", settings={"epsilon": 1e-3})
    assert ported.changes == (
        "momentum 0.99 becomes 0.01: it weighs the new value",
        "the state has no stored statistics: track_running_stats=False, normalized with the batch's always",
        "bias was missing and is filled with 0",
        "input (N, *, C) becomes (N, C, *)",
    )


REFUSED = [
    (lambda s: port_state(s, source="caffe", target="torch"), ArgumentError, "known are: torch, keras, flax, onnx"),
    (lambda s: port_state(s, source="keras", target="tf"), ArgumentError, "target is 'tf'"),
    (lambda s: port_state(s, source="keras", target="torch", method="rms"), ArgumentError, "known are: batch, layer"),
    (lambda s: port_state(s, source="torch", target="keras"), ArgumentError, "is no array of torch's batch layer"),
    (
        lambda s: port_state(s, source="keras", target="torch", settings={"eps": 1e-3}),
        ArgumentError,
        "keras has no setting eps",
    ),
    (
        lambda s: port_state(s, source="keras", target="torch", convert_variance=True),
        ArgumentError,
        "count is None; pass count=batch size times positions",
    ),
    (
        lambda s: port_state(s, source="keras", target="torch", settings={"axis": [1, 2]}),
        ArgumentError,
        "only one channel axis",
    ),
    (
        lambda s: port_state({**s, "gamma": np.ones(5)}, source="keras", target="torch"),
        ShapeError,
        "have different shapes",
    ),
    (
        lambda s: port_state({"moving_mean": np.ones(3)}, source="keras", target="torch"),
        ArgumentError,
        "moving_variance is missing",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_what_cannot_be_ported_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(named("keras", arrays()))


SWAPPED = {"mean": np.array([1.0, 2.0, 0.5]), "var": np.array([1.0, -0.7, 2.0])}


@pytest.mark.parametrize("target", FRAMEWORKS)
@pytest.mark.parametrize("source", FRAMEWORKS)
def test_a_negative_variance_is_not_carried(source, target):
    names = STATES[source]
    with pytest.raises(ArgumentError, match=rf"{names['var']} is negative at index 1 of 3.*swapped"):
        port_state(named(source, arrays() | SWAPPED), source=source, target=target)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("word", ["weight", "bias", "mean", "var"])
def test_what_is_not_finite_is_not_carried(word, bad):
    values = arrays()
    values[word][2] = bad
    with pytest.raises(ArgumentError, match=rf"{STATES['keras'][word]} holds NaN or infinity at index 2 of 3"):
        port_state(named("keras", values), source="keras", target="torch")


@pytest.mark.parametrize("source", FRAMEWORKS)
@pytest.mark.parametrize("form", [list, tuple, lambda values: np.stack(list(values))])
def test_arrays_without_names_are_refused_with_what_to_pass(source, form):
    state = form(arrays().values())
    with pytest.raises(ArgumentError, match=rf"a dict with the names {STATES[source]['weight']}, .*: "):
        port_state(state, source=source, target="torch")


def test_numbers_in_lists_and_in_bfloat16_are_taken_and_words_are_not():
    listed = {name: value.tolist() for name, value in named("keras", arrays()).items()}
    ported = port_state(listed, source="keras", target="torch")
    np.testing.assert_allclose(ported.state["running_var"], arrays()["var"])
    half = {name: torch.as_tensor(value).bfloat16() for name, value in named("torch", arrays()).items()}
    ported = port_state(half, source="torch", target="keras")
    np.testing.assert_array_equal(ported.state["gamma"], half["weight"].float().numpy())
    for wrong in (["a", "b", "c"], [[1.0], [1.0, 2.0]], [1j, 1j, 1j], [True, True, True]):
        with pytest.raises(ArgumentError, match="gamma"):
            port_state(listed | {"gamma": wrong}, source="keras", target="torch")


@pytest.mark.parametrize("source", FRAMEWORKS)
@pytest.mark.parametrize("target", FRAMEWORKS)
def test_what_was_given_is_taken_back(source, target):
    first = named(source, arrays())
    there = port_state(first, source=source, target=target)
    back = port_state(there.state, source=target, target=source, settings=there.settings)
    assert {name: value.tolist() for name, value in back.state.items() if name in first} == {
        name: value.tolist() for name, value in first.items()
    }
    again = port_state(back.state, source=source, target=target, settings=back.settings)
    assert again.settings == there.settings


def test_the_biased_variance_that_a_torch_layer_was_told_of_is_one():
    ported = port_state(named("keras", arrays()), source="keras", target="torch")
    assert ported.settings["unbiased"] is False
    back = port_state(ported.state, source="torch", target="keras", settings=ported.settings)
    assert not any("variance" in change for change in back.changes)
    unbiased = port_state(ported.state, source="torch", target="keras", settings={"unbiased": True})
    assert "the stored variance is the unbiased one, carried as it is" in unbiased.changes


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("keras", {"momentum": 1.5}, r"momentum is 1\.5; in keras it is the weight of the old value, 0 to 1"),
        ("keras", {"momentum": -3}, "momentum is -3; in keras"),
        ("keras", {"momentum": "a"}, "momentum is 'a'"),
        ("keras", {"momentum": None}, "momentum is None"),
        ("keras", {"momentum": float("nan")}, "momentum is nan"),
        ("torch", {"momentum": 1.5}, "in torch it is the weight of the new value"),
        ("keras", {"epsilon": -1}, "epsilon is -1; it is finite and not negative"),
        ("keras", {"epsilon": None}, "epsilon is None"),
        ("keras", {"epsilon": float("inf")}, "epsilon is inf"),
        ("keras", {"axis": 7}, "axis is 7; it counts the channels"),
        ("keras", {"axis": 0}, "axis is 0; it counts the channels"),
        ("keras", {"axis": "last"}, "axis is 'last'"),
        ("torch", {"unbiased": "no"}, "unbiased is 'no'; True or False"),
        ("torch", {"num_groups": 0}, "num_groups is 0; it is the number of groups"),
    ],
)
def test_a_setting_that_no_layer_has_is_refused(source, settings, words):
    with pytest.raises(ArgumentError, match=words):
        port_state(named(source, arrays()), source=source, target="flax", settings=settings)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FRAMEWORKS, FRAMEWORKS)))
def test_an_empty_state_is_refused(source, target):
    with pytest.raises(ArgumentError, match="the state is empty: pass one layer's arrays"):
        port_state({}, source=source, target=target)


def test_the_plain_average_has_no_word_elsewhere_and_that_is_told():
    for target, default in (("keras", 0.99), ("flax", 0.99), ("onnx", 0.9)):
        ported = port_state(torch.nn.BatchNorm2d(4, momentum=None), target=target)
        assert "momentum" not in ported.settings
        assert any(f"has no word in {target}: its layer goes on with {default}" in said for said in ported.changes)
    assert port_state(torch.nn.BatchNorm2d(4, momentum=None), target="torch").settings["momentum"] is None


def test_a_state_without_statistics_loads_into_the_layer_that_its_settings_build():
    state = {"gamma": np.ones(4), "beta": np.zeros(4)}
    ported = port_state(state, source="keras", target="torch")
    assert ported.settings["track_running_stats"] is False
    assert any("the state has no stored statistics" in said for said in ported.changes)
    assert batch_layer(ported).running_mean is None
    there = port_state(torch.nn.BatchNorm2d(4, track_running_stats=False), target="keras")
    assert any("has no moving_mean and moving_variance" in said for said in there.changes)


def test_channels_that_are_first_already_do_not_move():
    state = named("keras", arrays())
    assert not any("input" in said for said in port_state(
        state, source="keras", target="torch", settings={"axis": 1}).changes)  # fmt: skip
    assert any("input" in said for said in port_state(
        state, source="keras", target="flax", settings={"axis": 1}).changes)  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", None])
def test_the_norm_of_a_fused_layer_is_ported(activation):
    layer = normkit.BatchNormAct2d(4, activation=activation)
    ported, plain = port_state(layer, target="keras"), port_state(layer.norm, target="keras")
    assert ported.settings == plain.settings
    assert all(np.array_equal(ported.state[name], plain.state[name]) for name in plain.state)
    said = [change for change in ported.changes if change not in plain.changes]
    assert said == ([] if activation is None else ["the relu after the layer is no part of it"])


def test_a_method_that_has_no_word_elsewhere_is_named():
    with pytest.raises(ArgumentError, match="a GhostBatchNorm2d cannot be ported: ghost normalization has no word"):
        port_state(normkit.GhostBatchNorm2d(4), target="keras")
