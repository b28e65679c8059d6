import dataclasses
import json

import pytest
import torch

import normkit
from normkit.errors import ArgumentError, ResultsError
from normkit.lab import grid
from normkit.lab.backends import seen_backends
from normkit.lab.claim import Request, concerning, plan
from normkit.lab.claims import get_claim
from normkit.lab.ledger import read_ledger
from normkit.lab.record import commit, read_record, versions
from normkit.lab.results import read_cells
from normkit.lab.training import UNTRAINED
from small_fashion_mnist import write_small_fashion_mnist


@pytest.fixture
def small(tmp_path):
    data_dir = write_small_fashion_mnist(tmp_path / "data")
    request = Request(data="fashion-mnist", data_dir=data_dir, seeds=2, epochs=1)
    return plan(get_claim("convergence"), request), data_dir, tmp_path / "out"


def run(small, **changes):
    this_plan, data_dir, out = small
    events = []
    grid.run(
        [changes.get("plan", this_plan)],
        out,
        jobs=1,
        data_dir=changes.get("data_dir", data_dir),
        on_event=events.append,
    )
    return events


def test_events_tell_every_epoch_and_cell(small):
    events = run(small)
    kinds = [event.kind for event in events]
    assert kinds[0] == "begin"
    assert (events[0].steps, events[0].done) == (4, 0)
    assert events[0].cells == events[0].left == {"convergence": 4}
    assert kinds.count("epoch") == kinds.count("cell") == 4


def test_rows_carry_what_is_needed_to_repeat_them(small):
    run(small)
    this_plan, _, out = small
    for row in read_cells(out / "results.jsonl").rows:
        assert row["settings"] == this_plan.record()["settings"]
        assert row["versions"] == versions()
        assert row["commit"] == commit()
        assert row["device"] == "cpu"
    record = read_record(out)["convergence"]
    assert record["fingerprint"] == this_plan.fingerprint
    assert len(record["data_digest"]) == 64


def test_claim_that_reads_the_last_epoch_alone_keeps_one_row_per_cell_and_tells_every_epoch(tmp_path):
    data_dir = write_small_fashion_mnist(tmp_path / "data")
    request = Request(data="fashion-mnist", data_dir=data_dir, seeds=1, epochs=3, norms=("batch",))
    this_plan = plan(get_claim("dropout"), request)
    events = run((this_plan, data_dir, tmp_path / "out"))
    rows = read_cells(tmp_path / "out" / "results.jsonl").rows
    assert [(row["epoch"], row["row"], row["rows"]) for row in rows] == [(3, 1, 1)] * 5
    # Every epoch is in the log, which progress is read from.
    assert [event.kind for event in events].count("cell") == 5
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] * 5
    assert run((this_plan, data_dir, tmp_path / "out"))[0].left == {}


def test_threads_of_the_caller_do_not_change_a_number(small, tmp_path):
    this_plan, data_dir, out = small
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(small)
        torch.set_num_threads(3)
        run((this_plan, data_dir, tmp_path / "again"))
    finally:
        torch.set_num_threads(before)
    assert (out / "results.jsonl").read_bytes() == (tmp_path / "again" / "results.jsonl").read_bytes()


def test_torn_end_is_said_and_only_its_cell_is_run_again(small):
    run(small)
    results = small[2] / "results.jsonl"
    content = results.read_bytes()
    results.write_bytes(content[:-20])
    events = run(small)
    assert next(event.text for event in events if event.kind == "dropped").endswith(
        "dropped a last line that was cut off; it is run again"
    )
    assert [event.cell for event in events if event.kind == "cell"] == ["convergence/fashion-mnist/batch/seed=1"]
    assert results.read_bytes() == content


def test_other_data_in_the_same_folder_are_refused(small, tmp_path):
    run(small)
    other = write_small_fashion_mnist(tmp_path / "other", train=140)
    with pytest.raises(ResultsError, match=r"data files \(SHA-256\)"):
        run(small, data_dir=other)


def test_unfinished_run_of_other_versions_is_refused_and_a_finished_one_redrawn(small):
    run(small)
    out = small[2]
    record = json.loads((out / "run.json").read_text())
    record["convergence"]["versions"]["torch"] = "1.0"
    (out / "run.json").write_text(json.dumps(record))
    run(small)
    (out / "results.jsonl").write_bytes(b"")
    with pytest.raises(ResultsError, match=r"begun with normkit .* torch 1\.0"):
        run(small)


@pytest.mark.parametrize("content", ["{", "[]", '{"convergence": 3}'])
def test_damaged_record_is_refused(small, content):
    run(small)
    (small[2] / "run.json").write_text(content)
    with pytest.raises(ResultsError, match=r"run.json"):
        run(small)


def test_record_of_an_unknown_claim_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"unheard-of": {"plan": {}}}')
    with pytest.raises(ResultsError, match="unheard-of"):
        read_ledger(tmp_path)


def test_plan_refuses_a_data_set_the_claim_does_not_run_on():
    from dataclasses import replace

    claim = replace(get_claim("convergence"), data=("digits",))
    with pytest.raises(ArgumentError, match="does not run on fashion-mnist; it runs on: digits"):
        plan(claim, Request(data="fashion-mnist"))


def test_fingerprint_changes_with_every_choice():
    claim = get_claim("convergence")
    requests = [Request(), Request(seeds=6), Request(epochs=6), Request(norms=("none",)), Request(device="cuda")]
    assert len({plan(claim, request).fingerprint for request in requests}) == len(requests)
    assert plan(claim, Request()).fingerprint == plan(claim, Request(seeds=5)).fingerprint


def test_norms_and_epochs_are_refused_where_they_mean_nothing():
    fixed = dataclasses.replace(
        get_claim("convergence"), any_norm=False, settings={"digits": UNTRAINED}, data=("digits",)
    )
    with pytest.raises(ArgumentError, match=r"--norms group: claim convergence is about none,batch alone"):
        plan(fixed, Request(norms=("group",)))
    with pytest.raises(ArgumentError, match=r"--epochs 3: claim convergence trains nothing"):
        plan(fixed, Request(epochs=3))
    everything = Request(norms=("group",), epochs=3, seeds=2)
    assert plan(fixed, concerning(fixed, everything)).norms == ("none", "batch")
    assert concerning(get_claim("convergence"), everything) == everything


def test_rows_name_the_implementation_that_ran(small):
    run(small)
    backends = {(row["norm"], json.dumps(row["backend"])) for row in read_cells(small[2] / "results.jsonl").rows}
    assert backends == {("none", "{}"), ("batch", '{"BatchNorm1d": "numba", "BatchNorm2d": "numba"}')}
    assert read_record(small[2])["convergence"]["machine"].count(",") == 1


def test_backends_are_those_the_layers_are_asked_for_and_the_hook_goes_away():
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(3), normkit.BatchNorm1d(3), normkit.RMSNorm(3))
    with seen_backends() as seen, normkit.use_backend("plain"):
        network(torch.randn(4, 3))
    assert seen == {"torch.nn.BatchNorm1d": "torch", "BatchNorm1d": "plain", "RMSNorm": "plain"}
    assert not torch.nn.modules.module._global_forward_pre_hooks
