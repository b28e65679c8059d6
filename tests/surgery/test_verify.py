"""The judge: right is what float64 says, and rounding is measured on the model itself."""

import copy

import pytest
import torch
from torch import nn

from normkit.anatomy import fingerprint
from normkit.errors import SurgeryError
from normkit.surgery import transaction
from normkit.surgery.verify import Judge

from .networks import randomize

EXAMPLE = torch.linspace(-2, 2, 2 * 3 * 6 * 5).reshape(2, 3, 6, 5).sin()


def small():
    torch.manual_seed(3)
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())).eval()


def test_equal_copy_is_right_and_the_numbers_say_so():
    model = small()
    before = fingerprint(model)
    verdict = Judge(model, EXAMPLE)(copy.deepcopy(model))
    assert fingerprint(model) == before
    assert verdict.wrong is None
    assert verdict.exact == 0.0
    assert verdict.own == verdict.rounding > 0
    assert "in float64" in str(verdict)


def test_change_that_float32_would_hide_is_wrong_in_float64():
    model = small()
    changed = copy.deepcopy(model)
    changed[0].bias.data[1] *= 1 + 1e-6
    verdict = Judge(model, EXAMPLE)(changed)
    assert (changed(EXAMPLE) - model(EXAMPLE)).abs().max() < 1e-5
    assert verdict.exact > 1e-9
    assert "both are computed in float64" in verdict.wrong
    assert not verdict.is_rounding
    assert Judge(model, EXAMPLE, tolerance=1e-4)(changed).wrong is None


class Cancels(nn.Module):
    """Loses four digits in float32, and none in float64."""

    def __init__(self, order):
        super().__init__()
        self.linear, self.order = nn.Linear(3, 4), order

    def forward(self, x):
        y = self.linear(x.movedim(1, -1))
        return (y + 3e3) - 3e3 if self.order else (y + 1e3 + 2e3) - 3e3


def test_rounding_of_the_models_own_is_allowed_where_float64_agrees():
    torch.manual_seed(0)
    model, other = Cancels(True), Cancels(False)
    other.load_state_dict(model.state_dict())
    verdict = Judge(model, EXAMPLE)(other)
    assert verdict.own > 1e-5  # what is allowed where the model itself is exact
    assert verdict.exact <= 1e-9
    assert verdict.wrong is None


def test_loss_in_the_own_type_that_the_model_has_not_is_wrong():
    model = small()
    lossy = copy.deepcopy(model)
    exactly = copy.deepcopy(model).double()
    lossy[0].weight.data = lossy[0].weight.data.bfloat16().float()
    verdict = Judge(model, EXAMPLE)(lossy, exactly)
    assert verdict.is_rounding
    assert "in the model's own type" in verdict.wrong


class InFloat32Only(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        return self.linear(x.float())


def test_model_that_does_not_run_in_float64_is_judged_in_its_own_type():
    model = InFloat32Only()
    judge = Judge(model, EXAMPLE)
    assert not judge.runs_in_float64
    assert judge(copy.deepcopy(model)).own == 0.0
    changed = copy.deepcopy(model)
    changed.linear.weight.data *= 1.01
    assert judge(changed).wrong is not None


class Detector(nn.Module):
    """Returns as many rows as are above a threshold, the largest first."""

    def __init__(self):
        super().__init__()
        self.score = nn.Conv2d(3, 1, 1)
        self.bound = 0.0

    def forward(self, x):
        scores = self.score(x).flatten()
        return [{"scores": scores[scores > self.bound].sort(descending=True).values}]


def test_outputs_of_varying_number_are_compared_by_the_callers_function():
    model = Detector()
    nn.init.ones_(model.score.weight)
    changed = copy.deepcopy(model)
    changed.bound = float(model(EXAMPLE)[0]["scores"].detach().min()) + 1e-4
    with pytest.raises(SurgeryError, match="give compare="):
        Judge(model, EXAMPLE)(changed)
    totals = Judge(
        model, EXAMPLE, compare=lambda first, second: abs(len(first[0]["scores"]) - len(second[0]["scores"]))
    )
    assert totals(copy.deepcopy(model)).wrong is None
    assert "changes the output by" in totals(changed).wrong


def test_output_that_proves_nothing_is_refused():
    class Broken(nn.Module):
        def forward(self, x):
            return x * float("nan")

    with pytest.raises(SurgeryError, match="holds no finite number"):
        Judge(Broken(), EXAMPLE)
    with pytest.raises(SurgeryError, match="holds no tensor"):
        Judge(nn.Sequential(Detector()), EXAMPLE, call=lambda model, batch: "text")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 1, 128, 128), "twice the size"),  # makes 2^19 of 2^17 elements
        ((9, 1, 128, 128), "half the size"),
        ((2, 1, 32, 32, 32), "twice the size"),  # makes 2^19 of 2^16
        ((4, 1, 32, 32, 32), "half the size"),
        ((2, 1, 2**17), "twice the size"),
    ],
)
def test_example_that_doubling_would_make_large_is_halved(shape, words):
    assert Judge(nn.ReLU(), torch.randn(shape)).words == f"verified on the example and on {words}"


def test_sizes_are_the_models_to_take():
    assert Judge(small(), EXAMPLE).words == "verified on the example and on twice the size"
    two = Judge(small(), EXAMPLE, sizes=2)
    assert two.words == "verified on the example and on twice the size and half the size"
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(90, 2))
    assert Judge(fixed, EXAMPLE).words == "verified on the example and on two samples more"

    class OnlyThis(nn.Module):
        def forward(self, x):
            torch._assert(x.shape == EXAMPLE.shape, "another size")
            return x

    assert Judge(OnlyThis(), EXAMPLE).words.startswith("verified on the size of the example alone")


def test_old_weight_norm_is_copied_by_its_value():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)))
    model(EXAMPLE)
    judge = Judge(model, EXAMPLE)
    assert judge.runs_in_float64
    other = transaction.copied(model)
    other[0].weight_g.data *= 2
    assert "both are computed in float64" in judge(other).wrong
    assert judge(transaction.copied(model)).wrong is None
