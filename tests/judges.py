"""Judges of a two-dimensional batch norm: each takes what builds a layer, and raises AssertionError at a fault.

A layer is built as ``build(num_features, eps=..., momentum=...)`` and used as torch's is. Which faults they find
between them is tested in ``test_planted_faults.py``.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from normkit import reference
from tolerances import FORWARD_ULP, assert_close

Build = Callable[..., nn.Module]

# Large enough that where it stands shows in every digit.
EPS = 0.3


def _filled(build: Build, dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
    """A layer whose state differs from its starting one, and between channels."""
    module = build(3, **settings).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            else:
                assert name == "num_batches_tracked"
                value.fill_(2)
    return module


def _data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape) * 2 + torch.tensor([1.0, -2.0, 5.0])[:, None, None]).to(dtype)


def _run(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return {"output": y.detach(), **dict(zip(["dx", *(f"d{name}" for name in names)], gradients, strict=True))}


def agrees_with_torch(build: Build) -> None:
    """Output, gradients and state are torch's in both modes, for every form of the momentum."""
    for momentum in (0.1, 0.7, None):
        ours = _filled(build, eps=EPS, momentum=momentum)
        theirs = nn.BatchNorm2d(3, eps=EPS, momentum=momentum).double()
        theirs.load_state_dict(ours.state_dict())
        for training in (True, True, False):
            x, dy = _data(4, 3, 5, 7), torch.randn(4, 3, 5, 7, dtype=torch.float64)
            found, expected = _run(ours.train(training), x, dy), _run(theirs.train(training), x, dy)
            found.update(ours.state_dict())
            expected.update(theirs.state_dict())
            for name, value in expected.items():
                assert_close(found[name], value, dtype=torch.float64, what=f"{name}, training={training}")


def agrees_with_the_reference(build: Build) -> None:
    """The training step and prediction are those of the float64 reference."""
    module = _filled(build, eps=EPS)
    weight, bias = (value.detach().numpy() for value in (module.weight, module.bias))
    x, dy = _data(3, 3, 2, 5), torch.randn(3, 3, 2, 5, dtype=torch.float64)
    for training in (True, False):
        if training:
            step = reference.batch_norm(x.numpy(), weight, bias, eps=EPS)
            back = reference.batch_norm_backward(dy.numpy(), step)
        else:
            mean, var = (value.numpy().copy() for value in (module.running_mean, module.running_var))
            step = reference.batch_norm_inference(x.numpy(), mean, var, weight, bias, eps=EPS)
            back = reference.batch_norm_inference_backward(dy.numpy(), step)
        found = _run(module.train(training), x, dy)
        expected = {"output": step.output, "dx": back.dx, "dweight": back.dweight, "dbias": back.dbias}
        for name, value in expected.items():
            assert_close(found[name], torch.from_numpy(value), dtype=torch.float64, what=name)


def follows_the_running_average(build: Build) -> None:
    """After some batches the stored statistics are the weighted sum that their definition says."""
    module = build(3, momentum=0.25).double()
    batches = torch.stack([_data(4, 3, 2, 1) for _ in range(3)])
    for batch in batches:
        module(batch)
    weights = 0.25 * 0.75 ** torch.arange(2, -1, -1, dtype=torch.float64)
    values = batches.transpose(1, 2).flatten(2)
    assert module.num_batches_tracked == 3
    assert_close(module.running_mean, weights @ values.mean(2), dtype=torch.float64, what="running_mean")
    assert_close(module.running_var, 0.75**3 + weights @ values.var(2), dtype=torch.float64, what="running_var")


def leaves_evaluation_untouched(build: Build) -> None:
    """Evaluation uses the stored statistics, one sample at a time, and writes nothing."""
    module = _filled(build).eval()
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    x = _data(4, 3, 5, 7)
    whole, alone = module(x), torch.cat([module(sample) for sample in x.split(1)])
    assert_close(alone, whole, dtype=torch.float64, what="samples one by one")
    for name, value in module.state_dict().items():
        assert torch.equal(value, kept[name]), f"evaluation changed {name}"


def survives_a_large_mean(build: Build) -> None:
    """float32 results stay within the promised units in the last place, in both layouts; a constant gives the bias."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for mean in (0.0, 1e4):
            x = (torch.randn(8, 3, 17, 19) + mean).to(memory_format=memory_format)
            y = build(3)(x).detach().double().numpy()
            expected = reference.batch_norm(x.double().numpy()).output
            unit = np.spacing(np.maximum(1, np.abs(expected)).astype(np.float32)).astype(np.float64)
            error = (np.abs(y - expected) / unit).max()
            assert error <= FORWARD_ULP, f"off by {error:.3g} ulp at mean {mean:g}, {memory_format}"
        module = _filled(build, torch.float32)
        constant = torch.full((4, 3, 5, 7), 1e10).to(memory_format=memory_format)
        assert torch.equal(module(constant), module.bias[:, None, None].expand(4, 3, 5, 7)), "a constant channel"


def keeps_type_and_memory_format(build: Build) -> None:
    """The output has the input's type and memory format, whatever the type of the state."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for training in (True, False):
                x = _data(4, 3, 5, 7, dtype=dtype).to(memory_format=memory_format)
                found = _run(build(3).train(training), x, torch.randn_like(x))
                for name in ("output", "dx"):
                    assert found[name].dtype is dtype, f"{name} of {dtype} came as {found[name].dtype}"
                    assert found[name].is_contiguous(memory_format=memory_format), f"{name} lost {memory_format}"


def refuses_without_a_trace(build: Build) -> None:
    """A batch with one value per channel is refused, and has not been counted."""
    module = _filled(build)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    try:
        module(_data(1, 3, 1, 1))
    except ValueError:
        pass
    else:
        raise AssertionError("one value per channel was accepted")
    for name, value in module.state_dict().items():
        assert torch.equal(value, kept[name]), f"the refused batch changed {name}"


JUDGES: tuple[Callable[[Build], None], ...] = (
    agrees_with_torch,
    agrees_with_the_reference,
    follows_the_running_average,
    leaves_evaluation_untouched,
    survives_a_large_mean,
    keeps_type_and_memory_format,
    refuses_without_a_trace,
)
