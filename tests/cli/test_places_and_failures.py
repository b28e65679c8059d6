"""What stands at a file's place, full disks, code of the user's that fails, and names that would steer a terminal."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normkit import files
from normkit.anatomy.states import read_state, write_state
from normkit.cli.terminal import Terminal, echo
from normkit.errors import ArgumentError

APP = """
import sys
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

def batches():
    return [torch.randn(4, 3, 8, 8)]

def fails():
    raise ZeroDivisionError("no model\\ntoday \\x1b[31m")

def leaves():
    sys.exit(0)

def interrupted():
    raise KeyboardInterrupt

def half():
    yield torch.randn(4, 3, 8, 8)
    raise LookupError("lost")
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    (tmp_path / "failing_app.py").write_text(APP)
    (tmp_path / "broken_app.py").write_text("1 / 0\n")
    (tmp_path / "unreadable_app.py").write_text("def (\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("failing_app", "broken_app", "unreadable_app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def put(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "dangling link":
        path.symlink_to("nowhere.pt")
    elif kind == "link into no folder":
        path.symlink_to("no/where.pt")
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.write_bytes(b"precious")


ALWAYS = {"folder": "is a folder", "pipe": "a pipe or a device", "device": "a pipe or a device"}
LINKS = {"dangling link": "is a link to nowhere.pt", "link into no folder": "is a link to no/where.pt"}
LINKS |= {"link to itself": "is a link"}
COMMANDS = {
    "recalibrate": ("recalibrate", "failing_app:build", "--data", "failing_app:batches", "--out", "a.pt"),
    "fold": ("fold", "failing_app:build", "--shape", "1,3,8,8", "--out", "a.pt"),
    "convert": ("convert", "failing_app:build", "--to", "normkit", "--out", "a.pt"),
    "repair": ("repair", "failing_app:build", "--out", "a.pt"),
    "doctor": ("doctor", "failing_app:build", "--html", "a.pt"),
    "bench": ("bench", "--quick", "--only", "imports", "--json", "a.pt"),
}


@pytest.mark.parametrize("kind", [*ALWAYS, *LINKS, "file"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_stands_in_the_way_is_told_before_the_work_and_left(app, normkit, monkeypatch, command, kind):
    replaces = command in ("doctor", "bench")
    if replaces and kind in ("file", "dangling link"):
        pytest.skip("this command replaces a file and writes through a link")
    put(kind, app / "a.pt")
    before = os.lstat(app / "a.pt")
    monkeypatch.setattr("normkit.cli.surgery.patient", None)
    monkeypatch.setattr("normkit.cli.doctor.patient", None)
    monkeypatch.setattr("normkit.cli.bench._run", None)
    code, out, err = normkit(*COMMANDS[command])
    assert (code, out, err.count("\n")) == (2, "", 1)
    word = {**ALWAYS, **LINKS, "file": "is there already"}[kind]
    if not (replaces and kind == "link to itself"):
        assert word in err
    assert os.lstat(app / "a.pt").st_ino == before.st_ino
    assert not list(app.glob(".a-*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_takes_no_file_is_told_before_the_work(app, normkit, monkeypatch, command):
    # root may write everywhere, and still /proc takes no file.
    *words, _ = COMMANDS[command]
    monkeypatch.setattr("normkit.cli.surgery.patient", None)
    monkeypatch.setattr("normkit.cli.doctor.patient", None)
    monkeypatch.setattr("normkit.cli.bench._run", None)
    code, out, err = normkit(*words, "/proc/a.pt")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no file can be put into /proc" in err


def test_a_name_of_two_lines_stays_on_one(app, normkit):
    code, out, _ = normkit("convert", "failing_app:build", "--to", "normkit", "--out", "a\nb.pt")
    assert code == 0
    assert out.endswith("wrote a\\nb.pt\n")


@pytest.mark.parametrize("kind", [*ALWAYS, "link into no folder", "link to itself"])
def test_force_replaces_files_alone(tmp_path, kind):
    put(kind, tmp_path / "a.pt")
    with pytest.raises(ArgumentError):
        files.write_atomically(tmp_path / "a.pt", lambda path: path.write_bytes(b"new"), force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt"}


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    for name in ("there.pt", "new.pt"):
        (tmp_path / f"to-{name}").symlink_to(name)
    (tmp_path / "there.pt").write_bytes(b"old")
    for name in ("there.pt", "new.pt"):
        write_state(tmp_path / f"to-{name}", {"a": torch.ones(2)}, force=True)
        assert (tmp_path / f"to-{name}").is_symlink()
        assert read_state(tmp_path / name)["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("step", ["write", "fsync", "mkstemp", "rename"])
def test_a_full_disk_leaves_the_old_file_and_names_the_path(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif step == "mkstemp":
        monkeypatch.setattr(files.tempfile, "mkstemp", full)
    elif step == "rename":
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left") as told:
        files.write_atomically(path, full if step == "write" else lambda p: p.write_bytes(b"new"), force=True)
    assert told.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB, where there is one to be had."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    # Lazily: of a write that failed torch keeps the file open as long as the exception lives.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_on_a_disk_that_fills_up(small_disk, ending):
    path = small_disk / f"a.{ending}"
    write_state(path, {"a": torch.ones(2)})
    with pytest.raises(OSError, match="No space left") as told:
        write_state(path, {"a": torch.ones(1 << 16)}, force=True)
    assert told.value.filename == str(path)
    assert read_state(path)["a"].tolist() == [1.0, 1.0]
    assert [entry.name for entry in small_disk.iterdir()] == [path.name]


def test_a_mistake_in_writing_is_no_full_disk(tmp_path):
    def fail(path):
        raise RuntimeError("cannot take this")

    with pytest.raises(RuntimeError, match="cannot take this"):
        files.write_atomically(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


FAILURES = {
    "factory": (("fold", "failing_app:fails", "--shape", "1,3,8,8"), 2, r"ZeroDivisionError: no model today \x1b[31m"),
    "module": (("fold", "broken_app:build", "--shape", "1,3,8,8"), 2, "ZeroDivisionError: division by zero"),
    "syntax": (("fold", "unreadable_app:build", "--shape", "1,3,8,8"), 1, "SyntaxError"),
    "data": (("recalibrate", "failing_app:build", "--data", "failing_app:fails"), 2, "ZeroDivisionError: no model"),
    "loader": (("recalibrate", "failing_app:build", "--data", "failing_app:half"), 2, "LookupError: lost"),
    "leaves": (("convert", "failing_app:leaves", "--to", "normkit"), 2, "SystemExit: 0"),
    "interrupted": (("convert", "failing_app:interrupted", "--to", "normkit"), 130, "interrupted"),
    "shape": (("fold", "failing_app:build", "--shape", "1,4,8,8"), 2, "--shape 1,4,8,8: the model fails on it"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_code_of_the_users_that_fails_is_one_line_and_a_place(app, normkit, name):
    words, expected, why = FAILURES[name]
    code, out, err = normkit(*words, "--out", "a.pt")
    assert (code, out, err.count("\n")) == (expected, "", 1), err
    assert why in err
    if expected == 2 and name != "shape":
        assert "_app.py, line" in err
    assert not (app / "a.pt").exists()


def test_a_doctor_whose_patient_does_not_come_is_misuse(app, normkit):
    assert normkit("doctor", "failing_app:fails")[0] == 2
    assert normkit("doctor", "failing_app:build", "--data", "failing_app:half")[0] == 2


def test_a_traceback_is_shown_to_those_who_ask(app, normkit, monkeypatch):
    monkeypatch.setenv("NORMKIT_TRACEBACK", "1")
    _, _, err = normkit("fold", "failing_app:fails", "--shape", "1,3,8,8", "--out", "a.pt")
    assert "Traceback (most recent call last)" in err


@pytest.mark.parametrize("before", [True, False])
def test_the_option_shows_the_line_first_and_then_the_traceback(app, normkit, before):
    words = ["fold", "failing_app:fails", "--shape", "1,3,8,8", "--out", "a.pt"]
    code, out, err = normkit(*(["--traceback", *words] if before else [*words, "--traceback"]))
    assert (code, out) == (2, "")
    assert err.startswith("normkit: ZeroDivisionError")
    assert err.split("\n")[1] == "Traceback (most recent call last):"
    assert 'raise ZeroDivisionError("no model' in err


NAME = "\x1b[31mred\u202e.running_mean"


def test_names_in_a_state_file_are_shown(app, normkit):
    write_state(app / "a.safetensors", {NAME: torch.zeros(3), NAME.replace("mean", "var"): torch.full((3,), -1.0)})
    code, out, _ = normkit("doctor", "a.safetensors", "--html", "page.html")
    assert code == 1
    page = (app / "page.html").read_text()
    for text in (out, page):
        assert r"\x1b[31mred\u202e" in text
        assert "\x1b[31m" not in text
        assert "\u202e" not in text
    code, _, err = normkit(
        "convert", "failing_app:build", "--weights", "a.safetensors", "--to", "torch", "--out", "b.pt"
    )
    assert (code, err.count("\n")) == (1, 1)
    assert r"\x1b[31mred\u202e" in err


def test_no_text_of_a_command_steers_the_terminal(capsys):
    echo(f"{NAME}\tx", colour="red")
    assert r"\x1b[31mred\u202e" in capsys.readouterr().out
    from rich.progress import Progress
    from rich.table import Table

    console = Terminal(width=200, force_terminal=True)
    table = Table(title=NAME, caption=NAME)
    table.add_column(NAME)
    table.add_row(f"[bold]{NAME}[/]")
    with Progress(console=console) as progress:
        progress.add_task(NAME, total=1)
        console.print(table)
        console.print(NAME, soft_wrap=True)
    out = capsys.readouterr().out
    assert "\x1b[31mred" not in out
    assert "\u202e" not in out
    assert out.count(r"\x1b[31mred\u202e") >= 5
    assert "\x1b[1m" in out  # rich's own codes are sent


def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "normkit", "lab", "list", "--json"], stdout=full, stderr=-1, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
