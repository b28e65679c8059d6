"""A folded model as a program: from every form of example that goes into it, and whole or not at all."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError

X, T = torch.randn(4, 3, 9, 9), torch.randn(4, 5)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, pixel_values):
        return {"logits": self.n(self.c(pixel_values))}


class Two(Named):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 8)

    def forward(self, x, t, scale=None):
        y = self.n(self.c(x)) + self.l(t)[:, :, None, None]
        return y if scale is None else y * scale


FORMS = [
    # model, example, the call of the program with seven samples
    (Named, X, lambda p, x, t: p(x)["logits"]),
    (Named, (X,), lambda p, x, t: p(x)["logits"]),
    (Named, {"pixel_values": X, "label": 3}, lambda p, x, t: p(pixel_values=x)["logits"]),
    (Named, [X[:1]], lambda p, x, t: p(x)["logits"]),
    (Two, (X, T), lambda p, x, t: p(x, t)),
    (Two, {"x": X, "t": T}, lambda p, x, t: p(x=x, t=t)),
    (Two, {"x": X[:1], "t": T[:1], "scale": torch.tensor(2.0)}, lambda p, x, t: p(x=x, t=t, scale=torch.tensor(1.0))),
]


@pytest.mark.parametrize(("cls", "example", "call"), FORMS)
def test_every_form_of_example_that_folds_is_exported(cls, example, call, tmp_path):
    torch.manual_seed(0)
    model = cls()
    normkit.recalibrate(model, [X], call=lambda model, x: model(x, T) if cls is Two else model(x))
    record = normkit.fold(model.eval(), example)
    program = torch.export.load(record.export(tmp_path / "m.pt2")).module()
    x, t = torch.randn(7, 3, 9, 9), torch.randn(7, 5)
    expected = model(x, t) if cls is Two else model(x)["logits"]
    torch.testing.assert_close(call(program, x, t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own exporter
def test_onnx_takes_them_too(tmp_path):
    pytest.importorskip("onnxscript")
    record = normkit.fold(Two().eval(), {"x": X, "t": T})
    assert record.export(tmp_path / "m.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (X[:0], r"holds no sample, but a tensor of shape \(0, 3, 9, 9\)"),
        ({"image": X}, "give example= that goes into forward: a tensor, or a dict with the names"),
        ("image", "give example= that goes into forward"),
    ],
)
def test_an_example_that_does_not_go_in_is_refused(example, words, tmp_path):
    record = normkit.fold(Named().eval(), X)
    with pytest.raises(ArgumentError, match=words):
        record.export(tmp_path / "m.pt2", example)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 3, b"m.pt2"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(ArgumentError, match=r"path is .*; give the name of a file that ends in \.onnx or \.pt2"):
        normkit.fold(Named().eval(), X).export(path)


FULL = """
import resource, sys, torch, normkit
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3)).eval()
record = normkit.fold(model, torch.randn(2, 3, 12, 12))
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    record.export(sys.argv[1])
except OSError as error:
    print("refused:", error.strerror, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size there")
def test_a_disk_that_takes_no_more_is_an_error_in_words(tmp_path):
    """torch's own writer ends the process where a file cannot grow."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "m.pt2")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused: File too large\n"), done.stderr
    assert not list(tmp_path.iterdir())
