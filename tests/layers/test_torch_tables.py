"""Our layers and function, run through the tables that torch tests its own with.

Every test counts the cases it ran: a row that is skipped in silence fails the count.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing._internal.common_utils import gradcheck, gradgradcheck, noncontiguous_like

from normkit import functional
from tolerances import assert_close
from torch_tables import EAGER, LAYERS, LAZY, ROWS, Case, cases, error_rows, operator_samples
from torch_versions import uses_torchscript

every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# gradcheck's forward mode compiles a decomposition of torch's own with what torch itself calls deprecated.
WIDE, LOW = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)


def assert_served(kernels_ran, case: Case, dtype: torch.dtype) -> None:
    """The CPU kernels of this type ran forward and backward; an input without values needs none."""
    if case.input.numel():
        assert kernels_ran.served(dtype), f"{case.name}: torch operations ran instead"
        assert kernels_ran.served(dtype, backward=True), f"{case.name}: torch operations ran instead"
    kernels_ran.clear()


def run(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Forward and backward; output, gradients and buffers by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, [x, *named.values()], dy)
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    return {"output": y.detach(), **dict(zip(["input gradient", *named], gradients, strict=True)), **buffers}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], case: Case, dtype: torch.dtype) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key == "num_batches_tracked":
            # torch counts a batch without samples; ours, which changes nothing then, does not.
            surplus = 1 if case.training and case.input.numel() == 0 else 0
            assert ours[key] == value - surplus, case.name
        else:
            assert_close(ours[key], value, dtype=dtype, what=f"{case.name}: {key}")


@every_mode
@every_layer
def test_output_gradients_and_buffers_match_torch(layer, training, kernels_ran):
    ran = 0
    for dtype in WIDE + LOW:
        for case in cases(layer, dtype, training):
            ours, theirs = case.pair()
            dy = torch.randn_like(case.input)
            expected = run(theirs.double(), case.input.double(), dy.double())
            found = run(ours, case.input, dy)
            assert_served(kernels_ran, case, dtype)
            assert found["output"].dtype is dtype
            assert found["input gradient"].dtype is dtype
            assert_same(found, expected, case, dtype)
            ran += 1
    assert ran == 4 * ROWS[LAYERS[layer]]


@every_layer
def test_error_rows_raise_torchs_error(layer):
    at_construction = in_forward = 0
    for row in error_rows(layer):
        assert row.error_type is ValueError
        made, given = row.module_error_input.constructor_input, row.module_error_input.forward_input
        args = made.args if layer in EAGER else made.args[1:]
        if made.kwargs["eps"] < 0:
            # torch builds a layer that can never run; ours is refused where the mistake is made.
            with pytest.raises(ValueError, match="eps must be finite and non-negative"):
                layer(*args, **made.kwargs)
            at_construction += 1
        else:
            module = layer(*args, **made.kwargs)
            with pytest.raises(row.error_type, match=row.error_regex):
                module(*given.args, **given.kwargs)
            in_forward += 1
    assert (at_construction, in_forward) == (1, 1)


@uses_torchscript
@every_mode
@pytest.mark.parametrize("layer", EAGER, ids=lambda layer: layer.__name__)
def test_gradients_agree_with_differences(layer, training):
    ran = 0
    for case in cases(layer, torch.float64, training, requires_grad=True):
        ours, _ = case.pair()
        inputs = (case.input, *ours.parameters())

        def call(x, *values, module=ours):
            named = dict(zip(dict(module.named_parameters()), values, strict=True))
            return functional_call(module, named, (x,))

        assert gradcheck(call, inputs, check_forward_ad=True), case.name
        assert gradgradcheck(call, inputs), case.name
        ran += 1
    assert ran == ROWS[LAYERS[layer]]


@every_mode
@every_layer
def test_strides_of_input_and_cotangent_do_not_matter(layer, training, kernels_ran):
    ran = 0
    for case in cases(layer, torch.float64, training):
        ours, _ = case.pair()
        ours.eval()(case.input)
        ours.train(training)
        other = copy.deepcopy(ours)
        dy = torch.randn_like(case.input)
        expected = run(other, case.input, dy)
        kernels_ran.clear()
        x, cotangent = noncontiguous_like(case.input), noncontiguous_like(dy)
        assert x.numel() < 2 or not x.is_contiguous()
        leaf = x.detach().requires_grad_()
        y = ours(leaf)
        gradients = torch.autograd.grad(y, [leaf, *ours.parameters()], cotangent)
        assert_served(kernels_ran, case, torch.float64)
        found = {
            "output": y.detach(),
            **dict(zip(list(expected)[1:], gradients, strict=False)),
            **dict(ours.named_buffers()),
        }
        for key, value in expected.items():
            assert_close(found[key], value, dtype=torch.float64, what=f"{case.name}: {key}")
        ran += 1
    assert ran == ROWS[LAYERS[layer]]


@every_mode
@every_layer
def test_memory_format_of_the_input_is_kept(layer, training, kernels_ran):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    ran = 0
    for case in cases(layer, torch.float32, training):
        if case.input.dim() not in formats:
            continue
        memory_format = formats[case.input.dim()]
        ours, theirs = case.pair()
        dy = torch.randn_like(case.input)
        expected = run(theirs.double(), case.input.double(), dy.double())
        found = run(ours, case.input.to(memory_format=memory_format), dy.to(memory_format=memory_format))
        # The others run per channel, whatever the layout.
        of_the_layout = [name for name in kernels_ran.names() if name not in ("stored", "given")]
        assert all(name.startswith("channels_last.") for name in of_the_layout), case.name
        assert_served(kernels_ran, case, torch.float32)
        assert found["output"].is_contiguous(memory_format=memory_format), case.name
        assert found["input gradient"].is_contiguous(memory_format=memory_format), case.name
        assert_same(found, expected, case, torch.float32)
        ran += 1
    assert ran == (0 if LAYERS[layer] is nn.BatchNorm1d else ROWS[LAYERS[layer]])


@every_layer
def test_state_dicts_load_in_both_directions(layer):
    ran = 0
    for case in cases(layer, torch.float32, False):
        ours, theirs = case.pair()
        ours(case.input)
        mine, other = ours.state_dict(), theirs.state_dict()
        assert list(mine) == list(other)
        assert mine._metadata == other._metadata
        back = case.twin(*case.args, **case.kwargs).eval()
        assert str(back.load_state_dict(mine)) == "<All keys matched successfully>"
        for name, value in other.items():
            assert torch.equal(mine[name], value), f"{case.name}: {name}"
            assert torch.equal(back.state_dict()[name], value), f"{case.name}: {name}"
        assert_close(ours(case.input), back(case.input), dtype=torch.float32, what=case.name)
        ran += 1
    assert ran == ROWS[LAYERS[layer]]


def _pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
@every_layer
def test_copies_compute_the_same_bits(layer, duplicate):
    ran = 0
    for training in (True, False):
        for case in cases(layer, torch.float32, training):
            ours, _ = case.pair()
            ours.eval()(case.input)
            twin = duplicate(ours.train(training))
            assert type(twin) is type(ours)
            assert repr(twin) == repr(ours)
            dy = torch.randn_like(case.input)
            expected, found = run(ours, case.input, dy), run(twin, case.input, dy)
            for key, value in expected.items():
                assert torch.equal(found[key], value), f"{case.name}: {key}"
            ran += 1
    assert ran == 2 * ROWS[LAYERS[layer]]


@pytest.mark.parametrize("layer", LAZY, ids=lambda layer: layer.__name__)
def test_lazy_layer_becomes_the_eager_one(layer):
    ran = 0
    for case in cases(layer, torch.float32, True):
        lazy = case.build()
        assert list(lazy.state_dict()) == list(case.pair()[1].state_dict())
        lazy(case.input)
        assert type(lazy) is layer.cls_to_become
        assert type(lazy) in EAGER
        assert lazy.num_features == case.args[0]
        assert repr(lazy) == repr(type(lazy)(*case.args, **case.kwargs))
        ran += 1
    assert ran == ROWS[LAYERS[layer]]


@every_mode
@every_layer
def test_meta_layer_gives_the_shape(layer, training):
    ran = 0
    for case in cases(layer, torch.float32, training):
        args = case.args if layer in EAGER else case.args[1:]
        module = layer(*args, **case.kwargs, device="meta").train(training)
        y = module(case.input.to("meta"))
        assert y.is_meta
        assert y.shape == case.input.shape
        assert all(value.is_meta for value in module.state_dict().values())
        ran += 1
    assert ran == ROWS[LAYERS[layer]]


@every_layer
def test_double_module_and_to_empty_keep_the_layout_of_the_state(layer):
    ran = 0
    for case in cases(layer, torch.float32, False):
        ours, theirs = case.pair()
        ours(case.input)
        wide, twin = ours.double(), theirs.double()
        assert [v.dtype for v in wide.state_dict().values()] == [v.dtype for v in twin.state_dict().values()]
        assert [name for name, _ in wide.named_parameters()] == [name for name, _ in twin.named_parameters()]
        assert [name for name, _ in wide.named_buffers()] == [name for name, _ in twin.named_buffers()]
        ran += 1
    assert ran == ROWS[LAYERS[layer]]


def _allowed(x: Tensor, kwargs: dict[str, object]) -> dict[str, object]:
    """The sample's arguments with a momentum that is one: torch's table holds negative ones."""
    momentum = kwargs.get("momentum", 0.1)
    return kwargs if 0 <= momentum <= 1 else {**kwargs, "momentum": 0.3}


def test_operator_samples_match_torch(kernels_ran):
    ran = one_dimensional = negative_momentum = 0
    for dtype in WIDE + LOW:
        for x, args, kwargs in operator_samples(dtype):
            if x.dim() < 2:
                with pytest.raises(ValueError, match="at least 2D"):
                    functional.batch_norm(x, *args, **kwargs)
                one_dimensional += 1
                continue
            if _allowed(x, kwargs) != kwargs:
                with pytest.raises(ValueError, match="momentum must be from 0 to 1"):
                    functional.batch_norm(x, *args, **kwargs)
                negative_momentum += 1
            kwargs = _allowed(x, kwargs)
            args = [None if value is None else value.abs() + 0.5 for value in args]
            wide = [None if value is None else value.double() for value in args]
            dy = torch.randn_like(x)
            leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
            y, expected = functional.batch_norm(leaf, *args, **kwargs), F.batch_norm(twin, *wide, **kwargs)
            assert y.dtype is dtype
            assert_close(y, expected, dtype=dtype, what=f"{tuple(x.shape)} {kwargs}")
            (dx,), (expected_dx,) = torch.autograd.grad(y, leaf, dy), torch.autograd.grad(expected, twin, dy.double())
            assert_close(dx, expected_dx, dtype=dtype, what=f"{tuple(x.shape)} {kwargs}: input gradient")
            assert not x.numel() or (kernels_ran.served(dtype) and kernels_ran.served(dtype, backward=True)), kwargs
            kernels_ran.clear()
            for value, other in zip(args, wide, strict=True):
                if value is not None:
                    assert_close(value, other, dtype=dtype, what=f"{tuple(x.shape)} {kwargs}: argument after the call")
            ran += 1
    # op_db names the operator twice (with and without cuDNN): 2 x 12 samples, 2 x 2 of them without channels.
    assert (ran, one_dimensional, negative_momentum) == (4 * 20, 4 * 4, 4 * 6)


@uses_torchscript
def test_operator_samples_pass_gradcheck():
    ran = 0
    for x, args, kwargs in operator_samples(torch.float64, requires_grad=True):
        if x.dim() < 2:
            continue
        running = [None if value is None else value.detach().abs() + 0.5 for value in args[:2]]
        parameters = [value for value in args[2:] if value is not None]
        kwargs = _allowed(x, kwargs)

        def call(x, *values, running=running, kwargs=kwargs):
            return functional.batch_norm(x, *running, *values, **kwargs)

        assert gradcheck(call, (x, *parameters), check_forward_ad=True), kwargs
        assert gradgradcheck(call, (x, *parameters)), kwargs
        ran += 1
    assert ran == 20
