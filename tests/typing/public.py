"""What a type checker says of a user's calls; `make lint` runs it. A line with `type: ignore` has to be an error."""

from typing import assert_type

import torch
from torch import Tensor

import fastattn as fa


def ops(q: Tensor, k: Tensor, v: Tensor, wanted: bool) -> None:
    mask = fa.Mask(causal=True, window=(4, None))
    assert_type(fa.attention(q, k, v, mask=mask), Tensor)
    assert_type(fa.attention(q, k, v, return_lse=True), tuple[Tensor, Tensor])
    relu = fa.Score.from_function(
        lambda x, row, b, h, i, j: x * row.mean, normalise="sum", statistics=("mean",)
    )
    assert_type(fa.attention(q, k, v, score=relu), Tensor)
    fa.Score.from_function(3)  # type: ignore[arg-type]
    assert_type(fa.sigmoid_attention(q, k, v, bias=q, backend="reference"), Tensor)
    assert_type(fa.lssa_attention(q, k, v, power=3), Tensor)
    assert_type(fa.softplus_attention(q, k, v), Tensor)
    assert_type(fa.sinkhorn(q), Tensor)
    assert_type(fa.sinkhorn(q, return_potentials=True), tuple[Tensor, Tensor])
    assert_type(fa.linear_attention(q, k, v, beta=v), Tensor)
    assert_type(fa.linear_attention(q, k, v, return_state=True), tuple[Tensor, Tensor])
    assert_type(fa.rms_norm(q, weight=v), Tensor)
    assert_type(fa.rms_norm(q, residual=k, backend="cpu"), tuple[Tensor, Tensor])
    assert_type(fa.rotary(q, k, v), tuple[Tensor, Tensor])
    assert_type(fa.linear_cross_entropy(q, k, v, temperature=0.5), Tensor)
    assert_type(fa.causal_conv1d(q, k, activation="silu"), Tensor)
    assert_type(fa.causal_conv1d(q, k, return_state=True), tuple[Tensor, Tensor])
    assert_type(fa.linear_scan(q, k, reverse=True), Tensor)
    assert_type(fa.selective_scan(q, k, v, q, k, D=v), Tensor)
    assert_type(fa.selective_scan(q, k, v, q, k, return_state=True), tuple[Tensor, Tensor])
    assert_type(fa.explain("attention", q, k, v).ruled_out, dict[str, str])
    with fa.set_backend("cpu"):
        fa.swiglu(q)

    fa.softmax_attention(q, k, v)  # type: ignore[attr-defined]
    fa.attention(q, k, v, masks=mask)  # type: ignore[call-overload]
    fa.attention(q, k, v, mask=torch.ones(2, 2))  # type: ignore[call-overload]
    fa.sigmoid_attention(q, k, v, mask=mask, scale="2")  # type: ignore[arg-type]
    fa.gated(q)  # type: ignore[call-arg]
    fa.Mask(causal=True, window=3)  # type: ignore[arg-type]


def modules(h: Tensor) -> None:
    head = fa.nn.VQHead(16, 100, 8)
    assert_type(head.codes, Tensor)
    assert_type(head.argmax(h), Tensor)
    recursive = fa.nn.Recursive(torch.nn.Linear(4, 4), router=fa.nn.TopK(4, [1, 0.5]))
    assert_type(recursive.forward(h), Tensor)
    assert_type(recursive.forward(h, return_choices=True)[0], Tensor)
    assert_type(fa.nn.spherical_z_loss(h, h, h, a=1, b=2), Tensor)
    config = fa.models.HrmTextConfig(vocab_size=100, hidden_size=64, num_attention_heads=4)
    assert_type(config.head_dim, int)
    model = fa.models.HrmText(config)
    fa.optim.AdamATan2(model.parameters(), lr=1e-3).step()

    accelerated = fa.integrations.transformers.accelerate(model, loss=True)
    assert_type(accelerated.replaced, dict[str, int])
    accelerated.undo()

    fa.nn.VQHead(16, 100, 8, assigment="ema")  # type: ignore[call-arg]
    fa.models.HrmTextConfig(vocab="100")  # type: ignore[call-arg]
