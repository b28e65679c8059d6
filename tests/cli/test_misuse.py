"""Every mistake gets one line that says what is allowed, and an exit code; never a traceback."""

import errno
import json
import os
import subprocess
import sys

import pytest

from small_fashion_mnist import write_small_fashion_mnist

MISUSE = {
    "unknown-command": (["lba"], "No such command 'lba'"),
    "unknown-subcommand": (["lab", "rnu"], "No such command 'rnu'"),
    "unknown-option": (["lab", "run", "convergence", "--seed", "3"], "--seed"),
    "no-claim": (["lab", "run"], "Missing argument"),
    "unknown-claim": (
        ["lab", "run", "convergense"],
        "unknown claim 'convergense'; did you mean 'convergence'? Known",
    ),
    "all-and-more": (["lab", "run", "all", "convergence"], "unknown claim 'all'; known are: convergence"),
    "unknown-data": (["lab", "run", "convergence", "--data", "mnist"], "'mnist'; known are: digits, fashion-mnist"),
    "unknown-norm": (
        ["lab", "run", "convergence", "--norms", "none,bach"],
        "'bach'; did you mean 'batch'?",
    ),
    "norm-twice": (["lab", "run", "convergence", "--norms", "none,none"], "each only once"),
    "no-norm": (["lab", "run", "convergence", "--norms", ""], "unknown normalization ''"),
    "seeds-zero": (["lab", "run", "convergence", "--seeds", "0"], "--seeds 0: expected 1 or more"),
    "epochs-negative": (["lab", "run", "convergence", "--epochs", "-1"], "--epochs -1: expected 1 or more"),
    "jobs-zero": (["lab", "run", "convergence", "--jobs", "0"], "--jobs 0: expected 1 or more"),
    "seeds-word": (["lab", "run", "convergence", "--seeds", "many"], "--seeds"),
    "unknown-device": (["lab", "run", "convergence", "--device", "gpu"], "'gpu'; known are: cpu, cuda"),
    "digits-folder": (["lab", "run", "convergence", "--data-dir", "x"], "leave --data-dir out"),
    "report-nowhere": (["lab", "report", "absent"], "absent: no such folder"),
    "report-empty": (["lab", "report", "."], "holds no run.json"),
    "report-nothing": (["lab", "report"], "Missing argument"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_exits_2_with_one_line(normkit, tmp_path, monkeypatch, name):
    arguments, message = MISUSE[name]
    monkeypatch.chdir(tmp_path)
    code, out, err = normkit(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("normkit: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_missing_cuda_device_is_refused(normkit, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = normkit("lab", "run", "convergence", "--device", "cuda", "--out", tmp_path / "out")
    assert code == 2
    assert "finds no CUDA device on this machine; use --device cpu" in err
    assert not (tmp_path / "out").exists()


def test_damaged_data_exit_1_with_the_file_named(normkit, tmp_path):
    folder = write_small_fashion_mnist(tmp_path / "data")
    images = folder / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-100])
    code, _, err = normkit(
        "lab", "run", "convergence", "--data", "fashion-mnist", "--data-dir", folder, "--out", tmp_path / "out"
    )
    assert code == 1
    assert err.count("\n") == 1
    assert str(images) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_folder_that_cannot_be_written_exits_1_with_one_line(normkit, tmp_path, monkeypatch, code):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code), str(tmp_path / "out" / "run.json"))

    monkeypatch.setattr("normkit.lab.record.atomic_write", refuse)
    left, _, err = normkit("lab", "run", "convergence", "--out", tmp_path / "out")
    assert left == 1
    assert err == f"normkit: {tmp_path / 'out' / 'run.json'}: {os.strerror(code)}\n"


def test_out_that_is_a_file_exits_1_with_one_line(normkit, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, _, err = normkit("lab", "run", "convergence", "--out", tmp_path / "out")
    assert code == 1
    assert err.count("\n") == 1
    assert (tmp_path / "out").read_text() == "mine"


def test_missing_extra_says_what_to_install():
    # A fresh interpreter in which typer cannot be imported, as after a bare `pip install normkit`.
    program = "import sys; sys.modules['typer'] = None; from normkit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == 'normkit: this command needs typer: pip install "normkit[lab]"\n'


def test_version_and_help_are_quick_to_say(normkit):
    from normkit import __version__

    assert normkit("--version") == (0, f"normkit {__version__}\n", "")
    code, out, _ = normkit()
    assert code == 0
    assert "lab" in out
    code, out, _ = normkit("lab")
    assert code == 0
    assert {"list", "run", "report"} <= set(out.split())


def test_list_as_json_holds_every_claim(normkit):
    code, out, _ = normkit("lab", "list", "--json")
    assert code == 0
    (first, *_) = json.loads(out)
    assert first["id"] == "convergence"
    assert first["number"] == "E1"
    assert "averaged over the first" in first["question"]
    code, out, _ = normkit("lab", "list")
    assert code == 0
    assert "convergence" in out
