import json
import os

import pytest

from normkit.errors import ResultsError
from normkit.lab.results import append_rows, atomic_write, locked, read_cells, rewrite


def cell_rows(name, count=2, **more):
    return [{"cell": name, "row": i, "rows": count, "value": i / 3, **more} for i in range(1, count + 1)]


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, cell_rows("a", text="é\n"))
    append_rows(path, cell_rows("b", 3))
    loaded = read_cells(path)
    assert loaded.cells == {"a": cell_rows("a", text="é\n"), "b": cell_rows("b", 3)}
    assert loaded.dropped == ""


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, cell_rows("a", 1, losses=[float("nan"), 1.0], worst=float("-inf")))
    assert read_cells(path).rows[0]["losses"] == [None, 1.0]
    assert read_cells(path).rows[0]["worst"] is None


def test_every_cut_of_the_file_keeps_the_whole_cells_before_it(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, cell_rows("a"))
    first = path.stat().st_size
    append_rows(path, cell_rows("b"))
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        loaded = read_cells(path)
        assert list(loaded.cells) == (["a"] if cut >= first else [])
        assert bool(loaded.dropped) == (cut not in (0, first))


@pytest.mark.parametrize(
    ("before", "after"), [(b'"value": 0.3333333333333333', b'"value": 0.4333333333333333'), (b'"row": 1', b'"row": 9')]
)
def test_a_number_altered_inside_a_line_is_found(tmp_path, before, after):
    path = tmp_path / "results.jsonl"
    append_rows(path, cell_rows("a"))
    assert before in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(before, after))
    with pytest.raises(ResultsError, match=r"line 1: altered after it was written.*remove the lines of a and run"):
        read_cells(path)


def test_rows_of_versions_before_digests_are_read(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in cell_rows("a")))
    assert read_cells(path).rows == cell_rows("a")


def test_full_disk_names_the_file_and_the_way_on(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    append_rows(path, cell_rows("a"))
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"make room and run the same command again") as caught:
        append_rows(path, cell_rows("b"))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"{torn\n", b"[1]\n", b'{"cell": "a"}\n', b"\xff\n"])
def test_damage_before_the_end_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "results.jsonl"
    append_rows(path, cell_rows("a"))
    path.write_bytes(path.read_bytes() + line)
    append_rows(path, cell_rows("b"))
    with pytest.raises(ResultsError, match=r"results.jsonl, line 3: not a row of results"):
        read_cells(path)


def test_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    append_rows(path, cell_rows("a"))
    before = path.read_bytes()
    write = os.write

    def full_disk(file, content):
        write(file, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        append_rows(path, cell_rows("b"))
    assert path.read_bytes() == before


def test_failed_atomic_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_rewrite_orders_rows_and_leaves_an_ordered_file_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, cell_rows("b"))
    append_rows(path, cell_rows("a"))
    ordered = cell_rows("a") + cell_rows("b")
    rewrite(path, ordered)
    assert read_cells(path).rows == ordered
    inode = path.stat().st_ino
    rewrite(path, ordered)
    assert path.stat().st_ino == inode


def test_second_run_in_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(ResultsError, match="another run is writing here"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
