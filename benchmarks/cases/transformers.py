"""Whole models of transformers: HRM-Text on "fastattn", and a Llama and a Qwen3-Next with `accelerate`, each against its own functions."""

import copy
import functools

import torch

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than
from fastattn import testing
from fastattn.integrations.transformers import cache_name

BF16, FP32 = torch.bfloat16, torch.float32


@functools.cache
def _model(dtype):
    import transformers

    fa.integrations.transformers.register()
    torch.manual_seed(0)
    config = transformers.HrmTextConfig(
        vocab_size=1024, hidden_size=1536, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=12,
        head_dim=128, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _tokens(length):
    ids = torch.randint(1, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    return ids, (torch.arange(length) < length // 2).long()[None]


def _compare(actual, expected, dtype):
    """Two implementations of one model differ by roundings of the residual stream, eps each, random in sign."""
    scale = testing.max_finite(expected)
    error = testing.max_error(actual, expected)
    assert error <= 16 * torch.finfo(dtype).eps * scale, (
        f"logits differ by {error:.2e}, the largest is {scale:.2e}"
    )


def prefill(dtype, tokens):
    ids, types = _tokens(tokens)

    def run(implementation):
        model = _model(dtype).eval()
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(ids, token_type_ids=types, use_cache=False, logits_to_keep=1).logits

    return Problem(
        inputs=(),
        contenders={name: functools.partial(run, name) for name in ("fastattn", "sdpa")},
        compare=lambda logits: _compare(logits["fastattn"], logits["sdpa"], dtype),
    )


def training(dtype, tokens):
    """Loss and gradients. The weights stay as they are, so that every round does the same work."""
    ids, types = _tokens(tokens)

    def run(implementation):
        model = _model(dtype).train()
        model.set_attn_implementation(implementation)
        model.zero_grad(set_to_none=False)
        loss = model(ids, token_type_ids=types, labels=ids, use_cache=False).loss
        loss.backward()
        return model.model.H_module.layers[0].self_attn.q_proj.weight.grad.clone()  # the model is shared

    return Problem(
        inputs=(),
        contenders={name: functools.partial(run, name) for name in ("fastattn", "sdpa")},
        compare=lambda gradients: _compare(gradients["fastattn"], gradients["sdpa"], dtype),
    )


@functools.cache
def _llamas(dtype):
    """{contender: model} with the same weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    sdpa = transformers.LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    accelerated = copy.deepcopy(sdpa)
    fa.integrations.transformers.accelerate(accelerated)
    return {"fastattn": accelerated, "sdpa": sdpa}


def accelerated_prefill(dtype, tokens):
    ids, _ = _tokens(tokens)

    def run(name):
        with torch.no_grad():
            return _llamas(dtype)[name](ids, use_cache=False, logits_to_keep=1).logits

    return Problem(
        inputs=(),
        contenders={name: functools.partial(run, name) for name in ("fastattn", "sdpa")},
        compare=lambda logits: _compare(logits["fastattn"], logits["sdpa"], dtype),
    )


def accelerated_decode(dtype, batch, cached):
    """A token for each sequence, after which the cache is as long as before."""
    import transformers

    ids = torch.randint(1, 1024, (batch, cached + 1), generator=torch.Generator().manual_seed(0))
    caches = {}

    def run(name):
        model = _llamas(dtype)[name]
        with torch.no_grad():
            if name not in caches:
                caches[name] = transformers.DynamicCache(config=model.config)
                model(ids[:, :-1], use_cache=True, **{cache_name(): caches[name]})
            logits = model(ids[:, -1:], use_cache=True, **{cache_name(): caches[name]}).logits
            caches[name].crop(-1)
        return logits

    return Problem(
        inputs=(),
        contenders={name: functools.partial(run, name) for name in ("fastattn", "sdpa")},
        compare=lambda logits: _compare(logits["fastattn"], logits["sdpa"], dtype),
    )


@functools.cache
def _linear_time_models(dtype):
    """{contender: a Qwen3-Next with the proportions of the 80B's layers at a sixteenth of the width, and MLPs in place of experts},
    with the same weights. Three of its four layers are the gated delta rule."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64,
        linear_value_head_dim=64, mlp_only_layers=[0, 1, 2, 3], pad_token_id=0,
    )  # fmt: skip
    own = transformers.Qwen3NextForCausalLM._from_config(
        config, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    accelerated = copy.deepcopy(own)
    fa.integrations.transformers.accelerate(accelerated)
    return {"fastattn": accelerated, "transformers": own}


def linear_time_prefill(dtype, tokens):
    ids, _ = _tokens(tokens)

    def run(name):
        with torch.no_grad():
            return _linear_time_models(dtype)[name](ids, use_cache=False, logits_to_keep=1).logits

    return Problem(
        inputs=(),
        contenders={name: functools.partial(run, name) for name in ("fastattn", "transformers")},
        compare=lambda logits: _compare(logits["fastattn"], logits["transformers"], dtype),
    )


def linear_time_training(dtype, tokens):
    ids, _ = _tokens(tokens)

    def run(name):
        model = _linear_time_models(dtype)[name]
        model.zero_grad(set_to_none=False)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].linear_attn.in_proj_qkvz.weight.grad.clone()

    return Problem(
        inputs=(),
        contenders={name: functools.partial(run, name) for name in ("fastattn", "transformers")},
        compare=lambda gradients: _compare(gradients["fastattn"], gradients["transformers"], dtype),
    )


CASES = [
    Case("attention", "transformers hrm_text prefill half prefix", prefill, {"tokens": 2048}, BF16, "step",
         (faster_than("sdpa", 1.6),), needs={"torch matmul bf16": 100}),  # 2 TFLOP of linear layers a pass
    Case("attention", "transformers hrm_text prefill half prefix", prefill, {"tokens": 2048}, FP32, "step"),
    Case("attention", "transformers hrm_text training step", training, {"tokens": 1024}, FP32, "step",
         (faster_than("sdpa", 1.3),)),
    Case("linear_time", "transformers qwen3_next accelerated prefill", linear_time_prefill, {"tokens": 2048}, FP32, "step",
         (faster_than("transformers", 2.0),)),
    Case("linear_time", "transformers qwen3_next accelerated training step", linear_time_training, {"tokens": 1024}, FP32,
         "step", (faster_than("transformers", 3.0),)),
    Case("attention", "transformers llama accelerated prefill", accelerated_prefill, {"tokens": 1024}, BF16, "step",
         (faster_than("sdpa", 1.5),)),
    Case("attention", "transformers llama accelerated prefill", accelerated_prefill, {"tokens": 1024}, FP32, "step",
         (faster_than("sdpa", 1.25),)),
    *(
        Case("attention", "transformers llama accelerated decode", accelerated_decode, {"batch": batch, "cached": 256}, dtype,
             "step", (faster_than("sdpa", 2.0),))
        for dtype in (BF16, FP32) for batch in (1, 8)
    ),
]  # fmt: skip
