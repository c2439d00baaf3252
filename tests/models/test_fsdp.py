"""FSDP2 around each block and the whole: stacks that are called many times give the gradients of one process."""

import os
import subprocess
import sys

import tiny
import torch
from torch.utils import _pytree as pytree

from fastattn.models.hrm import HrmCarry, HrmOutput
from fastattn.models.hrm_text import HrmTextOutput

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fastattn.models import HrmText, HrmTextConfig

dist.init_process_group("gloo")
torch.set_num_threads(1)
config = HrmTextConfig(**OPTIONS)

def make():
    torch.manual_seed(0)
    return HrmText(config)

plain, sharded = make(), make()
mesh = init_device_mesh("cpu", (2,))
stacks = sharded.recurrence.L_stack, sharded.recurrence.H_stack
for block in (*stacks[0].layers, *stacks[1].layers, sharded):
    fully_shard(block, mesh=mesh)
for module in sharded.modules():
    if hasattr(module, "set_force_sum_reduction_for_comms"):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        module.set_gradient_divide_factor(1.0)
optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, sharded)]
rows = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(1))
for bp_steps, recompute in ((2, False), (5, False), (5, True)):
    sharded.activation_checkpointing(recompute)
    losses = []
    for model, ids in ((plain, rows), (sharded, rows[dist.get_rank() : dist.get_rank() + 1])):
        model.zero_grad()
        loss = model(ids, labels=ids, bp_steps=bp_steps).loss * len(ids)
        loss.backward()
        losses.append(loss.detach())
    dist.all_reduce(losses[1])
    pairs = list(zip(plain.named_parameters(), sharded.parameters(), strict=True))
    assert any(p.grad is not None for (_, p), _ in pairs)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for (name, one), two in pairs:
        if one.grad is None:
            assert two.grad is None or not two.grad.full_tensor().any(), name
            continue
        # fp32: sums over the tokens in another order
        error = (two.grad.full_tensor() - one.grad).norm()
        assert error <= 1e-5 * one.grad.norm(), (name, bp_steps, error, one.grad.norm())
    for optimizer in optimizers:
        optimizer.step()
sys.stdout.write(f"rank {dist.get_rank()} is done\\n")
sys.stdout.flush()
dist.barrier()
os._exit(0)
"""


def test_blocks_sharded_by_themselves(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"OPTIONS = {tiny.OPTIONS!r}\n{SCRIPT}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.count("is done") == 2, done.stderr


def test_outputs_are_pytrees():
    """FSDP2 of torch before 2.12 reduces no gradient behind an output in which it finds no tensor."""
    for kind in (HrmTextOutput, HrmCarry, HrmOutput):
        tensors = [torch.zeros(i) for i, _ in enumerate(kind.__annotations__)]
        assert [t.shape for t in pytree.tree_leaves(kind(*tensors))] == [t.shape for t in tensors]
