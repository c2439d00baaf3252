"""HRM and TRM as their own code builds them, written anew in plain torch: its modules' names, its arch file's keys."""

import torch
import torch.nn.functional as F
from torch import nn

HRM = {
    "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
    "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
    "halt_exploration_prob": 0.1,
    "halt_max_steps": 4,
    "H_cycles": 2,
    "L_cycles": 2,
    "H_layers": 2,
    "L_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "expansion": 4,
    "puzzle_emb_ndim": 16,
    "pos_encodings": "rope",
}
TRM = HRM | {
    "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
    "H_layers": 0,
    "H_cycles": 3,
    "L_cycles": 3,
    "forward_dtype": "bfloat16",
    "mlp_t": False,
    "puzzle_emb_len": 16,
    "no_ACT_continue": True,
}
DATA = {"vocab_size": 7, "seq_len": 9, "num_puzzle_identifiers": 5}  # what it takes from the data


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class Embedding(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.randn(count, width) * width**-0.5)


class Sparse(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.register_buffer("weights", torch.randn(count, width))


class SwiGLU(nn.Module):
    def __init__(self, width, expansion):
        super().__init__()
        inner = -(round(expansion * width * 2 / 3) // -256) * 256
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, angle):
        B, L, _ = x.shape
        qkv = self.qkv_proj(x).view(B, L, 3 * self.heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.split(self.heads, 2))
        if angle is not None:

            def rotate(x):
                a, b = x.chunk(2, -1)
                return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

            q, k = rotate(q), rotate(k)
        out = (q @ k.mT / self.head_dim**0.5).softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))


class Block(nn.Module):
    def __init__(self, arch, length):
        super().__init__()
        if arch.get("mlp_t"):
            self.mlp_t = SwiGLU(length, arch["expansion"])
        else:
            self.self_attn = Attention(arch["hidden_size"], arch["num_heads"])
        self.mlp = SwiGLU(arch["hidden_size"], arch["expansion"])

    def forward(self, x, angle):
        if hasattr(self, "mlp_t"):
            x = x.transpose(1, 2)
            x = rms(x + self.mlp_t(x)).transpose(1, 2)
        else:
            x = rms(x + self.self_attn(x, angle))
        return rms(x + self.mlp(x))


class Level(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, state, injection, angle):
        x = state + injection
        for layer in self.layers:
            x = layer(x, angle)
        return x


class Inner(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.arch = arch = arch | DATA
        width = arch["hidden_size"]
        self.puzzle_len = arch.get("puzzle_emb_len", 0) or -(arch["puzzle_emb_ndim"] // -width)
        length = self.puzzle_len + arch["seq_len"]
        self.embed_tokens = Embedding(arch["vocab_size"], width)
        self.lm_head = nn.Linear(width, arch["vocab_size"], bias=False)
        self.q_head = nn.Linear(width, 2)
        self.puzzle_emb = Sparse(arch["num_puzzle_identifiers"], arch["puzzle_emb_ndim"])
        self.angle = None
        if arch["pos_encodings"] == "rope":
            half = width // arch["num_heads"] // 2
            angle = torch.arange(length)[:, None] * 1e4 ** -(torch.arange(half, dtype=torch.float64) / half)
            self.angle = torch.cat([angle, angle], -1)
        elif arch["pos_encodings"] == "learned":
            self.embed_pos = Embedding(length, width)
        self.L_level = Level([Block(arch, length) for _ in range(arch["L_layers"])])
        self.is_trm = "trm@" in arch["name"]
        if not self.is_trm:
            self.H_level = Level([Block(arch, length) for _ in range(arch["H_layers"])])
        self.register_buffer("H_init", torch.randn(width))
        self.register_buffer("L_init", torch.randn(width))

    def forward(self, zH, zL, inputs, puzzles):
        arch, width = self.arch, self.arch["hidden_size"]
        puzzle = self.puzzle_emb.weights[puzzles]
        puzzle = F.pad(puzzle, (0, self.puzzle_len * width - puzzle.shape[-1])).view(len(puzzle), -1, width)
        x = torch.cat([puzzle, self.embed_tokens.embedding_weight[inputs]], 1)
        if arch["pos_encodings"] == "learned":
            x = 0.707106781 * (x + self.embed_pos.embedding_weight)
        x = width**0.5 * x
        H_level = self.L_level if self.is_trm else self.H_level
        for _ in range(arch["H_cycles"]):
            for _ in range(arch["L_cycles"]):
                zL = self.L_level(zL, zH + x, self.angle)
            zH = H_level(zH, zL, self.angle)
        q = self.q_head(zH[:, 0])
        return zH, zL, self.lm_head(zH)[:, self.puzzle_len :], q[:, 0], q[:, 1]


class Named(nn.Module):
    """Its loss head holds ``model``, which holds ``inner``; torch.compile adds ``_orig_mod.``"""

    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)


def make(arch, seed=0):
    torch.manual_seed(seed)
    return Named("model", Named("inner", Inner(arch))).double()


def state(model):
    return {f"_orig_mod.{name}": tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def segments(model, inputs, puzzles, count=2):
    """(logits, q_halt, q_continue) of each segment."""
    inner = model.model.inner
    shape = (len(inputs), inner.puzzle_len + inputs.shape[1], -1)
    zH, zL = inner.H_init.expand(shape), inner.L_init.expand(shape)
    out = []
    for _ in range(count):
        zH, zL, *rest = inner(zH, zL, inputs, puzzles)
        out.append(rest)
    return out
