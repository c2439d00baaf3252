"""What holds for every op: NaN is never lost, derivatives that are not there are refused, threads and forks may call, and
`backend=` names who serves a call."""

import inspect
import threading

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.cli import doctor
from fastattn.runtime import native as _native

TWICE = {"rotary"}  # its backward is the op itself
MASK = fa.Mask(causal=True)
generator = torch.Generator().manual_seed(7)
POSITIONS = torch.arange(21)
GROUPS = torch.randint(0, 8, (1, 21), generator=generator)
TARGET = torch.randint(0, 30, (9,), generator=generator)
CODES = torch.randint(0, 7, (30,), generator=generator)


def calls():
    """{name: (call, floating inputs)} of every op with gradients, in float32."""

    def make(*shape):
        return testing.random_tensor(*shape, dtype=torch.float32, seed=len(shape) + sum(shape))

    q, k, v = make(1, 4, 21, 12), make(1, 2, 21, 12), make(1, 2, 21, 10)
    assignment = make(1, 21, 4).softmax(-1)
    x, weight, codebook, bias = make(9, 16), make(30, 16), make(7, 16), make(30)
    return {
        "attention": (lambda q, k, v: fa.attention(q, k, v, mask=MASK, return_lse=True), (q, k, v)),
        "attention, decoding": (fa.attention, (q[:, :, -1:].contiguous(), k, v)),
        "sigmoid_attention": (lambda q, k, v: fa.sigmoid_attention(q, k, v, mask=MASK), (q, k, v)),
        "lssa_attention": (lambda q, k, v: fa.lssa_attention(q, k, v, mask=MASK), (q, k, v)),
        "lssa_attention, power": (
            lambda q, k, v: fa.lssa_attention(q, k, v, power=3.0, mask=MASK),
            (q, k, v),
        ),
        "lssa_attention, odd power": (
            lambda q, k, v: fa.lssa_attention(q, k, v, power=2.5, mask=MASK),
            (q, k, v),
        ),
        "grouped_attention": (lambda q, k, v: fa.grouped_attention(q, k, v, GROUPS, window=4), (q, k, v)),
        "gated_attention": (lambda *t: fa.gated_attention(*t, window=4), (q, k, v, assignment)),
        "sinkhorn": (fa.sinkhorn, (make(1, 21, 4),)),
        "sinkhorn, causal": (lambda s: fa.sinkhorn(s, causal=True), (make(1, 21, 4),)),
        "linear_cross_entropy": (
            lambda h, w, b: fa.linear_cross_entropy(h, w, TARGET, bias=b, reduction="none"),
            (x, weight, bias),
        ),
        "linear_cross_entropy, stablemax": (
            lambda h, w: fa.linear_cross_entropy(h, w, TARGET, transform="stablemax"),
            (x, weight),
        ),
        "stablemax_cross_entropy": (lambda x: fa.stablemax_cross_entropy(x, TARGET), (make(9, 30),)),
        "vq_logits": (lambda h, c: fa.vq_logits(h, c, CODES), (x, codebook)),
        "vq_cross_entropy": (
            lambda h, c, b: fa.vq_cross_entropy(h, c, CODES, TARGET, bias=b),
            (x, codebook, bias),
        ),
        "rms_norm": (lambda x, r, w: fa.rms_norm(x, residual=r, weight=w), (x, make(9, 16), make(16))),
        "swiglu": (fa.swiglu, (make(5, 46),)),
        "gated": (fa.gated, (make(5, 23), make(5, 23))),
        "rotary": (lambda q, k: fa.rotary(q, k, POSITIONS), (q, k)),
        "fused_linear": (lambda x, w: fa.fused_linear(x, w, norm_eps=1e-6), (x, weight)),
    }


CALLS = calls()
each = pytest.mark.parametrize("name", CALLS)


def results(fn, inputs):
    """Outputs and gradients."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = testing.as_tuple(fn(*inputs))
    # a sum with weights: that of a softmax's outputs alone has no gradient
    loss = sum((o * torch.arange(1, o.numel() + 1, dtype=o.dtype).view(o.shape).cos()).sum() for o in outputs)
    return (*(o.detach() for o in outputs), *torch.autograd.grad(loss, inputs))


def changed(inputs, i, at, change):
    moved = [t.clone() for t in inputs]
    flat = moved[i].view(-1)
    flat[at : at + 1] = change(flat[at : at + 1])
    return moved


@pytest.mark.parametrize("bits", [0x7FC00000, -1], ids=hex)  # NaNs, whose lower bits say nothing
@each
def test_what_depends_on_a_nan_is_nan(name, bits):
    fn, inputs = CALLS[name]
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    wide = [t.double() for t in inputs]
    with fa.set_backend("reference"):
        before = results(fn, wide)
    for i, t in enumerate(inputs):
        at = t.numel() * 2 // 3
        with fa.set_backend("reference"):
            moves = [results(fn, changed(wide, i, at, lambda x, by=by: x + by)) for by in (0.7, -0.7, 3.0)]
        for isa in testing.isas():
            with _native.use_cpu_isa(isa):
                found = results(fn, changed(inputs, i, at, lambda _: nan))
            for number, (old, new) in enumerate(zip(before, found, strict=True)):
                # far over float64's rounding: what does not move at all moves by less
                depends = torch.stack([(m[number] - old).abs() > 1e-10 * (1 + old.abs()) for m in moves]).any(
                    0
                )
                assert new[depends].isnan().all(), (isa, i, number)


@each
def test_second_derivatives_are_refused_where_there_are_none(name):
    fn, inputs = CALLS[name]
    inputs = [t.detach().requires_grad_() for t in inputs]
    loss = sum(o.square().sum() for o in testing.as_tuple(fn(*inputs)))
    if name in TWICE:
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        # |rotated|^2 = |x|^2: the gradient is 2 x, and that of its square 8 x
        assert all(
            torch.allclose(g, 8 * t, rtol=1e-5, atol=1e-5) for g, t in zip(second, inputs, strict=True)
        )
        return
    with pytest.raises(NotImplementedError, match="create_graph is not supported"):
        torch.autograd.grad(loss, inputs, create_graph=True)


@each
def test_forward_mode_is_refused(name):
    fn, inputs = CALLS[name]
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.func.jvp(fn, inputs, inputs)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, t) for t in inputs]
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            fn(*duals)


@each
def test_gradients_of_torch_func_are_refused(name):
    fn, inputs = CALLS[name]

    def loss(*inputs):
        return sum(o.sum() for o in testing.as_tuple(fn(*inputs)))

    for transformed in (
        torch.func.grad(loss),
        torch.func.grad(lambda *t: torch.vmap(loss)(*(x[None] for x in t)).sum()),
    ):
        with pytest.raises(
            NotImplementedError, match=r"fastattn\.\w+: torch.func's grad, vjp and jacrev are not supported"
        ):
            transformed(*inputs)
    constant = torch.func.grad(lambda t: loss(*inputs) * t)  # no gradient goes through the op
    assert torch.equal(constant(torch.tensor(1.0)), loss(*inputs))


@each
def test_vmap_is_a_loop(name):
    fn, inputs = CALLS[name]
    batched = [torch.stack([t, t * 0.5]) for t in inputs]
    found = testing.as_tuple(torch.vmap(lambda *t: fn(*t))(*batched))
    for i in range(2):
        for one, many in zip(testing.as_tuple(fn(*(t[i] for t in batched))), found, strict=True):
            assert torch.equal(one, many[i])


@each
def test_threads_may_call_at_once(name):
    fn, inputs = CALLS[name]
    expected, wrong = results(fn, inputs), []

    def work():
        for _ in range(3):
            wrong.extend(not torch.equal(a, b) for a, b in zip(expected, results(fn, inputs), strict=True))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 3 * 3 * len(expected) and not any(wrong)


class _Calls(torch.utils.data.Dataset):
    def __len__(self):
        return len(CALLS)

    def __getitem__(self, i):
        fn, inputs = list(CALLS.values())[i]
        return testing.as_tuple(fn(*inputs))


# Python 3.12 and later warn of forks; forking is what is tested
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_worker_may_call():
    expected = [
        testing.as_tuple(fn(*inputs)) for fn, inputs in CALLS.values()
    ]  # the pool's threads exist by now
    loader = torch.utils.data.DataLoader(
        _Calls(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for one, other in zip(expected, loader, strict=True):
        # a worker has one thread, so a sum over threads may be another
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(one, other, strict=True))


NOT_OPS = {"cpu_isas", "explain", "focus_groups"}  # the last is plain torch, without a kernel
PROBES = dict(doctor.probes("cpu"))
# the op behind a function, which messages name
OPS = {"sigmoid_attention": "attention", "lssa_attention": "softplus_attention"}


def test_every_public_function_is_asked_for_its_backend():
    functions = {
        f for name in fa.__all__ if inspect.isfunction(f := getattr(fa, name)) and name not in NOT_OPS
    }
    assert functions == {getattr(fa, name) for name in PROBES}


@pytest.mark.parametrize("name", PROBES)
def test_every_op_takes_a_backend(name):
    args, options = PROBES[name](torch.float32)
    function = getattr(fa, name)
    out = function(*args, **options, backend="reference")
    assert all(t.device.type == "cpu" for t in testing.as_tuple(out))
    assert fa.explain(name, *args, **options, backend="reference").backend == "reference"
    allowed = f"fastattn.{OPS.get(name, name)}: backend must be None or one of reference, cpu, triton, cuda, given 'gpu'"
    with pytest.raises(ValueError, match=f"^{allowed}$"):
        function(*args, **options, backend="gpu")


def test_potentials_leave_nothing_to_a_backend_but_its_name_is_checked():
    scores = testing.random_tensor(1, 5, 3)
    _, potentials = fa.sinkhorn(scores, return_potentials=True)
    with pytest.raises(ValueError, match="sinkhorn: backend must be None or one of"):
        fa.sinkhorn(scores, potentials=potentials, backend="gpu")
