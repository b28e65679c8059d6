"""Folding swept over generated graphs, and judged by ONNX Runtime."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from normkit import fold
from normkit.anatomy import fingerprint, norm_layers
from normkit.errors import SurgeryError
from normkit.lab import networks as lab_networks

from .nets import NETS
from .networks import randomize


def relative(first, second):
    return ((first - second).abs().max() / first.abs().max().clamp_min(1e-30)).item()


@st.composite
def convolutions(draw, channels):
    """A convolution or transposed convolution that keeps some space, and how many channels it gives."""
    transposed, depthwise = draw(st.booleans()), draw(st.booleans())
    groups = channels if depthwise else draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    out = groups * draw(st.integers(1, 3))
    kernel, stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding, bias = draw(st.integers(0, 1)), draw(st.booleans())
    if transposed:
        cut = padding if kernel > 1 else 0
        layer = nn.ConvTranspose2d(channels, out, kernel, stride, cut, groups=groups, bias=bias)
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias, mode)
    return layer, out


class Graph(nn.Module):
    """Steps applied in a row; a step may be shared, branch off and be added or joined again, or be read twice."""

    def __init__(self, steps, ways):
        super().__init__()
        self.steps, self.ways = nn.ModuleList(steps), ways

    def forward(self, x):
        for step, way in zip(self.steps, self.ways, strict=True):
            new = step(x)
            if way == "add" and isinstance(step, nn.BatchNorm2d):
                new = new + x
            elif way == "join" and isinstance(step, nn.ReLU):
                new = torch.cat([new, x], 1)[:, : x.shape[1]]
            elif way == "twice" and isinstance(step, nn.BatchNorm2d):
                new = step(new)
            x = new
        return x


@st.composite
def graphs(draw):
    channels, steps, ways, shared = 6, [], [], {}
    for _ in range(draw(st.integers(2, 6))):
        kind = draw(st.sampled_from(["conv", "conv", "norm", "norm", "relu", "dropout", "shared"]))
        if kind == "conv":
            layer, channels = draw(convolutions(channels))
        elif kind == "norm":
            layer = nn.BatchNorm2d(channels, affine=draw(st.booleans()))
        elif kind == "shared":
            layer = shared.setdefault(channels, nn.Conv2d(channels, channels, 1))
        else:
            layer = nn.ReLU() if kind == "relu" else nn.Dropout(0.5)
        steps.append(layer)
        ways.append(draw(st.sampled_from(["plain", "plain", "plain", "add", "join", "twice"])))
    return Graph(steps, ways)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graph=graphs(), seed=st.integers(0, 2**16))
def test_generated_graphs_keep_their_function_or_are_refused(graph, seed):
    torch.manual_seed(seed)
    model = randomize(graph).eval()
    example, other = torch.randn(2, 6, 13, 11), torch.randn(1, 6, 17, 15)
    try:
        expected = model(example), model(other)
    except RuntimeError:
        return  # space is used up: no model
    norms, before = len(norm_layers(model)), fingerprint(model)
    try:
        record = fold(model, example)
    except SurgeryError:
        assert fingerprint(model) == before
        return
    assert fingerprint(model) == before
    assert len(record.touched) + len(record.refused) == norms
    assert all(record.refused.values())
    with torch.no_grad():
        for input, output in zip((example, other), expected, strict=True):
            assert relative(output.detach(), record.model(input)) <= 1e-5


def test_sweep_folds_something():
    counts = []

    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(graph=graphs())
    def count(graph):
        try:
            counts.append(len(fold(randomize(graph).eval(), torch.randn(2, 6, 13, 11)).touched))
        except (SurgeryError, RuntimeError):
            counts.append(0)

    count()
    assert sum(counts) >= 10


def in_onnx_runtime(model, example, input, folder):
    """Export a model and return what onnxruntime makes of an input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own parts
        import onnxruntime

        from normkit.surgery.program import write_onnx

        write_onnx(model, example, folder / "net.onnx")
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    return torch.from_numpy(output)


@pytest.mark.parametrize("name", NETS)
def test_onnx_runtime_agrees_with_the_folded_export(name, tmp_path):
    model, example, input = randomize(NETS[name][0]()).eval(), torch.randn(2, 3, 16, 16), torch.randn(3, 3, 16, 16)
    folded = fold(model, example).model
    assert relative(model(input).detach(), in_onnx_runtime(folded, example, input, tmp_path)) <= 1e-5


LAB = {
    "lenet5": (lambda: lab_networks.LeNet5("batch"), (2, 1, 28, 28)),
    "four-convolutions": (lambda: lab_networks.FourConvolutions("batch"), (2, 1, 28, 28)),
    "deep-relu": (lambda: lab_networks.DenseNetwork([20] * 12, "batch", inputs=49), (3, 1, 7, 7)),
    "deep-sigmoid": (lambda: lab_networks.DenseNetwork([20] * 8, "batch", activation="sigmoid", inputs=49), (3, 7, 7)),
    "dropout": (lambda: lab_networks.DenseNetwork([20] * 3, "batch", dropout=0.5, dropout_after=1, inputs=49), (3, 49)),
}
if hasattr(lab_networks, "AlexNet"):
    LAB["alexnet"] = (lambda: lab_networks.AlexNet("batch", width=6, size=16), (2, 1, 16, 16))


@pytest.mark.parametrize("name", LAB)
def test_networks_of_the_laboratory_lose_every_norm_and_keep_their_function(name, tmp_path):
    build, shape = LAB[name]
    model, example = randomize(build()).eval(), torch.randn(shape)
    other = torch.randn(5, *shape[1:])
    record = fold(model, example)
    assert not record.refused
    assert not norm_layers(record.model)
    assert record.largest_change <= 1e-5
    with torch.no_grad():
        assert relative(model(other), record.model(other)) <= 1e-5
        assert relative(model(other), in_onnx_runtime(record.model, example, other, tmp_path)) <= 1e-5


# What is affine in evaluation, and so becomes part of the layer beside it.
AFFINE = {"batch", "renorm", "ghost", "whitening"}


@pytest.mark.parametrize("norm", [norm for norm in lab_networks.known_norms() if norm != "none"])
def test_every_kind_of_norm_of_the_laboratory_is_folded_or_refused_with_a_reason(norm):
    example = torch.randn(2, 1, 28, 28)
    model = randomize(lab_networks.LeNet5(norm)).eval()
    before = fingerprint(model)
    if norm in AFFINE:
        record = fold(model, example)
        assert not norm_layers(record.model)
        assert record.verdict.exact <= 1e-9
    else:
        with pytest.raises(SurgeryError, match=r"no layer to work on\. .+ computes its statistics from the input"):
            fold(model, example)
    assert fingerprint(model) == before
