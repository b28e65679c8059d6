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


class Deep(nn.Module):
    """A norm behind a convolution: what it is given ends in no run of equal vectors."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(6, 6, 3, padding=1), norm

    def forward(self, signals):
        return self.norm(self.conv(signals))


class Words(nn.Module):
    """Numbers of words, filled up with 0."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, 6), nn.BatchNorm1d(6)

    def forward(self, words):
        return self.norm(self.embedding(words).transpose(1, 2))


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (lambda: nn.Sequential(nn.GroupNorm(2, 6)), "0"),
        (lambda: nn.Sequential(nn.InstanceNorm1d(6)), "0"),
        (lambda: nn.Sequential(normkit.SampleLayerNorm(6)), "0"),
        (lambda: nn.Sequential(nn.LayerNorm([6, 24])), "0"),  # of one length: the padding itself is changed
        (lambda: Deep(nn.BatchNorm1d(6)), "norm"),
        (lambda: Deep(nn.GroupNorm(1, 6)), "norm"),
    ],
    ids=["group", "instance", "sample", "one length", "behind a convolution", "group behind a convolution"],
)
def test_padding_is_measured_for_every_norm(model, layer):
    signals, _ = sequences()
    model = model()
    for mode in (True, False):
        (finding,) = normkit.diagnose(model.train(mode), signals.split(32)).of("padding", layer)
        assert finding.evidence["moved_by_longer_padding"] > 0.05
        batch = isinstance(model.get_submodule(layer), nn.BatchNorm1d)
        assert ("in evaluation" in finding.summary) != batch


def test_padding_of_words_is_found():
    words = torch.randint(1, 50, (128, 24))
    words *= torch.arange(24) < torch.randint(6, 25, (128, 1))
    assert normkit.diagnose(Words(), words.split(32)).of("padding", "norm")


class Positions(nn.Module):
    """Each position by itself."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, signals):
        return self.norm(signals.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.RMSNorm(6), normkit.LayerNorm(6)], ids=lambda norm: repr(norm)[:20]
)
def test_norm_of_each_position_knows_no_padding(norm):
    signals, _ = sequences()
    assert not normkit.diagnose(Positions(norm), signals.split(32)).of("padding")


def test_norm_over_the_length_by_another_name_does_not_cure_padding():
    signals, _ = sequences()
    model = PerPosition()
    converted = normkit.convert(model, to="layer").model
    assert normkit.diagnose(converted, signals.split(32)).of("padding", "norm")
    finding = normkit.diagnose(model, signals.split(32)).of("padding", "norm")[0]
    space = {"normkit": normkit, "model": model, "batches": signals.split(32)}
    exec(finding.remedy, space)
    assert eval(finding.proof, space)
    assert normkit.diagnose(model, signals.split(32)).healthy


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
