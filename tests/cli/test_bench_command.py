"""``normkit bench`` through the command line: one tiny shape end to end, misuse, interruption, a wrong kernel."""

import json
import signal
import sys

import pytest

from normkit import cli
from normkit.bench import measure as measuring
from normkit.bench import shapes, training
from normkit.bench.shapes import Shape
from normkit.kernels.numba.channels import passes as channel_passes


@pytest.fixture
def normkit(monkeypatch, capsys):
    """Run the command line in this process, on one tiny shape; return its exit code and what it wrote."""
    monkeypatch.setattr(shapes, "SETS", {"edge": (Shape((2, 3, 5, 7), quick=True), Shape((64, 64, 64)))})

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["normkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        written = capsys.readouterr()
        return left.value.code, written.out, written.err

    return call


QUICK = ("bench", "--quick", "--threads", "1", "--seconds", "0.001")


def test_quick_run_prints_tables_writes_json_and_can_be_summarized(normkit, tmp_path):
    path = tmp_path / "rows.json"
    chosen = ("--dtype", "float32", "--chain", "bn,bn+add+relu", "--work", "forward,forward+backward")
    code, out, err = normkit(*QUICK, *chosen, "--json", path)
    assert (code, err) == (0, "measuring 8 rows\n")
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert document["complete"]
    assert len(document["rows"]) == 8
    assert document["machine"]["threads"] == 1
    assert document["settings"]["quick"]
    assert out.count("2x3x5x7") >= 8
    assert document["settings"]["only"] == ["rows"]
    assert "Geometric means over the shapes" in out
    assert "no input of up to 4096 values below 0.95 of torch's speed" in out
    assert "…" not in out, "a cell was cut off"
    assert out.startswith(("Slower than torch:\n  ", "Nothing is slower than torch.\n"))
    assert "worst: " in out
    code, out, err = normkit("bench", "--summary", path, path)
    assert (code, err) == (0, "")
    # Each document has its own table: a heading, its rule and eight groups.
    assert out.count("\n| forward") == 2 * 8
    assert out.count("\n| goal | found | met |") == 2


def test_choices_reach_the_plan(normkit, tmp_path):
    path = tmp_path / "rows.json"
    chosen = ("--shapes", "edge", "--dtype", "bfloat16", "--layout", "channels_last", "--work", "eval,forward")
    code, _, _ = normkit(*QUICK, *chosen, "--chain", "bn+relu", "--json", path)
    assert code == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["dtype"], row["layout"], row["work"], row["chain"]) for row in rows] == [
        ("bfloat16", "channels_last", work, "bn+relu") for work in ("eval", "forward")
    ]


def test_training_steps_and_imports_are_measured_where_they_are_asked_for(normkit, tmp_path, monkeypatch):
    path = tmp_path / "steps.json"
    case = training.TrainingCase("LeNet-5", training.LeNet, (2, 1, 28, 28))
    monkeypatch.setattr(training, "CASES", (case,))
    monkeypatch.setattr(training.measure_training, "__defaults__", ((case,),))
    monkeypatch.setattr("normkit.bench.imports._import", lambda module: {"torch": 2.0, "normkit": 2.06}[module])
    code, out, err = normkit(*QUICK, "--only", "imports,training", "--json", path)
    assert (code, err) == (0, "measuring 1 networks\nmeasuring 1 imports\n")
    document = json.loads(path.read_text())
    assert not document["rows"]
    assert document["training"][0]["network"] == "LeNet-5"
    assert "a training step at least 1.05 times as fast as with torch.nn's layers" in out
    assert "import torch 2 s (2-2), import normkit 2.06 s (2.06-2.06): +3.0%" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["rows", "training", "imports"]),
        (["--quick"], ["rows", "training"]),
        (["--quick", "--dtype", "float32"], ["rows"]),
        (["--only", "imports"], ["imports"]),
    ],
)
def test_parts_that_are_measured(normkit, monkeypatch, arguments, expected):
    found = []
    monkeypatch.setattr("normkit.cli.bench._fill", lambda document, *_: found.append(document["settings"]))
    normkit("bench", *arguments)
    assert found[0]["only"] == expected
    assert found[0]["compile"] is ("--quick" not in arguments)


@pytest.mark.usefixtures("python_path")  # where the kernel is made wrong
def test_wrong_kernel_exits_1_names_it_and_keeps_what_was_measured(normkit, tmp_path, monkeypatch):
    true_forward, path = channel_passes.forward, tmp_path / "rows.json"

    def forward(*arguments):
        y, saved = true_forward(*arguments)
        return y + 1e-3, saved

    monkeypatch.setattr(channel_passes, "forward", forward)
    code, out, _ = normkit(*QUICK, "--chain", "bn", "--dtype", "float32", "--layout", "contiguous", "--json", path)
    assert code == 1
    named = "edge 2x3x5x7 float32 contiguous forward bn: the numba kernel is wrong: output is off by 0.00"
    assert f"WRONG, not timed: {named}" in out
    document = json.loads(path.read_text())
    assert document["complete"]
    # Inference has another kernel, which is right.
    assert [row["work"] for row in document["rows"]] == ["eval"]
    assert len(document["wrong"]) == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_was_measured(normkit, tmp_path, monkeypatch, how):
    true_row, path, done = measuring.measure_row, tmp_path / "rows.json", []
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def measure_row(*arguments, **settings):
        if len(done) == 2:
            signal.raise_signal(how)
        done.append(true_row(*arguments, **settings))
        return done[-1]

    monkeypatch.setattr(measuring, "measure_row", measure_row)
    code, out, err = normkit(*QUICK, "--json", path)
    assert code == 130
    assert "Interrupted; what was measured is kept." in err
    assert "2x3x5x7" in out
    document = json.loads(path.read_text())
    assert (document["complete"], len(document["rows"])) == (False, 2)
    _, out, _ = normkit("bench", "--summary", path)
    assert "The run was not finished." in out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_what_is_measured_is_written_now_and_then(normkit, tmp_path, monkeypatch):
    path, seen = tmp_path / "rows.json", []
    monkeypatch.setattr("normkit.cli.bench._WRITE", -1)
    true_row = measuring.measure_row

    def measure_row(*arguments, **settings):
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return true_row(*arguments, **settings)

    monkeypatch.setattr(measuring, "measure_row", measure_row)
    normkit(*QUICK, "--work", "eval", "--dtype", "float32", "--layout", "contiguous", "--json", path)
    assert seen == [0, 1, 2]


MISUSE = {
    "unknown-set": (["--shapes", "resnet51"], "--shapes: unknown 'resnet51'; known are: edge"),
    "threads-zero": (["--threads", "0"], "--threads 0: expected 1 or more"),
    "no-seconds": (["--seconds", "0"], "--seconds 0.0: expected more than 0"),
    "json-nowhere": (["--json", "absent/rows.json"], "expected a file in a folder that exists"),
    "files-alone": (["rows.json"], "files are read with --summary"),
    "summary-of-nothing": (["--summary"], "--summary needs files"),
    "unknown-part": (
        ["--only", "row"],
        "--only: unknown 'row'; did you mean 'rows'? Known are: rows",
    ),
    "choices-for-training": (["--only", "training", "--dtype", "float32"], "leaves the rows out"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_exits_2_with_one_line(normkit, tmp_path, monkeypatch, name):
    arguments, message = MISUSE[name]
    monkeypatch.chdir(tmp_path)
    code, out, err = normkit("bench", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_compile_without_a_compiler_is_refused(normkit, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    code, _, err = normkit(*QUICK, "--compile")
    assert code == 2
    assert "--compile needs a C++ compiler" in err


def test_summary_of_a_damaged_file_exits_1_with_one_line(normkit, tmp_path):
    (tmp_path / "rows.json").write_text("{")
    code, _, err = normkit("bench", "--summary", tmp_path / "rows.json")
    assert code == 1
    assert err.count("\n") == 1
    assert "not JSON" in err
