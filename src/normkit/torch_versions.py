"""What this package takes of torch beyond its documented surface, and the versions it was run with.

Anything else that differs between versions of torch belongs here too.
"""

from operator import attrgetter

import torch

__all__ = ["FUNCTION_APPLY", "PRIVATE", "TESTED", "check"]

TESTED = ("2.13.0", "2.14.1")

# Every private name that this package reads. A test looks for others in the source.
PRIVATE = (
    "_C.DisableTorchFunctionSubclass",
    "_C._InferenceMode",
    "_C._TorchDispatchModeKey.PROXY",
    "_C._are_functorch_transforms_active",
    "_C._autograd._get_sequence_nr",
    "_C._autograd._pop_saved_tensors_default_hooks",
    "_C._autograd._push_saved_tensors_default_hooks",
    "_C._autograd._saved_tensors_hooks_disable",
    "_C._autograd._saved_tensors_hooks_enable",
    "_C._autograd._saved_tensors_hooks_get_disabled_error_message",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._current_graph_task_id",
    "_C._dispatch_tls_local_exclude_set",
    "_C._dispatch_tls_local_include_set",
    "_C._functorch.get_unwrapped",
    "_C._functorch.is_batchedtensor",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._get_dispatch_mode",
    "_C._get_tracing_state",
    "_C._has_storage",
    "_C._is_fwd_grad_enabled",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._pop_torch_function_stack",
    "_C._push_on_torch_function_stack",
    "_C._set_fwd_grad_enabled",
    "_C._set_grad_enabled",
    "_compile._disable_dynamo",
    "_functorch.eager_transforms",
    "_functorch.pyfunctorch.temporarily_clear_interpreter_stack",
    "_ops.OpOverload",
    "autograd.forward_ad._current_level",
    "autograd.graph._engine_run_backward",
    "jit._trace.TracerWarning",
    "nn.modules.batchnorm._BatchNorm",
    "nn.modules.batchnorm._NormBase",
    "nn.modules.conv._ConvNd",
    "nn.modules.dropout._DropoutNd",
    "nn.modules.instancenorm._InstanceNorm",
    "nn.modules.pooling._AdaptiveAvgPoolNd",
    "nn.modules.pooling._AvgPoolNd",
    "overrides._get_current_function_mode_stack",
    "utils._contextlib",
    "utils._python_dispatch.TorchDispatchMode",
    "utils._python_dispatch._pop_mode",
    "utils._python_dispatch._push_mode",
    "utils._pytree.tree_flatten",
    "utils._pytree.tree_leaves",
    "utils._pytree.tree_map",
    "utils._pytree.tree_map_only",
    "utils._pytree.tree_unflatten",
)

# The code of the frame in which torch calls the forward of an autograd function; None since 2.14, where there is none.
FUNCTION_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)


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
