"""``normkit doctor``: targets, data, exit codes, and one line for every mistake."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from normkit import cli

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.BatchNorm1d(8))

def new():
    return build().train()

def number():
    return 3

def needs(classes, *more, width=3, **rest):
    return build()

def layerless():
    return nn.Linear(2, 2)

def dicts():
    return [{"pixels": torch.randn(8, 1, 28, 28)}]

def words():
    return [(torch.randn(8, 1, 28, 28), ["cat"] * 8)]

def batches():
    torch.manual_seed(1)
    return [torch.randn(64, 1, 28, 28) for _ in range(4)]
"""


@pytest.fixture
def doctor(monkeypatch, capsys, tmp_path):
    """Run ``normkit doctor`` beside a module of models; return its exit code and what it wrote."""
    (tmp_path / "doctor_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("doctor_models", None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["normkit", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        written = capsys.readouterr()
        return left.value.code, written.out, written.err

    yield call
    sys.modules.pop("doctor_models", None)


def test_a_sick_demo_exits_1_and_names_the_cure(doctor):
    code, out, err = doctor("demo:forgotten", "--batches", 2)
    assert (code, err) == (1, "")
    assert "error [never-updated] 1 (BatchNorm2d): " in out
    assert "cure     normkit.recalibrate(model, batches)" in out


def test_a_healthy_model_exits_0(doctor):
    code, out, err = doctor("doctor_models:new", "--data", "doctor_models:batches")
    assert (code, err) == (0, "")
    assert out.startswith("healthy: 1 normalization layer examined, measured on 256 samples")


def test_warnings_alone_exit_0_and_json_says_that_the_model_is_not_healthy(doctor):
    code, out, _ = doctor("demo:keras-momentum", "--batches", 8)
    assert code == 0
    assert "warning [ema-window]" in out
    code, out, _ = doctor("demo:keras-momentum", "--batches", 8, "--json")
    assert code == 0
    assert json.loads(out)["healthy"] is False
    _, help_, _ = doctor("--help")
    assert "Exit code 0: no error was found, though warnings may have been" in " ".join(help_.split())


def test_a_model_without_layers_exits_1(doctor):
    code, out, _ = doctor("doctor_models:layerless")
    assert code == 1
    assert out.startswith("nothing was examined: the model has no normalization layer")


def test_json_is_one_object_and_nothing_else(doctor):
    code, out, _ = doctor("demo:forgotten", "--batches", 2, "--json")
    assert code == 1
    assert {finding["layer"] for finding in json.loads(out)["findings"]} == {"1", "4"}


def test_a_page_is_written(doctor, tmp_path):
    code, out, _ = doctor("demo:forgotten", "--batches", 2, "--html", tmp_path / "page.html")
    assert code == 1
    assert out.rstrip().endswith("page.html")
    assert "Layer 4" in (tmp_path / "page.html").read_text()


def test_a_data_set_of_the_lab_is_batched(doctor):
    code, out, _ = doctor("doctor_models:build", "--data", "digits", "--batches", 2, "--json")
    assert code == 0
    assert json.loads(out)["samples"] == 128


def test_a_state_file_is_examined_without_its_model(doctor, tmp_path):
    norm = nn.BatchNorm1d(4)
    norm(torch.full((3, 4), float("inf")))
    torch.save({"features.norm." + name: value for name, value in norm.state_dict().items()}, tmp_path / "sick.pt")
    code, out, _ = doctor(tmp_path / "sick.pt")
    assert code == 1
    assert "error [nonfinite] features.norm:" in out


def test_weights_are_loaded_into_the_model(doctor, tmp_path):
    import doctor_models

    model = doctor_models.build()
    model(torch.full((4, 1, 28, 28), float("nan")))
    torch.save(model.state_dict(), tmp_path / "sick.pt")
    code, out, _ = doctor("doctor_models:build", "--weights", tmp_path / "sick.pt")
    assert code == 1
    assert "error [nonfinite] 2 (BatchNorm1d):" in out


class Trap:
    """Unpickling this would leave a file behind."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_a_pickle_is_named_in_one_line_and_not_run(doctor, tmp_path):
    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    code, out, err = doctor("trap.pt")
    assert (code, out) == (2, "")
    assert err.startswith("normkit: trap.pt: not readable as plain weights")
    assert err.count("\n") == 1
    assert not (tmp_path / "trapped").exists()


MISUSE = {
    "unknown-demo": (["demo:stail"], "unknown demo 'stail'; did you mean 'stale'? Known are: stale"),
    "no-target": ([], "Missing argument"),
    "no-module": (["absent_module:build"], "no module named 'absent_module'"),
    "no-name": (["doctor_models:built"], "did you mean"),
    "no-model": (["doctor_models:number"], "gives a int"),
    "factory-with-arguments": (["doctor_models:needs"], "doctor_models:needs needs classes; TARGET is a function with"),
    "dicts": (
        ["doctor_models:build", "--data", "doctor_models:dicts"],
        "a dict with keys 'pixels', and Sequential.forward takes (input); let the function of --data yield",
    ),
    "labels-of-words": (
        ["doctor_models:build", "--data", "doctor_models:words", "--labels"],
        "labels= gave a list of str, such as 'cat'",
    ),
    "not-a-file": (["absent.pt"], "absent.pt: no such file"),
    "damaged": (["damaged.safetensors"], "damaged.safetensors: not a readable safetensors file"),
    "batches-zero": (["demo:forgotten", "--batches", "0"], "--batches 0: expected 1 or more"),
    "weights-of-demo": (["demo:forgotten", "--weights", "state.pt"], "the state does not fit the model"),
    "unknown-data": (["doctor_models:build", "--data", "mnist"], "'mnist'; known are:"),
    "data-no-batches": (["doctor_models:build", "--data", "doctor_models:number"], "something to iterate over"),
    "data-unfit": (["doctor_models:narrow", "--data", "doctor_models:batches"], "the model fails on the data: Runtime"),
    "state-and-data": (["state.pt", "--data", "digits"], "name the model with --weights"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_exits_2_with_one_line(doctor, tmp_path, name):
    arguments, message = MISUSE[name]
    (tmp_path / "damaged.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken")
    torch.save(nn.BatchNorm1d(2).state_dict(), tmp_path / "state.pt")
    code, out, err = doctor(*arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("normkit: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_command_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "normkit", "doctor", "demo:nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nown are: stale" in done.stderr


@pytest.mark.parametrize("name", ["stale", "forgotten", "short-window", "poisoned"])
def test_cure_that_is_printed_cures_in_the_shell(doctor, monkeypatch, capsys, name):
    code, out, _ = doctor(f"demo:{name}")
    assert code == 1
    cure, proof = out.splitlines()[-2:]
    assert cure.split()[:2] in (["normkit", "recalibrate"], ["normkit", "repair"])
    monkeypatch.setattr(sys, "argv", cure.split())
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    assert "wrote cured.safetensors" in capsys.readouterr().out
    code, out, _ = doctor(*proof.split()[2:])
    assert code == 0, out


def test_cure_on_the_command_line_repeats_what_was_typed(doctor, tmp_path):
    import doctor_models

    state = doctor_models.build().state_dict()
    state["2.running_mean"] += 5
    torch.save(state, tmp_path / "a.pt")
    _, out, _ = doctor("doctor_models:build", "--weights", "a.pt", "--data", "doctor_models:batches")
    assert "doctor_models:build --weights a.pt --data doctor_models:batches --out cured.safetensors" in out
    assert "on the command line" not in doctor("a.pt")[1]


def test_page_replaces_no_file_that_is_no_page(doctor, tmp_path):
    kept = tmp_path / "keep.txt"
    kept.write_text("precious")
    code, _, err = doctor("demo:forgotten", "--batches", 2, "--html", kept)
    assert code == 2
    assert "give a name that ends in .html" in " ".join(err.split())
    assert kept.read_text() == "precious"


def test_data_that_are_shuffled_give_the_same_words_every_time(normkit):
    assert normkit("doctor", "demo:small-batch") == normkit("doctor", "demo:small-batch")


def test_a_model_of_which_nothing_can_be_read_leaves_with_1(normkit, tmp_path, monkeypatch):
    (tmp_path / "odd_app.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('moving_mean', torch.zeros(4))\n"
        "        self.register_buffer('moving_var', torch.ones(4))\n\n"
        "    def forward(self, x):\n"
        "        return torch.tanh(x)\n\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), Odd())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = normkit("doctor", "odd_app:build")
    assert code == 1
    assert out.startswith("nothing was examined: 1: Odd does not compute")
