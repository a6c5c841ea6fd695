#!/usr/bin/env bash
# torch 2.13.0 (2026-11-28).
#
# A parameter that is replaced by a smaller one after fully_shard is silently ignored: the module shows the new shape,
# and the next forward pass computes with the old tensor, which FSDP2 gathers and puts back.
#
# Expected: the new parameter counts, as in a plain module, or an error.
# Seen:     no error; the output has the old width, and so has the parameter afterwards.
#
# Exits with 0 while that is so, with 1 once it has changed. One process, gloo, no GPU.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29431"}
dist.init_process_group("gloo", rank=0, world_size=1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8, bias=False))
mesh = init_device_mesh("cpu", (1,))
fully_shard(model[0], mesh=mesh)
fully_shard(model, mesh=mesh)
x = torch.randn(2, 6)
before = tuple(model(x).shape)
old = model[0].weight
smaller = old.full_tensor().detach()[:5].clone()
model[0].weight = nn.Parameter(distribute_tensor(smaller, old.device_mesh, old.placements))
assigned = tuple(model[0].weight.shape)
after = tuple(model(x).shape)
print(f"output {before}; weight assigned {assigned}; output {after}; weight afterwards {tuple(model[0].weight.shape)}")
plain = nn.Linear(6, 8, bias=False)
plain.weight = nn.Parameter(plain.weight.detach()[:5].clone())
print(f"the same in a plain module: output {tuple(plain(x).shape)}")
dist.destroy_process_group()
sys.exit(not (assigned == (5, 6) and after == before == (2, 8) and plain(x).shape == (2, 5)))
PY
