"""``normkit recalibrate|fold|convert|repair``: whole files or none, and every mistake in one line."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from normkit import surgery
from normkit.anatomy.states import read_state, write_state

APP = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))

def batches():
    generator = torch.Generator().manual_seed(1)
    return [(3 + torch.randn(size, 3, 8, 8, generator=generator), torch.zeros(size)) for size in (6, 5)]
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    """Stand in a folder with a user's module, imported anew."""
    (tmp_path / "user_app.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_app", raising=False)
    return tmp_path


def built():
    import user_app

    return user_app.build(), user_app.batches()


def test_recalibrate_writes_the_statistics_of_the_data(app, normkit):
    code, out, _ = normkit("recalibrate", "user_app:build", "--data", "user_app:batches", "--out", "a.safetensors")
    model, batches = built()
    hidden = model[0](torch.cat([image for image, _ in batches])).double()
    state = read_state("a.safetensors")
    assert code == 0
    assert "1 layer touched" in out
    assert torch.allclose(state["1.running_mean"].double(), hidden.mean((0, 2, 3)), rtol=1e-5)
    model.load_state_dict(state)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_fold_writes_a_state_without_norms(app, normkit, name):
    model, _ = built()
    assert normkit("fold", "user_app:build", "--shape", "1,3,8,8", "--out", name)[0] == 0
    state = read_state(name)
    assert state.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    folded = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    folded.load_state_dict({name.replace("3.", "2."): tensor for name, tensor in state.items()})
    input = torch.randn(2, 3, 9, 9)
    assert torch.allclose(folded(input), model.eval()(input), atol=1e-5)


def test_fold_writes_a_program_that_runs_without_the_code(app, normkit):
    code, _, error = normkit("fold", "user_app:build", "--shape", "1,3,8,8", "--out", "a.pt2")
    assert (code, error) == (0, "")
    input = torch.randn(5, 3, 8, 8)
    program = torch.export.load("a.pt2").module()
    assert torch.allclose(program(input), built()[0].eval()(input), atol=1e-5)


def test_convert_writes_the_new_layers(app, normkit):
    code, out, _ = normkit("convert", "user_app:build", "--to", "group", "--groups", "4", "--out", "a.pt")
    assert code == 0
    assert "retrain" in out
    assert "1.running_mean" not in read_state("a.pt")


@pytest.mark.parametrize("words", [["fold"], ["convert", "--to", "normkit"]], ids=["fold", "convert"])
def test_tolerance_reaches_the_operation(app, normkit, monkeypatch, words):
    operate, given = getattr(surgery, words[0]), []

    def heard(*args, tolerance, **settings):
        given.append(tolerance)
        return operate(*args, tolerance=tolerance, **settings)

    monkeypatch.setattr(surgery, words[0], heard)
    shared = (words[0], "user_app:build", *words[1:], "--shape", "1,3,8,8")
    assert normkit(*shared, "--out", "a.pt", "--tolerance", "1e-3")[0] == 0
    assert normkit(*shared, "--out", "b.pt")[0] == 0
    assert given == [1e-3, None]
    code, _, said = normkit(*shared, "--out", "c.pt", "--tolerance", "-1")
    assert code == 2
    assert "tolerance" in said


def test_repair_mends_a_state_file_by_a_donor(app, normkit):
    sick, donor = built()[0].state_dict(), built()[0].state_dict()
    sick["1.running_var"] = torch.full((8,), float("nan"))
    donor["1.running_var"] = torch.full((8,), 3.0)
    write_state("sick.safetensors", sick)
    write_state("donor.pt", donor)
    code, _, error = normkit("repair", "sick.safetensors", "--out", "a.pt")
    assert (code, error.count("\n")) == (1, 1)
    assert "1: channels [0, 1, 2, 3, 4] of 8" in error
    assert normkit("repair", "sick.safetensors", "--donor", "donor.pt", "--out", "a.pt")[0] == 0
    assert read_state("a.pt")["1.running_var"].tolist() == [3.0] * 8


def test_file_that_is_there_is_not_replaced_without_force(app, normkit):
    (app / "a.pt").write_bytes(b"precious")
    words = ("fold", "user_app:build", "--shape", "1,3,8,8", "--out", "a.pt")
    code, _, error = normkit(*words)
    assert code == 2
    assert "--force" in error
    assert (app / "a.pt").read_bytes() == b"precious"
    assert normkit(*words, "--force")[0] == 0
    assert "0.weight" in read_state("a.pt")


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("fold", "user_app:biuld", "--shape", "1,3,8,8", "--out", "a.pt"), 2, "did you mean build"),
        (("fold", "nowhere:build", "--shape", "1,3,8,8", "--out", "a.pt"), 2, "no module named 'nowhere'"),
        (("fold", "user_app:build", "--out", "a.pt"), 2, "give --shape"),
        (
            ("fold", "user_app:build", "--shape", "1,3,8,8", "--data", "user_app:batches", "--out", "a.pt"),
            2,
            "not both",
        ),
        (("recalibrate", "user_app:build", "--out", "a.pt"), 2, "--data is missing"),
        (("recalibrate", "user_app:build", "--data", "mnist", "--out", "a.pt"), 2, "known are"),
        (("fold", "user_app:build", "--shape", "1,x", "--out", "a.pt"), 2, "whole numbers"),
        (("fold", "user_app:build", "--shape", "1,3,8,8", "--out", "a.txt"), 2, "ending is one of"),
        (("fold", "user_app:build", "--shape", "1,3,8,8", "--out", "no/a.pt"), 2, "does not exist"),
        (("fold", "broken.pt", "--shape", "1,3,8,8", "--out", "a.pt"), 1, "broken.pt"),
        (("repair", "broken.pt", "--out", "a.pt"), 1, "broken.pt: not readable"),
        (("repair", "broken.safetensors", "--out", "a.pt"), 1, "broken.safetensors: not a readable"),
        (("convert", "user_app:build", "--to", "better", "--out", "a.pt"), 2, "known are: normkit"),
        (("recalibrate", "user_app:build", "--data", "user_app:batches", "--where", "x*", "--out", "a.pt"), 2, "'x*'"),
    ],
)
def test_every_mistake_is_one_line_and_writes_nothing(app, normkit, words, code, why):
    for name in ("broken.pt", "broken.safetensors"):
        (app / name).write_bytes(b"\x80\x02garbage")
    before = sorted(app.iterdir())
    found, _, error = normkit(*words)
    assert (found, error.count("\n")) == (code, 1)
    assert why in error
    assert [path for path in sorted(app.iterdir()) if path.name != "__pycache__"] == before


def test_data_set_of_the_laboratory_is_taken_by_its_name(app, normkit):
    (app / "grey_app.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))\n"
    )
    assert normkit("recalibrate", "grey_app:build", "--data", "digits", "--out", "a.pt")[0] == 0
    code, out, _ = normkit("fold", "grey_app:build", "--data", "digits", "--weights", "a.pt", "--out", "b.pt")
    assert code == 0
    assert "1 layer touched" in out


def test_demo_brings_its_own_batches(app, normkit):
    for command in ("recalibrate", "fold"):
        code, out, _ = normkit(command, "demo:stale", "--out", f"{command}.safetensors")
        assert code == 0, out
    code, out, _ = normkit("convert", "demo:small-batch", "--to", "normkit", "--out", "c.pt")
    assert code == 0
    assert "2 batch norms compute the activation after them too" in out


def test_command_runs_as_a_process(app):
    words = [sys.executable, "-m", "normkit", "fold", "user_app:build", "--shape", "1,3,8,8", "--out", "a.pt"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("wrote a.pt\n")


@pytest.mark.parametrize(
    "command",
    [
        ["doctor", "user_app:dicts"],
        ["plan", "user_app:dicts", "--batch-size", "4"],
        ["recalibrate", "user_app:dicts", "--out", "new.pt"],
        ["fold", "user_app:dicts", "--out", "new.pt"],
        ["convert", "user_app:dicts", "--to", "normkit", "--out", "new.pt"],
    ],
)
def test_a_batch_of_another_form_gets_advice_that_can_be_typed_in_a_shell(normkit, app, command):
    with (app / "user_app.py").open("a") as file:
        file.write("\n\ndicts = build\n\ndef pixels():\n    return [{'pixels': torch.randn(4, 3, 8, 8)}]\n")
    code, out, err = normkit(*command, "--data", "user_app:pixels")
    assert (code, out) == (2, "")
    assert "let the function of --data yield what forward takes" in err
    assert "call=" not in err


def test_what_can_be_read_once_is_refused_with_labels_in_the_words_of_the_command(normkit, app):
    with (app / "user_app.py").open("a") as file:
        file.write("\n\ndef once():\n    return iter(batches())\n")
    code, _, err = normkit("doctor", "user_app:build", "--data", "user_app:once", "--labels")
    assert code == 2
    assert "--labels runs over the batches several times" in err
    assert "list or a DataLoader" in err
