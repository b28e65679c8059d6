"""The kernels that most models call first, to be compiled before they are needed."""

from typing import NamedTuple

from .channels.kernels import KERNELS as CHANNEL_KERNELS
from .samples.kernels import KERNELS as SAMPLE_KERNELS

__all__ = ["Job", "common", "compile_one"]

_STEPS = ("forward", "partial", "finish", "apply", "backward", "backward_partial", "finish_sums", "apply_backward")
# These hang on neither the activation nor the residual.
_PLAIN = ("partial", "finish", "finish_sums")


class Job(NamedTuple):
    """One kernel for one element type, activation and residual."""

    name: str
    element: str
    activation: str | None
    residual: bool


def common() -> tuple[Job, ...]:
    """Return batch norm's kernels in float32, alone, with ReLU, and with sum and ReLU; then those per sample."""
    jobs = [Job("stored", "float32", None, False)]
    for layout in ("contiguous", "channels_last"):
        for activation, residual in ((None, False), ("relu", False), ("relu", True)):
            for step in _STEPS:
                if activation is None or step not in _PLAIN:
                    jobs.append(Job(f"{layout}.{step}", "float32", activation, residual))  # noqa: PERF401
    for layout in ("elementwise", "contiguous", "channels_last"):
        jobs += [Job(f"samples.{layout}.{step}", "float32", None, False) for step in ("forward", "backward")]
    return (*jobs, Job("samples.elementwise.total", "float32", None, False))


def compile_one(job: Job) -> None:
    """Compile a kernel, or find it in the cache."""
    (SAMPLE_KERNELS if job.name in SAMPLE_KERNELS.functions else CHANNEL_KERNELS).address(*job)
