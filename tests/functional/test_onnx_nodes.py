"""The ONNX backend suite: nodes and expected values written by others, computed by our functions."""

import functools
import importlib
import re
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
import torch
from onnx.backend.test.case import node as suite

from normkit import functional
from normkit.kernels.plain import samples as plain_samples

# How many cases onnx 1.23 has, counted exactly: a case that a later version adds is looked at, not overlooked.
MODULES = (
    "batch_normalization",
    "groupnormalization",
    "instance_normalization",
    "layernormalization",
    "lrn",
    "meanvariancenormalization",
    "rmsnormalization",
)
# Cases that are run, and twins that are not: their names end in "_expanded", and they hold the same numbers for the
# operator written out in others (Sub, ReduceMean, Div ...), which no function of ours computes one by one.
OPERATORS = {
    "BatchNormalization": 4,
    "GroupNormalization": 2,
    "InstanceNormalization": 2,
    "LayerNormalization": 19,
    "LRN": 2,
    "MeanVarianceNormalization": 1,
    "RMSNormalization": 19,
}
NAMES = (
    "batchnorm",
    "group_normalization",
    "instancenorm",
    "layer_normalization",
    "lrn",
    "mvn",
    "rms_normalization",
)
TWINS = 61
EXPORTED = 5


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
    mean, var = plain_samples.statistics(x, axes)
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
    """All cases of these operators, twins too; the suite's modules write them when they are imported."""
    for module in MODULES:
        importlib.import_module(f"{suite.__name__}.{module}")
    return [case for case in suite._NodeTestCases if re.match(f"test_({'|'.join(NAMES)})(_|$)", case.name)]


def judge(case_name: str, call, given, outputs, *, rtol: float, atol: float) -> None:
    """Compare with the suite's values, which are computed in float32, as closely as it asks for."""
    found = call(*(torch.tensor(np.asarray(value)) for value in given))
    assert len(found) >= len(outputs), case_name
    for value, expected in zip(found, outputs, strict=False):
        target = torch.tensor(np.asarray(expected))
        assert value.shape == target.shape, case_name
        assert torch.allclose(value.double(), target.double(), rtol=rtol, atol=atol), case_name


@pytest.mark.parametrize("operator", OPERATORS)
def test_nodes_of_the_onnx_suite_give_the_expected_values(cases, operator):
    chosen = [case for case in cases if case.model.graph.node[0].op_type == operator]
    assert len(chosen) == OPERATORS[operator]
    for case in chosen:
        (node,) = case.model.graph.node
        settings = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        for given, outputs in case.data_sets:
            call = functools.partial(CALLS[operator], **settings)
            judge(case.name, call, given, outputs, rtol=case.rtol, atol=case.atol)


def test_every_case_is_run_or_a_twin_of_one_that_is(cases):
    run = {case.name for case in cases if case.model.graph.node[0].op_type in OPERATORS}
    twins = {case.name for case in cases} - run
    assert (len(run), len(twins)) == (sum(OPERATORS.values()), TWINS)
    assert {re.sub(r"_expanded(_ver\d+)?$", "", name) for name in twins} <= run


def exported() -> list[Path]:
    """Models with a batch normalization that torch once exported, with inputs and outputs as files."""
    folder = Path(onnx.backend.test.__file__).parent / "data" / "pytorch-converted"
    return sorted(path for path in folder.iterdir() if "Norm" in path.name)


def read(file: Path) -> np.ndarray:
    return onnx.numpy_helper.to_array(onnx.load_tensor(str(file)))


@pytest.mark.parametrize("folder", exported(), ids=lambda path: path.name)
def test_batch_norms_that_torch_exported_give_the_expected_values(folder):
    model = onnx.load(str(folder / "model.onnx"))
    (node,) = model.graph.node
    assert node.op_type == "BatchNormalization"
    settings = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    # A flag of old: prediction.
    assert settings.pop("is_test") == 1
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    data = list(folder.glob("test_data_set_*"))
    assert data
    for one in data:
        call = functools.partial(batch, **settings)
        given = [read(one / "input_0.pb"), *(stored[name] for name in node.input[1:])]
        judge(folder.name, call, given, [read(one / "output_0.pb")], rtol=1e-3, atol=1e-7)


def test_every_exported_batch_norm_is_run():
    assert len(exported()) == EXPORTED
