"""Ported layers predict the same as Flax's own, in both directions, and go on training alike."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normkit
from normkit.surgery.conventions import CONVENTIONS
from normkit.surgery.port import port_state
from tolerances import assert_close

PROBE = np.random.default_rng(1).standard_normal((4, 5, 7, 6)).astype(np.float32) * 3 + 1  # (N, H, W, C)
FIRST = np.ascontiguousarray(PROBE.transpose(0, 3, 1, 2))
SETTINGS: dict[str, dict[str, Any]] = {
    "batch": {"momentum": 0.8, "epsilon": 2e-3},
    "layer": {"epsilon": 1e-2},
    "group": {"num_groups": 3},
    "instance": {"epsilon": 1e-3},
}
FROM_FLAX = list(itertools.product(SETTINGS, [True, False], [True, False]))
OURS = {
    "batch": lambda **settings: normkit.BatchNorm2d(6, **settings),
    "layer": lambda **settings: normkit.LayerNorm(6, **settings),
    "group": lambda **settings: normkit.GroupNorm(2, 6, **settings),
    "instance": lambda **settings: normkit.InstanceNorm2d(6, affine=True, **settings),
}


def flax_call(method: str, scale: bool, bias: bool) -> dict[str, Any]:
    """A layer of Flax's with random state."""
    generator = np.random.default_rng(2)
    names = ["scale"] * scale + ["bias"] * bias + ["mean", "var"] * (method == "batch")
    state = {name: generator.uniform(0.5, 1.5, 6).astype(np.float32) for name in names}
    settings = {**SETTINGS[method], "use_scale": scale, "use_bias": bias}
    return {"method": method, "settings": settings, "state": state, "x": PROBE}


def our_layer(method: str) -> torch.nn.Module:
    """A layer of ours in a random state, the same at every call."""
    layer = OURS[method](eps=3e-3)
    generator = torch.Generator().manual_seed(3)
    for value in layer.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) + 0.5 if value.dim() else value)
    return layer


def to_flax(method: str) -> dict[str, Any]:
    """The call of Flax's layer that our layer becomes."""
    settings = {"eps": 3e-3} | ({"num_groups": 2} if method == "group" else {})
    ported = port_state(our_layer(method).state_dict(), source="torch", target="flax", method=method, settings=settings)
    return {"method": method, "settings": ported.settings, "state": ported.state, "x": PROBE}


@pytest.fixture(scope="module")
def flax(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Flax makes of every call, first those from it and then those to it."""
    file = tmp_path_factory.mktemp("flax") / "calls"
    file.write_bytes(pickle.dumps([*(flax_call(*row) for row in FROM_FLAX), *map(to_flax, OURS)]))
    command = [sys.executable, str(Path(__file__).with_name("flax_worker.py")), str(file)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return pickle.loads(file.read_bytes())


def first(y: np.ndarray) -> torch.Tensor:
    return torch.tensor(y.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("k", range(len(FROM_FLAX)), ids=lambda k: "-".join(map(str, FROM_FLAX[k])))
def test_flax_layers_predict_the_same_here(flax, k):
    method, scale, bias = FROM_FLAX[k]
    call, theirs = flax_call(method, scale, bias), flax["results"][k]
    if not (scale or bias) and method != "batch":
        # Nothing says how many channels there are, and nothing is to be carried.
        assert port_state(call["state"], source="flax", target="torch", method=method).state == {}
        return
    ported = port_state(call["state"], source="flax", target="torch", method=method, settings=call["settings"])
    kinds = {"batch": normkit.BatchNorm2d, "layer": normkit.LayerNorm, "group": normkit.GroupNorm}
    ours = kinds.get(method, normkit.InstanceNorm2d)(**ported.settings)
    ours.load_state_dict({name: torch.as_tensor(value) for name, value in ported.state.items()})
    given = torch.tensor(PROBE if method == "layer" else FIRST)
    expected = torch.tensor(theirs["output"]) if method == "layer" else first(theirs["output"])
    assert_close(ours.eval()(given).detach(), expected, dtype=torch.float32)
    if method == "batch":
        ours.train()(given)
        assert_close(ours.running_mean, torch.tensor(theirs["mean"]), dtype=torch.float32)
        assert_close(ours.running_var, torch.tensor(theirs["var"]), dtype=torch.float32)


@pytest.mark.parametrize("k", range(len(OURS)), ids=lambda k: list(OURS)[k])
def test_our_layers_predict_the_same_in_flax(flax, k):
    method = list(OURS)[k]
    theirs = flax["results"][len(FROM_FLAX) + k]["output"]
    given = torch.tensor(PROBE if method == "layer" else FIRST)
    expected = torch.tensor(theirs) if method == "layer" else first(theirs)
    assert_close(our_layer(method).eval()(given).detach(), expected, dtype=torch.float32)


def test_the_defaults_that_are_filled_in_are_flaxs(flax):
    ours = CONVENTIONS["flax"]
    for method, theirs in flax["defaults"].items():
        assert {ours.settings[word]: value for word, value in ours.defaults[method].items()} == theirs
