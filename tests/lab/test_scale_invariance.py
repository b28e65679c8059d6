import pytest
import torch

from normkit.lab.claims import scale_invariance
from normkit.lab.claims.scale_invariance import CLAIM, WORDS, deviations
from tiny_runs import tiny_run


def rows_of(seeds=5, **values):
    return [
        {"seed": seed, **{name: values.get(name, 1e-15) * (1 + 0.01 * seed) for name in WORDS}} for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "supported"), ({"output": 1e-9}, "refuted"), ({"output": 0.98e-12}, "inconclusive")],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(("place", "name"), [(0, "gradient"), (1, "along")])
def test_details_never_veto(place, name):
    verdict = CLAIM.judge(rows_of(**{name: 1e-9}))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", "refuted")


def test_deviations_see_a_layer_that_is_not_blind_to_scale(monkeypatch):
    x, weight, direction = (torch.randn(*shape, dtype=torch.float64) for shape in ((30, 7), (5, 7), (30, 5)))
    assert all(value < 1e-12 for value in deviations(x, weight, direction).values())
    monkeypatch.setattr(scale_invariance, "BatchNorm1d", lambda *sizes, **settings: torch.nn.Sequential())
    assert all(value > 0.1 for value in deviations(x, weight, direction).values())


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, seeds=5, batch_size=50)
    assert CLAIM.judge(rows).verdict == "supported"
    assert len(CLAIM.show(rows)) == 2
