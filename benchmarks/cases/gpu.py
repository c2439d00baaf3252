"""The bars of one NVIDIA H200 (bf16, D = 128): rows that need a CUDA device, and say so where there is none.

Every result is first held to the definition at a small size of the same kind; peers that are not installed are named as such.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

import fastattn as fa
from benchmarks.registry import (
    Case,
    Problem,
    faster_than,
    milliseconds_at_most,
    tflops_at_least,
    time_at_most,
)
from fastattn import testing
from fastattn.ops.hrm_step import workload as decode_workload

BF16 = torch.bfloat16
BOTH = "forward+backward"
SMALL = 700  # tokens or rows that the check takes


def _qkv(heads, length, dim=128):
    return testing.attention_inputs(1, heads, heads, length, length, dim, dtype=BF16, device="cuda")


def _check(fn, make):
    """The runner's check: outputs and gradients of fn(backend, *inputs) at inputs make(SMALL)."""

    def check():
        def run(backend):
            return lambda *inputs: fn(backend, *inputs)

        testing.check_op(run(None), run("reference"), make(SMALL), terms=SMALL)

    return check


def _compiled_flex(score_mod=None, block_mask=None, aux=None):
    torch.compiler.reset()  # past a few shapes the compiler would give up and run it uncompiled
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: compiled(
        q, k, v, score_mod=score_mod, block_mask=None if block_mask is None else block_mask(), return_aux=aux
    )


def _sdpa(backend, **options):
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


_SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sigmoid(dtype, H, L, passes=1.0):
    def log_trick():
        # softmax of log sigmoid(s), times its own sum of weights, is sigmoid attention
        with_lse = flex.AuxRequest(lse=True)
        attend = _compiled_flex(lambda s, b, h, i, j: F.logsigmoid(s - math.log(L)), aux=with_lse)

        def call(q, k, v):
            out, aux = attend(q, k, v)
            return out * aux.lse.exp()[..., None].to(out.dtype)

        return call

    def ours(backend, q, k, v):
        return fa.sigmoid_attention(q, k, v, backend=backend)

    return Problem(
        _qkv(H, L),
        {
            "fastattn": lambda *a: ours(None, *a),
            "flex log trick": log_trick(),
            **{name: _sdpa(backend) for name, backend in _SDPA.items()},
        },
        check=_check(ours, lambda length: _qkv(2, length)),
        yardsticks=tuple(_SDPA),
        flops=4 * H * L * L * 128 * passes,
    )


def packed_prefix(dtype, H, L, documents):
    def mask_of(length):
        cuts = torch.linspace(0, length, documents + 1).int()
        return fa.Mask(cu_seqlens_q=cuts.cuda(), prefix_lengths=(cuts.diff() // 2).cuda())

    cuts = torch.linspace(0, L, documents + 1).int()
    document = torch.bucketize(torch.arange(L), cuts[1:], right=True).cuda()
    ends = (cuts[:-1] + cuts.diff() // 2).cuda()  # of each document's prefix

    def visible(b, h, i, j):
        return (document[i] == document[j]) & ((j <= i) | (j < ends[document[i]]))

    # its mask is built in the call, as ours is
    block_mask = lambda: flex.create_block_mask(visible, None, None, L, L, device="cuda")  # noqa: E731

    def ours(backend, q, k, v):
        return fa.attention(q, k, v, mask=mask_of(q.shape[2]), backend=backend)

    return Problem(
        _qkv(H, L),
        {"fastattn": lambda *a: ours(None, *a), "flex": _compiled_flex(block_mask=block_mask)},
        check=_check(ours, lambda length: _qkv(2, length)),
    )


def softplus(dtype, H, L):
    def ours(backend, q, k, v):
        return fa.softplus_attention(q, k, v, power=15.0, mask=fa.Mask(causal=True), backend=backend)

    def softmax(q, k, v):
        return fa.attention(q, k, v, mask=fa.Mask(causal=True))

    return Problem(
        _qkv(H, L),
        {"fastattn": lambda *a: ours(None, *a), "our softmax": softmax},
        check=_check(ours, lambda length: _qkv(2, length)),
        yardsticks=("our softmax",),
    )


def grouped(dtype, H, L, groups):
    def signatures(length):
        generator = torch.Generator().manual_seed(0)
        return (1 << torch.randint(groups, (1, length), generator=generator)).cuda()

    whole = signatures(L)

    def ours(backend, q, k, v, signature):
        return fa.grouped_attention(q, k, v, signature, backend=backend)

    def causal(q, k, v, signature):
        return fa.attention(q, k, v, mask=fa.Mask(causal=True))

    def flash(q, k, v, signature):
        return _sdpa(SDPBackend.FLASH_ATTENTION, is_causal=True)(q, k, v)

    return Problem(
        (*_qkv(H, L), whole),
        {"fastattn": lambda *a: ours(None, *a), "our causal": causal, "sdpa flash": flash},
        check=_check(ours, lambda length: (*_qkv(2, length), signatures(length))),
        yardsticks=("our causal", "sdpa flash"),
    )


def _matrix(rows, columns, seed, scale=1.0):
    return testing.random_tensor(
        rows, columns, seed=seed, scale=scale, dtype=BF16, device="cuda", requires_grad=True
    )


def codes(dtype, N, d, K):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(K, (50 * K,), generator=generator).cuda()
    target = torch.randint(50 * K, (N,), generator=generator).cuda()

    def ours(backend, h, codebook):
        return fa.vq_cross_entropy(h, codebook, tokens, target[: h.shape[0]], backend=backend)

    def products(h, codebook):
        x = h @ codebook.T
        return x @ codebook, x.T @ h

    def liger(h, codebook):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(codebook, h, tokens[target])

    def cut(h, codebook):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(h, codebook, tokens[target])

    peers = ("three products", "liger", "cut-cross-entropy")
    return Problem(
        (_matrix(N, d, 1), _matrix(K, d, 2, 0.05)),
        {"fastattn": lambda *a: ours(None, *a), **dict(zip(peers, (products, liger, cut), strict=True))},
        check=_check(ours, lambda rows: (_matrix(rows, 64, 1), _matrix(K, 64, 2, 0.05))),
        yardsticks=peers,
    )


def stablemax(dtype, N, d, V):
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).cuda()

    def ours(backend, h, weight):
        return fa.linear_cross_entropy(
            h, weight, target[: h.shape[0]] % weight.shape[0], transform="stablemax", backend=backend
        )

    def softmax(h, weight):
        return fa.linear_cross_entropy(h, weight, target)

    return Problem(
        (_matrix(N, d, 1), _matrix(V, d, 2, 0.05)),
        {"fastattn": lambda *a: ours(None, *a), "our softmax": softmax},
        check=_check(ours, lambda rows: (_matrix(rows, 64, 1), _matrix(1000, 64, 2, 0.05))),
        yardsticks=("our softmax",),
    )


def decode(dtype, hidden, heads, inner, layers, cached):
    """A token of HRM-Text through its 8 stack calls, against the definition, whose products are torch's."""

    def problem(seed, **smaller):
        shape = {
            "hidden": hidden,
            "heads": heads,
            "inner": inner,
            "layers": layers,
            "cached": cached,
        } | smaller
        return shape, decode_workload.inputs(
            shape | {"head_dim": 128, "dtype": "bfloat16"}, torch.device("cuda"), seed
        )

    def check():
        shape, inputs = problem(1, layers=2)
        testing.assert_within_budget(
            decode_workload.call("cuda")(shape, *inputs),
            lambda *a: decode_workload.call("reference")(shape, *a),
            inputs,
            terms=16 * inner,
        )

    shape, inputs = problem(1)
    contenders = {"fastattn": "cuda", "reference": "reference"}
    return Problem(
        (),
        {name: functools.partial(decode_workload.call(b), shape, *inputs) for name, b in contenders.items()},
        check=check,
    )


def _case(op, build, shape, bars, direction="forward", **options):
    return Case("gpu", op, build, shape, BF16, direction, bars, options=options, device="cuda")


CASES = [
    *(_case("sigmoid", sigmoid, {"H": 16, "L": length}, (tflops_at_least(600),)) for length in (8192, 16384)),
    *(
        _case("sigmoid", sigmoid, {"H": 16, "L": length}, (tflops_at_least(400),), "backward", passes=2.5)
        for length in (8192, 16384)
    ),
    _case("packed PrefixLM", packed_prefix, {"H": 16, "L": 16384, "documents": 12}, (faster_than("flex", 1.3),), BOTH),
    _case("LSSAR", softplus, {"H": 16, "L": 8192}, (time_at_most("our softmax", 1.7),)),
    _case("grouped top-1", grouped, {"H": 16, "L": 4096, "groups": 8}, (faster_than("our causal", 1.3),)),
    _case("grouped top-1", grouped, {"H": 1, "L": 1 << 20, "groups": 8}, (faster_than("our causal", 7.6),)),
    _case("vq cross-entropy", codes, {"N": 32768, "d": 4096, "K": 1024}, (time_at_most("three products", 1.15),), BOTH),
    *(
        _case("HRM-Text XL decode step", decode,
              {"hidden": 1536, "heads": 12, "inner": 4096, "layers": 16, "cached": cached}, (milliseconds_at_most(3.0),), "step")
        for cached in (256, 2048)
    ),
    _case("StableMax", stablemax, {"N": 8192, "d": 2048, "V": 32768}, (time_at_most("our softmax", 1.1),), BOTH),
]  # fmt: skip
