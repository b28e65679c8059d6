"""A fusion beside other code that takes the layers: it is kept right there too, or is not made."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normkit import convert, fold
from normkit.errors import SurgeryError

X = torch.linspace(-1, 1, 8 * 3 * 9 * 9).reshape(8, 3, 9, 9).mul(7).sin()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.f = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 3))
        self.alpha = 0.5
        with torch.no_grad():
            for norm in (self.b, self.f[1]):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        self.eval()


class Method(Net):
    def forward_features(self, x):
        return F.silu(self.b(self.c(x)))

    def forward(self, x):
        return self.f(self.forward_features(x))


class PartInMethod(Net):
    def residual(self, x):
        return self.b(self.c(x))

    def forward(self, x):
        return F.relu(self.residual(x) + x)


class Parts(Net):
    def forward(self, x, early=False):
        return self.f[:2](x) if early else self.f(x)


class PartsInMethod(Net):
    def stem(self, x):
        for layer in self.f[:2]:
            x = layer(x)
        return x

    def forward(self, x):
        return self.f(x)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x):
        return self.inner(x) + 0


@pytest.mark.parametrize(
    ("model", "norm", "words", "other"),
    [
        (Method(), "b", "the method forward_features takes it too", lambda m: m.forward_features(X)),
        (PartInMethod(), "b", "the method residual takes it too", lambda m: m.residual(X)),
        (Parts(), "f.1", "forward takes f apart", lambda m: m(X, early=True)),
        (PartsInMethod(), "f.1", "the method stem takes it too", lambda m: m.stem(X)),
        (Wrapped(Method()), "inner.b", "the method forward_features", lambda m: m.inner.forward_features(X)),
        (Wrapped(Parts()), "inner.f.1", "inner.forward takes inner.f apart", lambda m: m.inner(X, early=True)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_other_code_takes_stay_apart(model, norm, words, other):
    record = convert(model, "normkit", X)
    assert norm in record.touched
    assert norm not in record.fused
    assert words in record.unfused[norm]
    torch.testing.assert_close(other(record.model), other(model), rtol=1e-5, atol=1e-5)


def test_asking_about_a_layer_is_no_use_of_it():
    class Asks(Net):
        def zero_init_last(self):
            if getattr(self.b, "weight", None) is not None:
                nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.f(F.relu(self.b(self.c(x))))

    assert sorted(convert(Asks(), "normkit", X).fused) == ["b", "f.1"]


def test_a_way_that_changes_is_found_where_no_text_shows_it():
    class Finds(Net):
        def forward(self, x, early=False):
            whole = self.get_submodule("f")
            return whole[:2](x) if early else whole(x)

    model = Finds()
    record = convert(model, "normkit", X)
    assert not record.fused
    assert "what forward(early=True) gives is another" in record.unfused["f.1"]


class Scaled(Net):
    def forward(self, x):
        return F.relu(self.b(self.c(x))) * self.alpha


@pytest.mark.parametrize("carry", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_program_refuses_settings_that_it_was_not_written_with(carry):
    model = Scaled()
    record = convert(model, "normkit", X)
    assert list(record.fused) == ["b"]
    fused = carry(record.model)
    torch.testing.assert_close(fused(X), model(X))
    fused.alpha = 2.0
    with pytest.raises(SurgeryError, match=r"written anew with alpha=0\.5, and alpha is 2\.0 now"):
        fused(X)
    fused.alpha = 0.5
    parted = convert(fused, "torch", X).model
    model.alpha = parted.alpha = 2.0
    torch.testing.assert_close(parted(X), model(X))
    assert vars(parted).keys() == vars(model).keys()


def test_merged_branches_refuse_them_too():
    class Branches(Net):
        def __init__(self):
            super().__init__()
            self.d, self.e = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.eval()

        def forward(self, x):
            return F.relu(self.b(self.c(x)) + self.e(self.d(x))) * self.alpha

    record = fold(Branches(), X)
    assert record.merged
    record.model.alpha = 2.0
    with pytest.raises(SurgeryError, match="alpha"):
        record.model(X)


def test_what_of_the_example_went_in_is_told():
    class Masked(Net):
        def forward(self, x, mask=None):
            h = self.c(x)
            return self.b(h if mask is None else h * mask)

    mask = torch.ones(8, 1, 9, 9)
    said = "1 of the example's 2 entries went into the model"
    for record in (fold(Masked(), (X, mask)), convert(Masked(), "normkit", (X, mask))):
        assert any(said in note for note in record.notes)
    assert not any(said in note for note in fold(Masked(), X).notes)


def test_an_argument_that_forward_cannot_do_without_is_told_where_it_was_not_varied():
    class Domains(Net):
        def forward(self, x, domain):
            return self.b(self.c(x)) if domain == 1 else self.c(x)

    model = Domains()
    record = fold(model, X, call=lambda m, batch: m(batch, 1))
    assert any("forward(domain=1)" in note for note in record.notes)


class Lists(nn.Module):
    """Its code calls norms that stand in lists, dicts and other children."""

    def __init__(self, home):
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4)
        norm.running_mean.normal_()
        self.c, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.home = nn.ModuleList([norm]) if home == "list" else nn.ModuleDict({"0": norm})
        self.key = 0 if home == "list" else "0"
        self.eval()

    def forward(self, x):
        return self.last(F.silu(self.home[self.key](self.c(x))))


@pytest.mark.parametrize("home", ["list", "dict"])
@pytest.mark.parametrize("example", [None, X], ids=["blind", "measured"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_block_is_taken_apart_wherever_its_norms_stand(home, example, inplace):
    model = Lists(home)
    fused = convert(model, "normkit", X)
    assert fused.fused == {"home.0": "silu"}
    parted = convert(fused.model, "torch", example, inplace=inplace).model
    assert type(parted) is Lists
    torch.testing.assert_close(parted(X), model(X), rtol=0, atol=0)
