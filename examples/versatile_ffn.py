"""VersatileFFN (arXiv 2512.14531): one feed-forward layer reused in width, by slices of it, and in depth, by repetition.

    python examples/versatile_ffn.py       a minute on one core: a tiny language model with it, and one with the plain layer

F(h) = h + SwiGLU(norm(h)) is the layer. The width path is a mixture of experts that are slices of its neurons, the depth path repeats it
up to `loops` times, and the expected number of repetitions weighs the two. Every part reads its own token alone: nothing leaks, but in
training the number of loops is drawn (Gumbel), and in evaluation it is the likeliest.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from _common import options, text_stream, train, windows
from torch import Tensor, nn

import fastattn as fa
from fastattn.nn.blocks import Attention, Routing, clipped_normal_


class VersatileFFN(nn.Module):
    """::

        width = sum over the top_k experts k of softmax(W_g h)_k (h + SwiGLU_k(norm(h)))
        depth = sum over l of p_l F^l(h),   p = straight-through Gumbel softmax of W_l h; in evaluation the likeliest l
        y = lambda * width + (1 - lambda) * depth,   lambda = (loops - E[l]) / loops

    Expert k has the `expert_size` neurons from floor(k * stride) on, stride = (hidden - expert_size) / (experts - 1). The selected
    probabilities are not normalised again. E[l] is of the soft p.

    h: (..., d). Returns the same shape, and keeps ``balance``, the load-balancing loss of the last call (Switch Transformer's).
    """

    def __init__(
        self,
        d: int,
        hidden: int,
        *,
        experts: int = 8,
        top_k: int = 2,
        expert_size: int | None = None,
        loops: int = 4,
    ) -> None:
        super().__init__()
        size = hidden // experts if expert_size is None else expert_size
        if experts * size > hidden or experts < 2:
            raise ValueError(f"VersatileFFN: {experts} experts of {size} neurons do not fit into {hidden}")
        self.top_k, self.loops, self.temperature = top_k, loops, 1.0
        self.gate_up = nn.Linear(d, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)
        self.router = nn.Linear(d, experts, bias=False)
        self.looper = nn.Linear(d, loops, bias=False)
        clipped_normal_(self.gate_up.weight, d**-0.5)
        clipped_normal_(self.down.weight, hidden**-0.5)
        stride = (hidden - size) / (experts - 1)
        starts = [int(k * stride) for k in range(experts)]
        self.slices = [torch.arange(start, start + size) for start in starts]
        self.balance = torch.zeros(())

    def forward(self, h: Tensor) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])  # (N, d)
        soft, p = self._loops(rows)
        expected = (soft * torch.arange(1, self.loops + 1, dtype=soft.dtype)).sum(-1, keepdim=True)
        share = (self.loops - expected) / self.loops
        return (share * self._width(rows) + (1 - share) * self._depth(rows, p)).view(h.shape)

    def layer(self, rows: Tensor) -> Tensor:
        """F."""
        hidden = fa.fused_linear(rows, self.gate_up.weight, norm_eps=1e-6, swiglu=True)
        return fa.fused_linear(hidden, self.down.weight, residual=rows)

    def expert(self, k: int, rows: Tensor) -> Tensor:
        """F with expert k's neurons alone: their rows of the gate, of the values, and their columns of the way down."""
        index, width = self.slices[k], self.down.weight.shape[1]
        weight = self.gate_up.weight[torch.cat([index, index + width])]
        hidden = fa.fused_linear(rows, weight, norm_eps=1e-6, swiglu=True)
        return fa.fused_linear(hidden, self.down.weight[:, index], residual=rows)

    def _width(self, rows: Tensor) -> Tensor:
        scores = self.router(rows).softmax(-1)  # (N, experts)
        chosen = scores.topk(self.top_k, -1).indices
        result = torch.zeros_like(rows)
        for k in range(scores.shape[1]):  # each expert on the tokens that chose it
            mine = (chosen == k).any(-1).nonzero()[:, 0]
            if len(mine):
                result = result.index_add(0, mine, scores[mine, k, None] * self.expert(k, rows[mine]))
        used = F.one_hot(chosen, scores.shape[1]).to(scores.dtype).sum(1).mean(0) / self.top_k
        self.balance = scores.shape[1] * (used * scores.mean(0)).sum()
        return result

    def _loops(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(soft, one-hot) weights of the numbers of loops."""
        logits = self.looper(rows)
        if self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()  # plus Gumbel's
            soft = (logits / self.temperature).softmax(-1)
        else:
            soft = logits.softmax(-1)
        hard = F.one_hot(soft.argmax(-1), self.loops).to(soft.dtype)
        return soft, hard + soft - soft.detach() if self.training else hard

    def _depth(self, rows: Tensor, p: Tensor) -> Tensor:
        if self.training:  # every loop, as the gradient of each p asks for its state
            result, state = torch.zeros_like(rows), rows
            for loop in range(self.loops):
                state = self.layer(state)
                result = result + p[:, loop, None] * state
            return result
        count, state = p.argmax(-1), rows
        for loop in range(self.loops):  # a token leaves after its last loop
            going = (count >= loop).nonzero()[:, 0]
            if len(going):
                state = state.index_copy(0, going, self.layer(state[going]))
        return state


class Plain(VersatileFFN):
    """F once: the layer that is reused."""

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h.reshape(-1, h.shape[-1])).view(h.shape)


class Model(nn.Module):
    """Blocks of attention and a feed-forward layer of the kind given."""

    def __init__(
        self, vocabulary: int, kind: type[VersatileFFN], *, width: int, heads: int, layers: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.attentions = nn.ModuleList(
            Attention(width, heads, width // heads, gate=False, rope_theta=1e4) for _ in range(layers)
        )
        for attention in self.attentions:
            attention.reset_parameters(width**-0.5, width**-0.5)
        self.layers = nn.ModuleList(kind(width, 2 * width) for _ in range(layers))
        clipped_normal_(self.embedding.weight, 1.0)
        clipped_normal_(self.head.weight, width**-0.5)

    def loss(self, pieces: Tensor) -> Tensor:
        """Mean cross-entropy of (B, L + 1) tokens, and in training the balance of the experts."""
        x = self.embedding(pieces[:, :-1])
        routing = Routing(fa.Mask(causal=True), torch.arange(x.shape[1]))
        for attention, layer in zip(self.attentions, self.layers, strict=True):
            x = layer(x + attention(fa.rms_norm(x), routing))
        loss = fa.linear_cross_entropy(fa.rms_norm(x), self.head.weight, pieces[:, 1:])
        return loss + 0.01 * sum(layer.balance for layer in self.layers) if self.training else loss


def main(argv: Sequence[str] | None = None, shape: dict | None = None) -> dict[str, float]:
    given = options(__doc__, steps=100, argv=argv)
    shape = shape or {"width": 64, "heads": 4, "layers": 2}
    tokenizer, stream, held_out = text_stream(512)
    losses = {}
    for kind in (Plain, VersatileFFN):
        torch.manual_seed(given.seed)
        model = Model(tokenizer.vocab_size, kind, **shape)
        optimizer = train(
            model.loss, list(model.parameters()), windows(stream, 64, 8, given.seed), given.steps, 4e-3
        )
        model.eval()
        with optimizer.averaged(), torch.no_grad():
            pieces = next(windows(held_out, 64, 64, seed=1))
            losses[kind.__name__] = model.loss(pieces).item()
        print(
            f"{kind.__name__}: held-out loss {losses[kind.__name__]:.3f} after {given.steps} steps",
            flush=True,
        )
    return losses


if __name__ == "__main__":
    main()
