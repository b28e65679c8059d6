"""The rules one by one: what the moments are, where the limits lie, what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import normkit
from normkit.doctor.checks import CHECKS
from normkit.doctor.measurements import PooledMoments
from normkit.errors import ArgumentError
from tolerances import RELATIVE

from . import networks


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(7, 3), (5, 2, 11), (4, 3, 5, 1), (1, 2, 3, 3)])
def test_pooled_moments_are_those_of_all_values(shape, offset):
    batches = [torch.randn(shape) * (1 + i) + i + offset for i in range(3)]
    moments = PooledMoments()
    for batch in batches:
        moments.add(batch)
    values = np.concatenate([b.double().numpy().swapaxes(0, 1).reshape(shape[1], -1) for b in batches], axis=1)

    np.testing.assert_allclose(moments.mean.numpy(), values.mean(1), rtol=RELATIVE[torch.float64])
    np.testing.assert_allclose(moments.var.numpy(), values.var(1, ddof=1), rtol=1e3 * RELATIVE[torch.float64])
    assert moments.values == values.shape[1]


def test_standard_errors_are_those_of_sample_means_where_positions_are_correlated():
    levels = torch.randn(400, 1, 1)
    correlated = levels.expand(400, 2, 50)  # fifty copies of one value carry no more than one
    moments = PooledMoments()
    moments.add(correlated)
    expected = levels.double().std() / math.sqrt(400)
    assert float(moments.mean_error[0]) == pytest.approx(float(expected), rel=1e-2)


def test_patches_of_one_sample_are_no_samples_of_their_own():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x.flatten(0, 1)).view_as(x)

    norm = nn.BatchNorm1d(3).eval()
    norm.running_var.fill_(1.01)  # no longer as built

    torch.manual_seed(0)
    # 12 samples of 50 patches that are nearly equal: 12 independent values and not 600, off by chance.
    values = torch.randn(12, 1, 3) + 0.6 + 0.01 * torch.randn(12, 50, 3)
    assert normkit.diagnose(norm, values.flatten(0, 1)).of("drift")
    assert not normkit.diagnose(Patches().eval(), values).of("drift")


def test_moments_of_parts_pool_to_the_moments_of_all():
    first, whole = PooledMoments(), PooledMoments()
    second = PooledMoments(first)
    for index in range(4):
        batch = torch.randn(6, 3, 2) + index
        whole.add(batch)
        if index == 0:
            second = PooledMoments(first)
        (first if index % 2 == 0 else second).add(batch)
        if index == 0:
            second = PooledMoments(first)
    pooled = PooledMoments.pooled([first, second])
    torch.testing.assert_close(pooled.var, whole.var, rtol=1e-12, atol=0)
    torch.testing.assert_close(pooled.mean_error, whole.mean_error, rtol=1e-9, atol=0)


def test_state_dict_is_examined_without_a_model():
    model = networks.dense()
    state = model.state_dict()
    state["2.running_var"][3] = -1.0
    found = normkit.diagnose(state).of("nonfinite")
    assert [(finding.layer, finding.evidence["running_var_channels"]) for finding in found] == [("2", [3])]


def test_state_dict_with_a_statistic_of_two_dimensions_is_refused():
    with pytest.raises(ArgumentError, match=r"bn.running_var is shape \(2, 2\)"):
        normkit.diagnose({"bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2, 2)})


@pytest.mark.parametrize("momentum", [-0.5, 1.5, "0.1", math.nan])
def test_impossible_momentum_is_an_error(momentum):
    found = normkit.diagnose(nn.BatchNorm1d(3, momentum=momentum)).of("ema-window")
    assert [finding.severity for finding in found] == ["error"]


@pytest.mark.parametrize(("updates", "severity"), [(20, "error"), (30, "warning"), (44, None)])
def test_residue_of_the_initial_values_follows_the_number_of_updates(updates, severity):
    norm = nn.BatchNorm1d(4)
    for _ in range(updates):
        norm(60 + 3 * torch.randn(64, 4))
    found = normkit.diagnose(norm.eval(), 60 + 3 * torch.randn(8192, 4)).of("ema-window")
    assert [finding.severity for finding in found] == ([severity] if severity else [])


def test_without_data_a_small_counter_is_no_fault_for_measured_statistics_have_one_too():
    norm = nn.BatchNorm1d(4)
    batches = (3 * torch.randn(1024, 4)).split(64)
    normkit.recalibrate(norm, batches)
    assert normkit.diagnose(norm.eval()).healthy
    (told,) = [f for f in normkit.diagnose(norm).findings if f.check == "ema-window"]
    assert (told.severity, "give batches to tell" in told.summary) == ("info", True)


def test_one_bad_channel_of_measured_statistics_is_no_average_that_began_lately():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16)
    batches = (3 * torch.randn(1024, 16) + 1).split(64)
    normkit.recalibrate(norm, batches)
    norm.running_mean[3] += 24
    diagnosis = normkit.diagnose(norm.eval(), batches)
    assert not diagnosis.of("ema-window")
    (drift,) = diagnosis.of("drift")
    assert not any("too few updates" in cause for cause in drift.causes)


def test_recalibrated_statistics_with_a_small_counter_have_no_residue():
    norm = nn.BatchNorm1d(4, momentum=None)
    for _ in range(5):
        norm(0.1 * torch.randn(64, 4))
    norm.momentum = 0.1
    assert not normkit.diagnose(norm.eval()).of("ema-window")


@pytest.mark.parametrize(("shift", "severity"), [(0.4, None), (0.8, "error")])
def test_drift_has_its_limit_at_half_a_standard_deviation(shift, severity):
    norm = nn.BatchNorm1d(3, momentum=None)
    values = torch.randn(2000, 3)
    norm(values)
    found = normkit.diagnose(norm.eval(), values + shift).of("drift")
    assert [finding.severity for finding in found] == ([severity] if severity else [])


def test_drift_that_few_samples_can_explain_is_none():
    norm = nn.BatchNorm1d(3, momentum=None)
    norm(torch.randn(2000, 3))
    assert not normkit.diagnose(norm.eval(), [torch.randn(6, 3) + 0.6]).of("drift")


def test_variances_are_judged_in_their_logarithm_where_samples_are_few():
    torch.manual_seed(0)
    values = torch.randn(24, 64)  # the standard error of the variance is 0.3 of it
    norm = nn.BatchNorm1d(64).eval()
    norm.running_mean.copy_(values.mean(0))
    norm.running_var.copy_(values.var(0) / 8)
    (finding,) = normkit.diagnose(norm, values).of("drift")
    assert finding.severity == "error"
    assert finding.evidence["share"] > 0.9


@pytest.mark.parametrize(("ratio", "severity"), [(3.2, None), (1 / 3.2, None), (4.0, "error"), (1 / 4.0, "error")])
def test_variance_too_large_or_too_small_by_one_factor_is_judged_alike(ratio, severity):
    # 6 of 100 values are 1 or -1: variance 0.06 * 100 / 99, fourth moment 0.06, so the error of the variance is
    # sqrt((0.06 - 0.0036) / 99) / 0.06 = 0.398 of it. Of one layer with three channels 3.2 errors are wanted (Student's
    # quantile at 0.01 / 6 with 99 degrees of freedom), which is a factor of exp(1.28) = 3.6.
    values = torch.zeros(100, 3)
    values[:3], values[3:6] = 1, -1
    norm = nn.BatchNorm1d(3).eval()
    norm.running_var.copy_(values.var(0) * ratio)
    found = normkit.diagnose(norm, values).of("drift")
    assert [finding.severity for finding in found] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("count", "batch_size", "message"),
    [(129, 64, "last batch brings 1 samples, 1 values"), (130, 64, "only +1 and -1"), (64, 1, "1 value per batch")],
)
def test_too_few_values_per_channel_are_an_error(count, batch_size, message):
    batches = networks.loader(batch_size, count, drop_last=False)
    found = normkit.diagnose(networks.dense(), batches).of("effective-n")
    assert {finding.severity for finding in found} == {"error"}
    assert message in found[0].summary


def test_a_small_last_batch_is_cured_by_the_call_that_is_named():
    model, loader = networks.dense(), networks.loader(64, 129, drop_last=False)
    finding = normkit.diagnose(model, loader).of("effective-n")[0]
    space = {"normkit": normkit, "model": model, "loader": loader, "DataLoader": torch.utils.data.DataLoader}
    exec(finding.remedy, space)
    assert eval(finding.proof, space)


def test_group_norm_with_one_value_per_group_is_an_error():
    model = nn.Sequential(nn.Linear(8, 4), nn.GroupNorm(4, 4))
    assert normkit.diagnose(model, torch.randn(8, 8)).of("effective-n", "1")[0].severity == "error"


def test_layer_without_statistics_is_found_to_depend_on_the_batch():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    finding = normkit.diagnose(model.eval(), torch.randn(32, 8)).of("batch-dependence")[0]
    assert finding.layer == "1"
    assert "track_running_stats=False" in finding.causes[0]


def test_dropout_before_batch_norm_is_sized_by_the_variance():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 10)
    )
    batches = networks.loader(64)
    networks.train(model, batches, 3)
    found = normkit.diagnose(model, batches).of("optimizer", "3")
    assert found
    assert found[0].evidence["log2_ratio"] > 0.5


@pytest.mark.parametrize("seed", [0, 5, 6, 8])
def test_dropout_that_only_chance_makes_large_is_no_alarm(seed):
    torch.manual_seed(seed)
    # Heavy tails and few samples: of 64 channels some lose most of their variance with one value.
    model = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(64, momentum=None)).train()
    model[0].eval()
    model(torch.randn(32, 64) ** 3)
    found = normkit.diagnose(model.eval(), torch.randn(12, 64) ** 3).of("optimizer")
    assert all(finding.severity == "info" for finding in found)


def test_inputs_with_a_large_offset_are_ill_conditioned():
    norm = nn.BatchNorm1d(2, momentum=None)
    values = torch.randn(512, 2) + 5e3
    norm(values)
    assert [f.severity for f in normkit.diagnose(norm.eval(), values).of("precision")] == ["error"]


def test_waiver_sets_a_finding_aside_with_its_reason():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    diagnosis = normkit.diagnose(model, waive={"never-updated:0": "inputs are standardized"})
    assert [finding.layer for finding in diagnosis.of("never-updated")] == ["1"]
    assert [(finding.layer, reason) for finding, reason in diagnosis.waived] == [("0", "inputs are standardized")]


@pytest.mark.parametrize(
    ("waive", "message"),
    [({"drfit:1": "x"}, "mean .drift.. Known are: nonfinite"), ({"drift:1": " "}, "needs a reason")],
)
def test_waiver_without_a_known_check_or_a_reason_is_refused(waive, message):
    with pytest.raises(ArgumentError, match=message):
        normkit.diagnose(nn.BatchNorm1d(3), waive=waive)


def test_batches_without_a_sample_are_refused():
    with pytest.raises(ArgumentError, match="batches yielded nothing"):
        normkit.diagnose(nn.BatchNorm1d(3), [])


def test_to_dict_is_strict_json():
    norm = nn.BatchNorm1d(3)
    norm(torch.full((4, 3), math.inf))
    text = json.dumps(normkit.diagnose(norm.eval(), torch.randn(32, 3)).to_dict(), allow_nan=False)
    assert json.loads(text)["findings"][0]["check"] == "nonfinite"


def test_every_check_has_a_question_and_a_unique_name():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.question.endswith("?") for check in CHECKS)
