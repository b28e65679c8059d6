import pytest
import torch

from normkit.lab.claims.identity import CLAIM, deviation


def rows_of(float64, float32, seeds=5):
    return [
        {
            "seed": seed, "dense_float64": 0.0, "dense_float32": float32 * (1 + 0.01 * seed),
            "convolutional_float64": float64 * (1 + 0.01 * seed), "convolutional_float32": 0.0,
        }
        for seed in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("float64", "float32", "expected"),
    [
        (1e-15, 1e-7, "supported"),
        (0.98e-12, 1e-7, "inconclusive"),
        (1e-15, 3e-6, "supported"),
        (2e-12, 1e-7, "refuted"),
    ],
)
def test_rule_decides_synthetic_rows(float64, float32, expected):
    assert CLAIM.judge(rows_of(float64, float32)).verdict == expected
    assert len(CLAIM.show(rows_of(float64, float32))) == 2


def test_too_few_seeds_are_inconclusive():
    assert CLAIM.judge(rows_of(1e-15, 1e-7, seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge([]).verdict == "inconclusive"


def test_deviation_sees_a_layer_that_is_not_the_identity():
    x = torch.randn(64, 5, dtype=torch.float64)
    assert deviation(x) < 1e-12
    # Statistics per sample are not those that gamma and beta undo.
    assert deviation(x, "layer") > 0.1
