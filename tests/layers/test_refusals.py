"""What every layer of the catalog refuses, in its settings and its input; nothing has changed then."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError, NormkitError
from normkit.layers.catalog import METHODS, METHODS_OF_WEIGHTS

NAN, INFINITE = float("nan"), float("inf")
NO_SIZE = (0, -3, 3.5, "3", None, True)
NO_EPS = (-1e-5, NAN, INFINITE, "small", True)
# Values that a setting of this name must not have, in whatever layer it is.
BAD = {
    "num_features": NO_SIZE,
    "num_channels": NO_SIZE,
    "normalized_shape": (0, -3, 3.5, "3", None, True, (), (3, 0), (3, 2.5)),
    "num_groups": (0, -1, 4, 7, 2.0, "2", None, True),
    "eps": NO_EPS,
    "momentum": (-0.1, 1.5, NAN, "a", True),
    "decay": (-0.1, 1.5, NAN, "a", True),
    "half_life": (0, -1.0, NAN, INFINITE, "a", True),
    "average": ("mean", 1, None),
    "variance": ("sample", True, None),
    "ghost_size": (0, -1, 2.0, "2", None, True),
    "r_max": (0.5, -3.0, NAN, "3", None),
    "d_max": (-0.1, NAN, "5", None),
    "schedule": (3, (3.0, 5.0)),
    "shrinkage": (-0.1, 1.1, NAN, "0", None),
    "iterations": (0, -1, 2.5, "5", True),
    "size": (0, -1, 2.5, "3", None, True),
    "alpha": (-1e-4, NAN, INFINITE, "1", None),
    "beta": (NAN, INFINITE, "1", None),
    "k": (0.0, -1.0, NAN, INFINITE, "1", None),
}
# Where None is a value: torch's default eps of RMS normalization, and the plain average of all batches.
LAYERS = sorted({layer for row in METHODS for layer in row.layers.values()}, key=lambda layer: layer.__name__)
SIZES = {"num_features": 6, "num_channels": 6, "normalized_shape": 6, "num_groups": 3, "size": 3}


def sound(layer: type[nn.Module]) -> dict[str, object]:
    """The arguments that this layer must be given."""
    return {name: value for name, value in SIZES.items() if name in inspect.signature(layer.__init__).parameters}


BAD_SETTINGS = [
    (layer, name, value)
    for layer in LAYERS
    for name in inspect.signature(layer.__init__).parameters
    for value in BAD.get(name, ())
    if not (name == "num_groups" and value == 4 and "num_groups" not in sound(layer))
]


def test_every_setting_of_every_layer_is_in_the_table_or_has_nothing_to_check():
    free = {"self", "affine", "elementwise_affine", "bias", "track_running_stats", "device", "dtype", "unbiased"}
    for layer in LAYERS:
        assert set(inspect.signature(layer.__init__).parameters) <= BAD.keys() | free, layer


@pytest.mark.parametrize(("layer", "name", "value"), BAD_SETTINGS)
def test_bad_setting_is_refused_when_the_layer_is_built(layer, name, value):
    settings = sound(layer) | {name: value}
    with pytest.raises(ArgumentError, match=name if name != "schedule" else "schedule must be a function"):
        layer(**settings)


@pytest.mark.parametrize("layer", [normkit.GroupNorm, normkit.WhiteningBatchNorm1d])
def test_groups_that_do_not_divide_the_channels_list_the_divisors(layer):
    sizes = {"num_channels": 12} if layer is normkit.GroupNorm else {"num_features": 12}
    with pytest.raises(ArgumentError, match="12 channels go into 1, 2, 3, 4, 6, 12 groups"):
        layer(**sizes, num_groups=5)


@pytest.mark.parametrize("row", METHODS_OF_WEIGHTS, ids=lambda row: row.name)
def test_parametrizations_refuse_what_is_no_weight_and_change_nothing(row):
    layer = nn.Conv2d(3, 4, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for name in ("kernel", "in_channels", ""):
        with pytest.raises(ArgumentError, match="has no tensor"):
            row.parametrization.register(layer, name)
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def wrong_channels(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(shape[0], shape[1] + 1, *shape[2:])


BAD_INPUTS: dict[str, Callable[[nn.Module, tuple[int, ...]], object]] = {
    "another number of channels": wrong_channels,
    "six dimensions more": lambda layer, shape: torch.ones(*shape, 1, 1, 1, 1, 1, 1),
    "one dimension": lambda layer, shape: torch.ones(shape[1] + 1),
    "a wider type": lambda layer, shape: torch.ones(shape, dtype=torch.float64),
    "integers": lambda layer, shape: torch.ones(shape, dtype=torch.int32),
    "booleans": lambda layer, shape: torch.ones(shape, dtype=torch.bool),
    "complex numbers": lambda layer, shape: torch.ones(shape, dtype=torch.complex64),
    "a sparse tensor": lambda layer, shape: torch.ones(shape).to_sparse(),
    "a list": lambda layer, shape: torch.ones(shape).tolist(),
    "nothing": lambda layer, shape: None,
}
# Local response normalization has no size, type or rank of its own. Layer, RMS and group normalization take any rank,
# RMS normalization any type.
TAKEN = {
    "response": {"another number of channels", "six dimensions more", "a wider type"},
    "group": {"six dimensions more"},
    "rms": {"a wider type"},
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_bad_input_is_refused_by_name_and_nothing_has_changed(row, bad):
    for shape in row.samples:
        layer = row.build(shape[1], len(shape) - 2)
        method = "group" if isinstance(layer, nn.GroupNorm) else row.name
        if bad in TAKEN.get(method, set()) or torch.Size(shape).numel() < 8:
            continue
        layer(torch.randn(shape))
        kept = {name: value.clone() for name, value in layer.state_dict().items()}
        with pytest.raises(NormkitError) as caught:
            layer(BAD_INPUTS[bad](layer, shape))
        assert str(caught.value).startswith(f"{type(layer).__name__}(")
        assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


ONE_VALUE = {
    "batch": "more than 1 value per channel",
    "layer": None,
    "rms": None,
    "group": "every group is one value",
    "instance": "more than 1 spatial element",
    "response": None,
    "adaptive": "more than 1 spatial element",
    "renorm": "more than 1 value per channel",
    "ghost": "more than 1 value per channel",
    "masked": "more than 1 value per channel",
    "whitening": "more than 1 value per channel",
}


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_one_value_for_every_statistic_is_refused_with_the_reason_and_nothing_has_changed(row):
    words = ONE_VALUE[row.name]
    for dimensions in row.layers:
        layer = normkit.GroupNorm(6, 6) if row.name == "group" else row.build(6, dimensions)
        kept = {name: value.clone() for name, value in layer.state_dict().items()}
        x = torch.randn(1, 6, *(1 for _ in range(dimensions)))
        if words is None:
            assert layer(x).isfinite().all()
        else:
            with pytest.raises(NormkitError, match=words):
                layer(x)
        assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())
