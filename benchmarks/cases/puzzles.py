"""Hrm's training step against its reference's structure in eager torch, with the same weights.

The peer is written for the comparison: torch's linear layers and SDPA, the norm, rotary and StableMax as the
reference's code has them (float32 inside, the loss in float64), no gradients in all but the last two stack calls, and
one more forward for the value of going on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.registry import Case, Problem, faster_than
from fastattn import testing
from fastattn.models import Hrm, HrmConfig

SHAPE = {"vocab_size": 11, "seq_len": 81}


def _rms(x: Tensor, eps: float) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, L, H, D); cos, sin: (L, 1, D)."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class EagerBlock(nn.Module):
    def __init__(self, config: HrmConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.heads, self.eps = config.num_heads, config.rms_norm_eps
        self.self_attn = nn.ModuleDict(
            {"qkv_proj": nn.Linear(D, 3 * D, bias=False), "o_proj": nn.Linear(D, D, bias=False)}
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_up_proj": nn.Linear(D, 2 * inner, bias=False),
                "down_proj": nn.Linear(inner, D, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.self_attn["qkv_proj"](x).view(B, L, 3, self.heads, -1).unbind(2)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)
        x = _rms(x + self.self_attn["o_proj"](out), self.eps)
        gate, up = self.mlp["gate_up_proj"](x).chunk(2, -1)
        return _rms(x + self.mlp["down_proj"](F.silu(gate) * up), self.eps)


class EagerStack(nn.Module):
    def __init__(self, config: HrmConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EagerBlock(config) for _ in range(layers))

    def forward(self, state: Tensor, injection: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = state + injection
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


class EagerHrm(nn.Module):
    """The loss of one segment on a fresh batch; its parameters have Hrm's names."""

    def __init__(self, config: HrmConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.q_head = nn.Linear(D, 2)
        self.puzzle_emb = nn.ParameterDict({"weights": torch.zeros(config.num_puzzles, D)})
        self.H_init, self.L_init = (nn.Parameter(torch.empty(D), requires_grad=False) for _ in range(2))
        self.recurrence = nn.ModuleDict(
            {
                "L_stack": EagerStack(config, config.L_layers),
                "H_stack": EagerStack(config, config.H_layers),
            }
        )

    def segment(self, zH: Tensor, zL: Tensor, inputs: Tensor, puzzle_ids: Tensor) -> tuple[Tensor, ...]:
        config = self.config
        L_stack, H_stack = self.recurrence["L_stack"], self.recurrence["H_stack"]
        puzzle = self.puzzle_emb["weights"][puzzle_ids][:, None]
        x = config.hidden_size**0.5 * torch.cat((puzzle, self.embed_tokens(inputs)), 1)
        width = config.hidden_size // config.num_heads
        angles = config.rope_theta ** -(torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), angles)
        angles = torch.cat((angles, angles), -1)[:, None]  # (L, 1, D)
        rotary = angles.cos(), angles.sin()
        with torch.no_grad():
            for h in range(config.H_cycles):
                for l in range(config.L_cycles):
                    if (h, l) != (config.H_cycles - 1, config.L_cycles - 1):
                        zL = L_stack(zL, zH + x, *rotary)
                if h != config.H_cycles - 1:
                    zH = H_stack(zH, zL, *rotary)
        zL = L_stack(zL, zH + x, *rotary)
        zH = H_stack(zH, zL, *rotary)
        q = self.q_head(zH[:, 0]).float()
        return zH, zL, self.lm_head(zH)[:, 1:], q[:, 0], q[:, 1]

    def forward(self, batch: dict[str, Tensor], *, extra: bool) -> Tensor:
        inputs, labels, ids = (batch[name] for name in ("inputs", "labels", "puzzle_ids"))
        shape = (len(inputs), inputs.shape[1] + 1, -1)
        zH, zL = self.H_init.expand(shape), self.L_init.expand(shape)
        zH, zL, logits, q_halt, q_continue = self.segment(zH, zL, inputs, ids)
        zH, zL = zH.detach(), zL.detach()
        wide = logits.double()
        s = torch.where(wide < 0, 1 / (1 - wide + 1e-30), wide + 1)
        chosen = torch.log(s / s.sum(-1, keepdim=True)).gather(-1, labels[..., None])[..., 0]
        right = (logits.argmax(-1) == labels).all(-1)
        loss = -chosen.mean(-1).sum()
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q_halt, right.float(), reduction="sum")
        if extra:
            with torch.no_grad():
                *_, next_halt, next_continue = self.segment(zH, zL, inputs, ids)
                target = torch.maximum(next_halt, next_continue).sigmoid()
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q_continue, target, reduction="sum")
        return loss / len(inputs)


def training(dtype, hidden, layers, batch, extra_pass):
    """Loss and gradients of a segment of ``batch`` fresh puzzles.

    The peer always makes the extra pass, as the reference does; the one that is compared in value makes it as we do.
    """
    torch.manual_seed(0)
    config = HrmConfig(
        **SHAPE,
        hidden_size=hidden,
        num_heads=hidden // 64,
        H_layers=layers,
        L_layers=layers,
        q_continue=extra_pass,
    )
    ours = Hrm(config).to(dtype)
    theirs = EagerHrm(config).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    data = {
        "inputs": torch.randint(1, 11, (batch, 81), generator=generator),
        "labels": torch.randint(2, 11, (batch, 81), generator=generator),
        "puzzle_ids": torch.zeros(batch, dtype=torch.int64),
    }

    def run():
        ours.zero_grad(set_to_none=False)
        _, out = ours(ours.initial_carry(batch), data)
        out.loss.backward()
        return out.loss.detach()

    def peer(extra=True):
        theirs.zero_grad(set_to_none=False)
        loss = theirs(data, extra=extra)
        loss.backward()
        return loss.detach()

    def check():
        testing_loss, peers = run(), peer(extra=extra_pass)
        assert abs(testing_loss - peers) <= 1e-5 * abs(peers), f"the losses are {testing_loss} and {peers}"
        grads = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            # fp32 sums over up to 2624 rows in another order, through 16 blocks: random roundings of eps each
            scale = testing.max_finite(grads[name].grad)
            error = testing.max_error(p.grad, grads[name].grad)
            assert error <= 1e-3 * scale, f"{name}'s gradients differ by {error:.2e} of {scale:.2e}"

    rows = batch * (81 + config.puzzle_len)
    weights = 4 * hidden**2 + 3 * hidden * config.intermediate_size
    attention = 4 * rows * (81 + config.puzzle_len) * hidden
    block = 2 * rows * weights + attention
    passes = (2 * 3 + 4) + (6 if extra_pass else 0)  # a backward is two forwards' work
    return Problem((), {"fastattn": run, "eager": peer}, check=check, flops=float(passes * layers * block))


SUDOKU = {"hidden": 512, "layers": 4, "batch": 32}
CASES = [
    Case("models", "Hrm training step", training, SUDOKU | {"extra_pass": extra}, torch.float32, "step",
         (faster_than("eager", bar),))
    for extra, bar in ((True, 2.0), (False, 2.8))
]  # fmt: skip
