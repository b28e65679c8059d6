"""A forward may branch on values and sizes of its input: fold keeps what the other branch gives, or is not made."""

import re

import pytest
import torch
from torch import nn

from normkit import fold

X = torch.linspace(-1, 1, 2 * 3 * 12 * 10).reshape(2, 3, 12, 10).mul(9).sin() + 0.1


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.n, self.other = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
        with torch.no_grad():
            for norm in (self.n, self.other, self.head[1]):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        self.eval()


class OnTheMean(Pair):
    def forward(self, x):
        y = self.c(x)
        return self.head(self.n(y) if x.mean() > 0 else self.other(y))


class OnTheLargest(Pair):
    def forward(self, x):
        y = self.c(x)
        return self.head(y if x.amax() > 8 else self.n(y))


class OnTheSpread(Pair):
    def forward(self, x):
        y = self.c(x)
        return self.head(y if x.std() < 0.1 else self.n(y))


class OnTheWidth(Pair):
    def forward(self, x):
        y = self.c(x)
        return self.head(y if x.shape[-1] > 100 else self.n(y))


class OnTheHeight(Pair):
    def forward(self, x):
        y = self.c(x)
        return self.head(y if x.shape[-2] > 100 else self.n(y))


class Branching(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * (2 if x.std() < 0.1 else 1)


class InALayer(Pair):
    """The whole can be traced; the branch is inside of a layer."""

    def __init__(self):
        super().__init__()
        self.c = Branching(3, 8, 3).eval()

    def forward(self, x):
        return self.head(self.n(self.c(x)).relu())


CASES = [
    (OnTheMean(), "with it folded, it changes the output by .* on the example in half the size times -3", -3 * X),
    (OnTheLargest(), "plus 10 times its largest value", X + 9),
    (OnTheSpread(), r"times 0\.01", 0.01 * X),
    (OnTheWidth(), "repeated to size 260 along dimension -1", X.repeat(1, 1, 1, 12)),
    (OnTheHeight(), "repeated to size 258 along dimension -2", X.repeat(1, 1, 12, 1)),
    (InALayer(), r"times 0\.01", 0.01 * X),
]


@pytest.mark.parametrize("call", [None, lambda model, batch: model(batch)], ids=["plain", "call"])
@pytest.mark.parametrize(("model", "words", "given"), CASES, ids=lambda value: type(value).__name__)
def test_a_pair_that_other_values_part_is_not_folded(model, words, given, call):
    record = fold(model, X, call=call)
    assert list(record.into) == ["head.1"]
    assert re.search(words, record.refused["n"])
    for each in (X, given):
        torch.testing.assert_close(record.model(each), model(each), rtol=1e-5, atol=1e-4)


class Takes(Pair):
    """Takes probabilities alone, and takes no other size."""

    def forward(self, x):
        if not 0 <= float(x.min()) <= float(x.max()) <= 1:
            raise ValueError("a probability")
        if x.shape[1:] != X.shape[1:]:
            raise ValueError("one size")
        return self.head(self.n(self.c(x)))


class NotFinite(Pair):
    """Has no finite output for other values, where it takes another way."""

    def forward(self, x):
        y = self.c(x)
        return self.head(self.n(y)) if float(x.min()) >= 0 and float(x.max()) <= 1 else y.log() * float("nan")


class Tokens(Pair):
    """Takes whole numbers, which have no other values."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)

    def forward(self, x):
        if int(x.max()) > 4:
            raise IndexError
        return self.head(self.n(self.c(self.words(x).movedim(-1, 1))))


@pytest.mark.parametrize(
    ("model", "example"),
    [(Takes(), X.sigmoid()), (NotFinite(), X.sigmoid()), (Tokens(), (X.sigmoid() * 5).long()[:, 0])],
    ids=lambda value: type(value).__name__,
)
def test_what_the_model_refuses_itself_is_no_evidence(model, example):
    record = fold(model, example)
    assert sorted(record.into) == ["head.1", "n"]


def test_a_record_names_the_values():
    said = "\n".join(fold(OnTheMean(), X).notes)
    assert "on the example in half the size times -3; the example in half the size times 0.01" in said
    said = "\n".join(fold(Tokens(), (X.sigmoid() * 5).long()[:, 0]).notes)
    assert "on those of the example alone" in said


class Leaves(Pair):
    def forward(self, x):
        self.feature = self.c(x)
        return self.head(self.n(self.feature))


class LeavesInADict(Pair):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x):
        y = self.kept["c"] = self.c(x)
        return self.head(self.n(y))


class LeavesInABuffer(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.last = self.c(x)
        return self.head(self.n(self.last))


class LeavesWhatStays(Pair):
    def forward(self, x):
        self.feature = self.n(self.c(x))
        return self.head(self.feature)


@pytest.mark.parametrize(
    ("model", "name"),
    [(Leaves(), "feature"), (LeavesInADict(), "kept"), (LeavesInABuffer(), "last")],
    ids=lambda value: type(value).__name__,
)
def test_what_forward_leaves_on_its_modules_stays(model, name):
    record = fold(nn.Sequential(model).eval(), X)
    assert list(record.into) == ["0.head.1"]
    assert re.search(rf"it changes what forward leaves in 0\.{name} by", record.refused["0.n"])


def test_what_forward_leaves_and_stays_the_same_is_no_obstacle():
    model = LeavesWhatStays()
    record = fold(model, X)
    assert sorted(record.into) == ["head.1", "n"]
    assert not hasattr(model, "feature")
    record.model(X)
    model(X)
    torch.testing.assert_close(record.model.feature, model.feature, rtol=1e-5, atol=1e-5)


class Flag(Pair):
    def __init__(self):
        super().__init__()
        self.deploy, self.never_asked = False, True

    def forward(self, x):
        y = self.c(x)
        return self.head(y if self.deploy else self.n(y))


def test_a_flag_that_was_not_varied_is_named():
    said = "\n".join(fold(nn.Sequential(Flag()).eval(), X).notes)
    assert "other values may take other ways, and were not tried: 0.deploy=False" in said
    assert "never_asked" not in said
