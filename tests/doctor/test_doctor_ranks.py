"""Two processes, each averaging its own shard: the doctor finds it on both, and the call cures it."""

import json

import pytest
import torch

import normkit
from normkit.errors import ArgumentError
from ranks.processes import run_program

# The mistake: DistributedDataParallel that does not copy buffers, on shards of different data.
PROGRAM = """
import json, sys
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import normkit
from ranks.processes import leave

torch.set_num_threads(1)
rank, path = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
parallel = DistributedDataParallel(model, **{buffers}=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(60):
    optimizer.zero_grad()
    parallel(torch.randn(16, 8) + 2.0 * rank).square().mean().backward()
    optimizer.step()
group = distributed.group.WORLD
model.eval()
found = normkit.diagnose(parallel, group=group).of("rank-agreement")
lengths = normkit.diagnose(model, [torch.randn(16, 8)] * (2 + rank), group=group).of("rank-agreement", "")
for finding in found:
    exec(finding.remedy)
cured = normkit.diagnose(model, group=group).of("rank-agreement")
print(json.dumps({
    "found": [(finding.layer, finding.severity, finding.evidence["largest_difference"]) for finding in found],
    "lengths": [finding.severity for finding in lengths],
    "cured": len(cured),
}))
leave(rank, 2)
"""


def test_ranks_that_disagree_are_found_on_every_rank_and_cured(tmp_path):
    import inspect

    accepted = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    source = PROGRAM.replace("{buffers}", "{" + repr(buffers) + ": False}").replace("=False)", ")")
    for said in run_program(source, tmp_path):
        seen = json.loads(said)
        assert [(layer, severity) for layer, severity, _ in seen["found"]] == [("1", "error")]
        assert seen["found"][0][2] > 0.5
        assert seen["lengths"] == ["warning"]
        assert seen["cured"] == 0


def test_group_without_a_process_group_is_refused():
    with pytest.raises(ArgumentError, match="init_process_group first"):
        normkit.diagnose(torch.nn.BatchNorm1d(3), group="WORLD")
