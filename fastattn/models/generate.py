"""Decoding with a static cache: the prompt in one piece, then a token a step."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn.vq_head import VQHead
from ..ops.matvec import linear

if TYPE_CHECKING:
    from .hrm_text import HrmText


@torch.no_grad()
def generate(
    model: "HrmText",
    input_ids: Tensor,
    *,
    prompt_lengths: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
    stream: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues each prompt; the prompt is the prefix, whose tokens see each other both ways.

    Args:
        input_ids: (B, L) prompts, padded on the right where shorter than L.
        prompt_lengths: (B,), 1 to L. Default: all L.
        max_new_tokens: at least 1.
        temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the smallest set of most likely tokens whose probability reaches p, after top_k.
        stop_tokens: a row ends with the first of these it produces. Default: none.
        generator: for the draws, on the model's device.
        stream: called after each step with the new tokens (B,).

    Returns:
        (B, L + new): the prompts as given, then the new tokens from column L on, whatever the row's prompt
        length. ``new`` is max_new_tokens, or less when every row has ended. After a row's stop token come
        pad tokens (config.pad_token_id, or the stop token again when there is none).
    """
    config = model.config
    B, L = input_ids.shape if input_ids.ndim == 2 else (0, 0)
    if B == 0 or L == 0:
        raise ValueError(
            f"generate: input_ids has shape {tuple(input_ids.shape)}; it must be (B, L), not empty"
        )
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; it must be at least 1")
    if L + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"generate: a prompt of {L} tokens and {max_new_tokens} new ones exceed "
            f"max_position_embeddings {config.max_position_embeddings}"
        )
    _check_sampling(temperature, top_k, top_p)
    stop = torch.tensor(sorted(set(stop_tokens)), dtype=torch.int64, device=input_ids.device)
    lengths = prompt_lengths
    if lengths is None:
        lengths = torch.full((B,), L, device=input_ids.device)
    cache = model.make_cache(B, L + max_new_tokens - 1 if max_new_tokens > 1 else L)
    uniform = prompt_lengths is None
    prefix = lengths if config.prefix_lm else None
    hidden, _ = model.hidden_states(
        input_ids, prefix_lengths=prefix, lengths=None if uniform else lengths, cache=cache
    )
    last = hidden[torch.arange(B, device=hidden.device), lengths.to(hidden.device, torch.int64) - 1]  # (B, D)
    ended = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    new_tokens: list[Tensor] = []
    while True:
        token = _next(model.lm_head, last, temperature, top_k, top_p, generator).to(input_ids.dtype)
        if new_tokens:
            fill = new_tokens[-1] if config.pad_token_id is None else config.pad_token_id
            token = torch.where(ended, fill, token)
        new_tokens.append(token)
        ended = ended | torch.isin(token, stop)
        if stream is not None:
            stream(token)
        if len(new_tokens) == max_new_tokens or (len(stop) and bool(ended.all())):
            return torch.cat([input_ids, torch.stack(new_tokens, 1)], 1)
        hidden, _ = model.hidden_states(token[:, None], cache=cache)
        last = hidden[:, 0]


def _next(
    head: nn.Module,
    last: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token a row, from states (B, D); a quantised head gives it without all logits where it can."""
    if isinstance(head, VQHead) and temperature == 0:
        return head.argmax(last)
    if isinstance(head, VQHead) and top_k is None and top_p is None:
        return head.sample(last, temperature=temperature, generator=generator)
    return sample(linear(last, head), temperature, top_k, top_p, generator)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row, (B,) int64, from logits (B, V); see :func:`generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept, index = logits.topk(top_k)
    else:
        kept, index = logits.sort(-1, descending=True)
    probabilities = kept.softmax(-1)  # (B, k), most likely first
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return index.gather(-1, choice)[:, 0]


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature}; it must be 0 or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}; it must be above 0 and at most 1")
