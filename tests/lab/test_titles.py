"""A claim's title asks what its primary question asks: the quantity, and the condition under which it is compared."""

import pytest

from normkit.lab.claims import get_claim

# Words that both have; where a title has the everyday word, what stands for it in the question.
SHARED = {
    "convergence": [("first five epochs", "first 5 epochs"), ("test accuracy", "test accuracy")],
    "drift": [("means of the layers' inputs", "layer inputs' mean"), ("epoch to epoch", "epoch to epoch")],
    "generalization": [("test data", "test accuracy")],
    "initialization": [("scale", "scale")],
    "saturation": [("share", "share"), ("saturated", "saturated")],
    "gradient-flow": [("sigmoid", "sigmoid"), ("gradient", "gradient")],
    "batch-noise": [("at the same training loss", "at the same training loss"), ("test loss", "test loss")],
    "augmentation": [("test accuracy", "test accuracy"), ("distorted", "gained by distortion")],
    "rank-collapse": [("rank", "effective rank")],
    "accumulation": [("test loss", "test loss"), ("plainly", "plain"), ("large batch's", "large batch's")],
}


@pytest.mark.parametrize("claim_id", SHARED)
def test_title_says_what_its_question_asks(claim_id):
    claim = get_claim(claim_id)
    for in_title, in_question in SHARED[claim_id]:
        assert in_title in claim.title.lower()
        assert in_question in claim.question.effect
