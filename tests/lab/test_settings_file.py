"""A reader's own data and network: taken where they fit, refused with the key and what is allowed where not."""

import json
import math
import subprocess
import sys

import pytest

from normkit.errors import ArgumentError
from normkit.lab.cells import Surroundings, run_cell
from normkit.lab.claim import Request, plan
from normkit.lab.claims import all_claims, get_claim
from normkit.lab.claims.learning_rate import final_loss
from normkit.lab.settings_file import KEYS, LEAST, read_settings

SOUND = """
[data]
module = "mine_{name}:load"
[network]
module = "mine_{name}:build"
[training]
epochs = 2
batch_size = 8
learning_rate = 0.05
"""
MODULE = """
import torch
from torch import nn

from normkit.layers.catalog import create


def load():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(60, 5, generator=generator)
    labels = (images[:, 0] > 0).long()
    return images[:40], labels[:40], images[40:], labels[40:]


def build(norm):
    between = nn.Identity() if norm == "none" else create(norm, 7, 0)
    return nn.Sequential(nn.Linear(5, 7), between, nn.ReLU(), nn.Linear(7, 2))


def broken():
    return 1, 2


number = 3
"""


@pytest.fixture
def write(tmp_path, request):
    # A module is imported once in a process, so every test has its own.
    name = "".join(character if character.isalnum() else "_" for character in request.node.name)

    def write(content=SOUND):
        (tmp_path / f"mine_{name}.py").write_text(MODULE)
        path = tmp_path / "settings.toml"
        path.write_text(content.replace("{name}", name))
        return path

    return write


def test_own_network_and_data_run_to_a_verdict_and_a_changed_network_is_refused(write, tmp_path):
    path = write()
    command = [
        sys.executable, "-m", "normkit", "lab", "run", "convergence", "--settings", str(path), "--seeds", "2",
        "--jobs", "2", "--out", str(tmp_path / "out"), "--tensorboard", str(tmp_path / "curves"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2
    # A run of TensorBoard's for every cell.
    assert len({path.parent for path in (tmp_path / "curves").rglob("events.*")}) == 4
    assert {row["data"].partition(":")[2] for row in rows} == {"load"}
    assert all(row["settings"]["learning_rate"] == 0.05 and len(row["step_losses"]) == 5 for row in rows)
    assert {tuple(row["backend"]) for row in rows if row["norm"] == "batch"} == {("BatchNorm1d",)}
    assert ":build" in (tmp_path / "out" / "report.html").read_text()
    (module,) = tmp_path.glob("mine_*.py")
    module.write_text(MODULE + "\n# changed\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "network's file (SHA-256)" in done.stderr


def test_own_data_of_a_hundred_classes_have_their_own_chance_and_no_column_of_the_source(tmp_path, monkeypatch):
    (tmp_path / "mine_hundred.py").write_text(
        MODULE.replace("(images[:, 0] > 0).long()", "torch.arange(60) % 100").replace(
            "nn.Linear(7, 2)", "nn.Linear(7, 100)"
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    training = {"batch_size": 8, "learning_rate": 0.05, "epochs": 1}
    request = Request(data="mine_hundred:load", network="mine_hundred:build", seeds=1, training=training)
    around = Surroundings(data_dir=None, folder=None, commit=None, parent=None, keeps=False)
    rates, table = (get_claim(name) for name in ("learning-rate", "convergence"))
    rows = [row for cell in plan(rates, request).cells() for row in run_cell(cell, around)]
    # The labels end at 59.
    assert {row["classes"] for row in rows} == {60}
    assert 0 < max(final_loss([row]) for row in rows) <= math.log(60)
    assert f"{math.log(60):.4f}" in rates.show(rows)[1].note
    rows = [row for cell in plan(table, request).cells() for row in run_cell(cell, around)]
    assert table.show(rows)[1].header == ["epoch", "without norm", "with batch norm"]
    assert [number.holds for number in table.judge(rows).reproduced] == [None, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[data\n", "not TOML"),
        ("[dat]\n", r"unknown table: dat; did you mean 'data'\? Known are: data, network, training"),
        ("data = 3\n", r"data = 3; expected a table, \[data\]"),
        ("[training]\nepoch = 3\n", r"unknown key in \[training\]: epoch; did you mean 'epochs'\? Known are: epochs, "),
        ("[training]\nepochs = 1.5\n", r"\[training\] epochs = 1.5: expected a whole number"),
        ("[training]\nepochs = true\n", r"\[training\] epochs = True: expected a whole number"),
        ("[training]\nepochs = 0\n", r"\[training\] epochs = 0: expected 1 or more"),
        ("[training]\nlearning_rate = nan\n", r"learning_rate = nan: expected 0 or more"),
        ("[training]\nlearning_rate = 'x'\n", r"learning_rate = 'x': expected a number"),
        ("[training]\noptimizer = 'adamw'\n", r"optimizer = 'adamw': did you mean 'adam'\? Known are: adam, sgd"),
        ("[network]\n", r'\[network\] lacks module = "package.module:function"'),
        ("[network]\nmodule = 'build'\n", r'module = "build": expected "package.module:function"'),
        ("[network]\nmodule = 'nowhere_at_all:build'\n", "nowhere_at_all cannot be imported"),
        ("[network]\nmodule = 'mine_{name}:biuld'\n", r"has no function biuld; did you mean build\?"),
        ("[network]\nmodule = 'mine_{name}:number'\n", "has no function number"),
    ],
)
def test_faulty_files_are_refused_with_what_is_allowed(write, content, message):
    with pytest.raises(ArgumentError, match=message):
        read_settings(write(content))


def test_missing_file_and_contradictions_end_with_code_two(write, normkit, tmp_path):
    for arguments, message in (
        ([str(tmp_path / "none.toml")], "cannot be read"),
        ([str(write()), "--data", "digits"], "give one of them"),
    ):
        code, _, told = normkit("lab", "run", "convergence", "--settings", *arguments)
        assert code == 2
        assert message in told
        assert told.count("\n") == 1


def test_every_training_key_sets_its_field():
    assert set(LEAST) | {"optimizer"} == set(KEYS["training"])
    claim = next(claim for claim in all_claims() if claim.own_network)
    training = {"batch_size": 16, "optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    settings = plan(claim, Request(training={**training, "epochs": 4, "train_images": 100, "test_images": 50})).settings
    assert {name: getattr(settings, name) for name in training} == training
    assert (settings.epochs, settings.train_images, settings.test_images) == (4, 100, 50)


def test_claims_about_their_own_network_refuse_another():
    claim = next(claim for claim in all_claims() if not claim.own_network)
    with pytest.raises(ArgumentError, match="is about its own network"):
        plan(claim, Request(network="my:build"))
