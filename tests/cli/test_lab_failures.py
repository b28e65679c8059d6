"""What goes wrong on the way ends with one line that says so, and nothing that was finished is lost."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from small_fashion_mnist import write_small_fashion_mnist

from .test_lab_run import PATIENCE, in_process, started, wait_until


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_small_fashion_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture
def command(small_data):
    def build(out, *more, data=small_data):
        return [
            sys.executable, "-m", "normkit", "lab", "run", "convergence", "--data", "fashion-mnist", "--data-dir",
            str(data), "--seeds", "2", "--epochs", "2", "--out", str(out), *more,
        ]  # fmt: skip

    return build


def test_worker_that_dies_is_told_and_the_same_command_goes_on(command, normkit, tmp_path):
    log, results = tmp_path / "out" / "log.jsonl", tmp_path / "out" / "results.jsonl"
    process = started([*command(tmp_path / "out", "--jobs", "2"), "--seeds", "3", "--epochs", "40"])
    wait_until(lambda: results.exists() and results.stat().st_size > 0)
    worker = json.loads(log.read_text().splitlines()[-1])["process"]
    os.kill(worker, signal.SIGKILL)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "a worker process died (killed, or out of memory); finished cells are kept in" in told
    assert "Traceback" not in told
    kept = results.read_bytes().splitlines()
    assert kept
    assert len(kept) % 40 == 0
    code, _, told = in_process(normkit, [*command(tmp_path / "out", "--jobs", "1"), "--seeds", "3", "--epochs", "40"])
    assert code == 0, told
    assert set(kept) <= set(results.read_bytes().splitlines())


def test_full_disk_is_told_and_finished_cells_are_kept(command, normkit, tmp_path):
    # A limit on the size of a file is what a full disk is: a write takes a part and then fails.
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    # No kernels are compiled for layer norm: their cache is larger than the limit.
    arguments = command(tmp_path / "out", "--jobs", "1", "--norms", "none,layer")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, preexec_fn=limited, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    results = tmp_path / "out" / "results.jsonl"
    kept = results.read_bytes().splitlines()
    assert 0 < len(kept) < 8
    assert len(kept) % 2 == 0
    code, _, told = in_process(normkit, arguments)
    assert code == 0, told
    assert told.count("done: ") == 4 - len(kept) // 2
    assert results.read_bytes().splitlines()[: len(kept)] == kept


def test_folder_that_cannot_be_written_is_told_before_anything_is_run(command, normkit, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, told = in_process(normkit, command(tmp_path / "file" / "out"))
    assert code == 1
    assert "Not a directory" in told
    assert str(tmp_path / "file" / "out") in told
    assert told.count("\n") == 1


def test_data_cut_short_are_told_before_anything_is_run(command, normkit, tmp_path):
    data = write_small_fashion_mnist(tmp_path / "data")
    images = data / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-100])
    code, _, told = in_process(normkit, command(tmp_path / "out", data=data))
    assert code == 1
    assert str(images) in told
    assert "cut short" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
