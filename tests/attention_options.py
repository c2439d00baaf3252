"""Attention's options, sinks, soft cap and dropout: the calls that a backend is compared with the definition by."""

import math

import torch
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention.scores import SCORES

RNG = (0x0123456789ABCDEF, -5)  # seed and offset: every half of both is in use


@st.composite
def options(draw, score):
    """softcap, dropout_p and whether there is a sink; at least one of them is on."""
    sink = score == "softmax" and draw(st.booleans())
    cap = draw(st.sampled_from((None, 0.3, 2.0, 50.0)))
    share = draw(st.sampled_from((0.1, 0.5, 1.0) if not sink and cap is None else (0.0, 0.1, 0.5)))
    return {"softcap": cap, "dropout_p": share}, sink


def check(backend, score, dtype, problem, given, *, bias=False, bias_dims=None):
    """Results and gradients of one problem, with a sink among its inputs where there is one. bias_dims: the dims in which a bias that
    has a gradient is not 1."""
    choice, with_sink = given
    rng = torch.tensor(RNG)
    inputs = [*problem.inputs(dtype)]
    names = ["q", "k", "v"]
    if with_sink:
        inputs.append(testing.random_tensor(inputs[0].shape[1], dtype=dtype, seed=5, requires_grad=True))
        names.append("sink")
    full = (*inputs[0].shape[:3], inputs[1].shape[2])
    added = testing.random_tensor(*full, dtype=dtype, seed=6) if bias else None
    summed = 1  # elements of dS that are one of the bias's gradient
    if bias_dims is not None:
        shape = [n if own else 1 for n, own in zip(full, bias_dims, strict=True)]
        summed = math.prod(n for n, own in zip(full, bias_dims, strict=True) if not own)
        inputs.append(testing.random_tensor(*shape, dtype=dtype, seed=6, requires_grad=True))
        names.append("bias")

    def run(backend):
        def op(q, k, v, *more):
            of = dict(zip(names[3:], more, strict=True))
            return fa.attention(
                q,
                k,
                v,
                score=score,
                bias=of.get("bias") if added is None else added.to(q.dtype),
                mask=problem.mask(),
                sink=of.get("sink"),
                rng=rng,
                return_lse=SCORES[score].normalised,
                backend=backend,
                **choice,
            )

        return op

    group = max(1, problem.heads // problem.kv_heads)
    terms = max(problem.k_len * group + problem.q_len * full[0] + problem.head_dim, summed)
    testing.check_op(run(backend), run("reference"), inputs, terms=terms, names=names)
