"""``normkit plan``: the table, JSON, and one line for every mistake."""

import json
import sys

import pytest
import torch

from normkit import cli


@pytest.fixture
def plan(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["normkit", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        written = capsys.readouterr()
        return left.value.code, written.out, written.err

    return call


def test_a_demo_is_planned_as_a_table_and_as_json(plan):
    code, out, err = plan("demo:small-batch", "--batch-size", 4, "--samples", 129)
    assert (code, err) == (0, "")
    assert out.startswith("batch of 4 on 1 ranks in 1 micro-batches each\nlayer  kind")
    code, out, _ = plan("demo:small-batch", "--batch-size", 32, "--ranks", 8, "--json")
    assert code == 0
    assert [layer["samples"] for layer in json.loads(out)["layers"]] == [4, 4]


def test_the_same_plan_is_reckoned_every_time(plan):
    first = plan("demo:small-batch", "--batch-size", 4, "--json")
    torch.rand(3)
    assert plan("demo:small-batch", "--batch-size", 4, "--json") == first


def test_a_page_is_written_and_no_other_file_over(plan, tmp_path):
    code, out, err = plan("demo:small-batch", "--batch-size", 4, "--html", tmp_path / "plan.html")
    assert (code, err) == (0, "")
    assert out.rstrip().endswith("plan.html")
    assert "<h1>Plan of demo:small-batch</h1>" in (tmp_path / "plan.html").read_text()
    code, out, _ = plan("demo:small-batch", "--batch-size", 4, "--json", "--html", tmp_path / "plan.html")
    assert json.loads(out)["batch_size"] == 4
    kept = tmp_path / "notes.txt"
    kept.write_text("mine")
    for place, said in ((kept, "give a name that ends in .html"), (tmp_path / "none" / "plan.html", "--html")):
        code, out, err = plan("demo:small-batch", "--batch-size", 4, "--html", place)
        assert (code, out) == (2, "")
        assert said in " ".join(err.split())
    assert kept.read_text() == "mine"


def test_mistakes_are_told_in_one_line(plan):
    for arguments, said in (
        (("demo:small-batch", "--batch-size", 5, "--ranks", 2), "not shared evenly by 2 ranks"),
        (("demo:small-batch", "--batch-size", 4, "--batches", 0), "expected 1 or more"),
    ):
        code, out, err = plan(*arguments)
        assert (code, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1
