"""The ONNX backend suite: nodes and expected values written by others, computed by our functions."""

import importlib

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case import node as suite

from normkit import functional
from normkit.kernels import plain_rows

# How many cases onnx 1.23 has; a later version may add some, none may vanish unseen. Besides these it has twins with
# the suffix _expanded, which hold the same numbers for the operator's decomposition.
MODULES = (
    "batch_normalization",
    "groupnormalization",
    "instance_normalization",
    "layernormalization",
    "lrn",
    "meanvariancenormalization",
    "rmsnormalization",
)
OPERATORS = {
    "BatchNormalization": 4,
    "GroupNormalization": 2,
    "InstanceNormalization": 2,
    "LayerNormalization": 19,
    "LRN": 2,
    "MeanVarianceNormalization": 1,
    "RMSNormalization": 19,
}


def batch(x, weight, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0):
    running = (mean.clone(), var.clone())
    training = bool(training_mode)
    y = functional.batch_norm(x, *running, weight, bias, training, 1 - momentum, epsilon, unbiased=False)
    return (y, *running) if training else (y,)


def group(x, weight, bias, *, num_groups, epsilon=1e-5):
    return (functional.group_norm(x, num_groups, weight, bias, epsilon),)


def instance(x, weight, bias, *, epsilon=1e-5):
    return (functional.instance_norm(x, weight=weight, bias=bias, eps=epsilon),)


def layer(x, weight, bias=None, *, axis=-1, epsilon=1e-5):
    axes = tuple(range(axis % x.dim(), x.dim()))
    mean, var = plain_rows.statistics(x, axes)
    y = functional.layer_norm(x, x.shape[axes[0] :], weight, bias, epsilon)
    return y, mean.float(), (var + epsilon).rsqrt().float()


def response(x, *, size, alpha=1e-4, beta=0.75, bias=1.0):
    # ONNX reaches floor((size - 1) / 2) down and the rest up, torch the other way round: alike for odd sizes.
    assert size % 2
    return (functional.local_response_norm(x, size, alpha, beta, bias),)


def mean_variance(x, *, axes=(0, 2, 3)):
    assert tuple(axes) == (0, 2, 3)
    return (functional.batch_norm(x, None, None, training=True, eps=1e-9),)


def rms(x, weight, *, axis=-1, epsilon=1e-5):
    return (functional.rms_norm(x, x.shape[axis % x.dim() :], weight, epsilon),)


CALLS = dict(zip(OPERATORS, (batch, group, instance, layer, response, mean_variance, rms), strict=True))


@pytest.fixture(scope="module")
def cases():
    """The suite's cases of these operators; its modules write them when they are imported."""
    for module in MODULES:
        importlib.import_module(f"{suite.__name__}.{module}")
    return [case for case in suite._NodeTestCases if "_expanded" not in case.name]


@pytest.mark.parametrize("operator", OPERATORS)
def test_nodes_of_the_onnx_suite_give_the_expected_values(cases, operator):
    chosen = [case for case in cases if case.model.graph.node[0].op_type == operator]
    assert len(chosen) >= OPERATORS[operator]
    for case in chosen:
        (node,) = case.model.graph.node
        settings = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        for inputs, outputs in case.data_sets:
            given = [torch.tensor(np.asarray(value)) for value in inputs]
            found = CALLS[operator](*given, **settings)
            for value, expected in zip(found, outputs, strict=False):
                # The suite's values are computed in float32, and it says how close they must be met.
                target = torch.tensor(np.asarray(expected))
                assert value.shape == target.shape, case.name
                assert torch.allclose(value.double(), target.double(), rtol=case.rtol, atol=case.atol), case.name
