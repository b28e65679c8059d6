"""The grid on a Dask cluster, one of whose workers is killed; a cell shared by two processes under torchrun."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from small_fashion_mnist import write_small_fashion_mnist

PATIENCE = 240


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_small_fashion_mnist(tmp_path_factory.mktemp("data"))


def arguments(small_data, out, *more):
    return [
        "-m", "normkit", "lab", "run", "convergence", "--data", "fashion-mnist", "--data-dir", str(small_data),
        "--out", str(out), *more,
    ]  # fmt: skip


def ran(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def wait_until(condition):
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        threading.Event().wait(0.05)


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers, each a process of its own as on machines of their own."""
    pytest.importorskip("distributed", reason="distributed is in the dependency group test")
    told = tmp_path / "scheduler.json"
    here = ["--host", "127.0.0.1", "--scheduler-file", str(told), "--no-dashboard"]
    worker = [
        sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(told), "--nthreads", "1",
        "--no-nanny", "--no-dashboard", "--host", "127.0.0.1", "--local-directory", str(tmp_path),
    ]  # fmt: skip
    started = []

    def start(command):
        with (tmp_path / f"{len(started)}.log").open("w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        return started[-1]

    start([sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", *here])
    wait_until(told.exists)
    workers = [start(worker), start(worker)]
    yield json.loads(told.read_text())["address"], workers
    for process in started:
        process.kill()
        process.wait(PATIENCE)


def test_cluster_that_loses_a_worker_gives_the_rows_of_one_process(small_data, tmp_path, cluster, normkit):
    address, workers = cluster
    short = ("--seeds", "4", "--epochs", "8")
    command = [sys.executable, *arguments(small_data, tmp_path / "out", *short, "--scheduler", address)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    results = tmp_path / "out" / "results.jsonl"
    # Once the first cell is back both workers are at work.
    wait_until(lambda: process.poll() is not None or (results.exists() and results.stat().st_size > 0))
    finished_before = len(results.read_bytes().splitlines()) // 8
    os.kill(workers[0].pid, signal.SIGKILL)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert finished_before < 8
    assert workers[1].poll() is None
    code, _, told = normkit(*arguments(small_data, tmp_path / "alone", *short, "--jobs", "1")[2:])
    assert code == 0, told
    assert results.read_bytes() == (tmp_path / "alone" / "results.jsonl").read_bytes()


def test_scheduler_that_is_not_there_is_refused(small_data, tmp_path, normkit):
    pytest.importorskip("distributed", reason="distributed is in the dependency group test")
    command = arguments(small_data, tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")
    code, _, told = normkit(*command[2:])
    assert code == 2
    assert "--scheduler tcp://127.0.0.1:9: cannot be reached" in told


def test_two_processes_share_a_cell_and_train_the_same_network(small_data, tmp_path, normkit):
    one_cell = ("--seeds", "1", "--epochs", "2", "--norms", "none,batch")
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran([*together, *arguments(small_data, tmp_path / "two", *one_cell)])
    code, _, told = normkit(*arguments(small_data, tmp_path / "one", *one_cell, "--jobs", "1")[2:])
    assert code == 0, told
    two, one = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    assert len(two) == len(one) == 4
    assert {row["settings"]["processes"] for row in two} == {2}
    for shared, alone in zip(two, one, strict=True):
        if shared["norm"] == "none":
            # The mean of the halves' gradients is the batch's gradient, but for rounding.
            assert shared["step_losses"] == pytest.approx(alone["step_losses"], rel=1e-4)
        else:
            # Each process normalizes its half with that half's statistics: another number, of the same size.
            assert shared["step_losses"] != alone["step_losses"]
            assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=0.5)
    # A folder of two processes is not gone on with by one.
    code, _, told = normkit(*arguments(small_data, tmp_path / "two", *one_cell)[2:])
    assert code == 1
    assert "processes 2 there, 1 now" in told
