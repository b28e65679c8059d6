"""Two runs beside each other: what is compared, what is named, what is refused."""

import json

import pytest

from normkit.errors import ArgumentError
from normkit.lab.claims import get_claim
from normkit.lab.compare import compare
from normkit.lab.record import read_record


@pytest.fixture
def write_run(tmp_path):
    def write(name, lead, epochs=2, claim="convergence", digest="a", norms=("none", "batch")):
        folder = tmp_path / name
        folder.mkdir()
        plan = {
            "claim": claim, "data": "digits", "norms": list(norms), "seeds": [0, 1, 2, 3, 4], "device": "cpu",
            "settings": {"epochs": epochs, "learning_rate": 0.002}, "variants": [[]], "design": get_claim(claim).design,
        }  # fmt: skip
        record = {"plan": plan, "data": "digits", "data_digest": digest, "versions": {"torch": "2"}, "commit": None}
        (folder / "run.json").write_text(json.dumps({claim: {**record, "machine": "a machine"}}))
        rows = [
            {
                "claim": claim, "data": "digits", "norm": norm, "seed": seed, "epoch": epoch,
                "train_loss": 0.5 + 0.01 * seed - 0.1 * (norm != "none"), "step_losses": [0.9, 0.8],
                "test_accuracy": 0.8 + 0.01 * seed + (lead + 0.001 * seed) * (norm != "none"),
                "cell": f"{norm}{seed}", "row": epoch, "rows": epochs,
            }
            for norm in norms for seed in range(5) for epoch in range(1, epochs + 1)
        ]  # fmt: skip
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def test_effects_verdicts_and_differing_settings_stand_side_by_side(write_run):
    (comparison,) = compare(write_run("a", 0.05), write_run("b", -0.05, epochs=3))
    assert comparison.verdicts == ("supported", "refuted")
    assert comparison.settings == {"epochs": (2, 3)}
    headline = comparison.parts[0]
    assert headline.first.effect == pytest.approx(0.052)
    assert headline.difference == pytest.approx(-0.1)
    assert comparison.parts[1].difference == pytest.approx(0.0)


def test_command_prints_both_verdicts_and_json_holds_the_numbers(write_run, normkit):
    folders = write_run("a", 0.05), write_run("b", -0.05, epochs=3)
    code, told, _ = normkit("lab", "compare", *folders)
    assert code == 0
    assert "supported" in told
    assert "refuted" in told
    assert "epochs 2 in A, 3 in B" in told
    (record,) = json.loads(normkit("lab", "compare", *folders, "--json")[1])
    assert record["verdicts"] == ["supported", "refuted"]
    assert record["settings"] == {"epochs": [2, 3]}
    first = record["parts"][0]["first"]
    assert first["low"] < first["effect"] < first["high"]
    assert record["parts"][0]["difference"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claim": "learning-rate", "norms": ()}, "a holds convergence; .*b holds learning-rate; expected a claim"),
        ({"digest": "b"}, r"convergence cannot be compared: data files \(SHA-256\) a in .*a, b in .*b"),
    ],
)
def test_runs_that_have_nothing_in_common_are_refused(write_run, changes, message):
    with pytest.raises(ArgumentError, match=message):
        compare(write_run("a", 0.05), write_run("b", 0.05, **changes))


def test_a_folder_without_a_run_is_refused(write_run, tmp_path):
    with pytest.raises(ArgumentError, match="no such folder"):
        compare(write_run("a", 0.05), tmp_path / "nowhere")
    assert read_record(tmp_path / "a")
