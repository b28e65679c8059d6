"""Runs Flax's own layers in a process of its own: JAX starts threads, and forks of the test process would not survive.

``python flax_worker.py FILE``: FILE holds a list of calls, pickled by the test beside it, and then their results.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen

LAYERS = {
    "batch": linen.BatchNorm,
    "layer": linen.LayerNorm,
    "group": linen.GroupNorm,
    "instance": linen.InstanceNorm,
}


def run(call: dict[str, Any]) -> dict[str, Any]:
    """Predict with the given state, and for batch normalization also train one step and tell what is stored then."""
    # The fast variance is a difference of squares, and its lost digits are not what is compared here.
    layer = LAYERS[call["method"]](**call["settings"], use_fast_variance=False)
    parameters = {name: value for name, value in call["state"].items() if name in ("scale", "bias")}
    variables = {"params": parameters}
    if call["method"] != "batch":
        return {"output": np.asarray(layer.apply(variables, call["x"]))}
    variables["batch_stats"] = {name: call["state"][name] for name in ("mean", "var")}
    output = layer.apply(variables, call["x"], use_running_average=True)
    _, after = layer.apply(variables, call["x"], use_running_average=False, mutable=["batch_stats"])
    stored = {name: np.asarray(value) for name, value in after["batch_stats"].items()}
    return {"output": np.asarray(output), **stored}


def defaults() -> dict[str, dict[str, Any]]:
    """What Flax's layers have where nothing is said."""
    names = ("epsilon", "momentum", "num_groups")
    return {
        method: {name: getattr(layer, name) for name in names if hasattr(layer, name)}
        for method, layer in LAYERS.items()
    }


if __name__ == "__main__":
    file = Path(sys.argv[1])
    calls = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps({"defaults": defaults(), "results": [run(call) for call in calls]}))
