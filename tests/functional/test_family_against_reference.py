"""Every function of the family through one table: output, gradients and stored statistics against the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_utils import gradcheck, gradgradcheck

from normkit import functional as F
from normkit import reference as R
from normkit.reference import Running
from tolerances import RELATIVE, assert_close
from torch_versions import uses_torchscript

MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()


@dataclass(frozen=True)
class Case:
    """One call of a function, and the same of the reference.

    Attributes:
        name: the function and what is special.
        shapes: the differentiable arguments and their shapes.
        call: the function on tensors by name.
        judge: the reference on arrays by name; returns output and gradients by name for a cotangent.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Tensor]
    judge: Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]

    def tensors(self, dtype: torch.dtype, requires_grad: bool = False) -> dict[str, Tensor]:
        made = {name: torch.randn(shape) for name, shape in self.shapes.items()}
        return {name: value.to(dtype).requires_grad_(requires_grad) for name, value in made.items()}


def judged(forward: Callable, backward: Callable, **gradients: str) -> Callable:
    """A judge from the reference's two functions; the keywords name the gradients' attributes."""

    def judge(dy: np.ndarray, **arrays: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        step = forward(**arrays)
        found = backward(dy, step)
        return step.output, {name: getattr(found, attribute) for name, attribute in gradients.items()}

    return judge


AFFINE = {"input": "dx", "weight": "dweight", "bias": "dbias"}
RUNNING = Running(mean=np.array([0.3, -0.2]), var=np.array([0.5, 2.0]))
CASES = [
    *(
        Case(
            f"layer-{shape}",
            {"input": shape, "weight": normalized, "bias": normalized},
            lambda input, weight, bias, n=normalized: F.layer_norm(input, n, weight, bias),
            judged(
                lambda input, weight, bias, n=normalized: R.layer_norm(input, n, weight, bias),
                R.layer_norm_backward,
                **AFFINE,
            ),
        )
        for shape, normalized in [((5, 3), (3,)), ((2, 3, 4), (3, 4))]
    ),
    Case(
        "rms",
        {"input": (2, 3, 4), "weight": (4,)},
        lambda input, weight: F.rms_norm(input, (4,), weight, 1e-5),
        judged(
            lambda input, weight: R.rms_norm(input, 4, weight, eps=1e-5),
            R.rms_norm_backward,
            input="dx",
            weight="dweight",
        ),
    ),
    *(
        Case(
            f"group-{shape}-{groups}",
            {"input": shape, "weight": shape[1:2], "bias": shape[1:2]},
            lambda input, weight, bias, g=groups: F.group_norm(input, g, weight, bias),
            judged(
                lambda input, weight, bias, g=groups: R.group_norm(input, g, weight, bias),
                R.group_norm_backward,
                **AFFINE,
            ),
        )
        for shape, groups in [((3, 6), 2), ((2, 4, 3, 2), 2), ((2, 3, 5), 3)]
    ),
    Case(
        "instance",
        {"input": (2, 3, 4, 2), "weight": (3,), "bias": (3,)},
        lambda input, weight, bias: F.instance_norm(input, weight=weight, bias=bias),
        judged(lambda input, weight, bias: R.instance_norm(input, weight, bias), R.instance_norm_backward, **AFFINE),
    ),
    *(
        Case(
            f"response-{size}",
            {"input": (2, 5, 3)},
            lambda input, n=size: F.local_response_norm(input, n, 2.0, 0.75, 1.5),
            judged(
                lambda input, n=size: R.local_response_norm(input, n, alpha=2.0, beta=0.75, k=1.5),
                R.local_response_norm_backward,
                input="dx",
            ),
        )
        for size in (1, 2, 3, 9)
    ),
    Case(
        "adaptive",
        {"input": (2, 3, 4), "style": (2, 3, 2, 3)},
        lambda input, style: F.adaptive_instance_norm(input, style),
        judged(
            lambda input, style: R.adaptive_instance_norm(input, style),
            R.adaptive_instance_norm_backward,
            input="dcontent",
            style="dstyle",
        ),
    ),
    *(
        Case(
            f"weight-{dim}",
            {"v": (2, 3, 2), "magnitude": size},
            lambda v, magnitude, d=dim: F.weight_norm(v, magnitude, d),
            judged(
                lambda v, magnitude, d=dim: R.weight_norm(v, magnitude, dim=d),
                R.weight_norm_backward,
                v="dv",
                magnitude="dmagnitude",
            ),
        )
        for dim, size in [(0, (2, 1, 1)), (1, (1, 3, 1)), (-1, (1, 1, 2)), (None, (1, 1, 1))]
    ),
    Case(
        "standardization",
        {"weight": (3, 2, 2)},
        lambda weight: F.weight_standardization(weight),
        judged(lambda weight: R.weight_standardization(weight), R.weight_standardization_backward, weight="dx"),
    ),
    *(
        Case(
            f"ghost-{samples}-{size}",
            {"input": (samples, 2, 3), "weight": (2,), "bias": (2,)},
            lambda input, weight, bias, g=size: F.ghost_batch_norm(input, None, None, weight, bias, True, ghost_size=g),
            judged(
                lambda input, weight, bias, g=size: R.ghost_batch_norm(input, g, weight, bias),
                R.ghost_batch_norm_backward,
                **AFFINE,
            ),
        )
        for samples, size in [(7, 3), (6, 3), (2, 5), (5, 1)]
    ),
    Case(
        "masked",
        {"input": (3, 2, 4), "weight": (2,), "bias": (2,)},
        lambda input, weight, bias: F.masked_batch_norm(input, MASK, None, None, weight, bias, True),
        judged(
            lambda input, weight, bias: R.masked_batch_norm(input, MASK.numpy(), weight, bias),
            R.masked_batch_norm_backward,
            **AFFINE,
        ),
    ),
    *(
        Case(
            f"whitening-{shape}-{groups}-{iterations}-{shrinkage}",
            {"input": shape, "weight": (4,), "bias": (4,)},
            lambda input, weight, bias, g=groups, i=iterations, s=shrinkage: F.whitening_batch_norm(
                input, None, None, weight, bias, True, num_groups=g, iterations=i, shrinkage=s
            ),
            judged(
                lambda input, weight, bias, g=groups, i=iterations, s=shrinkage: R.whitening_batch_norm(
                    input, weight, bias, num_groups=g, iterations=i, shrinkage=s
                ),
                R.whitening_batch_norm_backward,
                **AFFINE,
            ),
        )
        for shape, groups, iterations, shrinkage in [
            ((6, 4), 1, None, 0.0),
            ((3, 4, 2), 2, None, 0.2),
            ((6, 4), 2, 4, 0.0),
            ((3, 4, 2), 1, 3, 0.2),
        ]
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@every_case
def test_output_and_every_gradient_agree_with_the_reference(case, dtype):
    given = case.tensors(dtype, requires_grad=True)
    y = case.call(**given)
    dy = torch.randn(y.shape).to(dtype)
    gradients = torch.autograd.grad(y, list(given.values()), dy)
    arrays = {name: value.detach().double().numpy() for name, value in given.items()}
    output, expected = case.judge(dy.double().numpy(), **arrays)
    assert y.dtype is dtype
    assert_close(y.detach(), torch.tensor(output), dtype=dtype, what="output")
    for name, gradient in zip(given, gradients, strict=True):
        assert gradient.dtype is dtype
        assert_close(gradient, torch.tensor(expected[name]), dtype=dtype, what=name)


@uses_torchscript
@every_case
def test_gradients_agree_with_differences_to_second_order(case):
    given = case.tensors(torch.float64, requires_grad=True)

    def call(*values: Tensor) -> Tensor:
        return case.call(**dict(zip(given, values, strict=True)))

    values = tuple(given.values())
    # The fast mode looks along one direction alone, and a wrong second derivative of the matrix root passed it.
    fast = not case.name.startswith("whitening")
    assert gradcheck(call, values, check_forward_ad=True, fast_mode=fast)
    assert gradgradcheck(call, values, fast_mode=fast)


@every_case
def test_strides_do_not_matter(case):
    given = case.tensors(torch.float64)
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in given.items()}
    assert_close(case.call(**strided), case.call(**given), dtype=torch.float64)


# What is stored.


def test_renorm_agrees_with_the_reference_in_output_gradients_and_statistics():
    x, dy = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True), torch.randn(6, 2, 3, dtype=torch.float64)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.tensor(RUNNING.mean), torch.tensor(RUNNING.var)
    y = F.batch_renorm(x, mean, var, weight, bias, True, 0.1, r_max=1.2, d_max=0.3)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    arrays = [value.detach().numpy() for value in (x, weight, bias)]
    step = R.batch_renorm(arrays[0], RUNNING, arrays[1], arrays[2], r_max=1.2, d_max=0.3)
    found = R.batch_renorm_backward(dy.numpy(), step)
    assert_close(y.detach(), torch.tensor(step.output), dtype=torch.float64)
    for gradient, name in zip(gradients, ("dx", "dweight", "dbias"), strict=True):
        assert_close(gradient, torch.tensor(getattr(found, name)), dtype=torch.float64, what=name)
    after = R.running_update(RUNNING, R.batch_statistics(arrays[0]), momentum=0.1)
    assert_close(mean, torch.tensor(after.mean), dtype=torch.float64)
    assert_close(var, torch.tensor(after.var), dtype=torch.float64)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", ["ghost", "masked", "renorm"])
def test_one_update_follows_a_step_and_holds_the_whole_batch(name, unbiased):
    x = torch.randn(7, 2, 4, dtype=torch.float64)
    mask = torch.rand(7, 4) > 0.4
    mean, var, counter = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), torch.tensor(0)
    settings = {"unbiased": unbiased, "num_batches_tracked": counter}
    if name == "ghost":
        F.ghost_batch_norm(x, mean, var, training=True, momentum=0.3, ghost_size=3, **settings)
    elif name == "renorm":
        F.batch_renorm(x, mean, var, training=True, momentum=0.3, **settings)
    else:
        F.masked_batch_norm(x, mask, mean, var, training=True, momentum=0.3, **settings)
        x = x.movedim(1, -1)[mask]
    start = Running(mean=np.zeros(2), var=np.ones(2))
    after = R.running_update(start, R.batch_statistics(x.numpy()), momentum=0.3, unbiased=unbiased)
    assert counter == 1
    assert_close(mean, torch.tensor(after.mean), dtype=torch.float64)
    assert_close(var, torch.tensor(after.var), dtype=torch.float64)


def test_whitening_stores_the_covariance_and_predicts_with_it():
    x = torch.randn(40, 4, dtype=torch.float64)
    mean, covariance = torch.zeros(4, dtype=torch.float64), torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    settings = {"num_groups": 2, "shrinkage": 0.1}
    F.whitening_batch_norm(x, mean, covariance, training=True, momentum=0.25, **settings)
    step = R.whitening_batch_norm(x.numpy(), num_groups=2, shrinkage=0.1)
    expected = 0.75 * np.eye(2) + 0.25 * step.covariance * 40 / 39
    assert_close(covariance, torch.tensor(expected), dtype=torch.float64)
    assert_close(mean, torch.tensor(0.25 * step.mean), dtype=torch.float64)
    y = F.whitening_batch_norm(x[:1], mean, covariance, training=False, **settings)
    judge = R.whitening_batch_norm_inference(x[:1].numpy(), 0.25 * step.mean, expected, shrinkage=0.1)
    assert_close(y, torch.tensor(judge), dtype=torch.float64)


@pytest.mark.parametrize("call", [F.batch_renorm, lambda *a, **k: F.ghost_batch_norm(*a, ghost_size=2, **k)])
def test_prediction_is_batch_norms(call):
    x, mean, var = torch.randn(3, 2, 5), torch.randn(2), torch.rand(2) + 0.5
    assert torch.equal(call(x, mean, var, training=False), F.batch_norm(x, mean, var, training=False))


# What is true by definition.


@pytest.mark.parametrize("training", [True, False])
def test_masked_output_does_not_change_with_padding_or_with_what_stands_in_it(training):
    x = torch.randn(3, 2, 4, requires_grad=True)
    state = {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
    short = F.masked_batch_norm(x, MASK, **state, training=training)
    padded = torch.cat([x.masked_fill(~MASK[:, None], torch.nan), torch.full((3, 2, 5), torch.nan)], 2).detach()
    padded.requires_grad_()
    again = {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
    long = F.masked_batch_norm(padded, torch.nn.functional.pad(MASK, (0, 5)), **again, training=training)
    assert torch.equal(long[..., :4], short)
    assert not long[..., 4:].any()
    assert torch.equal(again["running_var"], state["running_var"])
    dy = torch.randn(3, 2, 9)
    (dx,) = torch.autograd.grad(long, padded, dy)
    (expected,) = torch.autograd.grad(short, x, dy[..., :4])
    assert torch.equal(dx[..., :4], expected)
    assert not dx[..., 4:].any()


def test_mask_without_a_valid_position_passes_and_changes_nothing():
    mean, var, counter = torch.zeros(2), torch.ones(2), torch.tensor(0)
    y = F.masked_batch_norm(
        torch.randn(3, 2, 4), torch.zeros(3, 4).bool(), mean, var, training=True, num_batches_tracked=counter
    )
    assert not y.any()
    assert (mean.tolist(), var.tolist(), counter.item()) == ([0, 0], [1, 1], 0)


def test_adaptive_output_has_the_style_statistics():
    content, style = torch.randn(2, 3, 8, 8) * 5 + 2, torch.randn(2, 3, 9, 7) * 0.2 - 4
    y = F.adaptive_instance_norm(content, style, eps=0.0).double()
    var, mean = torch.var_mean(style.double(), (2, 3), correction=0)
    found_var, found_mean = torch.var_mean(y, (2, 3), correction=0)
    assert_close(found_mean, mean, dtype=torch.float32)
    assert_close(found_var.sqrt(), var.sqrt(), dtype=torch.float32)


def test_whitened_channels_are_uncorrelated_at_a_large_mean():
    x = torch.randn(500, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 1e4
    y = F.whitening_batch_norm(x, None, None, training=True, eps=1e-12)
    assert_close(torch.cov(y.T, correction=0), torch.eye(3).double(), dtype=torch.float32)


def test_whitening_survives_more_channels_than_samples():
    x = torch.randn(4, 16, requires_grad=True)
    y = F.whitening_batch_norm(x, None, None, training=True, shrinkage=0.1)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert y.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own, of its slower way
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inputs", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rms_norm_takes_a_weight_of_any_floating_type_as_torch_does(inputs, weights):
    x = torch.randn(5, 7).to(inputs).requires_grad_()
    weight = torch.randn(7).to(weights).requires_grad_()
    y = F.rms_norm(x, (7,), weight, eps=1e-5)
    expected = torch.nn.functional.rms_norm(x, (7,), weight, eps=1e-5)
    assert y.dtype is expected.dtype is inputs
    dy = torch.randn_like(y)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert (dx.dtype, dweight.dtype) == (inputs, weights)
    arrays = {"x": x.detach().double().numpy(), "weight": weight.detach().double().numpy()}
    step = R.rms_norm(arrays["x"], 7, arrays["weight"], eps=1e-5)
    found = R.rms_norm_backward(dy.double().numpy(), step)
    assert_close(y, torch.tensor(step.output), dtype=inputs)
    assert_close(dx, torch.tensor(found.dx), dtype=inputs)
    coarser = max(inputs, weights, key=RELATIVE.__getitem__)
    assert_close(dweight, torch.tensor(found.dweight), dtype=coarser)
