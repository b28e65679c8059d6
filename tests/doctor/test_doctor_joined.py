"""One cause in many layers is one finding, with one cure, and the whole is short enough to be read."""

import pytest
import torch
from torch import nn

import normkit
from normkit.doctor import Diagnosis, Finding
from normkit.doctor.join import join_findings


def deep(count, norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    layers = [[nn.Linear(6, 6, bias=False), norm(6), nn.ReLU()] for _ in range(count)]
    return nn.Sequential(*(layer for part in layers for layer in part))


def batches():
    return torch.randn(1200, 6, generator=torch.Generator().manual_seed(0)).split(40)


def finding(layer="a", **changes):
    fields = {
        "check": "drift", "layer": layer, "severity": "error", "summary": "the same", "evidence": {},
        "causes": ("one",), "remedy": "normkit.recalibrate(model, batches)",
        "proof": 'not normkit.diagnose(model, batches).of("drift", {layer})',
    }  # fmt: skip
    return Finding(**fields | changes)


@pytest.mark.parametrize("count", [3, 4, 53])
def test_one_cause_in_many_layers_is_one_finding(count):
    diagnosis = normkit.diagnose(deep(count).eval())
    found = diagnosis.of("never-updated")
    names = tuple(str(3 * place + 1) for place in range(count))
    if count < 4:
        assert tuple(each.layer for each in found) == names
        assert [each.layers for each in found] == [(name,) for name in names]
    else:
        (only,) = found
        assert only.layers == names
        assert only.layer in names
        assert f"in {count} of {count} layers" in only.summary
    assert {row.worst for row in diagnosis.layers} == {"error"}


def test_finding_of_many_layers_is_found_by_each_of_them():
    diagnosis = normkit.diagnose(deep(6).eval())
    assert (
        diagnosis.of("never-updated", "13")
        == diagnosis.of("never-updated", ["x", "7"])
        == diagnosis.of("never-updated")
    )
    assert not diagnosis.of("never-updated", "2")


def test_other_causes_and_severities_stay_apart():
    parts = [finding(str(place)) for place in range(4)]
    other = [finding(str(place), causes=("two",)) for place in range(4, 8)]
    mild = [finding(str(place), severity="warning") for place in range(8, 12)]
    joined = join_findings([*parts, *other, *mild], [str(place) for place in range(12)])
    assert [each.layers for each in joined] == [("0", "1", "2", "3"), ("4", "5", "6", "7"), ("8", "9", "10", "11")]


def test_numbers_of_a_joined_finding_are_the_worst_layer_s():
    parts = [
        finding(name, summary=f"at {name}", extent=extent, evidence={"z": extent})
        for name, extent in zip("abcd", (1, 4, 2, 3), strict=True)
    ]
    (joined,) = join_findings(parts, list("dcba"))
    assert (joined.layer, joined.evidence, joined.layers) == ("b", {"z": 4}, tuple("dcba"))
    assert joined.summary == "in 4 of 4 layers; b is the worst: at b"


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (["a.x", "a.y", "a.z", "a.b.c"], "'a'"),
        (["a.x", "a.y", "a.z", "b.x"], "['a.x', 'a.y', 'a.z', 'b.x']"),
        (["a.x", "a.y", "a.z", "a.b.c", "b.x"], "'*'"),
    ],
)
def test_layers_are_named_as_where_takes_them(layers, named):
    names = ["a.x", "a.y", "a.z", "a.b.c", "b.x"]
    (joined,) = join_findings([finding(name, remedy="normkit.freeze(model, where={layer})") for name in layers], names)
    assert joined.remedy == f"normkit.freeze(model, where={named})"


def test_call_that_the_batches_need_stands_in_cure_and_proof():
    (joined,) = join_findings([finding()], ["a"], None, ", call=call")
    assert joined.remedy == "normkit.recalibrate(model, batches, call=call)"
    assert "diagnose(model, batches, call=call)" in joined.proof


def spoilt(name):
    """Eight layers with one fault."""
    model = deep(8)
    for batch in batches():
        model(batch)
    if name == "drift":
        for module in model[1::3]:
            module.running_mean += 3
    elif name == "freeze-leak":
        for module in model[1::3]:
            module.requires_grad_(False)
    elif name == "ema-window":
        for module in model[1::3]:
            module.momentum = 0.99
    elif name == "dead-channel":
        for module in model[1::3]:
            module.weight.data[2] = 1e-9
    elif name == "mode":
        model.eval()
        for module in model[1:18:3]:
            module.train()
    return model if name in ("freeze-leak", "ema-window", "mode") else model.eval()


@pytest.mark.parametrize("name", ["drift", "freeze-leak", "ema-window", "dead-channel", "mode"])
def test_one_call_cures_all_layers(name):
    model = spoilt(name)
    found = normkit.diagnose(model, batches()).of(name)
    (only,) = found
    assert len(only.layers) >= 6
    space = {"normkit": normkit, "model": model, "batches": batches()}
    exec(only.remedy, space)
    assert eval(only.proof, space)
    assert not normkit.diagnose(model, batches()).of(name)


def test_healthy_network_has_no_line_for_every_layer():
    model = deep(12)
    for _ in range(3):
        for batch in batches():
            model(batch)
    for batches_ in (batches(), [batch[:4] for batch in batches()]):  # small ones: worth knowing, once
        diagnosis = normkit.diagnose(model.eval(), batches_)
        assert len(diagnosis.findings) <= 3
        assert len(str(diagnosis).splitlines()) < 10


def test_text_of_any_diagnosis_is_short():
    many = tuple(
        finding(
            f"layer.{place}", check=check, causes=tuple(f"cause {place} {k}" for k in range(4)), evidence={"a": 1.0}
        )
        for check in ("drift", "precision", "padding")
        for place in range(40)
    )
    infos = tuple(finding(f"info.{place}", severity="info") for place in range(40))
    notes = tuple(f"note {place}" for place in range(40))
    diagnosis = Diagnosis(findings=(*many, *infos), layers=(), notes=notes, waived=tuple((f, "meant") for f in infos))
    lines = str(diagnosis).splitlines()
    assert len(lines) < 60
    assert any("more errors and warnings" in line for line in lines)
    assert lines[2] == "error [drift] layer.0: the same"
    assert len(repr(diagnosis).splitlines()) == len(repr(many[0]).splitlines()) == 1
    assert len(repr(diagnosis)) < 200


def test_finding_is_written_with_its_class_numbers_and_cure():
    model = spoilt("drift")
    text = str(normkit.diagnose(model, batches()).of("drift")[0])
    assert text.startswith("error [drift] 1, 4, 7 and 5 more: in 8 of 8 layers; ")
    assert "standard deviations off" in text
    assert "cure     normkit.recalibrate(model, batches)" in text
    single = normkit.diagnose(nn.Sequential(nn.BatchNorm1d(3)).eval()).findings[0]
    assert str(single).startswith("error [never-updated] 0 (BatchNorm1d): ")


@pytest.mark.parametrize(("factor", "said"), [(1 / 22, "22 times too small"), (100.0, "100 times too large")])
def test_plain_numbers_come_first(factor, said):
    norm, values = nn.BatchNorm1d(3, momentum=None), torch.randn(4000, 3)
    norm(values)
    norm.running_var *= factor
    finding = normkit.diagnose(norm.eval(), values).of("drift")[0]
    assert f"the running variance is {said}" in finding.summary
    assert list(finding.evidence)[:4] == ["channels_beyond", "share", "z_99th_percentile", "log2_ratio_99th_percentile"]
    norm.running_var /= factor
    norm.running_mean += 3
    assert "the running mean is 3 standard deviations off" in normkit.diagnose(norm, values).of("drift")[0].summary


def test_layers_stand_in_the_order_in_which_the_batches_reach_them():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.last(self.first(x))

    rows = normkit.diagnose(Backwards(), batches()).layers
    assert [row.name for row in rows] == ["first", "last", "unused"]
    assert [row.layer_class for row in rows] == ["BatchNorm1d"] * 3


@pytest.mark.parametrize(
    ("remedy", "filled"),
    [
        ("normkit.repair(model, batches=batches)", "normkit.repair(model, batches=batches, call=call)"),
        ("normkit.recalibrate(model, batches)", "normkit.recalibrate(model, batches, call=call)"),
        ("normkit.recalibrate(model.eval(), batches)", "normkit.recalibrate(model.eval(), batches, call=call)"),
        ("normkit.diagnose(model, loader).healthy", "normkit.diagnose(model, loader, call=call).healthy"),
        ("f(model, batches, layerwise=True)", "f(model, batches, call=call, layerwise=True)"),
        ("normkit.fold(model, example)", "normkit.fold(model, example)"),
    ],
)  # fmt: skip
def test_every_call_that_runs_the_model_carries_how_it_is_called(remedy, filled):
    (found,) = join_findings([finding(remedy=remedy, proof=remedy)], ["a"], arguments=", call=call")
    assert (found.remedy, found.proof) == (filled, filled)


def test_outputs_that_are_not_finite_are_not_said_to_vary():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    model[1].running_var.fill_(torch.nan)
    notes = " ".join(normkit.diagnose(model, batches()).notes)
    assert "another output each time" not in notes
    assert "batch-dependence: the outputs are not finite" in notes
