"""What an installed package is asked, in an environment of its own: `python tests/package_smoke.py [lab]`.

Run from outside the repository. Without `lab` the extras are not there, and what needs one must say which, in one line.
"""

import sys

import torch
from torch import nn

import normkit
from normkit.doctor.demos import build


def core() -> None:
    """Layers, kernels, doctor, surgery, the reference and the kit, with torch, NumPy and Numba alone."""
    assert "src" not in normkit.__file__.split("/"), f"this is the repository's: {normkit.__file__}"
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    layer = normkit.BatchNorm2d(6, decay=0.9)
    print(normkit.explain(layer, x))
    assert normkit.explain(layer, x).backend == "numba"
    layer(x).sum().backward()
    assert torch.allclose(layer(x), nn.BatchNorm2d(6)(x), atol=1e-5)
    patient = build("stale")
    assert not normkit.diagnose(patient.model, patient.batches).healthy
    normkit.recalibrate(patient.model, patient.batches)
    assert normkit.diagnose(patient.model, patient.batches).healthy
    assert normkit.testing.check_norm_layer(normkit.LayerNorm, "layer").conforms
    assert normkit.fold(patient.model.eval(), torch.randn(2, 1, 8, 8)).into
    assert normkit.reference.batch_norm([[1.0], [3.0]]).output.shape == (2, 1)


def without_extras() -> None:
    """What needs an extra names it."""
    diagnosis = normkit.diagnose(build("stale").model)
    for needs in (diagnosis.to_html, lambda: normkit.lab):
        try:
            needs()
        except ModuleNotFoundError as error:
            said = str(error)
        else:
            raise AssertionError(f"{needs} went without the extra")
        assert 'pip install "normkit[lab]"' in said, said
        assert "\n" not in said
        print(said)


def with_lab() -> None:
    """The page, a claim, and the data set that needs no download."""
    assert "<html" in normkit.diagnose(build("stale").model).to_html()
    from normkit.lab.claims import get_claim
    from normkit.lab.data import load

    assert get_claim("identity").number == "E18"
    assert load("digits").train_images.shape[1:] == (1, 28, 28)


core()
if "lab" in sys.argv[1:]:
    with_lab()
else:
    without_extras()
print(f"normkit {normkit.__version__} on Python {sys.version.split()[0]} and torch {torch.__version__}: sound")
