"""What mistakes that only one method allows would have given, with words for them."""

from collections.abc import Iterator

import numpy as np

from .. import reference
from ..reference.arrays import Array
from .judges import whitening_settings
from .subject import Case

__all__ = ["ghosts", "masks", "responses", "styles", "whitenings"]


def responses(case: Case) -> Iterator[tuple[str, Array]]:
    """Mistakes of local response normalization."""
    settings = {name: float(case.setting(name, default)) for name, default in (("beta", 0.75), ("k", 1.0))}
    size, alpha = int(case.setting("size", 5)), float(case.setting("alpha", 1e-4))
    paper = reference.local_response_norm(case.x, size, alpha=alpha * size, **settings)
    yield "does not divide alpha by size, as the paper and TensorFlow do not", paper.output
    mirrored = reference.local_response_norm(case.x[:, ::-1], size, alpha=alpha, **settings)
    yield "reaches one channel further up than down", mirrored.output[:, ::-1]


def styles(case: Case) -> Iterator[tuple[str, Array]]:
    """Mistakes of adaptive instance normalization."""
    style, eps = case.company[0], case.eps
    space = tuple(range(2, style.ndim))
    xhat = reference.instance_norm(case.x, eps=eps).output
    yield "ignores the style", xhat
    std = np.sqrt(style.var(axis=space, keepdims=True) + eps)
    yield "leaves the style's mean out", xhat * std
    unbiased = np.sqrt(style.var(axis=space, keepdims=True, ddof=1) + eps)
    yield "takes the style's unbiased deviation", xhat * unbiased + style.mean(axis=space, keepdims=True)


def ghosts(case: Case) -> Iterator[tuple[str, Array]]:
    """Mistakes of ghost batch normalization."""
    size = int(case.setting("ghost_size", 32))
    cuts = range(size, len(case.x), size)
    if all(len(part) > 1 or part[0, 0].size > 1 for part in np.split(case.x, cuts)):
        parts = [reference.batch_norm(part, *case.affine, eps=case.eps).output for part in np.split(case.x, cuts)]
        yield "leaves the remainder of the batch as a small part of its own", np.concatenate(parts)


def masks(case: Case) -> Iterator[tuple[str, Array]]:
    """Mistakes of masked batch normalization."""
    mask = np.expand_dims(case.company[0], 1)
    whole = reference.batch_norm(case.x, *case.affine, eps=case.eps).output
    yield "lets the padding into the statistics", np.where(mask, whole, 0.0)
    blank = reference.batch_norm(np.where(mask, case.x, 0.0), *case.affine, eps=case.eps).output
    yield "counts the padding as zeros", np.where(mask, blank, 0.0)
    valid = reference.masked_batch_norm(case.x, case.company[0], eps=case.eps).valid
    mean, rstd = (value.reshape(1, -1, *(1 for _ in case.x.shape[2:])) for value in (valid.mean, valid.rstd))
    yield "normalizes the padding too instead of leaving zeros", _scaled(case, (case.x - mean) * rstd)


def whitenings(case: Case) -> Iterator[tuple[str, Array]]:
    """Mistakes of whitening."""
    groups = int(case.setting("num_groups", 1))
    step = reference.whitening_batch_norm(case.x, num_groups=groups, eps=case.eps, **whitening_settings(case))
    _, vectors = np.linalg.eigh(step.regularized)
    by_group = np.moveaxis(step.xhat, 1, 0).reshape(groups, -1, case.x[:, 0].size)
    rotated = (np.swapaxes(vectors, -1, -2) @ by_group).reshape(case.x.shape[1], case.x.shape[0], *case.x.shape[2:])
    yield "leaves the result in the basis of the eigenvectors (PCA)", _scaled(case, np.moveaxis(rotated, 0, 1))


def _scaled(case: Case, xhat: Array) -> Array:
    for value, multiply in zip(case.affine, (True, False), strict=True):
        if value is not None:
            spread = value.reshape(1, -1, *(1 for _ in xhat.shape[2:]))
            xhat = xhat * spread if multiply else xhat + spread
    return xhat
