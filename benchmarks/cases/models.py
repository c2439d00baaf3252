"""HrmText against transformers' HRM-Text on "sdpa", with the same weights."""

import copy
import functools
import tempfile

import torch

from benchmarks.registry import Case, Problem, faster_than, share_of_peak
from fastattn import testing
from fastattn.integrations.transformers import cache_name
from fastattn.models import HrmText, HrmTextConfig
from fastattn.models.hrm_text_config import SIZES

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {  # hidden: (intermediate, heads)
    512: (1536, 4),
    1536: (4096, 12),
}


@functools.cache
def _pair(dtype, hidden, layers, vocabulary=1024, device="cpu"):
    """(ours, theirs)"""
    import transformers

    transformers.utils.logging.disable_progress_bar()

    intermediate, heads = SHAPES[hidden]
    config = transformers.HrmTextConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, head_dim=128, pad_token_id=0, L_bp_cycles=[0, 3],
        initializer_range=hidden**-0.5, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        theirs = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return HrmText.from_pretrained(folder).to(device), theirs


def _tokens(rows, length):
    return torch.randint(1, 1024, (rows, length), generator=torch.Generator().manual_seed(0))


def _compare(actual, expected, dtype, layers, calls=8):
    """Two implementations of one model differ by roundings: in each of its calls * layers blocks two products and two sums,
    up to eps / 2 of the residual stream each, uniform, on both sides. Five standard deviations, for the largest of many."""
    scale = testing.max_finite(expected)
    error = testing.max_error(actual, expected)
    bound = 5 * (2 * 4 * calls * layers / 12) ** 0.5 * torch.finfo(dtype).eps * scale
    assert error <= bound, (
        f"the results differ by {error:.2e}, bound {bound:.2e}, the largest value is {scale:.2e}"
    )


def _products(hidden, layers):
    """Operations a token in the products of one stack call, forward."""
    intermediate, heads = SHAPES[hidden]
    return 2 * layers * hidden * (5 * heads * 128 + 3 * intermediate)


def prefill(dtype, hidden, layers, tokens, device="cpu"):
    """The prompt into an empty cache, and the logits of its last token."""
    ids = _tokens(1, tokens).to(device)
    ours, theirs = _pair(dtype, hidden, layers, device=device)
    prefix = torch.tensor([tokens])

    @torch.no_grad()
    def run():
        cache = ours.make_cache(1, tokens)
        zH, _ = ours.hidden_states(ids, prefix_lengths=prefix, cache=cache)
        return ours.lm_head(zH[:, -1:])

    @torch.no_grad()
    def peer():
        return theirs(ids, token_type_ids=torch.ones_like(ids), use_cache=True, logits_to_keep=1).logits

    def compare(logits):
        _compare(logits["fastattn"], logits["transformers"], dtype, layers)

    flops = tokens * 8 * _products(hidden, layers)
    return Problem((), {"fastattn": run, "transformers": peer}, compare=compare, flops=flops)


LENGTHS = (32, 56, 80, 104, 128, 160, 200, 264)  # 1024 tokens in samples of unequal length


def training(dtype, hidden, layers, samples, tokens, lengths="equal", vocabulary=1024):
    """Loss and gradients of samples, the last half of each a response: packed here, a batch there, padded where the
    lengths are unequal. transformers' own packing (by position_ids) would let the prompts of all samples see each other."""
    ours, theirs = _pair(dtype, hidden, layers, vocabulary)
    sizes = torch.tensor(LENGTHS if lengths == "unequal" else [tokens // samples] * samples)
    assert (len(sizes), sizes.sum()) == (samples, tokens)
    prefixes = (sizes // 2).int()
    cu_seqlens = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    within = torch.arange(int(sizes.max())).expand(samples, -1)
    real = within < sizes[:, None]  # (samples, longest)
    types = (within < prefixes[:, None]).long()
    ids = _tokens(*real.shape).where(real, 0)
    labels = ids.masked_fill((types == 1) | ~real, -100)
    packed, packed_labels = ids[real][None], labels[real][None]
    attended = real.long() if lengths == "unequal" else None

    def run():
        ours.zero_grad(set_to_none=False)
        loss = ours(
            packed,
            labels=packed_labels,
            cu_seqlens=cu_seqlens,
            prefix_lengths=prefixes,
            bp_steps=5,
        ).loss
        loss.backward()
        return loss.detach(), ours.recurrence.H_stack.layers[0].mlp.down_proj.weight.grad

    def step(model):
        model.zero_grad(set_to_none=False)
        loss = model(ids, attention_mask=attended, token_type_ids=types, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), model.model.H_module.layers[0].mlp.down_proj.weight.grad

    def compare(found):
        truth = step(copy.deepcopy(theirs).to(FP32 if dtype is BF16 else torch.float64))
        own, peer = found["fastattn"], found["transformers"]
        _compare(own[0], peer[0], dtype, layers)
        testing.assert_close_to_truth(own[1], truth[1], peer[1], factor=3.0, name="weight's gradient")

    # eight calls forward, five of them with a backward of twice that; the head's classes for responses
    flops = tokens * ((8 + 2 * 5) * _products(hidden, layers) + 3 * vocabulary * hidden)
    return Problem((), {"fastattn": run, "transformers": lambda: step(theirs)}, compare=compare, flops=flops)


def decode(dtype, hidden, layers, batch, cached, shortest=None, device="cpu"):
    """One token a row after ``cached``, or from that down to ``shortest``: theirs then are padded on the left.

    The caches are put back, so that every round does the same work."""
    ours, theirs = _pair(dtype, hidden, layers, device=device)
    ids = _tokens(batch, cached + 1).to(device)
    prompt, token = ids[:, :cached], ids[:, cached:]
    cache = ours.make_cache(batch, cached + 1)
    ragged = shortest is not None
    lengths = torch.linspace(shortest if ragged else cached, cached, batch).long()
    padded = {}
    if ragged:
        there = torch.arange(cached + 1) >= cached - lengths[:, None]
        padded = {"attention_mask": there.long().to(device), "position_ids": lengths[:, None].to(device)}
    with torch.no_grad():
        ours(prompt, prefix_lengths=lengths, lengths=lengths if ragged else None, cache=cache)
        # theirs gets our keys and values: its own bf16 prompt can take minutes
        name = cache_name()
        kept = theirs(prompt[:, :1], token_type_ids=torch.ones_like(prompt[:, :1]), use_cache=True)[name]
        slots = zip(cache.keys.flatten(0, 1), cache.values.flatten(0, 1), strict=True)
        for layer, (keys, values) in zip(kept.layers, slots, strict=True):
            layer.keys, layer.values = (t[:, :, :cached].clone() for t in (keys, values))
            for row, length in enumerate(lengths.tolist()):
                for t in (layer.keys, layer.values):
                    t[row] = t[row].roll(cached - length, 1)

    @torch.no_grad()
    def run():
        logits = ours(token, cache=cache).logits
        cache.truncate(cached)
        cache.lengths.copy_(lengths)
        return logits

    def by_layers():
        handle = ours.recurrence.register_forward_hook(lambda *_: None)  # which the one op would not call
        logits = run()
        handle.remove()
        return logits

    @torch.no_grad()
    def peer():
        logits = theirs(token, use_cache=True, **{name: kept}, **padded).logits
        kept.crop(-1)
        return logits

    others = {"ours by layers": by_layers} if ragged else {}
    return Problem(
        (),
        {"fastattn": run, "transformers": peer} | others,
        check=lambda: _compare(run(), peer(), dtype, layers),
    )


@functools.cache
def _xl(dtype):
    """The released size, with random weights drawn in place: one copy in memory."""
    hidden, heads, intermediate, layers = SIZES["XL"]
    config = HrmTextConfig(
        vocab_size=65536, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads,
    )  # fmt: skip
    with torch.device("meta"):
        model = HrmText(config).to(dtype)
    torch.manual_seed(0)
    model.to_empty(device="cpu").reset_parameters()
    return model


def _xl_check(model):
    """A token over the cache against the whole sample at once, in the model's own dtype."""
    ids = _tokens(1, 17)
    with torch.no_grad():
        cache = model.make_cache(1, 17)
        model(ids[:, :16], cache=cache)
        stepped = model(ids[:, 16:], cache=cache).logits
        _compare(stepped, model(ids).logits[:, 16:], stepped.dtype, model.config.num_hidden_layers)


def xl_decode(dtype, cached):
    """A token of the released size: every block's weights and its keys and values are read once a call."""
    model = _xl(dtype)
    token, cache = _tokens(1, 1), model.make_cache(1, cached + 1)
    for t in (cache.keys, cache.values):
        t.normal_()
    cache.lengths.fill_(cached)
    cache.longest = cached

    @torch.no_grad()
    def run():
        logits = model(token, cache=cache).logits
        cache.truncate(cached)
        return logits

    recurrence = model.recurrence
    stacks = [sum(p.nbytes for p in s.parameters()) for s in (recurrence.L_stack, recurrence.H_stack)]
    read = recurrence.H_cycles * (recurrence.L_cycles * stacks[0] + stacks[1]) + model.lm_head.weight.nbytes
    read += (cache.keys.nbytes + cache.values.nbytes) * cached // (cached + 1)
    return Problem((), {"fastattn": run}, check=lambda: _xl_check(model), bytes=read, bandwidth="read")


def xl_prefill(dtype, tokens):
    """The prompt of the released size into an empty cache, and the logits of its last token."""
    model = _xl(dtype)
    ids, prefix = _tokens(1, tokens), torch.tensor([tokens])

    @torch.no_grad()
    def run():
        zH, _ = model.hidden_states(ids, prefix_lengths=prefix, cache=model.make_cache(1, tokens))
        return model.lm_head(zH[:, -1:])

    weights = sum(p.numel() for p in model.recurrence.parameters())  # of both stacks, called alike often
    width = model.config.num_attention_heads * model.config.head_dim
    calls, layers = model.recurrence.calls, model.config.num_hidden_layers
    flops = 2 * tokens * weights * calls / 2 + 4 * tokens**2 * width * calls * layers
    return Problem((), {"fastattn": run}, check=lambda: _xl_check(model), flops=flops)


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
        Case("models", "HrmText training step", training,
             NARROW | {"samples": 8, "tokens": 1024, "lengths": "unequal", "vocabulary": vocabulary}, FP32, "step")
        for vocabulary in (1024, 65536)
    ),
    *(
        Case("models", "HrmText decode", decode, NARROW | {"batch": batch, "cached": 256}, dtype, "step",
             (faster_than("transformers", 1.5),) if dtype is BF16 else ())
        for batch in (1, 8) for dtype in (BF16, FP32)
    ),
    Case("models", "HrmText decode, rows of different lengths", decode,
         NARROW | {"batch": 8, "cached": 256, "shortest": 32}, BF16, "step", (faster_than("transformers", 1.5),)),
    Case("models", "HrmText XL prefill", xl_prefill, {"tokens": 256}, BF16, "step"),
    Case("models", "HrmText XL decode", xl_decode, {"cached": 256}, BF16, "step", (share_of_peak(0.75),)),
]  # fmt: skip
