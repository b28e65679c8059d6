"""A norm behind a concatenation of channels goes into every layer before it, each with its own channels."""

import pytest
import torch
from torch import nn

import normkit
from normkit import fold
from normkit.anatomy import fingerprint
from normkit.errors import SurgeryError

from .nets import densenet
from .networks import randomize

IMAGES = torch.linspace(-1, 2, 2 * 6 * 7 * 5).reshape(2, 6, 7, 5).sin()


class Mixed(nn.Module):
    """Branches of an input, or of parts of it, joined before one norm."""

    def __init__(self, *branches, norm=None, sizes=None, dim=1):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.norm, self.last = norm or nn.BatchNorm2d(9), nn.Conv2d(9, 2, 1)
        self.sizes, self.dim = sizes, dim

    def forward(self, x):
        parts = [x] * len(self.branches) if self.sizes is None else x.split(self.sizes, 1)
        joined = torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], self.dim)
        return self.last(self.norm(joined).relu())


class Changed(Mixed):
    """One whose joining is told apart."""

    def __init__(self, join, *branches, **settings):
        super().__init__(*branches, **settings)
        self.join = join

    def forward(self, x):
        return self.last(self.norm(self.join([branch(x) for branch in self.branches])).relu())


def ready(model):
    torch.manual_seed(3)
    return randomize(model).eval()


def relative(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


def folded(model, example=IMAGES, **settings):
    """Fold; the model is as before, and the copy computes the same, on other data too."""
    before = fingerprint(model)
    record = fold(model, example, **settings)
    assert fingerprint(model) == before
    assert record.verdict.exact <= 1e-9
    other = torch.randn(example.shape, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        for data in (example, other):
            assert relative(model(data), record.model(data)) <= 1e-5
    return record


def against(model, example=IMAGES):
    before = fingerprint(model)
    with pytest.raises(SurgeryError) as caught:
        fold(model, example)
    assert fingerprint(model) == before
    return str(caught.value)


def convolution(inputs, outputs, size=3, **settings):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings)


MIXED = {
    "two": lambda: Mixed(convolution(6, 4), convolution(6, 5)),
    "three of uneven channels": lambda: Mixed(convolution(6, 1, 1), convolution(6, 6), convolution(6, 2, 5)),
    "no bias": lambda: Mixed(convolution(6, 4, bias=False), convolution(6, 5, bias=False)),
    "one bias": lambda: Mixed(convolution(6, 4, bias=False), convolution(6, 5)),
    "grouped": lambda: Mixed(convolution(6, 6, groups=3), convolution(6, 3, 5, groups=3, bias=False)),
    "depthwise on parts": lambda: Mixed(
        convolution(4, 4, 3, groups=4), convolution(2, 2, 5, groups=2), norm=nn.BatchNorm2d(6), sizes=[4, 2]
    ),
    "transposed": lambda: Mixed(convolution(6, 4), nn.ConvTranspose2d(6, 5, 3, padding=1)),
    "negative dimension": lambda: Mixed(convolution(6, 4), convolution(6, 5), dim=-3),
    "not affine": lambda: Mixed(convolution(6, 4), convolution(6, 5), norm=nn.BatchNorm2d(9, affine=False)),
    "ours": lambda: Mixed(convolution(6, 4), convolution(6, 5), norm=normkit.BatchNorm2d(9)),
    "with an activation": lambda: Mixed(convolution(6, 4), convolution(6, 5), norm=normkit.BatchNormAct2d(9)),
    "within each other": lambda: Changed(
        lambda parts: torch.cat([parts[0], torch.concat(parts[1:], dim=1)], dim=1),
        convolution(6, 2), convolution(6, 3), convolution(6, 4),
    ),
    "dropout behind": lambda: Changed(
        lambda parts: torch.dropout(torch.cat(parts, 1), 0.5, False), convolution(6, 4), convolution(6, 5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_norm_behind_a_concatenation_goes_into_every_branch(name):
    model = MIXED[name]()
    channels = model.norm.norm.num_features if hasattr(model.norm, "norm") else model.norm.num_features
    model.last = nn.Conv2d(channels, 2, 1)
    record = folded(ready(model))
    path = "norm.norm" if hasattr(model.norm, "norm") else "norm"
    branches = tuple(f"branches.{place}" for place in range(len(model.branches)))
    assert record.touched == (path,)
    assert record.into == {path: branches[0]}
    assert record.concatenated == {path: branches}
    # The code that zips parts is seen in runs alone.
    assert record.known_from == {path: "" if model.sizes is None else None}
    assert not [module for module in record.model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_folded_branches_have_the_weights_of_the_closed_form():
    model = ready(MIXED["one bias"]())
    record = fold(model, IMAGES)
    norm = model.norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    first, second = record.model.branches
    for made, given, part in (
        (first, model.branches[0], slice(0, 4)),
        (second, model.branches[1], slice(4, 9)),
    ):
        bias = shift[part] + (0 if given.bias is None else given.bias.double() * scale[part])
        expected = (given.weight.double() * scale[part].view(-1, 1, 1, 1)).float()
        torch.testing.assert_close(made.weight, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(made.bias, bias.float(), rtol=1e-6, atol=1e-7)


def test_norms_of_the_branches_and_the_norm_behind_them_fold_together():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = convolution(6, 4), convolution(6, 5)
            self.a, self.b, self.norm = nn.BatchNorm2d(4), nn.BatchNorm2d(5), nn.BatchNorm2d(9)

        def forward(self, x):
            return self.norm(torch.cat([self.a(self.first(x)), self.b(self.second(x))], 1)).relu()

    record = folded(ready(Both()))
    assert record.into == {"a": "first", "b": "second", "norm": "first"}
    assert record.concatenated == {"norm": ("first", "second")}


def test_linear_branches_take_a_norm_behind_their_concatenation():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(6, 4), nn.Linear(6, 5), nn.BatchNorm1d(9)

        def forward(self, x):
            return self.norm(torch.cat((self.first(x), self.second(x)), dim=-1))

    record = folded(ready(Joined()), torch.linspace(-2, 2, 30).reshape(5, 6).sin())
    assert record.concatenated == {"norm": ("first", "second")}


def test_blocks_around_code_that_cannot_be_traced_are_folded_on_their_own():
    class AsksForValues(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Mixed(convolution(6, 4), convolution(6, 5))

        def forward(self, x):
            return self.block(x if x.sum() > 1e9 else 2 * x)

    record = folded(ready(AsksForValues()))
    assert record.known_from == {"block.norm": "block"}


REFUSED = {
    "one tensor twice": (lambda parts: torch.cat([parts[0], parts[0], parts[1][:, :1]], 1), "given one tensor twice"),
    "an activation in a branch": (lambda parts: torch.cat([parts[0], parts[1].relu()], 1), "its input comes from relu"),
    "a written branch": (lambda parts: torch.cat([parts[0], parts[1].mul_(2)], 1), "its input comes from mul_"),
    "a constant": (lambda parts: torch.cat([parts[0], torch.ones(2, 5, 7, 5)], 1), "its input comes from ones"),
    "a sum": (lambda parts: torch.cat(parts, 1) + parts[0].mean(), "its input comes from add"),
    "another dimension": (
        lambda parts: torch.cat([parts[0], parts[0].roll(1, 0)], 2).flatten(2)[:, :, :9].movedim(1, 2)[..., None],
        "its input comes from",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_norm_behind_a_concatenation_is_left_with_the_reason(name):
    join, reason = REFUSED[name]
    said = against(ready(Changed(join, convolution(6, 4), convolution(6, 5))))
    assert reason in said


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (lambda: nn.MaxPool2d(3, 1, 1), "its input comes from branches.1 (MaxPool2d)"),
        (lambda: nn.Sequential(convolution(6, 6), nn.ReLU()), "its input comes from branches.1.1 (ReLU)"),
        (nn.Identity, "its input comes from the model's input"),
    ],
    ids=["pool", "activation", "input"],
)
def test_branch_that_is_no_layer_is_named(branch, reason):
    model = Mixed(convolution(6, 3), branch(), norm=nn.BatchNorm2d(9))
    assert f"of a part of that: {reason}" in against(ready(model))


@pytest.mark.parametrize(
    ("used", "reason"),
    [("branch", "the output of branches.0 has 2 consumers"), ("joined", "the output of cat has 2 consumers")],
)
def test_branch_or_concatenation_that_goes_elsewhere_too_is_left(used, reason):
    class Twice(Mixed):
        def forward(self, x):
            parts = [branch(x) for branch in self.branches]
            joined = torch.cat(parts, 1)
            return self.norm(joined), (parts[0] if used == "branch" else joined).mean(1)

    assert reason in against(ready(Twice(convolution(6, 4), convolution(6, 5))))


def test_shared_convolution_is_not_scaled_twice():
    shared = convolution(6, 3)
    model = Mixed(shared, shared, norm=nn.BatchNorm2d(6))
    model.last = nn.Conv2d(6, 2, 1)
    assert "branches.0 is called 2 times" in against(ready(model))


def test_concatenation_along_positions_is_left():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = convolution(6, 4), convolution(6, 4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(torch.cat([self.first(x), self.second(x)], 2))

    assert "joins along dimension 2 and not the channels" in against(ready(Rows()))


def test_norm_that_mixes_channels_is_left():
    model = Mixed(convolution(6, 4), convolution(6, 5), norm=normkit.WhiteningBatchNorm2d(9, num_groups=1))
    model = ready(model)
    model.train()(IMAGES.repeat(4, 1, 1, 1))
    assert "it mixes channels" in against(model.eval())


def test_branches_of_another_size_that_go_elsewhere_are_left():
    class Asks(Mixed):
        def forward(self, x):
            first, second = (branch(x) for branch in self.branches)
            joined = torch.cat([first, second] if x.shape[-1] > 4 else [second[:, :4], first, second[:, :1]], 1)
            return self.norm(joined)

    assert "on another size" in against(ready(Asks(convolution(6, 4), convolution(6, 5))))


def test_dense_blocks_keep_their_function():
    model = ready(densenet())
    record = fold(model, torch.linspace(-1, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin())
    assert not record.concatenated
    assert record.verdict.exact <= 1e-9


def test_part_of_a_layers_channels_is_no_whole_layer():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other, self.norm = convolution(6, 8), convolution(6, 5), nn.BatchNorm2d(9)
            self.alone, self.two = convolution(6, 4), nn.BatchNorm2d(2)

        def forward(self, x):
            joined = self.norm(torch.cat([self.conv(x)[:, :4], self.other(x)], 1))
            return joined.sum(1), self.two(self.alone(x)[:, :2]).relu()

    said = against(ready(Part()))
    assert "it takes 4 of the 8 channels of conv" in said
    assert "it takes 2 of the 4 channels of alone" in said
