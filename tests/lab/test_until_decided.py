"""Seeds are added to a folder, look after look; a folder of another machine is told, other options are refused."""

import json
import time
from dataclasses import replace

import pytest

from normkit.lab import grid, until
from normkit.lab.claim import Request, plan
from normkit.lab.claims import get_claim
from normkit.lab.ledger import read_ledger
from normkit.lab.record import read_record
from normkit.lab.results import read_cells
from normkit.lab.sequential import LOOKS
from normkit.lab.until import run_until_decided


@pytest.fixture
def quick():
    return plan(get_claim("gradient-flow"), Request(data="digits", seeds=2))


def run(plans, folder, deadline=float("inf")):
    events = []
    grid.run(plans, folder, jobs=1, data_dir=None, on_event=events.append, deadline=deadline)
    return events


def test_seeds_are_added_to_a_folder_and_the_rows_are_those_of_one_run(quick, tmp_path):
    more = replace(quick, seeds=(0, 1, 2))
    run([quick], tmp_path / "out")
    run([more], tmp_path / "out")
    run([more], tmp_path / "whole")
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == (tmp_path / "whole" / "results.jsonl").read_bytes()
    assert read_record(tmp_path / "out") == read_record(tmp_path / "whole")
    # Fewer are asked for: what is there stays.
    run([quick], tmp_path / "out")
    assert read_record(tmp_path / "out")["gradient-flow"]["plan"]["seeds"] == [0, 1, 2]


def test_run_stops_at_the_look_that_decides(quick, tmp_path):
    calls = []
    run_until_decided([quick], tmp_path, lambda plans, deadline: (calls.append(plans), run(plans, tmp_path)))
    (entry,) = read_ledger(tmp_path)
    assert (entry.verdict.verdict, entry.verdict.primary.seeds) == ("supported", 5)
    assert entry.finished == entry.total
    assert [len(plans[0].seeds) for plans in calls] == [5]
    # The same command again finds nothing to do, and looks at the folder all the same.
    before = (tmp_path / "results.jsonl").read_bytes()
    run_until_decided([quick], tmp_path, lambda plans, deadline: (calls.append(plans), run(plans, tmp_path)))
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert len(calls) == 2


def test_run_goes_on_from_look_to_look_while_nothing_is_decided(quick, tmp_path, monkeypatch):
    claim = get_claim("gradient-flow")
    monkeypatch.setattr(until, "get_claim", lambda name: replace(claim, judge=lambda rows: undecided(claim, rows)))
    monkeypatch.setattr(until, "_rows", lambda plan, folder: [{"seed": seed} for seed in done])
    done, looks = [], []

    def pretend(plans, deadline):
        (only,) = plans
        looks.append(len(only.seeds))
        done[:] = only.seeds

    def undecided(claim, rows):
        from normkit.lab.verdicts import conclude, single

        values = {row["seed"]: claim.question.line + 0.01 * (-1) ** row["seed"] for row in rows}
        return conclude(single(claim.question, values), compared="")

    run_until_decided([quick], tmp_path, pretend)
    assert looks == list(LOOKS)


def test_no_cell_is_begun_after_the_deadline(quick, tmp_path):
    events = run([quick], tmp_path, deadline=time.monotonic() - 1)
    assert not [event for event in events if event.kind == "cell"]
    assert read_cells(tmp_path / "results.jsonl").rows == []


def test_folder_of_another_machine_is_told_and_every_row_says_its_own(quick, tmp_path):
    run([quick], tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["gradient-flow"]["machine"] = "another machine"
    (tmp_path / "run.json").write_text(json.dumps(record))
    more = replace(quick, seeds=(0, 1, 2))
    told = [event.text for event in run([more], tmp_path) if event.kind == "dropped"]
    assert len(told) == 1
    assert "goes on with another machine another machine there, " in told[0]
    assert all(row["machine"] for row in read_cells(tmp_path / "results.jsonl").rows)
    # Nothing is left to run: nothing is told.
    assert not [event for event in run([more], tmp_path) if event.kind == "dropped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "3"], "--budget 3: expected minutes above 0, together with --until-decided"),
        (["--until-decided", "--budget", "0"], "--budget 0: expected minutes above 0"),
        (["--until-decided", "--seeds", "3"], "--until-decided chooses the seeds itself; leave --seeds 3 out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(normkit, tmp_path, arguments, message):
    code, _, told = normkit("lab", "run", "identity", *arguments, "--out", tmp_path)
    assert code == 2
    assert message in told


def test_rows_of_another_design_are_not_judged(quick, tmp_path):
    run([quick], tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["gradient-flow"]["plan"]["design"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match=r"gradient-flow by its design number 1; this version's is 2"):
        read_ledger(tmp_path)
    with pytest.raises(Exception, match=r"other settings \(design 1 there, 2 now\)"):
        run([quick], tmp_path)
