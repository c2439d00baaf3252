"""Vocabulary ops as torch ops: definitions against plain torch, gradients, opcheck, compile, error messages."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastattn as fa

V, D, N, K = 13, 5, 7, 4


def head(dtype=torch.float64, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    t = {
        "h": torch.randn(N, D, generator=g),
        "weight": torch.randn(V, D, generator=g),
        "codebook": torch.randn(K, D, generator=g),
        "bias": torch.randn(V, generator=g),
        "temperature": torch.rand(N, generator=g) + 0.5,
        "probabilities": torch.rand(N, V, generator=g) / V,
        "class_weight": torch.rand(V, generator=g) + 0.5,
    }
    t = {k: v.to(dtype).requires_grad_(requires_grad) for k, v in t.items()}
    t["target"] = torch.randint(0, V, (N,), generator=g)
    t["target"][2] = -100
    t["codes"] = torch.randint(0, K - 1, (V,), generator=g)  # the last code is empty
    return t


def test_softmax_is_torchs():
    t = head()
    for reduction in ("none", "sum", "mean"):
        loss = fa.linear_cross_entropy(t["h"], t["weight"], t["target"], bias=t["bias"], reduction=reduction)
        dense = F.cross_entropy(F.linear(t["h"], t["weight"], t["bias"]), t["target"], reduction=reduction)
        torch.testing.assert_close(loss, dense)


def test_options_by_hand():
    t = head()
    x = F.linear(t["h"], t["weight"], t["bias"])
    x = 2.0 * torch.tanh(x / 2.0) / t["temperature"][:, None]
    s = torch.where(x >= 0, x + 1, 1 / (1 - x))
    target = t["target"].clamp(min=0)
    expected = -torch.log(s.gather(1, target[:, None])[:, 0] / s.sum(1)) + 0.1 * torch.log(s.sum(1)) ** 2
    expected[2] = 0
    loss = fa.linear_cross_entropy(
        t["h"],
        t["weight"],
        t["target"],
        bias=t["bias"],
        transform="stablemax",
        softcap=2.0,
        z_loss=0.1,
        temperature=t["temperature"],
        reduction="none",
    )
    torch.testing.assert_close(loss, expected)


def test_stablemax_is_hrms():
    """HRM's own form: s(x) in float64, log of its share."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, V, generator=g, dtype=torch.float64) * 30
    target = torch.randint(0, V, (3, 4), generator=g)
    s = torch.where(logits < 0, 1 / (1 - logits + 1e-30), logits + 1)
    expected = -torch.log((s / s.sum(-1, keepdim=True)).gather(-1, target[..., None])[..., 0])
    torch.testing.assert_close(fa.stablemax_cross_entropy(logits, target, reduction="none"), expected)


def test_quantised_head_is_the_dense_head_of_its_rows():
    t = head()
    rows = t["codebook"][t["codes"]]
    dense = F.linear(t["h"], rows, t["bias"])
    torch.testing.assert_close(fa.vq_logits(t["h"], t["codebook"], t["codes"], bias=t["bias"]), dense)
    loss = fa.vq_cross_entropy(t["h"], t["codebook"], t["codes"], t["target"], bias=t["bias"])
    torch.testing.assert_close(loss, F.cross_entropy(dense, t["target"]))
    assert torch.equal(fa.vq_argmax(t["h"], t["codebook"], t["codes"], bias=t["bias"]), dense.argmax(1))
    distance = torch.cdist(t["weight"], t["codebook"])
    assert torch.equal(fa.nearest_codes(t["weight"], t["codebook"]), distance.argmin(1))


LOSSES = {
    "linear": (("h", "weight"), {}),
    "stablemax": (
        ("h", "weight", "bias", "temperature"),
        {"transform": "stablemax", "softcap": 2.0, "z_loss": 0.1},
    ),
    "weighted": (
        ("h", "weight", "bias", "temperature"),
        {"label_smoothing": 0.3, "class_weight": "class_weight", "z_loss": 0.1, "return_lse": True},
    ),
    "weighted stablemax": (
        ("h", "weight", "bias", "temperature"),
        {"label_smoothing": 0.3, "transform": "stablemax", "return_lse": True},
    ),
    "probabilities": (
        ("h", "weight", "bias", "temperature", "probabilities"),
        {"label_smoothing": 0.3, "class_weight": "class_weight", "z_loss": 0.1, "return_lse": True},
    ),
    "codes": (("h", "codebook", "bias"), {}),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck(kind, reduction):
    names, options = LOSSES[kind]
    t = head(requires_grad=True)

    def loss(*given):
        a = t | dict(zip(names, given, strict=True))
        if kind == "codes":
            return fa.vq_cross_entropy(
                a["h"], a["codebook"], a["codes"], a["target"], bias=a["bias"], reduction=reduction
            )
        extra = {k: a[k] for k in ("bias", "temperature") if k in names}
        extra |= {k: a[v].detach() if isinstance(v, str) and v in a else v for k, v in options.items()}
        target = a["probabilities" if "probabilities" in names else "target"]
        return fa.linear_cross_entropy(a["h"], a["weight"], target, reduction=reduction, **extra)

    assert torch.autograd.gradcheck(loss, tuple(t[k] for k in names))


def test_gradcheck_of_logits():
    t = head(requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, c, b: fa.vq_logits(h, c, t["codes"], bias=b), (t["h"], t["codebook"], t["bias"])
    )
    logits = (t["h"].detach() @ t["weight"].detach().T).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fa.stablemax_cross_entropy(x, t["target"]), (logits,))


def test_shadow_gets_the_dense_gradient():
    t = head(requires_grad=True)
    shadow = torch.zeros(V, D, dtype=torch.float64, requires_grad=True)
    loss = fa.vq_cross_entropy(t["h"], t["codebook"], t["codes"], t["target"], bias=t["bias"], shadow=shadow)
    rows = t["codebook"].detach()[t["codes"]].requires_grad_()
    dense = F.cross_entropy(F.linear(t["h"], rows, t["bias"]), t["target"])
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(torch.autograd.grad(loss, shadow)[0], torch.autograd.grad(dense, rows)[0])


def calls(dtype):
    """(op, arguments) of every registered op."""
    t = head(dtype, requires_grad=True)
    ops = torch.ops.fastattn
    h, weight, bias, temperature = t["h"], t["weight"], t["bias"], t["temperature"]
    target, codes, codebook = t["target"], t["codes"], t["codebook"]
    options = (1, 2.0, 0.1, 0.2, -100)
    one, row, statistics = (torch.ones(shape, dtype=dtype) for shape in ((), (N,), (2, N)))
    shares = t["probabilities"]
    linear = (h, weight, bias, target, temperature, t["class_weight"].detach())
    soft = (h, weight, bias, shares, temperature, t["class_weight"].detach())
    plain = (0, 0.0, 0.0, 0.0, -100)
    yield ops.linear_cross_entropy, (*linear, *options, "mean", False, 15, "")
    yield ops.linear_cross_entropy, (*soft, *options, "mean", False, 31, "")
    yield ops.linear_cross_entropy, (*linear, *options, "none", True, 0, "")
    yield ops.linear_cross_entropy, (*linear, *plain, "none", True, 0, "")
    yield ops.linear_cross_entropy, (h, weight, None, target, None, None, *plain, "sum", False, 0, "")
    for call, wanted in ((linear, 15), (soft, 31)):
        detached = tuple(x.detach() for x in call)
        for lse in (None, row):
            arguments = (one, lse, *detached, statistics, *options, "mean", wanted, "")
            yield ops.linear_cross_entropy_backward, arguments
    logits = (h @ weight.T).detach()
    yield ops.stablemax_cross_entropy, (logits.clone().requires_grad_(), target, -100, "")
    yield ops.stablemax_cross_entropy_backward, (row, logits, statistics, target, -100, "")
    yield ops.vq_logits, (h, codebook, codes, bias, "")
    quantised = (h.detach(), codebook.detach(), codes, bias.detach())
    yield ops.vq_logits_backward, (torch.ones(N, V, dtype=dtype), *quantised, 7, "")
    shadow = torch.zeros(V, D, dtype=dtype, requires_grad=True)
    yield ops.vq_cross_entropy, (h, codebook, codes, bias, shadow, target, -100, "mean", 15, "")
    yield ops.vq_cross_entropy, (h, codebook, codes, bias, shadow, target, -100, "none", 0, "")
    yield (
        ops.vq_cross_entropy_backward,
        (one, *quantised, shadow.detach(), target, statistics, -100, "mean", 15, ""),
    )
    yield ops.vq_argmax, (*quantised, "")
    yield ops.vq_sample, (*quantised, torch.rand(N, 2, dtype=torch.float64), 0.7, "")
    yield ops.nearest_codes, (weight.detach(), codebook.detach(), "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    for op, arguments in calls(dtype):
        torch.library.opcheck(op.default, arguments)


def test_compiles_to_one_graph():
    t = head(torch.float32, requires_grad=True)

    def step(h, weight, codebook, bias):
        a = fa.linear_cross_entropy(h, weight, t["target"], bias=bias, transform="stablemax", temperature=2.0)
        b = fa.vq_cross_entropy(h, codebook, t["codes"], t["target"], bias=bias, reduction="none")
        c = fa.stablemax_cross_entropy(h @ weight.T, t["target"])
        d = fa.vq_logits(h, codebook, t["codes"])
        with torch.no_grad():
            tokens = fa.vq_argmax(h, codebook, t["codes"]) + fa.nearest_codes(h, codebook)
        return a + b.sum() + c + d.square().mean(), tokens

    inputs = [t[k] for k in ("h", "weight", "codebook", "bias")]
    eager, tokens = step(*inputs)
    compiled, tokens_compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    assert torch.equal(tokens, tokens_compiled)
    pairs = zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("rows", [0, N])
def test_no_rows_left(reduction, rows):
    """All rows ignored, or none given: zero loss and gradients, never nan."""
    t = head(torch.float32, requires_grad=True)
    h, target = t["h"][:rows], torch.full((rows,), -1)
    options = {"ignore_index": -1, "reduction": reduction}
    losses = (
        fa.linear_cross_entropy(h, t["weight"], target, bias=t["bias"], **options),
        fa.vq_cross_entropy(h, t["codebook"], t["codes"], target, bias=t["bias"], **options),
        fa.stablemax_cross_entropy(h @ t["weight"].T, target, **options),
    )
    for loss in losses:
        assert loss.shape == (target.shape if reduction == "none" else ())
        assert not loss.any()
        for g in torch.autograd.grad(
            loss.sum(), [t[k] for k in ("h", "weight", "codebook", "bias")], allow_unused=True
        ):
            assert g is None or not g.any()


def test_a_loss_scale_is_not_rounded_to_16_bits():
    """The gradient that comes in multiplies those found in the forward pass as float32."""
    t = head(torch.bfloat16, requires_grad=True)
    for loss, leaves in (
        (fa.linear_cross_entropy(t["h"], t["weight"], t["target"]), ("h", "weight")),
        (fa.vq_cross_entropy(t["h"], t["codebook"], t["codes"], t["target"]), ("h", "codebook")),
    ):
        leaves = [t[name] for name in leaves]
        for scale in (torch.tensor(1.7), torch.tensor(65537.0)):
            plain = torch.autograd.grad(loss, leaves, torch.tensor(1.0), retain_graph=True)
            scaled = torch.autograd.grad(loss, leaves, scale, retain_graph=True)
            for a, b in zip(plain, scaled, strict=True):
                assert torch.equal(b, (a.float() * scale).to(a.dtype))


def test_ignored_rows_may_hold_anything():
    t = head(torch.float32)
    h = t["h"].clone()
    h[2] = math.nan
    h.requires_grad_()
    for loss in (
        fa.linear_cross_entropy(h, t["weight"], t["target"]),
        fa.linear_cross_entropy(h, t["weight"], t["target"], reduction="none").sum(),
        fa.vq_cross_entropy(h, t["codebook"], t["codes"], t["target"]),
        fa.stablemax_cross_entropy(h, t["target"].clamp(max=D - 1)),
    ):
        (grad,) = torch.autograd.grad(loss, h)
        assert loss.isfinite() and grad.isfinite().all() and not grad[2].any()


def test_second_order_is_refused():
    t = head(torch.float32, requires_grad=True)
    loss = fa.linear_cross_entropy(t["h"], t["weight"], t["target"])
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(loss, t["h"], create_graph=True)


def refused():
    t = head(torch.float32)
    h, w, c, b, y, m, p = (
        t[k] for k in ("h", "weight", "codebook", "bias", "target", "codes", "probabilities")
    )
    lce, vqce, stable = fa.linear_cross_entropy, fa.vq_cross_entropy, fa.stablemax_cross_entropy
    yield lambda: lce(h, w[:, 1:], y), ValueError, "linear_cross_entropy: h must have a last dim of 4"
    yield lambda: lce(h, w.double(), y), TypeError, "weight is float64 but h is float32"
    yield lambda: lce(h, w, y[1:]), ValueError, r"target must have shape \(7\)"
    yield lambda: lce(h, w, y + V), ValueError, r"target must lie in \[0, 13\) or -100, given"
    yield lambda: lce(h, w, y.float()), ValueError, r"target must have shape \(7x13\) \(a probability a class"
    yield lambda: lce(h, w, y > 0), TypeError, "target must be int32 or int64, given a bool"
    yield lambda: lce(h, w, p.double()), TypeError, "target must be float32, given a float64"
    yield (
        lambda: lce(h, w, p, ignore_index=-100),
        ValueError,
        "ignore_index must be None where target has probabilities",
    )
    yield lambda: lce(h, w, y, class_weight=b[1:]), ValueError, r"class_weight must have shape \(13\)"
    yield lambda: lce(h, w, y, class_weight=y), TypeError, "class_weight must be one of float32"
    yield (
        lambda: lce(h, w, y, class_weight=b.clone().requires_grad_()),
        NotImplementedError,
        "class_weight gets no gradient",
    )
    yield (
        lambda: lce(h, w, y, label_smoothing=1.5),
        ValueError,
        r"label_smoothing must lie in \[0, 1\], given 1.5",
    )
    yield lambda: lce(h, w, y, label_smoothing=-0.5), ValueError, "label_smoothing must be zero or more"
    yield lambda: lce(h, w[:, None], y), ValueError, r"target must have shape \(7x1\)"
    yield lambda: lce(h, w[:, None], y[:, None], bias=b), ValueError, r"bias must have shape \(13x1\)"
    yield lambda: lce(h, w[:, :0], y), ValueError, r"weight must be \(V, d\) or \(V, d_1, ..., d_K, d\)"
    yield lambda: lce(h, w, y, transform="entmax"), ValueError, "transform must be one of None, 'stablemax'"
    yield lambda: lce(h, w, y, reduction="max"), ValueError, "reduction must be one of 'none', 'sum', 'mean'"
    yield lambda: lce(h, w, y, softcap=0.0), ValueError, "softcap must be more than zero"
    yield lambda: lce(h, w, y, z_loss=-1.0), ValueError, "z_loss must be zero or more"
    yield lambda: lce(h, w, y, temperature=torch.zeros(N)), ValueError, "temperature must be more than zero"
    yield lambda: lce(h, w, y, temperature=torch.ones(3)), ValueError, "temperature must have shape"
    yield lambda: lce(h, w, y, bias=b[1:]), ValueError, r"bias must have shape \(13\) \(one a class\)"
    yield lambda: lce(h, w, y, bias=b.half()), TypeError, "bias must be float32, given a float16"
    yield lambda: lce(h, w, y, ignore_index=0.5), TypeError, "ignore_index must be an int"
    yield (
        lambda: lce(h, w, y, backend="triton"),
        NotImplementedError,
        "triton: it serves cuda tensors, not cpu",
    )
    yield lambda: lce(h, w, y, backend="best"), ValueError, "backend must be None or one of"
    yield lambda: lce(h, w[0], y), ValueError, r"weight must be \(V, d\) or"
    yield lambda: lce(h.to("meta"), w, y), ValueError, "weight is on cpu but h is on meta"
    yield lambda: stable(h, y), ValueError, r"target must lie in \[0, 5\) or -100"
    yield lambda: stable(y, y), TypeError, "logits must be one of float32"
    yield lambda: vqce(h, c, m + K, y), ValueError, r"vq_cross_entropy: codes must lie in \[0, 4\), given"
    yield lambda: vqce(h, c, m - 5, y), ValueError, r"codes must lie in \[0, 4\), given -"
    yield lambda: vqce(h, c, m.float(), y), TypeError, "codes must be int32 or int64"
    yield lambda: vqce(h, c, m[None], y), ValueError, "codes must have 1 dimensions"
    yield lambda: vqce(h, c, m, y + V), ValueError, "target must lie in"
    yield lambda: vqce(h, c, m, y, bias=b[1:]), ValueError, "one a token of codes"
    yield lambda: vqce(h, c, m, y, shadow=c), ValueError, "shadow must have shape"
    yield lambda: fa.vq_logits(h, c[:, 1:], m), ValueError, "vq_logits: h must have a last dim of 4"
    yield lambda: fa.vq_argmax(h, c, m[:0]), ValueError, "codes must have one element a token"
    yield lambda: fa.vq_sample(h, c, m, temperature=0), ValueError, "temperature must be more than zero"
    yield lambda: fa.vq_sample(h, c, m, generator=3), TypeError, "generator must be a torch.Generator"
    yield lambda: fa.nearest_codes(w, c[:0]), ValueError, r"codebook must be \(K, d\)"
    yield lambda: fa.nearest_codes([1.0], c), TypeError, "x must be a tensor"


def test_refusals_name_the_argument():
    for call, error, message in refused():
        with pytest.raises(error, match=message):
            call()
