"""Focus (arXiv 2604.03260): a router that gives tokens their groups, and its retrofit to a frozen transformers model."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..masks import Mask, token_counts
from ..ops.focus import MAX_GROUPS
from ..ops.gated import gated_attention
from ..ops.grouped import focus_groups, grouped_attention
from ..ops.sinkhorn import sinkhorn
from ..runtime import checks

NAME = "fastattn_focus"


class FocusRouter(nn.Module):
    """Groups of tokens from their hidden states: scores = (h W) C^T, balanced by Sinkhorn's iterations.

    d_model: width of h. groups: G, at most 63. group_dim: width of the centroids.
    top_k: groups of a token at inference. window: keys before a query that it always attends.
    temperature, iterations, causal: as in `fastattn.sinkhorn`. causal (default) keeps a token's groups from depending on later
        tokens; the plain form of the paper lets a causal model see the future through its routing.
    sharpness, gate: of `fastattn.gated_attention`, the form that trains the router.

    Parameters: projection (group_dim, d_model) and centroids (G, group_dim). In training mode a retrofitted layer runs
    `gated_attention` on the assignment, in eval mode `grouped_attention` on the signatures.
    """

    def __init__(
        self,
        d_model: int,
        groups: int = 8,
        group_dim: int = 16,
        *,
        top_k: int = 1,
        window: int = 128,
        temperature: float = 0.1,
        iterations: int = 10,
        causal: bool = True,
        sharpness: float = 1.0,
        gate: str = "multiply",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("groups", groups), ("group_dim", group_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"fastattn.FocusRouter: {name} must be an integer of at least 1, given {value!r}"
                )
        if groups > MAX_GROUPS:
            raise ValueError(f"fastattn.FocusRouter: groups must be at most {MAX_GROUPS}, given {groups}")
        if not 1 <= top_k <= groups:
            raise ValueError(f"fastattn.FocusRouter: top_k must lie in [1, {groups}], given {top_k!r}")
        self.top_k, self.window = top_k, window
        self.temperature, self.iterations, self.causal = temperature, iterations, causal
        self.sharpness, self.gate = sharpness, gate
        self.projection = nn.Parameter(torch.empty(group_dim, d_model, device=device, dtype=dtype))
        self.centroids = nn.Parameter(torch.empty(groups, group_dim, device=device, dtype=dtype))
        self.reset_parameters()
        self._caches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def reset_parameters(self) -> None:
        """Scores start with a variance of 1 / group_dim for hidden states of unit variance."""
        nn.init.normal_(self.projection, std=self.projection.shape[1] ** -0.5)
        nn.init.normal_(self.centroids, std=self.centroids.shape[1] ** -1.0)

    def extra_repr(self) -> str:
        groups, group_dim = self.centroids.shape
        return (
            f"d_model={self.projection.shape[1]}, groups={groups}, group_dim={group_dim}, top_k={self.top_k}"
        )

    def scores(self, h: torch.Tensor) -> torch.Tensor:
        """(h W) C^T: (B, L, d_model) -> (B, L, G)."""
        checks.check_tensor("FocusRouter", "h", h, dims=3)
        if h.shape[2] != self.projection.shape[1]:
            raise ValueError(
                f"fastattn.FocusRouter: h must be (B, L, {self.projection.shape[1]}), given {checks.describe(h)}"
            )
        return h.to(self.projection.dtype) @ self.projection.T @ self.centroids.T

    def forward(
        self,
        h: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The assignment (B, L, G) of hidden states (B, L, d_model); rows from `lengths` (B,) on are 0. For training.

        prefix_lengths: (B,), of the attention's mask: tokens before it see each other, and are routed by all of them.
        """
        return self._balanced(h, lengths, prefix_lengths)[0]

    def signature(
        self,
        h: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        potentials: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(signatures int64 (B, L), column potentials (B, 1, G)). For inference. lengths, prefix_lengths: as for training.

        potentials: those of the prefill, held fixed, when h continues it.
        """
        with torch.no_grad():
            assignment, potentials = self._balanced(h, lengths, prefix_lengths, potentials)
        return focus_groups(assignment, top_k=self.top_k), potentials

    def _balanced(
        self,
        h: torch.Tensor,
        lengths: torch.Tensor | None,
        prefix_lengths: torch.Tensor | None,
        potentials: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return sinkhorn(
            self.scores(h),
            temperature=self.temperature,
            iterations=self.iterations,
            causal=self.causal,
            lengths=lengths,
            prefix_lengths=prefix_lengths if self.causal else None,  # else all tokens are routed by all
            potentials=potentials,
            return_potentials=True,
        )

    @staticmethod
    def retrofit(model: Any, **options: Any) -> nn.ModuleList:
        """Give every attention layer of a transformers model a router of its own and freeze everything else.

        The model runs in eval mode with its own attention replaced. A layer whose router is in training mode gates its distant
        scores; one whose router is in eval mode attends its window and shared groups alone. The routers come in training mode:
        train with `torch.optim.Adam(routers.parameters())` and finish with `routers.eval()`.

        model: a decoder of transformers 5.9 or later whose layers use the attention interface (gpt2, llama, hrm_text, ...).
        options: those of FocusRouter, without d_model. Returns the routers as a ModuleList, one per attention layer, in order.

        Cached generation keeps each token's signature beside its key, and the potentials of the prefill stay fixed. The cache has to
        grow (DynamicCache) and its rows must keep their places (greedy search and sampling, not beam search).
        Raises ImportError without transformers; ValueError where the model has no such layer, or has routers already.
        """
        from ..integrations.transformers import register_as

        register_as(NAME, attention_forward, "nn.FocusRouter.retrofit")
        layers = [
            m for m in model.modules() if hasattr(m, "layer_idx") and getattr(m, "is_causal", None) is True
        ]
        if not layers:
            raise ValueError(
                f"fastattn.FocusRouter.retrofit: {type(model).__name__} has no causal attention layer"
            )
        if any(hasattr(m, "focus_router") for m in layers):
            raise ValueError(f"fastattn.FocusRouter.retrofit: {type(model).__name__} has routers already")
        model.set_attn_implementation(NAME)
        model.requires_grad_(False)
        model.eval()
        routers: list[FocusRouter] = []
        for layer in layers:
            weight = next(layer.parameters())
            router = FocusRouter(model.config.hidden_size, device=weight.device, **options)
            layer.focus_router = router
            layer.register_forward_pre_hook(_keep_hidden_states, with_kwargs=True)
            routers.append(router)
        hooks = _OneCache(routers)
        model.register_forward_pre_hook(hooks.before, with_kwargs=True)
        model.register_forward_hook(hooks.after)
        return nn.ModuleList(routers).train()


def _keep_hidden_states(layer: Any, args: tuple, kwargs: dict) -> None:
    layer.focus_input = args[0] if args else kwargs["hidden_states"]


class _OneCache:
    """Hooks of a retrofitted model: the signatures that its routers keep belong to one cache of keys."""

    def __init__(self, routers: list[FocusRouter]) -> None:
        self._routers = routers
        self._cache: Callable[[], Any] = _no_cache  # the cache that the routers' signatures belong to

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        from ..integrations.transformers import is_cache

        caches = [value for value in (*args, *kwargs.values()) if is_cache(value)]
        if all(cache.get_seq_length() == 0 for cache in caches):
            self._cache = _no_cache
            for router in self._routers:
                router._caches.clear()
        elif not any(cache is self._cache() for cache in caches):
            raise NotImplementedError(
                "fastattn: Focus keeps the signatures of one cache, the latest that was begun; this call has another cache"
            )

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        from ..integrations.transformers import is_cache

        parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        for part in parts:
            if is_cache(part):
                self._cache = weakref.ref(part)


def _no_cache() -> None:
    return None


def attention_forward(
    module: Any,  # a layer that `retrofit` gave a focus_router
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function of a retrofitted layer: query (B, Hq, Lq, D) -> ((B, Lq, Hq, D), None)."""
    from ..integrations.transformers import recognise, refuse

    if dropout:
        raise NotImplementedError(f"fastattn: Focus serves no attention dropout, given {dropout}")
    refuse(kwargs)
    for name in ("position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "softcap", "s_aux", "sinks"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"fastattn: Focus does not serve {name}")
    mask, keys = None, key.shape[2]
    if attention_mask is not None:
        recognised = recognise(attention_mask, keys)
        if recognised is None:
            raise NotImplementedError(
                "fastattn: Focus serves masks that forbid keys, not masks that add to scores"
            )
        mask, keys = recognised
        if query.shape[2] > 1 and (mask is None or not mask.causal):
            mask = _seeing_later(mask, query, keys)
    key, value = key[:, :, :keys], value[:, :, :keys]
    router, h = module.focus_router, module.focus_input
    module.focus_input = None
    whole = query.shape[2] == keys  # not the continuation of what a cache holds
    counts = {
        "lengths": token_counts(mask) if whole else None,
        # a dense mask says of each pair what may be seen: routing takes no later token
        "prefix_lengths": mask.prefix_lengths if whole and mask is not None and mask.dense is None else None,
    }
    if router.training:
        out = gated_attention(
            query,
            key,
            value,
            router(h, **counts),
            window=router.window,
            sharpness=router.sharpness,
            gate=router.gate,
            scale=scaling,
            mask=mask,
        )
    else:
        groups, key_groups = _signatures(router, h, counts, keys)
        out = grouped_attention(
            query,
            key,
            value,
            groups,
            key_groups=key_groups,
            window=router.window,
            scale=scaling,
            mask=mask or Mask(causal=True),
        )
    return out.transpose(1, 2).contiguous(), None


def _seeing_later(mask: Mask | None, query: torch.Tensor, keys: int) -> Mask:
    """A mask under which tokens may see later ones, for ops that are causal but for a prefix: that is all the keys."""
    lengths = token_counts(mask)
    if lengths is None:
        lengths = torch.full((query.shape[0],), keys, device=query.device)
    return Mask(
        prefix_lengths=lengths,
        key_lengths=token_counts(mask),
        dense=None if mask is None else mask.dense,
    )


def _signatures(
    router: FocusRouter, h: torch.Tensor, counts: dict[str, torch.Tensor | None], keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(signatures of h, signatures of all keys).

    A layer that runs several times in a step has a cache for each of them. Their lengths tell them apart: the caches that this
    step has extended already are longer.
    """
    num_cached = keys - h.shape[1]
    if num_cached == 0:
        groups, potentials = router.signature(h, **counts)
        router._caches.append((groups, potentials))
        return groups, groups
    for i, (before, potentials) in enumerate(router._caches):
        if before.shape == (h.shape[0], num_cached):
            groups, _ = router.signature(h, potentials=potentials)
            router._caches[i] = (torch.cat([before, groups], dim=1), potentials)
            return groups, router._caches[i][0]
    raise NotImplementedError(
        f"fastattn: Focus has no signatures for {num_cached} cached keys; a cache must grow from an empty one, and its rows must keep their places"
    )
