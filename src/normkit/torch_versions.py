"""What this package takes of torch beyond its documented surface, and the versions it was run with.

Anything else that differs between versions of torch belongs here too.
"""

from operator import attrgetter

import torch

__all__ = ["PRIVATE", "TESTED", "check"]

TESTED = ("2.13.0", "2.14.1")

# Every private name that this package reads. A test looks for others in the source.
PRIVATE = (
    "_C._are_functorch_transforms_active",
    "_C._current_graph_task_id",
    "_C._functorch.is_batchedtensor",
    "_C._get_tracing_state",
    "_C._has_storage",
    "_C._len_torch_dispatch_stack",
    "autograd.forward_ad._current_level",
    "jit._trace.TracerWarning",
    "nn.modules.batchnorm._BatchNorm",
    "nn.modules.conv._ConvNd",
    "nn.modules.dropout._DropoutNd",
    "nn.modules.instancenorm._InstanceNorm",
    "utils._contextlib",
    "utils._pytree.tree_map_only",
)


def check() -> None:
    """Say at the import, and not in the middle of a forward, that this torch lacks a name.

    Raises:
        ImportError: names what is missing, and the versions that have it.
    """
    missing = []
    for name in PRIVATE:
        try:
            attrgetter(name)(torch)
        except AttributeError:
            missing.append(f"torch.{name}")
    if missing:
        raise ImportError(
            f"normkit needs {', '.join(missing)}, which torch {torch.__version__} does not have; it was tested with "
            f"torch {' and '.join(TESTED)}: pip install torch=={TESTED[-1]}"
        )
