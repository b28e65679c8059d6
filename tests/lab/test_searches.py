"""A search's trials are made once in a run, whatever the processes, and taken up again after a kill."""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from normkit.errors import NormkitError
from normkit.lab import grid, training
from normkit.lab.claim import Request, plan
from normkit.lab.claims import get_claim
from normkit.lab.search import _best_rate
from normkit.lab.searches import forget_locks, made_once, sharing

TRIALS = [{"rate": 0.1}, {"rate": 0.2}, {"rate": 0.3}]


class Maker:
    """Makes a trial's outcome and counts."""

    def __init__(self):
        self.made = []

    def __call__(self, place):
        self.made.append(place)
        return {"accuracy": place / 4, "loss": None}


def search(folder, make, identity="a"):
    with sharing(folder, identity):
        return made_once(TRIALS, make)


def test_trials_are_made_once_and_kept_with_their_words(tmp_path):
    make = Maker()
    expected = [{"accuracy": place / 4, "loss": None} for place in range(3)]
    assert search(tmp_path, make) == search(tmp_path, make) == expected
    assert make.made == [0, 1, 2]
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(trial["rate"] for trial in kept) == [0.1, 0.2, 0.3]
    forget_locks(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


def test_nothing_is_kept_outside_a_run():
    make = Maker()
    made_once(TRIALS, make)
    made_once(TRIALS, make)
    assert make.made == [0, 1, 2, 0, 1, 2]


def test_trials_of_other_versions_are_made_again(tmp_path):
    make = Maker()
    search(tmp_path, make)
    search(tmp_path, make, identity="b")
    assert make.made == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("content", [b"", b'{"outcome"', b"[]"])
def test_damaged_trial_is_made_again(tmp_path, content):
    make = Maker()
    search(tmp_path, make)
    damaged = next(path for path in tmp_path.glob("*.json") if json.loads(path.read_text())["rate"] == 0.2)
    damaged.write_bytes(content)
    search(tmp_path, make)
    assert make.made == [0, 1, 2, 1]


def test_trial_that_another_process_is_at_is_left_for_last_and_taken_over_from_it(tmp_path):
    make = Maker()
    search(tmp_path, make)
    other = next(path for path in tmp_path.glob("*.json") if json.loads(path.read_text())["rate"] == 0.1)
    lock = FileLock(other.with_suffix(".lock"))
    lock.acquire()
    for path in tmp_path.glob("*.json"):
        path.unlink()
    make.made.clear()

    def finishing(place):
        # The other process writes its outcome while this one is at its last trial.
        if place == 2:
            outcome = {"accuracy": 0.9, "loss": 0.1}
            other.write_text(json.dumps({**TRIALS[0], "outcome": outcome}))
            lock.release()
        return make(place)

    assert search(tmp_path, finishing)[0] == {"accuracy": 0.9, "loss": 0.1}
    assert make.made == [1, 2]


def test_trial_of_a_process_that_died_is_made_again(tmp_path):
    make = Maker()
    search(tmp_path, make)
    for path in tmp_path.glob("*.json"):
        path.unlink()
    script = "import os, sys; from filelock import FileLock\nfor name in sys.argv[1:]: FileLock(name).acquire()\n"
    locks = map(str, tmp_path.glob("*.lock"))
    # It ends with the locks held.
    subprocess.run([sys.executable, "-c", f"{script}os._exit(9)", *locks], check=False, timeout=60)
    make.made.clear()
    search(tmp_path, make)
    assert make.made == [0, 1, 2]


def test_full_disk_is_told_and_trials_kept_before_stand(tmp_path, monkeypatch):
    make, fsync, written = Maker(), os.fsync, []

    def fail_at_the_second(file):
        written.append(file)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        search(tmp_path, make)
    search(tmp_path, make)
    assert make.made == [0, 1, 1, 2]


@pytest.fixture
def wanted():
    """Two cells of one seed, each with a search of its own over three rates."""
    few = {"train_images": 80, "test_images": 30}
    return plan(get_claim("placement"), Request(data="digits", seeds=1, epochs=1, training=few))


def run(wanted, folder, jobs=1):
    _best_rate.cache_clear()
    grid.run([wanted], folder, jobs=jobs, data_dir=None, on_event=lambda event: None)
    return (folder / "results.jsonl").read_bytes()


@pytest.fixture
def counted(monkeypatch):
    """Count the passes over the training data, and break off at one where asked to."""
    passes, original = [], training._pass

    def counting(*given):
        passes.append(1)
        if len(passes) == counting.break_at:
            raise NormkitError("broken off")
        return original(*given)

    counting.break_at = None
    monkeypatch.setattr(training, "_pass", counting)
    return passes, counting


# In the first search; in the second, after the first cell; in the second cell's own training.
@pytest.mark.parametrize("break_at", [3, 6, 8])
def test_run_that_is_broken_off_searches_no_rate_twice(wanted, tmp_path, counted, break_at):
    passes, counting = counted
    whole = run(wanted, tmp_path / "whole")
    total = len(passes)
    assert total >= 3 + 3 + 2
    passes.clear()
    counting.break_at = break_at
    with pytest.raises(NormkitError):
        run(wanted, tmp_path / "out")
    assert run(wanted, tmp_path / "out") == whole
    assert len(passes) == total + 1
    assert len(list((tmp_path / "out" / "searches").iterdir())) == total - 2


def test_two_processes_share_the_searches_and_give_the_same_bytes(wanted, tmp_path):
    assert run(wanted, tmp_path / "two", jobs=2) == run(wanted, tmp_path / "one")
    made = [{path.name for path in (tmp_path / name / "searches").glob("*.json")} for name in ("two", "one")]
    assert made[0] == made[1]
    assert not list((tmp_path / "two" / "searches").glob("*.lock"))


def test_run_of_one_search_keeps_a_trial_for_every_seed(tmp_path, counted):
    passes, _ = counted
    few = {"train_images": 80, "test_images": 30}
    run(plan(get_claim("placement"), Request(data="digits", seeds=3, epochs=1, training=few)), tmp_path)
    assert len(passes) == len(list((tmp_path / "searches").glob("*.json"))) + 6
