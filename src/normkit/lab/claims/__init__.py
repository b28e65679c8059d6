"""The claims, one file each. A file of this folder that defines ``CLAIM`` is found by itself."""

import importlib
import pkgutil
from functools import lru_cache

from ...errors import ArgumentError
from ...spelling import alternatives
from ..claim import Claim

__all__ = ["all_claims", "get_claim"]


@lru_cache(maxsize=1)
def all_claims() -> tuple[Claim, ...]:
    """Return every claim of this folder, in the order of their numbers.

    >>> [claim.id for claim in all_claims()][0]
    'convergence'
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    claims: list[Claim] = [importlib.import_module(f"{__name__}.{name}").CLAIM for name in names]
    return tuple(sorted(claims, key=lambda claim: int(claim.number.removeprefix("E"))))


def get_claim(claim_id: str) -> Claim:
    """Return the claim of this id.

    Raises:
        ArgumentError: no claim has it; the message lists those that exist.
    """
    for claim in all_claims():
        if claim.id == claim_id:
            return claim
    raise ArgumentError(f"unknown claim {claim_id!r}; {alternatives(claim_id, [claim.id for claim in all_claims()])}")
