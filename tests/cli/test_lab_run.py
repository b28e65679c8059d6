"""Whole runs through the command line, in processes of their own: parallel, killed, interrupted, resumed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from small_fashion_mnist import write_small_fashion_mnist

# A test that waits longer than this has failed; a loaded machine needs a while to start Python.
PATIENCE = 120


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_small_fashion_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture
def command(small_data):
    def build(out, *more):
        return [
            sys.executable, "-m", "normkit", "lab", "run", "convergence", "--data", "fashion-mnist", "--data-dir",
            str(small_data), "--seeds", "2", "--epochs", "2", "--out", str(out), *more,
        ]  # fmt: skip

    return build


def in_process(normkit, arguments):
    """Run a command here that was written for a process of its own."""
    return normkit(*arguments[arguments.index("normkit") + 1 :])


def finished(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, check=False)


def started(arguments):
    # A session of its own, so that a signal to the group reaches the workers as in a terminal.
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    """An uninterrupted run of one process: what every other way of running must equal."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = finished(
        [
            sys.executable, "-m", "normkit", "lab", "run", "convergence", "--data", "fashion-mnist", "--data-dir",
            str(small_data), "--seeds", "2", "--epochs", "2", "--out", str(out), "--jobs", "1",
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done


def test_run_writes_rows_verdict_figures_and_report(whole):
    out, done = whole
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["norm"], row["seed"], row["epoch"]) for row in rows] == [
        (norm, seed, epoch) for norm in ("none", "batch") for seed in (0, 1) for epoch in (1, 2)
    ]
    needed = {"claim", "norm", "seed", "epoch", "train_loss", "test_accuracy", "data"}
    evidence = {"settings", "versions", "commit", "device", "step_losses"}
    assert all(needed | evidence <= row.keys() for row in rows)
    verdict = json.loads((out / "verdicts.json").read_text())["convergence"]
    assert {"verdict", "primary", "premise", "details", "reproduced", "looks"} <= verdict.keys()
    assert verdict["primary"]["seeds"] == 2
    assert (out / "figures" / "convergence.svg").read_text().startswith("<?xml")
    assert "](figures/convergence.svg)" in (out / "report.md").read_text()
    assert (out / "figures" / "small-convergence.svg").exists()
    assert (out / "figures" / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert verdict["verdict"].upper() in done.stdout
    assert str(out / "report.html") in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("done: ")]
    assert told[0] == "done: convergence/fashion-mnist/none/seed=0 (1 of 4 cells, 0 of 1 claims)"
    assert told[-1].endswith("(4 of 4 cells, 1 of 1 claims)")


def test_report_is_written_in_chinese_on_request(whole, normkit):
    out, _ = whole
    code, told, _ = normkit("lab", "report", out, "--lang", "zh")
    assert code == 0
    assert "前五个 epoch 的测试准确率更高" in told
    assert "前 5 个 epoch 的平均测试准确率，有归一化减无归一化：" in told
    assert "细节：最后一个 epoch 的训练损失，有归一化减无归一化：" in told
    assert "每个 epoch 之后的测试准确率" in told
    assert "各种子的平均 ± 标准差。" in told
    assert "Mean" not in told
    assert '<html lang="zh">' in (out / "report.html").read_text()
    assert "论断" in (out / "report.md").read_text()
    code, _, refused = normkit("lab", "report", out, "--lang", "fr")
    assert code == 2
    assert "unknown language; known are: en, zh" in refused


def test_two_processes_give_the_same_bytes_as_one(whole, command, tmp_path):
    done = finished(command(tmp_path / "out", "--jobs", "2"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == (whole[0] / "results.jsonl").read_bytes()


@pytest.mark.parametrize("seed", range(2))
def test_run_killed_at_a_random_moment_goes_on_to_the_same_bytes(whole, command, normkit, tmp_path, seed):
    out = tmp_path / "out"
    generator = random.Random(seed)
    process = started(command(out, "--jobs", str(1 + seed % 2)))
    kill_after(process, out / "log.jsonl", lines=generator.randint(1, 7), delay=generator.uniform(0, 0.1))
    kept = (out / "results.jsonl").read_bytes() if (out / "results.jsonl").exists() else b""
    code, _, told = in_process(normkit, command(out, "--jobs", "1"))
    assert code == 0, told
    content = (out / "results.jsonl").read_bytes()
    assert content == (whole[0] / "results.jsonl").read_bytes()
    # Nothing that was finished is run again.
    finished_lines = kept[: kept.rfind(b"\n") + 1].splitlines()
    assert set(finished_lines) <= set(content.splitlines())
    assert told.count("done: ") == 4 - len(finished_lines) // 2


def kill_after(process, log, lines, delay):
    """Kill the process and its workers when the log has so many lines, or let it end."""
    limit = time.monotonic() + PATIENCE
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < limit
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


def test_workers_end_when_their_parent_is_killed(command, tmp_path):
    log = tmp_path / "out" / "log.jsonl"
    process = started([*command(tmp_path / "out", "--jobs", "2"), "--epochs", "100000"])
    wait_until(lambda: log.exists() and log.stat().st_size > 0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)
    workers = {json.loads(line)["process"] for line in log.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"}
    assert process.pid not in workers
    # Standard output ends when the last process that holds it has ended.
    process.communicate(timeout=PATIENCE)


def wait_until(condition):
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        threading.Event().wait(0.01)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_keeps_finished_cells_and_says_how_to_go_on(whole, command, tmp_path, jobs):
    out = tmp_path / "out"
    # More epochs than the comparison run: the interrupt must come before the end.
    arguments = [*command(out, "--jobs", jobs), "--epochs", "400"]
    process = started(arguments)
    log = out / "log.jsonl"
    limit = time.monotonic() + PATIENCE
    while not log.exists() or log.stat().st_size == 0:
        assert process.poll() is None
        assert time.monotonic() < limit
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out_text, err_text = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert out_text == ""
    assert "Interrupted. 0 of 4 cells are done" in err_text
    assert "the same command goes on" in err_text
    assert "Traceback" not in err_text
    assert (out / "results.jsonl").read_bytes() == b"" if (out / "results.jsonl").exists() else True


def test_second_run_of_a_finished_folder_runs_nothing_and_redraws(whole, command, normkit):
    out, _ = whole
    before = (out / "results.jsonl").stat().st_ino
    (out / "report.html").unlink()
    code, _, told = in_process(normkit, command(out))
    assert code == 0, told
    assert "nothing is left to run" in told
    assert "done: " not in told
    assert (out / "report.html").exists()
    assert (out / "results.jsonl").stat().st_ino == before
    assert "seeds of" not in told


def test_seeds_that_the_folder_holds_besides_those_asked_for_are_told_to_count(whole, command, normkit):
    out, _ = whole
    code, _, told = in_process(normkit, [*command(out), "--seeds", "1"])
    assert code == 0, told
    assert f"{out} holds 2 seeds of convergence, and 1 was asked for: all 2 count" in told
    assert json.loads((out / "verdicts.json").read_text())["convergence"]["primary"]["seeds"] == 2


def test_other_settings_in_the_same_folder_are_refused_and_named(whole, command, normkit):
    out, _ = whole
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "report.html"}
    code, _, told = in_process(normkit, [*command(out), "--epochs", "3"])
    assert code == 1
    assert "epochs 2 there, 3 now" in told
    assert told.count("\n") == 1
    assert before == {name: (out / name).read_bytes() for name in before}
