"""The layers and functions beside batch normalization, run through the tables that torch tests its own with.

Expected values are torch.nn's in float64 on the same numbers. Every test counts the rows it ran.
"""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing._internal import common_modules
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import gradcheck, gradgradcheck, noncontiguous_like

import normkit
from normkit import functional
from tolerances import assert_close
from torch_tables import EAGER, scramble
from torch_versions import (
    GROUP_NORM_ERRORS,
    GROUP_NORM_REFERENCES,
    GROUP_NORM_SAMPLES,
    NO_POSITIONS,
    uses_torchscript,
)

# Ours, torch's, and how many rows torch 2.13 has for it: a newer torch may add some, none may vanish unseen.
LAYERS = {
    normkit.GroupNorm: (nn.GroupNorm, 10),
    normkit.InstanceNorm1d: (nn.InstanceNorm1d, 6),
    normkit.InstanceNorm2d: (nn.InstanceNorm2d, 6),
    normkit.InstanceNorm3d: (nn.InstanceNorm3d, 6),
    normkit.LayerNorm: (nn.LayerNorm, 7),
    normkit.LocalResponseNorm: (nn.LocalResponseNorm, 3),
    normkit.RMSNorm: (nn.RMSNorm, 6),
}
_INFO = {info.module_cls: info for info in common_modules.module_db}
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def rows(layer, dtype, training, requires_grad=False):
    """Our layer and torch's in the same random state, the input, and the row's name."""
    twin, count = LAYERS[layer]
    info = _INFO[twin]
    found = []
    for row in info.module_inputs_func(info, "cpu", dtype, requires_grad, training):
        args, kwargs = row.constructor_input.args, dict(row.constructor_input.kwargs)
        theirs = twin(*args, **kwargs).to(dtype).train(training)
        scramble(theirs)
        ours = layer(*args, **kwargs).to(dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        found.append((ours, theirs, row.forward_input.args[0], f"{layer.__name__} {row.desc}"))
    assert len(found) >= count, f"torch's table lost rows for {twin.__name__}"
    return found


def run(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Forward and backward; output, gradients and buffers by name."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(leaf)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, [leaf, *named.values()], dy)
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    return {"output": y.detach(), **dict(zip(["input gradient", *named], gradients, strict=True)), **buffers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_mode
@every_layer
def test_output_gradients_and_buffers_match_torch(layer, training, dtype):
    for ours, theirs, x, name in rows(layer, dtype, training):
        dy = torch.randn_like(x)
        expected, found = run(theirs.double(), x.double(), dy.double()), run(ours, x, dy)
        assert found["output"].dtype is dtype
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, dtype=dtype, what=f"{name}: {key}")


@uses_torchscript
@every_mode
@every_layer
def test_gradients_agree_with_differences(layer, training):
    for ours, _, x, name in rows(layer, torch.float64, training, requires_grad=True):

        def call(x, *values, module=ours):
            return functional_call(module, dict(zip(dict(module.named_parameters()), values, strict=True)), (x,))

        # torch's own local response norm has no forward mode here, nor need ours.
        assert gradcheck(call, (x, *ours.parameters()), check_forward_ad=True), name
        assert gradgradcheck(call, (x, *ours.parameters())), name


@every_layer
def test_strides_of_input_and_cotangent_do_not_matter(layer):
    for ours, _, x, name in rows(layer, torch.float64, True):
        if x.numel() == 0:
            continue
        dy = torch.randn_like(x)
        expected = run(copy.deepcopy(ours), x, dy)
        leaf = noncontiguous_like(x).detach().requires_grad_()
        y = ours(leaf)
        gradients = torch.autograd.grad(y, [leaf, *ours.parameters()], noncontiguous_like(dy))
        assert_close(y, expected["output"], dtype=torch.float64, what=name)
        for found, value in zip(gradients, list(expected.values())[1:], strict=False):
            assert_close(found, value, dtype=torch.float64, what=name)


@every_layer
def test_memory_format_of_the_input_is_kept(layer):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for ours, theirs, x, name in rows(layer, torch.float32, True):
        if x.dim() not in formats or isinstance(ours, (nn.LayerNorm, nn.RMSNorm)):
            continue
        given = x.to(memory_format=formats[x.dim()])
        dy = torch.randn_like(given)
        leaf = given.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = ours(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert y.is_contiguous(memory_format=formats[x.dim()]), name
        assert dx.is_contiguous(memory_format=formats[x.dim()]), name
        assert_close(y, theirs.double()(x.double()), dtype=torch.float32, what=name)


@every_layer
def test_state_dicts_load_in_both_directions(layer):
    for ours, theirs, _, _ in rows(layer, torch.float32, False):
        mine, other = ours.state_dict(), theirs.state_dict()
        assert list(mine) == list(other)
        assert mine._metadata == other._metadata
        assert str(theirs.load_state_dict(mine)) == "<All keys matched successfully>"
        assert repr(ours) == repr(theirs)
        assert isinstance(ours, type(theirs))


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(module)
    scramble(twin)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), _saved])
@every_layer
def test_copies_compute_the_same_bits(layer, duplicate):
    for ours, _, x, name in rows(layer, torch.float32, True):
        twin = duplicate(ours)
        assert type(twin) is layer
        assert torch.equal(twin(x), ours(x)), name


@every_mode
@every_layer
def test_meta_layer_gives_the_shape(layer, training):
    for ours, _, x, _ in rows(layer, torch.float32, training):
        y = ours.to("meta")(x.to("meta"))
        assert y.is_meta
        assert y.shape == x.shape


# How many of torch's rows bring a function of their own to compare with; the others have torch.nn alone.
OWN_REFERENCES = {normkit.RMSNorm: 6, normkit.InstanceNorm1d: 2, normkit.InstanceNorm2d: 2, normkit.InstanceNorm3d: 2}


@every_mode
@every_layer
def test_rows_agree_with_the_references_that_torch_gives_them(layer, training):
    info, ran = _INFO[LAYERS[layer][0]], 0
    for row in info.module_inputs_func(info, "cpu", torch.float64, False, training):
        if row.reference_fn is not None:
            ours = layer(*row.constructor_input.args, **row.constructor_input.kwargs).double().train(training)
            scramble(ours)
            x = row.forward_input.args[0]
            # Some of them compute in float32, whatever they are given.
            expected = row.reference_fn(copy.deepcopy(ours), x)
            assert_close(ours(x), expected, dtype=torch.float32, what=f"{layer.__name__} {row.desc}")
            ran += 1
    assert ran == OWN_REFERENCES.get(layer, 0)


def test_error_rows_of_group_norm_raise_torchs_error():
    info = _INFO[nn.GroupNorm]
    table = list(info.module_error_inputs_func(info, "cpu", torch.float32, False, True))
    assert len(table) == 2
    for row in table:
        made = row.module_error_input.constructor_input
        with pytest.raises(row.error_type, match=row.error_regex):
            normkit.GroupNorm(*made.args, **made.kwargs)


OPERATORS = {
    "nn.functional.group_norm": (functional.group_norm, F.group_norm, GROUP_NORM_SAMPLES, 4),
    "nn.functional.instance_norm": (functional.instance_norm, F.instance_norm, 6, 3),
    "nn.functional.layer_norm": (functional.layer_norm, F.layer_norm, 5, 1),
    "nn.functional.local_response_norm": (functional.local_response_norm, F.local_response_norm, 11, 0),
    "nn.functional.rms_norm": (functional.rms_norm, F.rms_norm, 5, 1),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def samples(name, dtype):
    """Positional tensors, the rest of the call, and whether the sample's eps or momentum is one that we refuse."""
    for info in op_db:
        if info.name == name:
            for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
                refused = sample.kwargs.get("eps", 1) < 0 or sample.kwargs.get("momentum", 0.1) < 0
                yield sample.input, list(sample.args), dict(sample.kwargs), refused


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_operator_samples_match_torch(name, dtype):
    ours, theirs, expected_runs, expected_refusals = OPERATORS[name]
    ran = refusals = 0
    for x, args, kwargs, refused in samples(name, dtype):
        for key in ("running_mean", "running_var"):
            if kwargs.get(key) is not None:
                kwargs[key] = kwargs[key].detach().abs() + 0.5
        if refused:
            with pytest.raises(ValueError, match=r"(eps|momentum) must be"):
                ours(x, *args, **kwargs)
            refusals += 1
            continue
        wide_args = [value.double() if isinstance(value, Tensor) else value for value in args]
        wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        y, expected = ours(x, *args, **kwargs), theirs(x.double(), *wide_args, **wide)
        assert y.dtype is dtype
        assert_close(y.detach(), expected.detach(), dtype=dtype, what=f"{tuple(x.shape)} {args} {kwargs}")
        for key in ("running_mean", "running_var"):
            if kwargs.get(key) is not None:
                assert_close(kwargs[key], wide[key], dtype=dtype, what=key)
        ran += 1
    assert (ran, refusals) == (expected_runs, expected_refusals)


# How many samples of an operator torch compares with NumPy, and how many of them we refuse.
NUMPY_REFERENCES = {
    "nn.functional.group_norm": (GROUP_NORM_REFERENCES, 4),
    "nn.functional.instance_norm": (0, 0),
    "nn.functional.layer_norm": (5, 1),
    "nn.functional.local_response_norm": (0, 0),
    "nn.functional.rms_norm": (5, 1),
}


@every_operator
def test_operator_samples_match_torchs_numpy_references(name):
    ran = refusals = 0
    for info in op_db:
        if info.name != name or info.ref is None:
            continue
        for sample in info.reference_inputs("cpu", torch.float64):
            if sample.kwargs.get("eps", 1) < 0:
                refusals += 1
                continue
            given = sample.numpy()
            expected = torch.as_tensor(info.ref(given.input, *given.args, **given.kwargs))
            y = OPERATORS[name][0](sample.input, *sample.args, **sample.kwargs)
            assert_close(y, expected, dtype=torch.float64, what=f"{given.args} {given.kwargs}")
            ran += 1
    assert (ran, refusals) == NUMPY_REFERENCES[name]


@uses_torchscript
@every_operator
def test_operator_samples_pass_gradcheck(name):
    ours, _, expected_runs, _ = OPERATORS[name]
    ran = 0
    for x, args, kwargs, refused in samples(name, torch.float64):
        if refused:
            continue
        kwargs = {key: None if key.startswith("running") else value for key, value in kwargs.items()}
        if kwargs.get("use_input_stats") is False:
            continue
        names = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
        places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]

        def call(x, *values, args=args, kwargs=kwargs, names=names, places=places):
            given = list(args)
            for place, value in zip(places, values, strict=False):
                given[place] = value
            return ours(x, *given, **{**kwargs, **dict(zip(names, values[len(places) :], strict=True))})

        tensors = (x, *(args[place] for place in places), *(kwargs[key] for key in names))
        assert gradcheck(call, tensors, check_forward_ad=True)
        assert gradgradcheck(call, tensors)
        ran += 1
    assert ran == expected_runs


@every_operator
def test_operator_errors_are_torchs(name):
    ran = 0
    for info in op_db:
        if info.name == name and info.error_inputs_func:
            for row in info.error_inputs("cpu"):
                if row.error_regex.startswith(NO_POSITIONS):
                    continue
                sample = row.sample_input
                with pytest.raises(row.error_type, match=row.error_regex):
                    OPERATORS[name][0](sample.input, *sample.args, **sample.kwargs)
                ran += 1
    assert ran == {"nn.functional.group_norm": GROUP_NORM_ERRORS, "nn.functional.rms_norm": 3}.get(name, 0)


def test_all_ten_layers_and_six_operators_are_run():
    assert {twin.__name__ for twin, _ in LAYERS.values()} | {twin.__name__ for twin in EAGER.values()} == {
        *(f"{kind}Norm{n}d" for kind in ("Batch", "Instance") for n in (1, 2, 3)),
        *("GroupNorm", "LayerNorm", "LocalResponseNorm", "RMSNorm"),
    }
    norms = {
        info.name
        for info in op_db
        if re.fullmatch(r"nn\.functional\.(\w+_)?(batch|group|instance|layer|rms|response)_norm", info.name)
    }
    assert norms == {*OPERATORS, "nn.functional.batch_norm"}


@uses_torchscript
@every_layer
def test_scripted_traced_and_compiled_layers_match(layer):
    ours, _, x, _ = rows(layer, torch.float32, False)[0]
    expected = ours(x)
    assert_close(torch.jit.script(ours)(x), expected, dtype=torch.float32, what="script")
    traced = torch.jit.trace(ours, x)
    assert_close(traced(x), expected, dtype=torch.float32, what="trace")
    graph = torch.fx.symbolic_trace(nn.Sequential(ours))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_close(compiled(x), expected, dtype=torch.float32, what="compile")
    exported = torch.export.export(ours, (x,)).module()
    assert_close(exported(x), expected, dtype=torch.float32, what="export")
