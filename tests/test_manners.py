"""What somebody who types a thing wrong is told, and what a thing looks like in a session."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normkit
from normkit.errors import ArgumentError
from normkit.kernels import dispatch
from normkit.testing import check_norm_layer


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def moved_model() -> nn.Sequential:
    model = small_model()
    model[1].running_mean += 1
    return model


def images() -> TensorDataset:
    return TensorDataset(torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64))


# What is typed, and what of the message must be there.
TYPED = {
    "a width that is a float": (lambda: normkit.BatchNorm2d(16.0), "pass num_features=16"),
    "a width that is no number": (lambda: normkit.BatchNorm2d("x"), "pass num_features=C of (N, C, *)"),
    "groups and channels swapped": (
        lambda: normkit.GroupNorm(64, 32),
        "did you mean num_groups=32, num_channels=64?",
    ),
    "a data set to diagnose": (
        lambda: normkit.diagnose(small_model(), images()),
        "TensorDataset, a data set, which yields single samples; give DataLoader(dataset, batch_size=32)",
    ),
    "a data set to recalibrate": (lambda: normkit.recalibrate(small_model(), images()), "give DataLoader(dataset"),
    "a shape to fold": (lambda: normkit.fold(small_model(), (1, 3, 8, 8)), "pass a tensor: torch.randn(1, 3, 8, 8)"),
    "a size to fold": (
        lambda: normkit.fold(small_model(), torch.Size((1, 3, 8, 8))),
        "pass a tensor: torch.randn(1, 3, 8, 8)",
    ),
    "a loader to fold": (
        lambda: normkit.fold(small_model(), DataLoader(images(), 2)),
        "a DataLoader holds batches or samples, and one batch is needed; pass next(iter(loader))",
    ),
    "a data set to fold": (
        lambda: normkit.fold(small_model(), images()),
        "pass next(iter(DataLoader(dataset, batch_size=32)))",
    ),
    "a list to waive": (
        lambda: normkit.diagnose(small_model(), waive=["drift"]),
        'waive= is a list; every waived finding has its reason: give a dict, such as waive={"never-updated:*"',
    ),
    "a device as backend": (lambda: normkit.use_backend("cuda"), "cuda is a device, and triton serves it"),
    "one device as backend": (lambda: normkit.use_backend("cpu:0"), "cpu:0 is a device, and numba serves it"),
    "no style": (
        lambda: normkit.AdaptiveInstanceNorm(3)(torch.randn(2, 3, 4, 4)),
        "there is no style, and without one this is an instance norm; pass layer(input, style)",
    ),
}


@pytest.mark.parametrize("case", TYPED)
def test_a_wrong_argument_is_told_what_to_type_instead(case):
    call, words = TYPED[case]
    with pytest.raises(ArgumentError, match=re.escape(words)):
        call()


MISSPELT = {
    "batch": lambda: check_norm_layer(normkit.BatchNorm2d, "bacth"),
    "group": lambda: normkit.convert(small_model(), "gruop"),
    "keras": lambda: normkit.port_state(nn.BatchNorm2d(3), target="kreas"),
    "flax": lambda: normkit.port_state({}, source="falx", target="torch"),
    "layer": lambda: normkit.port_state({}, source="keras", target="torch", method="leyer"),
    "moving_mean": lambda: normkit.port_state({"moving_maen": [1.0]}, source="keras", target="torch"),
    "epsilon": lambda: normkit.port_state({}, source="keras", target="torch", settings={"epsilom": 1e-3}),
    "plain": lambda: normkit.use_backend("palin"),
    "relu": lambda: normkit.BatchNormAct2d(4, activation="rleu"),
    "drift": lambda: normkit.diagnose(small_model(), waive={"drfit": "meant"}),
    "running": lambda: normkit.freeze(small_model(), statistics="runing"),
    "momentum": lambda: normkit.register_norm(nn.Identity, momentun="decay"),
    "instance": lambda: normkit.layers.catalog.create("instanse", 3),
    "stale": lambda: normkit.doctor.demos.build("stael"),
    "convergence": lambda: normkit.lab.claims.get_claim("convergance"),
    "fashion-mnist": lambda: normkit.lab.data.load("fashon-mnist"),
    "validation": lambda: normkit.training.Care(small_model(), [], recalibrate=("validaton",)),
}


@pytest.mark.parametrize("meant", MISSPELT)
def test_a_misspelt_name_is_told_the_one_that_is_close(meant):
    import normkit.doctor.demos
    import normkit.lab.claims
    import normkit.lab.data  # noqa: F401

    with pytest.raises(ArgumentError, match=re.escape(f"did you mean '{meant}'? Known are: ")):
        MISSPELT[meant]()


def test_python_itself_suggests_a_public_name():
    program = "import normkit\nnormkit.BatchNrom2d"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Did you mean: 'BatchNorm2d'?" in done.stderr


@pytest.mark.parametrize(
    "room", ["anatomy", "doctor", "lab", "native", "parts", "reference", "surgery", "testing", "training"]
)
def test_a_room_is_there_without_an_import_of_its_own(room):
    program = (
        f"import normkit; assert 'normkit.{room}' not in __import__('sys').modules; print(normkit.{room}.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == f"normkit.{room}", done.stderr
    assert room in dir(normkit)


def test_a_backend_that_nobody_entered_is_told():
    with pytest.warns(RuntimeWarning, match=r"use_backend\('plain'\) did nothing, because it was not entered"):
        normkit.use_backend("plain")


def test_a_backend_holds_inside_with_and_inside_what_it_decorates():
    @normkit.use_backend("plain")
    def inside(depth: int) -> list[str | None]:
        return [dispatch.requested(), *(inside(depth - 1) if depth else [])]

    request = normkit.use_backend("numba")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inside(1) == ["plain", "plain"]
        with request, request:  # it may be entered again
            assert dispatch.requested() == "numba"
            assert inside(0) == ["plain"]
            assert dispatch.requested() == "numba"
        del request
    assert dispatch.requested() is None


def test_a_style_counts_whether_it_was_passed_set_loaded_or_filled_in():
    content, style = torch.randn(2, 3, 4, 4), torch.randn(1, 3, 5, 5) + 3
    layer, loaded, filled = (normkit.AdaptiveInstanceNorm(3) for _ in range(3))
    layer(content, style.expand(2, -1, -1, -1))
    with pytest.raises(ArgumentError, match="there is no style"):
        layer(content)
    layer.set_style(style)
    loaded.load_state_dict(layer.state_dict())
    filled.style_mean.copy_(layer.style_mean)
    filled.style_std.copy_(layer.style_std)
    for other in (loaded, filled):
        assert torch.equal(other(content), layer(content))


def test_the_kit_gives_a_layer_the_shape_it_is_made_for():
    report = check_norm_layer(normkit.LayerNorm, "layer")
    assert report.conforms, report
    assert check_norm_layer(lambda channels: normkit.LayerNorm((channels, 7, 3)), "layer").conforms
    assert check_norm_layer(normkit.LayerNorm(6), "layer").conforms


def test_what_passed_is_no_verdict():
    report = check_norm_layer(nn.LayerNorm, "layer")
    assert not report.conforms
    with pytest.raises(AttributeError, match="`conforms` is the verdict"):
        report.passed  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'pased'"):
        report.pased  # noqa: B018


SHOWN = {
    "<Folding: fold: 1 layer touched, exact, largest change": lambda: normkit.fold(
        small_model(), torch.randn(2, 3, 8, 8)
    ),
    "<Conversion: convert: 1 layer touched, exact>": lambda: normkit.convert(small_model(), "normkit"),
    "<Recalibration: recalibrate: 1 layer touched, exact, largest change": lambda: normkit.recalibrate(
        small_model(), [torch.randn(8, 3, 8, 8)]
    ),
    "<Record: freeze: 1 layer touched, exact>": lambda: normkit.freeze(moved_model()),
    "<Ported: gamma (4,), beta (4,), moving_mean (4,), moving_variance (4,); ": lambda: normkit.port_state(
        nn.BatchNorm2d(4), target="keras"
    ),
    "<Explanation: numba: contiguous": lambda: normkit.explain(normkit.BatchNorm2d(3), torch.randn(8, 3, 5, 5)),
    "<ModelExplanation: torch: 1 of 1 normalization layers run>": lambda: normkit.explain(
        small_model(), torch.randn(8, 3, 5, 5)
    ),
    "<Report: LayerNorm((6,), eps=1e-05, elementwise_affine=True, bias=True) as layer: 0 findings in": lambda: (
        check_norm_layer(normkit.LayerNorm, "layer")
    ),
    "<Forward: output (2, 3), mean (3,), var (3,), rstd (3,), ": lambda: normkit.reference.batch_norm(
        [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]
    ),
    "<Diagnosis: 1 error and 0 warnings: 1 normalization layer examined": lambda: normkit.diagnose(small_model()),
}


@pytest.mark.parametrize("words", SHOWN)
def test_what_a_session_shows_is_one_short_line(words):
    shown = repr(SHOWN[words]())
    assert shown.startswith(words)
    assert "\n" not in shown
    assert len(shown) < 240
