"""One tiny run of a claim in this process: its own measurement, few images and steps."""

from dataclasses import replace

from normkit.lab.claim import Request, plan
from normkit.lab.data import limited, load


def tiny_run(claim, *, seeds=2, train_images=60, test_images=30, **settings):
    """Return the rows of every cell of the claim on a few digits."""
    dataset = limited(load("digits"), train_images, test_images)
    rows = []
    for cell in plan(claim, Request(data="digits", seeds=seeds)).cells():
        small = replace(cell, settings=replace(cell.settings, **settings))
        common = {"data": cell.data, "norm": cell.norm, **dict(cell.variant), "seed": cell.seed}
        rows += [{**common, **row} for row in claim.measure(small, dataset)]
    return rows
