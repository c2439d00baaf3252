"""What is kept from one call for the next follows memory that is written behind torch's version counters."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn as fa
from fastattn import testing
from fastattn.runtime import tuning as _config

LENGTH, TILE = 512, 256  # so that tiles of every size in use lie within one


def inputs(seed=1, **options):
    return testing.attention_inputs(1, 2, 2, LENGTH, LENGTH, 16, seed=seed, **options)


def blocks(which):
    """(1, 1, L, L): two masks that have no empty tile in common, each row attending some."""
    place = torch.arange(LENGTH) // TILE
    return ((place[:, None] + place + which) % 2 == 0)[None, None]


def as_bias(allowed, dtype=torch.float32):
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def through_numpy(mask, value):
    view = mask if mask.dtype == torch.bool else mask.view(torch.int32)
    view.numpy()[...] = value.view(view.dtype).numpy()


def through_data(mask, value):
    mask.data.copy_(value)


def as_an_alias(mask, value):
    """As a replayed graph or a compiler's buffer: a tensor of the same memory with a counter of its own."""
    torch.empty(0, dtype=mask.dtype).set_(mask.untyped_storage()).view(mask.shape).copy_(value)


WRITES = (through_numpy, through_data, as_an_alias)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ("dense", "bias", "attn_mask"))
def test_a_mask_is_read_anew_in_every_call(kind, write):
    q, k, v = inputs()
    mask = blocks(0) if kind != "bias" else as_bias(blocks(0))
    held = fa.Mask(dense=mask) if kind == "dense" else None

    def run(q, k, v, backend=None):
        if kind == "dense":
            return fa.attention(q, k, v, mask=held, backend=backend)
        if kind == "bias":
            return fa.attention(q, k, v, bias=mask, backend=backend)
        return fa.scaled_dot_product_attention(q, k, v, mask)

    def defined(q, k, v):
        # a copy: torch's function counts a version of its mask
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.clone())

    for which in (0, 1, 0):
        value = blocks(which) if kind != "bias" else as_bias(blocks(which))
        write(mask, value)
        testing.check_op(run, defined, (q, k, v), terms=LENGTH)


def layer(x, attend, product):
    """Attention and a product, under a mask whose empty tiles and by a weight one element of which depend on the layer before."""
    h = x.unflatten(-1, (2, 16)).transpose(1, 2)  # (1, 2, L, 16)
    place = torch.arange(LENGTH) // TILE
    which = (x[:, :1, 0].detach() > 0).long()  # (1, 1)
    allowed = ((place[:, None] + place + which[:, None]) % 2 == 0)[:, None]
    x = x + attend(0.5 * h, h, h, allowed).transpose(1, 2).flatten(-2)
    weight = torch.eye(32, dtype=x.dtype) + which * (torch.arange(1024).view(32, 32) == 37)
    return torch.cat(
        [-x[..., :1].sign(), 0.5 * product(x, weight)[..., 1:]], -1
    )  # the next layer has the others


def with_mask(q, k, v, allowed):
    return fa.attention(q, k, v, mask=fa.Mask(dense=allowed))


def with_bias(q, k, v, allowed):
    return fa.attention(q, k, v, bias=torch.where(allowed, 0.0, -torch.inf))


NATIVE = {(op, "cpu"): {"product": "native"} for op in ("fused_linear", "fused_linear_backward")}


@pytest.mark.parametrize("mode", ("no_grad", pytest.param("grad", marks=pytest.mark.slow), "checkpoint"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, of what it imports
def test_buffers_that_a_compiler_reuses(mode):
    def layers(x, product, *attends):
        for attend in attends:
            if mode == "checkpoint":
                x = checkpoint(layer, x, attend, product, use_reentrant=False)
            else:
                x = layer(x, attend, product)
        return x

    def definition(x):
        functional = torch.nn.functional
        return layers(x, functional.linear, *4 * (functional.scaled_dot_product_attention,))

    compiled = torch.compile(layers, fullgraph=True)
    x = testing.random_tensor(1, LENGTH, 32, seed=3)
    with torch.set_grad_enabled(mode != "no_grad"), _config.override(NATIVE):
        x.requires_grad_(mode != "no_grad")
        testing.check_op(
            lambda x: compiled(x, fa.fused_linear, with_mask, with_mask, with_bias, with_bias),
            definition,
            (x,),
            terms=LENGTH,
        )


CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "another default device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_made_first_within_a_context_serves_outside_of_it(context):
    """Tables, packed weights and a mask's copies, none of which may be of that context."""
    theta = 1234.5 + list(CONTEXTS).index(context)  # so that its table is new
    q, k, v = inputs(dtype=torch.float32)
    weight = testing.random_tensor(24, 16, seed=5)
    mask = fa.Mask(dense=blocks(0), key_lengths=torch.tensor([LENGTH - 3]))
    positions = torch.arange(LENGTH)

    def run(q, k, v):
        q, k = fa.rotary(q, k, positions, theta=theta)
        return fa.fused_linear(fa.attention(q, k, v, mask=mask), weight.to(q.dtype))

    def defined(q, k, v):
        with fa.set_backend("reference"):
            return run(q, k, v)

    with _config.override(NATIVE):
        with CONTEXTS[context]():
            run(*(t.detach() for t in (q, k, v)))
        testing.check_op(run, defined, (q, k, v), terms=LENGTH)
