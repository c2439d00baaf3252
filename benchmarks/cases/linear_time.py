"""Linear attention against the torch functions that transformers falls back to."""

import functools

import torch

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, milliseconds_at_most
from fastattn import testing

BF16, FP32 = torch.bfloat16, torch.float32


def _peers():
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    return module


def _inputs(dtype, H, L, D, tokens=None):
    """q, k, v as a projection gives them, (B, L, H, D) seen as (B, H, L, D), and the gates."""
    make = functools.partial(testing.random_tensor, dtype=dtype, layout="swapped", requires_grad=True)
    q, k, v = (make(1, H, L, D, seed=seed) for seed in range(3))
    decay = testing.random_tensor(1, H, L, seed=3).abs().neg().requires_grad_()
    beta = torch.sigmoid(testing.random_tensor(1, H, L, seed=4)).to(dtype).requires_grad_()
    return q, k, v, decay, beta


def gated_delta_rule(dtype, H, L, D):
    inputs = _inputs(dtype, H, L, D)

    def ours(q, k, v, decay, beta):
        return fa.linear_attention(q, k, v, decay=decay, beta=beta, qk_norm=True)

    def theirs(*tensors):
        q, k, v, g, beta = (t.transpose(1, 2) for t in tensors)
        function = _peers().torch_chunk_gated_delta_rule
        return function(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0].transpose(1, 2)

    def check():
        with torch.no_grad():
            actual, expected = ours(*inputs), theirs(*inputs)
        # theirs takes exponentials of differences of sums of 64 logarithms
        bound = testing.max_finite(expected) * (64 * testing.EPS32 + torch.finfo(dtype).eps)
        assert testing.max_error(actual, expected) <= bound

    flops = 156e3 * (D / 128) ** 2 * H * L  # of chunks of 64 tokens
    return Problem(inputs, {"fastattn": ours, "transformers": theirs}, check=check, flops=flops)


def gated_delta_step(dtype, H, D):
    """One token with a cached state."""
    q, k, v, decay, beta = (t.detach()[:, :, 0] for t in _inputs(dtype, H, 1, D))
    state = testing.random_tensor(1, H, D, D, seed=5)
    states = {name: state.clone() for name in ("fastattn", "transformers")}

    def ours():
        return fa.linear_attention_step(q, k, v, states["fastattn"], decay=decay, beta=beta, qk_norm=True)

    def theirs():
        function = _peers().torch_recurrent_gated_delta_rule
        out, states["transformers"] = function(
            *(t[:, None] for t in (q, k, v)), g=decay[:, None], beta=beta[:, None],
            initial_state=states["transformers"], output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return out[:, 0]

    def compare(results):
        actual, expected = results["fastattn"], results["transformers"]
        # sums of D products of numbers of which some cancel, in both
        bound = testing.max_finite(expected) * D * (testing.EPS32 + torch.finfo(dtype).eps)
        assert testing.max_error(actual, expected) <= bound

    return Problem((), {"fastattn": ours, "transformers": theirs}, compare=compare, bytes=8 * H * D * D)


CASES = [
    Case("linear_time", "gated delta rule", gated_delta_rule, {"H": 16, "L": 2048, "D": 128}, FP32,
         bars=(faster_than("transformers", 4.0),), quick=True),
    Case("linear_time", "gated delta rule", gated_delta_rule, {"H": 16, "L": 2048, "D": 128}, FP32,
         "forward+backward", bars=(faster_than("transformers", 5.0),), quick=True),
    Case("linear_time", "gated delta rule", gated_delta_rule, {"H": 16, "L": 2048, "D": 128}, BF16),
    Case("linear_time", "gated delta rule, a step", gated_delta_step, {"H": 32, "D": 128}, FP32, "step",
         bars=(milliseconds_at_most(0.15),)),
]  # fmt: skip
