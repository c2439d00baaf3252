"""HrmText against transformers' HRM-Text on "sdpa", with the same weights."""

import functools
import tempfile

import torch

from benchmarks.registry import Case, Problem, faster_than
from fastattn import testing
from fastattn.models import HrmText

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {  # hidden: (intermediate, heads)
    512: (1536, 4),
    1536: (4096, 12),
}


@functools.cache
def _pair(dtype, hidden, layers):
    """(ours, theirs)"""
    import transformers

    transformers.utils.logging.disable_progress_bar()

    intermediate, heads = SHAPES[hidden]
    config = transformers.HrmTextConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, head_dim=128, pad_token_id=0, L_bp_cycles=[0, 3],
        initializer_range=hidden**-0.5, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return HrmText.from_pretrained(folder), theirs


def _tokens(rows, length):
    return torch.randint(1, 1024, (rows, length), generator=torch.Generator().manual_seed(0))


def _compare(actual, expected, dtype):
    """Two implementations of one model differ by roundings of the residual stream, eps each, random in sign."""
    scale = testing.max_finite(expected)
    error = testing.max_error(actual, expected)
    assert error <= 16 * torch.finfo(dtype).eps * scale, (
        f"the results differ by {error:.2e}, the largest value is {scale:.2e}"
    )


def prefill(dtype, hidden, layers, tokens):
    """The prompt into an empty cache, and the logits of its last token."""
    ids = _tokens(1, tokens)
    ours, theirs = _pair(dtype, hidden, layers)
    prefix = torch.tensor([tokens])

    @torch.no_grad()
    def run():
        cache = ours.make_cache(1, tokens)
        zH, _ = ours.hidden_states(ids, prefix_lengths=prefix, cache=cache)
        return ours.lm_head(zH[:, -1:])

    @torch.no_grad()
    def peer():
        return theirs(ids, token_type_ids=torch.ones_like(ids), use_cache=True, logits_to_keep=1).logits

    return Problem((), {"fastattn": run, "transformers": peer}, check=lambda: _compare(run(), peer(), dtype))


def training(dtype, hidden, layers, samples, tokens):
    """Loss and gradients of ``samples`` equal samples, half of each a response: packed here, a batch there."""
    ours, theirs = _pair(dtype, hidden, layers)
    ids = _tokens(samples, tokens // samples)
    length = ids.shape[1]
    types = (torch.arange(length) < length // 2).long().expand_as(ids)
    labels = ids.masked_fill(types == 1, -100)
    cu_seqlens = torch.arange(samples + 1, dtype=torch.int32) * length
    prefixes = torch.full((samples,), length // 2, dtype=torch.int32)

    def run():
        ours.zero_grad(set_to_none=False)
        loss = ours(
            ids.view(1, -1),
            labels=labels.view(1, -1),
            cu_seqlens=cu_seqlens,
            prefix_lengths=prefixes,
            bp_steps=5,
        ).loss
        loss.backward()
        return loss.detach()

    def peer():
        theirs.zero_grad(set_to_none=False)
        loss = theirs(ids, token_type_ids=types, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def check():
        _compare(run(), peer(), dtype)
        stacks = (ours.recurrence.H_stack, theirs.model.H_module)
        _compare(*(stack.layers[0].mlp.down_proj.weight.grad for stack in stacks), dtype)

    return Problem((), {"fastattn": run, "transformers": peer}, check=check)


def decode(dtype, hidden, layers, batch, cached):
    """One token a row after ``cached``; the caches are put back, so that every round does the same work."""
    ours, theirs = _pair(dtype, hidden, layers)
    ids = _tokens(batch, cached + 1)
    prompt, token = ids[:, :cached], ids[:, cached:]
    cache = ours.make_cache(batch, cached + 1)
    with torch.no_grad():
        ours(prompt, prefix_lengths=torch.full((batch,), cached), cache=cache)
        kept = theirs(prompt, token_type_ids=torch.ones_like(prompt), use_cache=True).past_key_values

    @torch.no_grad()
    def run():
        logits = ours(token, cache=cache).logits
        cache.truncate(cached)
        return logits

    @torch.no_grad()
    def peer():
        logits = theirs(token, past_key_values=kept, use_cache=True).logits
        kept.crop(-1)
        return logits

    return Problem((), {"fastattn": run, "transformers": peer}, check=lambda: _compare(run(), peer(), dtype))


WIDE, NARROW = {"hidden": 1536, "layers": 2}, {"hidden": 512, "layers": 4}
FAST_BF16 = {"torch matmul bf16": 100}
CASES = [
    Case("models", "HrmText prefill", prefill, WIDE | {"tokens": 2048}, BF16, "step",
         (faster_than("transformers", 1.8),), needs=FAST_BF16),
    Case("models", "HrmText training step", training, WIDE | {"samples": 8, "tokens": 1024}, BF16, "step",
         (faster_than("transformers", 2.0),), needs=FAST_BF16),
    Case("models", "HrmText training step", training, NARROW | {"samples": 8, "tokens": 1024}, FP32, "step",
         (faster_than("transformers", 2.0),)),
    *(
        Case("models", "HrmText decode", decode, NARROW | {"batch": batch, "cached": 256}, dtype, "step",
             (faster_than("transformers", 1.5),) if dtype is BF16 else (),
             needs=FAST_BF16 if dtype is BF16 and batch > 1 else {})  # the prompt of 8 rows takes minutes without
        for batch in (1, 8) for dtype in (BF16, FP32)
    ),
]  # fmt: skip
