"""What many processes keep of freed memory is one share: real processes, killed ones, forks, and folders that fail."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from normkit.kernels import shares
from normkit.kernels.shares import Share

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")

BLOCK = 2  # megabytes; memory is kept in large pages
WHOLE = 24  # megabytes
WORKER = """
import os, sys, torch
from normkit.kernels import memory
from normkit.kernels.shares import Share
memory._kept, memory.KEPT_FROM = memory._Kept(Share("kept", [sys.argv[1]])), 1
x = torch.empty(1000)
for line in sys.stdin:
    word, *count = line.split()
    if word == "use":
        held = [memory.empty_like(x) for _ in range(int(count[0]))]
        while held:
            del held[0]
    elif word == "release":
        memory.release()
    elif word == "fork" and (child := os.fork()):
        os.waitpid(child, 0)
        os._exit(0)
    print(memory.kept() >> 20, flush=True)
"""


class Worker:
    """A process that uses and frees large outputs when told to."""

    def __init__(self, folder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "NORMKIT_KEPT_MEGABYTES": str(WHOLE)},
        )  # fmt: skip
        self.kept = 0

    def do(self, *words: object) -> int:
        """Have it do something; return how many megabytes it keeps then."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        self.kept = int(self.process.stdout.readline())
        return self.kept


@pytest.fixture
def workers(tmp_path) -> Iterator[Callable[[int], list[Worker]]]:
    made: list[Worker] = []

    def start(count: int) -> list[Worker]:
        made.extend(Worker(str(tmp_path)) for _ in range(count))
        return made

    yield start
    for worker in made:
        worker.process.kill()
        worker.process.communicate()


def test_processes_keep_one_share_together(workers):
    one, two, three = workers(3)
    assert one.do("use", 20) == WHOLE  # alone it may keep all of it
    assert two.do("use", 20) == 0  # nothing is left, and nothing taken from a process that may be asleep
    for _ in range(2):
        for worker in (one, two, three):
            worker.do("use", 20)
            assert one.kept + two.kept + three.kept <= WHOLE
    assert [worker.do("use", 20) for worker in (one, two, three)] == [WHOLE // 3] * 3
    three.process.send_signal(signal.SIGKILL)
    three.process.wait()
    assert [worker.do("use", 20) for worker in (one, two)] == [WHOLE // 2] * 2  # one that died does not count
    assert two.do("release") == 0
    assert one.do("use", 20) == WHOLE
    # A process that wants little leaves the rest to nobody, but never keeps more than is left.
    assert two.do("use", 1) == 0
    one.do("use", 20)
    assert two.do("use", 1) == BLOCK


def test_fork_is_a_process_of_its_own_and_inherits_nothing(workers):
    (worker,) = workers(1)
    assert worker.do("use", 20) == WHOLE
    assert worker.do("fork") == 0  # the child answers from now on; its parent keeps what it has
    assert worker.do("use", 20) == 0
    worker.process.kill()
    worker.process.wait()
    assert worker.do("use", 20) == WHOLE


@pytest.fixture
def share(tmp_path) -> Iterator[Share]:
    made = Share("kept", [str(tmp_path / "absent"), str(tmp_path)])
    yield made
    made.leave()


def test_without_a_folder_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    for folders in ([], [str(tmp_path / "absent")], [str(tmp_path / "file")]):
        share = Share("kept", folders)
        assert share.allowed(100, 10) == 0
        share.tell(5)
        share.leave()


def test_next_folder_is_tried(share, tmp_path):
    assert share.allowed(100, 10) == 100
    assert [path.name for path in tmp_path.iterdir()] == [f"kept-{os.getuid()}"]
    assert (tmp_path / f"kept-{os.getuid()}").stat().st_mode & 0o777 == 0o600


def test_no_place_left(share, monkeypatch):
    monkeypatch.setattr(shares, "_PLACES", 0)
    assert share.allowed(100, 10) == 0


@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "folder"])
def test_what_is_not_this_user_s_own_file_is_left_alone(kind, tmp_path):
    other, path = tmp_path / "other", tmp_path / f"kept-{os.getuid()}"
    other.write_text("precious")
    make = {"link": path.symlink_to, "second name": path.hardlink_to}
    if kind in make:
        make[kind](other)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert Share("kept", [str(tmp_path)]).allowed(100, 10) == 0
    (tmp_path / "next").mkdir()
    share = Share("kept", [str(tmp_path), str(tmp_path / "next")])
    assert share.allowed(100, 10) == 100
    share.leave()
    assert other.read_text() == "precious"


def test_closed_descriptor_whose_number_is_another_file_s_is_not_written(share, tmp_path):
    assert share.allowed(100, 10) == 100
    number = share._descriptor
    os.close(number)  # as who makes a daemon of a process does
    other = tmp_path / "log"
    other.write_text("precious")
    taken = os.open(other, os.O_RDWR)
    if taken != number:
        os.dup2(taken, number)
        os.close(taken)
    share.tell(7)
    assert share.allowed(100, 10) == 100
    share.leave()
    assert other.read_text() == "precious"
    os.close(number)


def test_removed_file_is_made_again(share, tmp_path):
    share.allowed(100, 10)
    (tmp_path / f"kept-{os.getuid()}").unlink()
    assert share.allowed(100, 10) == 100
    assert (tmp_path / f"kept-{os.getuid()}").exists()


@pytest.mark.parametrize("content", [b"x", b"\xff" * 8 * 50, b"\x7f" * 8 * 50 + b"xyz"])
def test_damaged_file_is_mended(content, tmp_path):
    (tmp_path / f"kept-{os.getuid()}").write_bytes(content)
    share = Share("kept", [str(tmp_path)])
    assert share.allowed(100, 60) == 100
    share.leave()
