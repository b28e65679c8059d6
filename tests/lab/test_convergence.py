import pytest

from normkit.lab.charts import Chart, Table
from normkit.lab.claims import all_claims, get_claim
from normkit.lab.claims.convergence import CLAIM, LEAD, SOURCE_ACCURACY
from normkit.lab.verdicts import OUTCOMES


def synthetic_rows(gain, loss_gain, seeds=5, norms=("none", "batch"), epochs=2, data="digits"):
    """Rows as a run would write them, with a known effect and a little spread between seeds."""
    return [
        {
            "claim": "convergence",
            "data": data,
            "norm": norm,
            "seed": seed,
            "epoch": epoch,
            "train_loss": 0.5 + 0.1 * seed - (norm != "none") * (loss_gain + 0.0003 * seed),
            "test_accuracy": 0.8 + 0.01 * seed + (norm != "none") * (gain + 0.0003 * seed),
            "step_losses": [0.9, 0.8, 0.7],
        }
        for norm in norms
        for seed in range(seeds)
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize(
    ("gain", "loss_gain", "expected"),
    [
        (0.02, 0.1, "supported"),
        (0.0047, 0.1, "inconclusive"),
        (0.0, 0.1, "no difference worth having"),
        (-0.02, 0.1, "refuted"),
        (-0.7, 0.1, "not testable here"),
        # The training loss is a detail.
        (0.02, -0.1, "supported"),
    ],
)
def test_rule_decides_synthetic_rows(gain, loss_gain, expected):
    assert CLAIM.judge(synthetic_rows(gain, loss_gain)).verdict == expected


def test_question_reads_accuracy_over_the_first_epochs_and_the_detail_the_loss_of_the_last():
    rows = synthetic_rows(0.02, 0.1, epochs=7)
    for row in rows:
        if row["epoch"] == 1:
            row["train_loss"] = 99.0 if row["norm"] == "batch" else 0.0
        if row["epoch"] == 6:
            row["test_accuracy"] = 0.1
    verdict = CLAIM.judge(rows)
    assert verdict.primary.effect == pytest.approx(0.0206, rel=1e-9)
    assert verdict.details[0].effect == pytest.approx(-0.1006, rel=1e-9)
    assert verdict.details[0].outcome == "supported"


@pytest.mark.parametrize("rows", [[], synthetic_rows(0.02, 0.1, seeds=1), synthetic_rows(0.02, 0.1, norms=("none",))])
def test_too_little_to_judge_is_inconclusive(rows):
    assert CLAIM.judge(rows).verdict == "inconclusive"


def test_prediction_is_the_source_s_table():
    assert pytest.approx(0.02258, abs=1e-9) == LEAD


def test_source_s_numbers_come_out_or_not_on_its_own_data_alone():
    rows = synthetic_rows(0.075, 0.1, epochs=5, data="fashion-mnist")
    ours = {number.what[-9:]: number.holds for number in CLAIM.judge(rows).reproduced}
    assert ours == {"atch norm": True, "hout norm": False}
    assert [number.holds for number in CLAIM.judge(synthetic_rows(0.07, 0.1, epochs=5)).reproduced] == [None, None]


def test_another_norm_can_take_the_place_of_batch_norm():
    verdict = CLAIM.judge(synthetic_rows(0.02, 0.1, norms=("none", "group")))
    assert (verdict.verdict, verdict.compared) == ("supported", "group against none")


def test_batch_norm_is_judged_where_several_norms_ran():
    assert CLAIM.judge(synthetic_rows(0.02, 0.1, norms=("none", "group", "batch"))).compared == "batch against none"


def test_shown_are_the_loss_curve_and_the_source_s_table_beside_ours():
    rows = synthetic_rows(0.02, 0.1, epochs=6, data="fashion-mnist")
    chart, table = CLAIM.show(rows)
    assert isinstance(chart, Chart)
    assert isinstance(table, Table)
    loss, accuracy = chart.panels
    assert [mark.label for mark in loss.marks] == ["without norm", "with batch norm"]
    assert len(loss.marks[0].y) == 18
    assert [mark.y for mark in accuracy.marks if mark.dashed] == [SOURCE_ACCURACY["none"], SOURCE_ACCURACY["batch"]]
    assert table.rows[0] == ["1", "0.8200 ± 0.0158", "0.8592", "0.8406 ± 0.0163", "0.8859"]
    assert table.rows[5][2] == ""


def test_rows_without_a_finite_number_are_shown_and_judged():
    rows = synthetic_rows(0.02, 0.1)
    rows[-1]["train_loss"] = rows[-1]["test_accuracy"] = None
    rows[-1]["step_losses"] = [0.9, None, None]
    # Whether the net has learnt is not known either.
    assert CLAIM.judge(rows).verdict == "not testable here"
    assert CLAIM.show(rows)


def test_every_claim_is_complete_and_known_by_its_id():
    assert [claim.number for claim in all_claims()] == sorted(
        {claim.number for claim in all_claims()}, key=lambda number: int(number[1:])
    )
    for claim in all_claims():
        assert get_claim(claim.id) is claim
        assert {"supported", "refuted"} <= claim.meaning.keys() <= set(OUTCOMES)
        assert all(claim.means(outcome) for outcome in OUTCOMES)
        assert claim.settings.keys() == set(claim.data)
        assert any(character.isdigit() for character in claim.prediction)
        assert claim.seeds >= 5
        assert all(rule.effect for rule in (claim.question, *claim.premises, *claim.details))


def test_every_claim_judges_by_the_rules_that_it_names():
    for claim in all_claims():
        verdict = claim.judge([])
        assert verdict.primary.rule == claim.question
        assert tuple(answer.rule for answer, _ in verdict.premises) == claim.premises
        assert {answer.rule for answer in verdict.details} <= set(claim.details)
