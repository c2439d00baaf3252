"""A block called again and again on the tokens that a router keeps: Mixture-of-Recursions, and Relaxed Recursive's LoRA a step."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..masks import Mask
from ..runtime.checks import traced
from .blocks import Routing
from .step_linear import Clock, StepLinear


class Choice(NamedTuple):
    """What a router decided at one step."""

    kept: Tensor  # (B, L) bool: the tokens that take the step
    weight: Tensor  # (B, L): of the block's result at each token
    logits: Tensor  # (B, L): of the router; no choice is made where a token was dropped before


class TopK(nn.Module):
    """Expert choice: each step keeps the tokens of its largest scores among those that the step before kept.

    ::

        scores_r = x . w_r;  kept_r = the shares[r] * L largest scores of kept_(r - 1)
        x[kept_r] += scale * sigmoid(scores_r[kept_r]) * block(x[kept_r])

    "Mixture-of-Recursions" (arXiv 2507.10524), table 2. **It leaks**: which tokens are kept depends on the whole sequence, so in a
    causal model a later token can take an earlier one's place. Its authors train a second router to tell the choice from the token
    alone, with a binary cross-entropy on :attr:`Choice.kept`, and use that to generate: `keep=` of :class:`Recursive`.

    Args:
        d_model: width of the tokens.
        shares: of the sequence that each step keeps, at most 1, never rising; one token at least is kept. Of equal scores the
            earlier token is kept.
        scale: of the weights, default 0.1, as the authors have it.

    Parameter: ``weight`` (steps, d_model), normal of deviation 0.02.
    """

    def __init__(self, d_model: int, shares: Sequence[float], *, scale: float = 0.1) -> None:
        super().__init__()
        self.shares = tuple(shares)
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"TopK: shares is {shares!r}; each must be over 0 and at most 1")
        if any(b > a for a, b in zip(self.shares, self.shares[1:], strict=False)):
            raise ValueError(f"TopK: shares is {shares!r}; a step cannot keep more than the one before it")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(len(self.shares), _positive("TopK", "d_model", d_model)))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def steps(self) -> int:
        return len(self.shares)

    def weights(self, logits: Tensor) -> Tensor:
        return self.scale * logits.sigmoid()


class TokenChoice(nn.Module):
    """Token choice: each token decides from its own first state how many steps it takes.

    ::

        p = scale * softmax(W x_0) over the steps;  depth = argmax p
        x_r = block(x_(r - 1)) for the tokens with depth >= r, which attend each other;  y = x_0 + p[depth] * x_depth

    "Mixture-of-Recursions" (arXiv 2507.10524), as its code has it (a step that is not a token's last has no weight). A token's
    depth depends on the token alone, so nothing leaks. The authors balance the steps by a loss on p, or by a bias that is moved
    without a gradient; both are the caller's, of what ``return_choices`` gives.

    Args:
        d_model: width of the tokens.
        steps: the most that a token may take; at least one is taken.
        function: "softmax" or "sigmoid" of the scores.
        scale: of the weights, default 1.

    Parameter: ``weight`` (steps, d_model), normal of deviation 0.02.
    """

    def __init__(self, d_model: int, steps: int, *, function: str = "softmax", scale: float = 1.0) -> None:
        super().__init__()
        if function not in ("softmax", "sigmoid"):
            raise ValueError(f"TokenChoice: function is {function!r}; it must be softmax or sigmoid")
        self.steps, self.function, self.scale = _positive("TokenChoice", "steps", steps), function, scale
        self.weight = nn.Parameter(torch.empty(steps, _positive("TokenChoice", "d_model", d_model)))
        nn.init.normal_(self.weight, std=0.02)

    def weights(self, logits: Tensor) -> Tensor:
        return self.scale * (logits.softmax(-1) if self.function == "softmax" else logits.sigmoid())


class Recursive(nn.Module):
    """One block called `steps` times, with a router that says which tokens take a step, and a LoRA of its own a step.

    Without a router every token takes every step, ``x = block(x)``. With one see :class:`TopK` and :class:`TokenChoice`. What a
    step computes is the block on the kept tokens alone, in their order and with their own positions: kept tokens attend kept
    tokens. It equals the block on the whole sequence with the keys of the others masked.

    ``lora_rank`` gives every nn.Linear of the block, in place, a term ``B_s (A_s x)`` at step s ("Relaxed Recursive
    Transformers", arXiv 2410.20672). B starts at zero, so that all steps start equal; :meth:`from_layers` starts from layers.

    Args:
        block: a module called as ``block(x, routing)``, x (B, L, D), which returns (B, L, D); routing is
            ``fastattn.nn.blocks.Routing(mask, positions)``. PostNormBlock is one.
        steps: default: the router's.
        router: TopK, TokenChoice or None.
        lora_rank: 0 for none. Of a layer with fewer rows or columns, that many.

    ``activation_checkpointing`` recomputes each step in the backward; a block that does so by itself fails with a LoRA, by name.
    TopK and no router compile with ``fullgraph=True``; TokenChoice and ``keep`` have shapes that depend on the data.

    >>> block = fastattn.nn.blocks.PostNormBlock(64, 4, 16, 128, rope_theta=1e4, eps=1e-6)
    >>> deeper = fastattn.nn.Recursive(block, router=fastattn.nn.TopK(64, [1, 0.5, 0.25]), lora_rank=4)
    >>> y = deeper(torch.randn(2, 40, 64), fastattn.nn.blocks.Routing(fastattn.Mask(causal=True), torch.arange(40)))
    """

    def __init__(
        self,
        block: nn.Module,
        steps: int | None = None,
        *,
        router: TopK | TokenChoice | None = None,
        lora_rank: int = 0,
    ) -> None:
        super().__init__()
        if router is not None and not isinstance(router, TopK | TokenChoice):
            raise TypeError(f"Recursive: router is a {type(router).__name__}; it must be TopK or TokenChoice")
        if router is not None and steps not in (None, router.steps):
            raise ValueError(f"Recursive: steps is {steps}; the router has {router.steps}")
        if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 0:
            raise ValueError(f"Recursive: lora_rank is {lora_rank!r}; it must be an int, not negative")
        self.steps = _positive("Recursive", "steps", steps if router is None else router.steps)
        self.activation_checkpointing = False
        self._clock = Clock()
        self.block = StepLinear.put_into(block, self.steps, lora_rank, self._clock) if lora_rank else block
        self.router = router

    @classmethod
    def from_layers(
        cls, layers: Sequence[nn.Module], *, lora_rank: int, router: TopK | TokenChoice | None = None
    ) -> "Recursive":
        """One block for several of one shape: the mean of each of their parameters, and for every nn.Linear and step the best
        term of that rank, by the singular values of ``W_s - W``. A full rank restores the products of the layers; of other
        parameters (biases, norms) the mean stays. The layers are left as they are.

        Raises:
            ValueError: layers whose parameters differ in names or shapes.
        """
        layers = list(layers)
        if not layers:
            raise ValueError("Recursive: layers is empty")
        shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers]
        for number, own in enumerate(shapes):
            if own != shapes[0]:
                different = sorted(
                    name for name in {*own, *shapes[0]} if own.get(name) != shapes[0].get(name)
                )
                raise ValueError(f"Recursive: layer {number} differs from layer 0 in {', '.join(different)}")
        block = copy.deepcopy(layers[0])
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                every = torch.stack([layer.get_parameter(name).double() for layer in layers])
                parameter.copy_(every.mean(0))
        result = cls(block, len(layers), router=router, lora_rank=lora_rank)
        for name, module in result.block.named_modules():
            if isinstance(module, StepLinear):
                module.start_from([layer.get_parameter(f"{name}.weight".lstrip(".")) for layer in layers])
        return result

    def extra_repr(self) -> str:
        return f"steps={self.steps}"

    @overload
    def forward(
        self,
        x: Tensor,
        routing: Routing | None = None,
        *,
        keep: Sequence[Tensor] | None = None,
        return_choices: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        routing: Routing | None = None,
        *,
        keep: Sequence[Tensor] | None = None,
        return_choices: Literal[True],
    ) -> tuple[Tensor, list[Choice]]: ...
    def forward(
        self,
        x: Tensor,
        routing: Routing | None = None,
        *,
        keep: Sequence[Tensor] | None = None,
        return_choices: bool = False,
    ) -> Tensor | tuple[Tensor, list[Choice]]:
        """The tokens after their steps.

        Args:
            x: (B, L, D), the router's dtype.
            routing: mask and positions; default: no mask, positions from 0. With a router the mask may be causal or not, and have
                packed documents; windows, prefixes, key lengths and dense masks are NotImplementedError where a step drops tokens.
            keep: TopK: (B, L) bool for each step in place of its choice, e.g. of a router that sees each token alone. A token
                that a step does not keep is not kept later.
            return_choices: also a :class:`Choice` a step.
        """
        if x.dim() != 3:
            raise ValueError(f"Recursive: x has shape {tuple(x.shape)}; it must be (B, L, D)")
        if routing is None:
            routing = Routing(None, torch.arange(x.shape[1], device=x.device))
        if keep is not None:
            if not isinstance(self.router, TopK):
                raise ValueError("Recursive: keep is for a TopK router")
            if len(keep) != self.steps:
                raise ValueError(f"Recursive: keep has {len(keep)} entries; there are {self.steps} steps")
            for one in keep:
                if one.dtype != torch.bool or one.shape != x.shape[:2]:
                    raise ValueError(
                        f"Recursive: keep holds {one.dtype} of shape {tuple(one.shape)}; it must be bool, {tuple(x.shape[:2])}"
                    )
        if self.router is not None and self.router.weight.shape[1] != x.shape[2]:
            raise ValueError(
                f"Recursive: x has width {x.shape[2]}; the router's d_model is {self.router.weight.shape[1]}"
            )
        choices: list[Choice] | None = [] if return_choices else None
        if isinstance(self.router, TopK):
            if keep is None:
                x = self._expert_choice(self.router, x, routing, choices)
            else:
                x = self._given(self.router, x, routing, keep, choices)
        elif isinstance(self.router, TokenChoice):
            x = self._token_choice(self.router, x, routing, choices)
        else:
            for step in range(self.steps):
                x = self._run(step, x, routing)
                if choices is not None:
                    every = x.new_ones(x.shape[:2])
                    choices.append(Choice(every.bool(), every, torch.zeros_like(every)))
        return x if choices is None else (x, choices)

    def _run(self, step: int, x: Tensor, routing: Routing) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._call, step, x, routing, use_reentrant=False)
        return self._call(step, x, routing)

    def _call(self, step: int, x: Tensor, routing: Routing) -> Tensor:
        before = self._clock.step
        self._clock.step = step
        try:
            return self.block(x, routing)
        finally:
            self._clock.step = before

    def _expert_choice(
        self, router: TopK, x: Tensor, routing: Routing, choices: list[Choice] | None
    ) -> Tensor:
        B, L, D = x.shape
        index = torch.arange(L, device=x.device).expand(B, L)  # the tokens kept, rising
        for step, share in enumerate(router.shares):
            among = x if index.shape[1] == L else _gather(x, index)
            logits = among @ router.weight[step]  # (B, n)
            count = min(max(1, int(share * L)), index.shape[1])
            chosen, before = logits, index
            if count < index.shape[1]:
                order = logits.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
                index, chosen, among = index.gather(1, order), logits.gather(1, order), _gather(among, order)
            weight = router.weights(chosen)
            own = routing if count == L else _dropped(routing, index, L)
            update = (weight[..., None] * self._run(step, among, own)).to(x.dtype)
            x = x + update if count == L else x.scatter_add(1, index[..., None].expand(-1, -1, D), update)
            if choices is not None:
                spread = logits.new_zeros(B, L)
                kept = torch.zeros_like(spread, dtype=torch.bool).scatter(1, index, True)
                choices.append(
                    Choice(kept, spread.scatter(1, index, weight), spread.scatter(1, before, logits))
                )
        return x

    def _given(
        self,
        router: TopK,
        x: Tensor,
        routing: Routing,
        keep: Sequence[Tensor],
        choices: list[Choice] | None,
    ) -> Tensor:
        kept = torch.ones_like(keep[0])
        for step, own in enumerate(keep):
            kept = kept & own
            logits = x @ router.weight[step]
            weight = router.weights(logits)
            update = weight[..., None] * self._ragged(step, x, kept, routing)
            x = torch.where(kept[..., None], x + update, x)
            if choices is not None:
                choices.append(Choice(kept, torch.where(kept, weight, 0.0), logits))
        return x

    def _token_choice(
        self, router: TokenChoice, x: Tensor, routing: Routing, choices: list[Choice] | None
    ) -> Tensor:
        logits = x @ router.weight.T  # (B, L, steps)
        p = router.weights(logits)
        depth = p.argmax(-1)  # of equal ones the first
        state, result = x, x
        for step in range(self.steps):
            kept = depth >= step
            state = torch.where(kept[..., None], self._ragged(step, state, kept, routing), state)
            last = depth == step
            weight = torch.where(last, p[..., step], 0.0)
            result = torch.where(last[..., None], x + weight[..., None] * state, result)
            if choices is not None:
                choices.append(Choice(kept, p[..., step], logits[..., step]))
        return result

    def _ragged(self, step: int, x: Tensor, kept: Tensor, routing: Routing) -> Tensor:
        """The block on kept tokens (B, L), which differ in number from row to row, laid end to end as documents; 0 elsewhere."""
        B, L, D = x.shape
        if bool(kept.all()):
            return self._run(step, x, routing)
        if not bool(kept.any()):
            return torch.zeros_like(x)
        mask = _simple(routing.mask)
        places = torch.arange(L, device=x.device).expand(B, L)
        counts = kept.sum(1)
        if mask is not None and mask.cu_seqlens_q is not None:
            counts = _counts(mask.cu_seqlens_q.to(x.device), places[kept])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        positions = routing.positions.to(x.device).expand(B, L)[kept][None]
        own = Routing(Mask(causal=mask is not None and mask.causal, cu_seqlens_q=offsets), positions)
        done = self._run(step, x[kept][None], own)[0]  # (n, D)
        return x.new_zeros(B, L, D).masked_scatter(kept[..., None], done)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, k, D) of x (B, L, D) at index (B, k)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _simple(mask: Mask | None) -> Mask | None:
    """The mask, if it means the same of a part of the tokens in their order; else NotImplementedError."""
    if mask is None:
        return None
    served = ("causal", "cu_seqlens_q") if _own_keys(mask) else ("causal", "cu_seqlens_q", "cu_seqlens_k")
    for name in mask.fields:
        if name not in served:
            raise NotImplementedError(
                f"Recursive: the mask has {name}, which counts tokens that a step drops; a router takes causal and cu_seqlens_q"
            )
    return mask


def _own_keys(mask: Mask) -> bool:
    """Whether documents have other keys than their own tokens; what a mask made in a compiled function holds is not read."""
    q, k = mask.cu_seqlens_q, mask.cu_seqlens_k
    return q is not None and k is not None and not traced() and not torch.equal(q, k)


def _counts(cu_seqlens: Tensor, places: Tensor) -> Tensor:
    """How many of the rising places lie in each document."""
    return torch.searchsorted(places, cu_seqlens.to(places.dtype)).diff()


def _dropped(routing: Routing, index: Tensor, length: int) -> Routing:
    """The routing of the tokens at index (B, k) alone."""
    mask = _simple(routing.mask)
    positions = routing.positions.to(index.device).expand(len(index), length).gather(1, index)
    if mask is not None and mask.cu_seqlens_q is not None:
        ends = torch.searchsorted(index[0].contiguous(), mask.cu_seqlens_q.to(index.device, index.dtype))
        mask = Mask(causal=mask.causal, cu_seqlens_q=ends)
    return Routing(mask, positions)


def _positive(op: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} is {value!r}; it must be an int of at least 1")
    return value
