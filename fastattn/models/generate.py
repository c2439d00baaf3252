"""Decoding with a static cache: the prompt in one piece, then a token a step."""

import operator
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn.plain import linear
from ..nn.vq_head import VQHead

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
    stop_tokens: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    stream: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues each prompt; the prompt is the prefix, whose tokens see each other both ways.

    Args:
        input_ids: (B, L) prompts, padded on the right where shorter than L.
        prompt_lengths: (B,), 1 to L, on the model's device or the CPU. Default: all L.
        max_new_tokens: at least 1.
        temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
        top_k: draw from the k most likely tokens only, and those as likely as the last of them; 0 or None: from all.
        top_p: after top_k, leave out the least likely tokens whose probabilities add up to at most 1 - p; 1 or None leaves
            out none, 0 all but the most likely. Both cuts are transformers'.
        stop_tokens: a row ends with the first of these that it generates; its prompt may hold them. Default:
            config.eos_token_id; () for none.
        generator: of the random draws, on the model's device.
        stream: called after each step with the new tokens (B,). An exception from it ends the call.

    Returns:
        (B, L + new): the prompts as given, then the new tokens from column L on, whatever the row's prompt
        length. ``new`` is max_new_tokens, or less when every row has ended. After its stop token a row is filled
        with config.pad_token_id, or with the stop token itself when the config has none.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
        ValueError: on the CPU, where a state or the largest logit is NaN or infinite.
    """
    config = model.config
    device = model.embed_tokens.weight.device
    _check_prompts(input_ids, prompt_lengths, max_new_tokens, config.max_position_embeddings, device)
    _check_sampling(temperature, top_k, top_p, generator, device)
    if stop_tokens is None:
        eos = config.eos_token_id
        stop_tokens = () if eos is None else eos if isinstance(eos, tuple) else (eos,)
    stop = _stop_tokens(stop_tokens, config.vocab_size, device)
    B, L = input_ids.shape
    lengths = prompt_lengths
    if lengths is None:
        lengths = torch.full((B,), L, device=input_ids.device)
    cache = model.make_cache(B, L + max_new_tokens - 1 if max_new_tokens > 1 else L)
    uniform = prompt_lengths is None
    prefix = lengths if config.prefix_lm else None
    hidden, _ = model.hidden_states(input_ids, prefix, lengths=None if uniform else lengths, cache=cache)
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
    _check_finite("states", last)
    if isinstance(head, VQHead) and temperature == 0:
        return head.argmax(last)
    if isinstance(head, VQHead) and not top_k and (top_p is None or top_p == 1):
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
        most, token = logits.max(-1)
        _check_finite("logits", most)
        return token
    # differences from the largest: no division by a small temperature overflows to two infinities
    logits = logits.float()
    most = logits.amax(-1, keepdim=True)
    _check_finite("logits", most)
    limits = torch.finfo(torch.float32)
    logits = (logits - most) / min(max(temperature, limits.tiny), limits.max)
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        rising, index = logits.sort(-1)
        left_out = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        left_out[:, -1] = False
        logits = logits.masked_fill(left_out.scatter(-1, index, left_out), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check_finite(name: str, values: Tensor) -> None:
    # on a GPU the check would wait for the device
    if values.device.type == "cpu" and not bool(values.isfinite().all()):
        raise ValueError(
            f"generate: the {name} hold NaN or infinity; the model's weights are not finite, or overflow its dtype"
        )


def _check_prompts(
    input_ids: Tensor, prompt_lengths: Tensor | None, max_new_tokens: int, limit: int, device: torch.device
) -> None:
    for name, value in (("input_ids", input_ids), ("prompt_lengths", prompt_lengths)):
        if value is None and name == "prompt_lengths":
            continue
        if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
            given = value.dtype if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"generate: {name} is {given}; it must be an int32 or int64 tensor")
        # lengths on the host spare a wait for a GPU
        if value.device != device and not (name == "prompt_lengths" and value.device.type == "cpu"):
            raise ValueError(f"generate: {name} is on {value.device}, but the model is on {device}")
    if device.type == "meta":
        raise ValueError("generate: the model is on meta: it has no weights")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"generate: input_ids has shape {tuple(input_ids.shape)}; it must be (B, L), not empty"
        )
    B, L = input_ids.shape
    _check_count("max_new_tokens", max_new_tokens)
    if L + max_new_tokens > limit:
        raise ValueError(
            f"generate: a prompt of {L} tokens and {max_new_tokens} new ones exceed "
            f"max_position_embeddings {limit}"
        )
    if prompt_lengths is None:
        return
    if prompt_lengths.shape != (B,):
        raise ValueError(
            f"generate: prompt_lengths has shape {tuple(prompt_lengths.shape)}; it must be one a row: ({B},)"
        )
    if prompt_lengths.device.type == "cpu" and not bool(
        ((prompt_lengths >= 1) & (prompt_lengths <= L)).all()
    ):
        raise ValueError(
            f"generate: prompt_lengths is {prompt_lengths.tolist()}; each must be from 1 to {L}, input_ids' columns"
        )


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"generate: {name} is {value!r}; it must be an int")
    if value < least:
        raise ValueError(f"generate: {name} is {value}; it must be at least {least}")


def _check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    device: torch.device,
) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, Real) and not (value is None and name == "top_p"):
            raise TypeError(f"generate: {name} is {value!r}; it must be a number")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature}; it must be 0 or a positive number")
    if top_k is not None:
        _check_count("top_k", top_k, least=0)
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}; it must be from 0 to 1")
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generate: generator is {generator!r}; it must be a torch.Generator")
    if generator.device.type != device.type:
        raise ValueError(f"generate: generator is on {generator.device}, but the model is on {device}")


def _stop_tokens(tokens: Iterable[int], vocab_size: int, device: torch.device) -> Tensor:
    """(n,) int64, sorted."""
    try:
        ids = sorted({operator.index(token) for token in tokens})
    except TypeError:
        raise TypeError(f"generate: stop_tokens is {tokens!r}; it must be ints") from None
    if ids and not 0 <= ids[0] <= ids[-1] < vocab_size:
        raise ValueError(f"generate: stop_tokens is {ids}; ids are from 0 to {vocab_size - 1}")
    return torch.tensor(ids, dtype=torch.int64, device=device)
