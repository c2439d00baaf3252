"""ParScale: one model run as several streams that learned prefixes tell apart, and their weighted sum."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..ops.rowwise import rotary
from .blocks import Attention, Routing


class ParallelStreams(nn.Module):
    """A stack run on P copies of its input at once, each with a learned prefix of keys and values in every layer ("Parallel Scaling
    Law for Language Models", arXiv 2505.10475)::

        h_p = stack(x with prefix p);  w = (1 - smoothing) softmax(MLP([h_1 ... h_P])) + smoothing / P
        y   = sum_p w_p h_p

    The P streams are one batch of P * B rows. A query attends its stream's whole prefix and, under a causal mask, the tokens up to its
    own: the last query is aligned with the last key, so a prefix before the keys is exactly that. Prefix keys are used as they are,
    without a rotation, and tokens keep their positions. The weights of a token are made of its own states alone, so no token sees a
    later one (a test holds that).

    Args:
        stack: a PreNormStack (HRM-Text's), or a module called as ``stack(x, injection, routing, cache)`` whose ``layers`` have
            an ``attn``, a fastattn.nn.blocks.Attention that gets its layer's entry of ``cache``.
        streams: P, at least 1.
        prefix_length: keys of a prefix, default 48.
        smoothing: in [0, 1], default 0.01; keeps a stream from dying.

    Parameters: ``prefixes`` (layers, 2, P, heads, prefix_length, head_dim), normal of deviation 0.02, keys and values; ``aggregate``, the
    MLP: Linear(P * D, D), SiLU, Linear(D, P).

    >>> y = fastattn.nn.ParallelStreams(stack, 4)(x, fastattn.nn.blocks.Routing(fastattn.Mask(causal=True), torch.arange(x.shape[1])))
    """

    def __init__(
        self, stack: nn.Module, streams: int, *, prefix_length: int = 48, smoothing: float = 0.01
    ) -> None:
        super().__init__()
        for name, value in (("streams", streams), ("prefix_length", prefix_length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"ParallelStreams: {name} is {value!r}; it must be an int of at least 1")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"ParallelStreams: smoothing is {smoothing!r}; it must be from 0 to 1")
        layers = getattr(stack, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise TypeError(
                f"ParallelStreams: stack is a {type(stack).__name__}; it must have layers, as PreNormStack has"
            )
        attentions = [getattr(layer, "attn", None) for layer in layers]
        own = [attention for attention in attentions if isinstance(attention, Attention)]
        if len(own) != len(layers):
            raise TypeError(
                f"ParallelStreams: stack is a {type(stack).__name__}; the layers' attn must be fastattn's Attention, "
                "which takes a cache"
            )
        heads = {(attention.num_heads, attention.head_dim) for attention in own}
        if len(heads) > 1:
            raise ValueError(f"ParallelStreams: the layers differ in heads and head_dim: {sorted(heads)}")
        ((num_heads, head_dim),) = heads
        self.stack, self.streams, self.smoothing = stack, streams, smoothing
        weight = own[0].o_proj.weight
        D = weight.shape[0]
        shape = (len(layers), 2, streams, num_heads, prefix_length, head_dim)
        self.prefixes = nn.Parameter(weight.new_empty(shape))
        nn.init.normal_(self.prefixes, std=0.02)
        self.aggregate = nn.Sequential(nn.Linear(streams * D, D), nn.SiLU(), nn.Linear(D, streams)).to(weight)

    def extra_repr(self) -> str:
        return f"streams={self.streams}, prefix_length={self.prefixes.shape[-2]}"

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """y (B, L, D) of x (B, L, D).

        routing: mask and positions, (L,) or (B, L). The mask is None or causal: windows, prefix and key lengths, documents and dense masks
        count keys from the first, which the prefix moves; they are NotImplementedError.
        """
        if x.dim() != 3:
            raise ValueError(f"ParallelStreams: x has shape {tuple(x.shape)}; it must be (B, L, D)")
        _check_mask(routing.mask)
        P, (B, L, D) = self.streams, x.shape
        positions = routing.positions
        if positions.dim() == 2:
            positions = positions.expand(B, L).repeat(P, 1)
        copies = x.repeat(P, 1, 1)  # (P * B, L, D), stream after stream
        cache = [_Prefix(keys, values, B) for keys, values in self.prefixes]
        h = self.stack(copies, torch.zeros_like(copies), Routing(routing.mask, positions), cache)
        h = h.view(P, B, L, D)
        scores = self.aggregate(h.permute(1, 2, 0, 3).reshape(B, L, P * D))
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights = (1 - self.smoothing) * weights + self.smoothing / P
        return torch.einsum("blp,pbld->bld", weights.to(h.dtype), h)


@dataclass(frozen=True)
class _Prefix:
    """What a layer takes for its cache: keys and values (P, H, n, D) before those of each of the P * B rows."""

    keys: Tensor
    values: Tensor
    batch: int

    def append_rotated(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, theta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k = rotary(q, k, positions, theta=theta)
        keys, values = (t.repeat_interleave(self.batch, 0).to(k.dtype) for t in (self.keys, self.values))
        return q, torch.cat([keys, k], 2), torch.cat([values, v], 2)


def _check_mask(mask: Mask | None) -> None:
    for name in () if mask is None else mask.fields:
        if name != "causal":
            raise NotImplementedError(f"ParallelStreams: the mask has {name}; None and causal are served")
