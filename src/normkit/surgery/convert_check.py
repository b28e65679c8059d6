"""Whether a layer computes in evaluation what the layer computes whose place it takes: each alone, in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..anatomy import NormLayer
from ..anatomy.evidence import bare_copy, sample_inputs

__all__ = ["Before"]

# Two float64 computations of one affine map; a layer that computes in float32 is compared in that.
_SAME = {torch.float64: 1e-9, torch.float32: 2e-5}


class Before:
    """A layer as it was, to compare with what became of it.

    Args:
        layer: one that is about to be converted; it is not run.
        shape: of the input that it was seen to get, which says how many dimensions it takes.
    """

    def __init__(self, layer: NormLayer, shape: tuple[int, ...] | None) -> None:
        self.layer, self.shape = layer, shape
        self.named = str(layer)
        try:
            self._copy: nn.Module | None = bare_copy(layer.module).eval()
        except (NotImplementedError, RuntimeError, TypeError):
            self._copy = None  # on the meta device, or with what cannot be copied

    def changed_to(self, now: nn.Module) -> str | None:
        """Say by how much the output in evaluation is another now, or return None; also where neither can be run."""
        if self._copy is None or self.layer.form is None:
            return None
        for first, second in self._outputs(self._copy, now):
            scale = first[torch.isfinite(first)].abs().max() if torch.isfinite(first).any() else torch.ones(())
            same = (first == second) | (first.isnan() & second.isnan())
            gap = float(torch.where(same, 0.0, (first - second).abs()).max() / scale.clamp_min(1e-300))
            return None if gap <= _SAME[first.dtype] else f"changes what {self.named} gives in evaluation by {gap:.3g}"
        return None

    def _outputs(self, old: nn.Module, now: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the outputs of both for the first input that both take."""
        assert self.layer.form is not None
        rank = None if self.shape is None else len(self.shape)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            new = bare_copy(now).eval()
            for x in sample_inputs(old, self.layer.form):
                if rank is not None and x.ndim != rank:
                    continue
                try:
                    yield tuple(module.to(x.dtype)(x.clone()) for module in (old, new))
                except Exception:  # noqa: S112  a forward of any house; the next input may fit
                    continue
