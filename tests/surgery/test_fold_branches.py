"""Branches of one input that are summed become one convolution, or stay as they are."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normkit
from normkit.surgery import fold_branches
from tolerances import assert_close

from .networks import randomize


def branch(inputs, outputs, size, **settings):
    padding = settings.pop("padding", size // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=padding, **settings), nn.BatchNorm2d(outputs))


class RepVGG(nn.Module):
    """Two convolutions and a norm of one input, summed."""

    def __init__(self, channels=6, **settings):
        super().__init__()
        self.large, self.small = branch(channels, channels, 3, **settings), branch(channels, channels, 1, **settings)
        self.identity, self.act = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x):
        return self.act(self.large(x) + self.small(x) + self.identity(x))


class InPlace(RepVGG):
    """The same as timm writes it, with what does nothing in between."""

    def __init__(self, channels=6, **settings):
        super().__init__(channels, **settings)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        identity = self.identity(x)
        y = self.drop(self.small(x) + self.large(x))
        y += identity
        return self.act(y)


class MobileOne(nn.Module):
    """Several branches in a list, summed in a loop that begins at 0."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([branch(6, 6, 3, groups=3) for _ in range(3)])
        self.scale, self.identity = branch(6, 6, 1, groups=3), nn.BatchNorm2d(6)

    def forward(self, x):
        y = 0
        for each in self.branches:
            y = y + each(x)
        y += self.scale(x)
        return torch.relu(torch.add(y, self.identity(x)))


class Strided(nn.Module):
    """No place of the input is one of the output."""

    def __init__(self):
        super().__init__()
        self.large, self.small = branch(6, 4, 3, stride=2), branch(6, 4, 1, stride=2)

    def forward(self, x):
        return self.large(x).add(self.small(x))


class Asymmetric(nn.Module):
    """ACNet's: the kernels lie in the largest one."""

    def __init__(self):
        super().__init__()
        self.square = branch(6, 6, 3)
        self.row = nn.Sequential(nn.Conv2d(6, 6, (1, 3), padding=(0, 1)), nn.BatchNorm2d(6))
        self.column = nn.Sequential(nn.Conv2d(6, 6, (3, 1), padding=(1, 0)), nn.BatchNorm2d(6))

    def forward(self, x):
        return self.square(x) + self.row(x) + self.column(x)


class Shortcut(RepVGG):
    """The input itself is one of the branches, and something of another input stays in the sum."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.act(self.large(x) + self.other(torch.tanh(x)) + x)


def given(block, channels=6):
    torch.manual_seed(3)
    model = randomize(nn.Sequential(nn.Conv2d(3, channels, 1), block, nn.Conv2d(block_outputs(block), 2, 1)))
    return model.eval()


def block_outputs(block):
    return 4 if isinstance(block, Strided) else 6


EXAMPLE = torch.linspace(-3, 5, 3 * 3 * 7 * 5).reshape(3, 3, 7, 5).sin()


def convolutions(model):
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize(
    ("block", "left", "branches"),
    [
        (lambda: RepVGG(), 1, 3),
        (lambda: RepVGG(groups=2), 1, 3),
        (lambda: RepVGG(dtype=torch.float32, bias=False), 1, 3),
        (lambda: InPlace(), 1, 3),
        (MobileOne, 1, 5),
        (Strided, 1, 2),
        (Asymmetric, 1, 3),
        (Shortcut, 2, 1),
    ],
    ids=["RepVGG", "groups", "no bias", "in place", "MobileOne", "strided", "asymmetric", "shortcut"],
)
def test_summed_branches_become_one_convolution(block, left, branches):
    model = given(block())
    used = 1 if isinstance(model[1], Shortcut) else None
    record = normkit.fold(model, EXAMPLE)
    assert record.verdict.exact <= 1e-9
    if used is None:
        assert not record.refused
        assert convolutions(record.model) == 2 + left
        assert sum(len(others) + 1 for others in record.merged.values()) == branches
    else:
        assert record.merged == {"1.large.0": ()}
    fresh = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        assert_close(record.model(fresh), model(fresh), dtype=torch.float32)
    assert isinstance(record.model[1], type(model[1]))
    for again in (copy.deepcopy(record.model), pickle.loads(pickle.dumps(record.model))):
        assert torch.equal(again(fresh), record.model(fresh))
    program = torch.export.export(record.model, (EXAMPLE,)).module()
    assert_close(program(EXAMPLE), record.model(EXAMPLE).detach(), dtype=torch.float32)


def test_kernel_is_the_sum_of_the_branches():
    """An identity is one tap, a small kernel lies in the middle: written down by hand."""
    model = nn.Sequential(RepVGG(2)).double().eval()
    block = model[0]
    with torch.no_grad():
        for norm in (block.large[1], block.small[1], block.identity):
            norm.eps = 0.0
            norm.running_var.fill_(4)
            norm.running_mean.fill_(1)
            norm.weight.copy_(torch.tensor([2.0, 6.0]))
            norm.bias.fill_(0.5)
    record = normkit.fold(model, EXAMPLE[:, :2].double())
    merged = record.model[0].large[0]
    expected = block.large[0].weight * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    expected = expected.detach().double()
    expected[:, :, 1, 1] += (block.small[0].weight[:, :, 0, 0] * torch.tensor([[1.0], [3.0]])).detach()
    expected[:, :, 1, 1] += torch.diag(torch.tensor([1.0, 3.0])).double()
    torch.testing.assert_close(merged.weight.detach(), expected, rtol=1e-14, atol=1e-14)
    bias = sum((part.bias.detach() - 1) * torch.tensor([1.0, 3.0]) + 0.5 for part in (block.large[0], block.small[0]))
    bias = bias + torch.tensor([-1.0, -3.0]) + 0.5
    torch.testing.assert_close(merged.bias.detach(), bias, rtol=1e-14, atol=1e-14)
    assert record.into == dict.fromkeys(("0.large.1", "0.small.1", "0.identity"), "0.large.0")
    assert record.merged == {"0.large.0": ("0.small.0", "0.identity")}
    assert "3 branches that were summed became 1 convolutions" in str(record)


class Used(RepVGG):
    """Another eye on a branch."""

    def forward(self, x):
        y = self.small(x)
        return self.act(self.large(x) + y + self.identity(x)) + y


class Writes(RepVGG):
    """The sum is written into the input, which is read after it."""

    def forward(self, x):
        y = x
        x += self.large(x)
        return self.act(x) + y


class Mixed(RepVGG):
    """The kernels do not lie on each other."""

    def __init__(self):
        super().__init__()
        self.small = nn.Sequential(nn.ZeroPad2d((1, -1, 0, 0)), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.identity = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(6))


class Shifted(RepVGG):
    """A kernel of three whose middle tap is not where the output is."""

    def __init__(self):
        super().__init__()
        self.large = branch(6, 6, 3, padding=0)
        self.identity = nn.Sequential(nn.ZeroPad2d(-1), nn.BatchNorm2d(6))
        self.small = nn.Sequential(nn.ZeroPad2d(-1), branch(6, 6, 1))


class Patches(nn.Module):
    """Strides that make one size of kernels whose middles are apart."""

    def __init__(self):
        super().__init__()
        self.large, self.small = branch(6, 6, 3, stride=3, padding=0), branch(6, 6, 1, stride=3)

    def forward(self, x):
        x = x[..., :6, :3]
        return self.large(x) + self.small(x)


def hooked():
    block = RepVGG()
    for part in (block.small, block.large, block.identity):
        part.register_forward_hook(lambda module, args, output: None)
    return block


def dilated():
    block = RepVGG()
    block.small = branch(6, 6, 3, dilation=2, padding=2)
    block.identity = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(6))
    return block


@pytest.mark.parametrize(
    "block", [Used, Writes, Mixed, Shifted, Patches, hooked, dilated], ids=lambda case: case.__name__
)
def test_branches_that_cannot_be_merged_stay(block, monkeypatch):
    model, proposed, prove = given(block()), [], fold_branches._is_the_sum

    def proven(made, branches, ones, shape):
        proposed.append((len(branches), len(ones)))
        return prove(made, branches, ones, shape)

    monkeypatch.setattr(fold_branches, "_is_the_sum", proven)
    before = convolutions(model)
    record = normkit.fold(model, EXAMPLE)
    assert convolutions(record.model) == before
    assert record.merged == ({"1.large.0": ("1.identity",)} if block is Used else {})
    assert proposed == ([(1, 1)] if block is Used else [])  # known from the code, not from a proof that fails
    with torch.no_grad():
        assert_close(record.model(EXAMPLE.clone()), model(EXAMPLE.clone()), dtype=torch.float32)


def test_where_keeps_a_norm_out_of_the_sum():
    model = given(RepVGG())
    record = normkit.fold(model, EXAMPLE, where=["1.large.*", "1.small.*"])
    assert isinstance(record.model[1].identity, nn.BatchNorm2d)
    assert record.merged == {"1.large.0": ("1.small.0",)}
    with torch.no_grad():
        assert_close(record.model(EXAMPLE), model(EXAMPLE), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_behind_a_sum_goes_into_the_one_convolution(dtype):
    model = given(RepVGG())
    model[1].act = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    randomize(model).eval().to(dtype)
    example = EXAMPLE.to(dtype)
    record = normkit.fold(model, example)
    assert not record.refused
    assert record.into["1.act.0"] == "1.large.0"
    assert record.known_from["1.act.0"] == ""
    assert not any(isinstance(module, nn.BatchNorm2d) for module in record.model.modules())
    assert record.verdict.exact < 1e-12
    with torch.no_grad():
        assert_close(record.model(example), model(example), dtype=dtype)


def test_norm_before_a_sum_goes_into_the_one_convolution():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), RepVGG())
    randomize(model)
    with torch.no_grad():
        model[2].running_mean.zero_()  # no shift, of which zero padding would see nothing
        model[2].bias.zero_()
    record = normkit.fold(model.eval(), EXAMPLE)
    assert not record.refused
    assert record.into["2"] == "3.large.0"
    with torch.no_grad():
        assert_close(record.model(EXAMPLE), model(EXAMPLE), dtype=torch.float32)


def test_norm_that_others_read_stays_behind_a_sum():
    class Read(RepVGG):
        def forward(self, x):
            y = self.large(x) + self.small(x)
            return self.act(self.identity(y) + y)

    model = given(Read())
    record = normkit.fold(model, EXAMPLE)
    assert "has 2 consumers" in record.refused["1.identity"]
    with torch.no_grad():
        assert_close(record.model(EXAMPLE), model(EXAMPLE), dtype=torch.float32)
