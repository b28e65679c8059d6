"""Padding that counts as data, and one layer for several populations: found by the numbers, and confirmed."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit
from normkit.anatomy import fingerprint
from normkit.doctor.demos import network, patterns
from normkit.errors import ArgumentError

from . import networks


def sequences(count=256, positions=24, offset=2.0):
    """Signals of different lengths filled up with zeros, and which positions hold data."""
    signals, lengths = offset + torch.randn(count, 6, positions), torch.randint(6, positions + 1, (count,))
    mask = torch.arange(positions) < lengths[:, None]
    return signals * mask[:, None], mask


class PerPosition(nn.Module):
    """Labels every position, so that it takes any length."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm1d(6), nn.Conv1d(6, 2, 3, padding=1)

    def forward(self, signals):
        return self.conv(self.norm(signals))


class Masked(nn.Module):
    """The same with the padding left out of the statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = normkit.MaskedBatchNorm1d(6), nn.Conv1d(6, 2, 3, padding=1)

    def forward(self, signals, mask):
        return self.conv(self.norm(signals, mask))


class ByHand(nn.Module):
    """A batch norm that is given the data alone, gathered out of the padding."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, signals, mask):
        rows = signals.transpose(1, 2)
        return rows.masked_scatter(mask[:, :, None], self.norm(rows[mask])).transpose(1, 2)


def test_padding_is_confirmed_by_lengthening_it():
    signals, _ = sequences()
    model = PerPosition()
    for batch in signals.split(32):
        model(batch)
    before = fingerprint(model)
    finding = normkit.diagnose(model, signals.split(32)).of("padding", "norm")[0]
    assert fingerprint(model) == before
    assert "moves the data's outputs by" in finding.summary

    # The number is that of the mistake: the first batch as it is, and with half its longest padding again.
    first = signals[:32]
    runs = [24 - int((row != 0).any(0).nonzero().max()) - 1 for row in first]
    longer = functional.pad(first, (0, max(runs) // 2))
    fresh = nn.BatchNorm1d(6)
    plain, moved = fresh(first).detach(), fresh(longer).detach()[:, :, :24]
    gap = (
        (plain - moved).abs() * (torch.arange(24) < torch.tensor([24 - max(run, 1) for run in runs])[:, None])[:, None]
    ).max()
    assert finding.evidence["moved_by_longer_padding"] == pytest.approx(float(gap / plain.std()), rel=1e-3)


def test_padding_of_a_model_of_one_length_is_found_and_confirmed():
    signals, _ = sequences()
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(6 * 24, 2))
    longer = normkit.diagnose(PerPosition(), signals.split(32)).of("padding", "norm")[0]
    finding = normkit.diagnose(model, signals.split(32)).of("padding", "0")[0]
    moved = finding.evidence["moved_by_longer_padding"]
    assert moved == longer.evidence["moved_by_longer_padding"] > 0.1


@pytest.mark.parametrize("cls", [Masked, ByHand])
def test_diagnose_is_silent_where_padding_is_left_out(cls):
    signals, mask = sequences()
    batches = list(zip(signals.split(32), mask.split(32), strict=True))
    model = cls()
    for batch in batches:
        model(*batch)
    assert not normkit.diagnose(model, batches).of("padding")


def test_signals_that_end_in_the_same_value_and_length_are_no_padding():
    signals = torch.randn(64, 6, 24)
    signals[:, :, 20:] = 0
    assert not normkit.diagnose(nn.Sequential(nn.BatchNorm1d(6)), signals).of("padding")


def two_domains():
    """One network trained on batches of which half come from another camera."""
    torch.manual_seed(0)
    model, images, labels = network(), *patterns(512).tensors
    domain = torch.arange(512) % 2
    images = torch.where(domain[:, None, None, None] == 0, images, 0.2 * images + 3.0)
    batches = list(zip(images.split(32), labels.split(32), domain.split(32), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(batch[0]), batch[1]).backward()
            optimizer.step()
    return model.eval(), batches


def test_labelled_domains_that_share_a_layer_are_found_and_the_call_cures_it():
    model, batches = two_domains()

    def domains(batch):
        return batch[2]

    assert not normkit.diagnose(model, batches).of("mixed-populations")  # without labels nobody can know
    finding = normkit.diagnose(model, batches, domains=domains).of("mixed-populations", "1")[0]
    assert "domains 0 and 1 differ" in finding.summary
    assert finding.evidence["domains"] == ["0", "1"]

    space = {"normkit": normkit, "model": model, "batches": batches, "domains": domains}
    exec(finding.remedy, space)
    assert eval(finding.proof, space)


def test_moments_of_the_domains_are_those_of_their_samples():
    values, domain = torch.randn(300, 3) + 1, torch.arange(300) % 3
    values[domain == 2] += 4
    norm = nn.BatchNorm1d(3)
    norm(values)
    batches = list(zip(values.split(50), domain.split(50), strict=True))
    finding = normkit.diagnose(norm.eval(), batches, domains=lambda batch: batch[1]).of("mixed-populations")[0]
    assert finding.evidence["apart"] in (["0", "2"], ["1", "2"])
    first, second = (values[domain == int(label)].double() for label in finding.evidence["apart"])
    expected = (first.mean(0) - second.mean(0)).abs() / first.var(0).sqrt()
    assert finding.channels["z"] == pytest.approx(expected.tolist(), rel=1e-3)


def test_domains_alike_are_no_finding_and_whole_batches_may_have_one_label():
    model = network()
    batches = [(images, index % 2) for index, images in enumerate(patterns(512).tensors[0].split(32))]
    assert not normkit.diagnose(model, batches, domains=lambda batch: batch[1]).of("mixed-populations")


def test_wrong_number_of_labels_is_refused():
    with pytest.raises(ArgumentError, match="2 labels for a batch of 16 samples"):
        normkit.diagnose(nn.BatchNorm1d(3), torch.randn(16, 3), domains=lambda batch: [0, 1])


def test_demo_of_padding_is_confirmed():
    patient = networks.patient("padded")
    finding = normkit.diagnose(patient.model, patient.batches).of("padding")[0]
    assert finding.evidence["moved_by_longer_padding"] > 0.01
