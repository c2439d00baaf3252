"""SignSGD on puzzle vectors: its formula, an optimizer's habits, and ranks that share the vectors."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from fastattn.models.hrm import PuzzleEmbedding
from fastattn.optim import SignSGD

IDS = torch.tensor([2, 0, 2])
SCALE = torch.tensor([[1.0], [-1.0], [-3.0]], dtype=torch.float64)  # id 2's sum is negative


@pytest.fixture
def embedding():
    torch.manual_seed(0)
    embedding = PuzzleEmbedding(4, 3).double()
    embedding.weights.normal_()
    return embedding


def loss(embedding, ids=IDS, scale=SCALE):
    return (embedding(ids) * scale).sum()


def moved(before, lr=0.1, weight_decay=0.5, rows=(0, 2)):
    after = before.clone()
    for row in rows:
        after[row] = before[row] * (1 - lr * weight_decay) + lr  # negative gradients
    return after


def test_used_rows_move(embedding):
    before = embedding.weights.clone()
    optimizer = SignSGD(embedding, lr=0.1, weight_decay=0.5)
    loss(embedding).backward()
    optimizer.step()
    torch.testing.assert_close(embedding.weights, moved(before))
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(embedding.weights, moved(before))  # nothing was used since


def test_zero_grad_may_come_between_forward_and_backward(embedding):
    before = embedding.weights.clone()
    optimizer = SignSGD(embedding, lr=0.1, weight_decay=0.5)
    loss(embedding, scale=-7 * SCALE).backward()  # dropped
    value = loss(embedding)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    torch.testing.assert_close(embedding.weights, moved(before))


def test_gradients_add_up_and_uses_do_not(embedding):
    optimizer = SignSGD(embedding, lr=0.1, weight_decay=0.5)
    for _ in range(50):
        loss(embedding)  # no backward
    assert embedding.weights.grad is None
    before = embedding.weights.clone()
    loss(embedding, scale=2 * SCALE).backward()
    for _ in range(50):  # one more row is used; the other gradients turn
        loss(embedding, torch.tensor([3, 2, 0]), torch.tensor([[-1.0], [0.01], [0.03]]).double()).backward()
    assert embedding.weights.grad.coalesce().indices().tolist() == [[0, 2, 3]]
    optimizer.step()
    torch.testing.assert_close(embedding.weights, moved(before, rows=(0, 2, 3)))


def test_schedulers_state_and_copies(embedding):
    optimizer = SignSGD(embedding, lr=0.4, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    before = embedding.weights.clone()
    state = optimizer.state_dict()
    twin, again = copy.deepcopy((embedding, optimizer))
    loss(embedding).backward()
    optimizer.step()
    torch.testing.assert_close(embedding.weights, moved(before))
    resumed = SignSGD(twin, lr=9.0)
    resumed.load_state_dict(state)
    for other in (again, resumed):
        twin.weights.copy_(before)
        other.zero_grad()
        loss(twin).backward()
        other.step()
        torch.testing.assert_close(twin.weights, moved(before))


def test_it_follows_the_model_and_takes_a_closure(embedding):
    optimizer = SignSGD(embedding.float(), lr=0.1, weight_decay=0.5)
    embedding.double()  # puts another tensor in the buffer's place
    before = embedding.weights.clone()

    def closure():
        optimizer.zero_grad()
        value = loss(embedding)
        value.backward()
        return value

    expected = loss(embedding).item()
    assert optimizer.step(closure).item() == expected
    torch.testing.assert_close(embedding.weights, moved(before))
    assert optimizer.param_groups[0]["params"][0] is embedding.weights


def test_evaluation_and_no_grad_leave_no_gradient(embedding):
    SignSGD(embedding)
    with torch.no_grad():
        assert not embedding(IDS).requires_grad
    assert not embedding.eval()(IDS).requires_grad


def test_bad_arguments(embedding):
    for name in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"SignSGD: {name} is -1"):
            SignSGD(embedding, **{name: -1})
    with pytest.raises(ValueError, match="add_param_group is not served"):
        SignSGD(embedding).add_param_group({"params": [torch.zeros(1)]})


SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from fastattn.models import Hrm, HrmConfig
from fastattn.optim import AdamATan2, SignSGD

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
alone = [dist.new_group([r]) for r in range(2)][rank]
SHAPE = dict(vocab_size=6, seq_len=5, num_puzzles=9, hidden_size=8, num_heads=2, intermediate_size=12, H_layers=1,
             L_layers=1, halt_max_steps=4, halt_exploration=0.0)


def start(group):
    torch.manual_seed(0)
    model = Hrm(HrmConfig(**SHAPE)).double()
    return model, SignSGD(model.puzzle_emb, lr=1e-2, weight_decay=0.1, process_group=group)


def sharded(model):
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    model.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    model.set_gradient_divide_factor(2.0)
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    data = {"inputs": torch.randint(0, 6, (8, 5), generator=generator),
            "labels": torch.randint(1, 6, (8, 5), generator=generator),
            "puzzle_ids": torch.randint(0, 9, (8,), generator=generator)}
    data["labels"][3 if step % 2 else 7] = -100  # padding on one rank
    if step == 0:
        data["labels"][4:] = -100  # the other one uses no row
    return data


def run(model, wrapped, puzzles, rows):
    optimizer = AdamATan2(wrapped.parameters(), lr=1e-2)
    carry, losses = model.initial_carry(len(range(8)[rows])), []
    for step in range(20):
        carry, out = wrapped(carry, {name: value[rows] for name, value in batch(step).items()})
        counted = out.counted.sum()
        if rows != slice(None):  # the mean over the rows of all ranks
            dist.all_reduce(counted)
        loss = out.loss * out.counted.sum() / counted
        puzzles.zero_grad()
        optimizer.zero_grad()
        (loss if rows == slice(None) else 2 * loss).backward()  # reductions divide by 2
        optimizer.step()
        puzzles.step()
        losses.append(loss.detach())
    return torch.stack(losses), out


model, puzzles = start(alone)
expected, _ = run(model, model, puzzles, slice(None))
assert model.puzzle_emb.weights.abs().max() > 0.05
for wrap in (torch.nn.parallel.DistributedDataParallel, sharded):
    mine, puzzles = start(None)
    losses, _ = run(mine, wrap(mine), puzzles, slice(4 * rank, 4 * rank + 4))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.puzzle_emb.weights, model.puzzle_emb.weights, rtol=0, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), mine.parameters(), strict=True):
        q = q.full_tensor() if hasattr(q, "full_tensor") else q
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5, msg=name)
    every = [torch.empty_like(mine.puzzle_emb.weights) for _ in range(2)]
    dist.all_gather(every, mine.puzzle_emb.weights)
    assert torch.equal(*every)
sys.stdout.write(f"rank {rank} is done\\n")
sys.stdout.flush()
dist.barrier()
os._exit(0)
"""


def test_two_ranks_equal_one_process(tmp_path):
    """20 steps under DistributedDataParallel and FSDP2, padding on one rank, a rank that uses no puzzle."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 is done" in done.stdout and "rank 1 is done" in done.stdout
