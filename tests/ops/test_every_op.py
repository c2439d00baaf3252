"""What holds for every op: NaN is never lost, derivatives that are not there are refused, threads and forks may call, and
`backend=` names who serves a call."""

import inspect
import threading
from dataclasses import replace

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native
from fastattn.runtime import registry
from fastattn.runtime.examples import examples

TWICE = {"rotary", "rotary, pairs", "rotary_tables", "matvec"}  # backwards of differentiable operations


def calls():
    """{name: (call, floating inputs)} of every op with gradients, in float32."""
    found = {}
    for name, example in examples().items():
        # torch's function serves what ours does not
        if example.gradients and example.function is not fa.scaled_dot_product_attention:
            rest = {n: a for n, a in example.arguments.items() if n not in example.floating}
            found[name] = (
                _by_place(example.function, tuple(example.floating), rest),
                tuple(example.floating.values()),
            )
    return found


def _by_place(function, names, rest):
    return lambda *inputs: function(**dict(zip(names, inputs, strict=True)), **rest)


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
                try:
                    found = results(fn, changed(inputs, i, at, lambda _: nan))
                except ValueError as error:
                    assert "must be more than zero everywhere, given nan" in str(error)
                    continue
            for number, (old, new) in enumerate(zip(before, found, strict=True)):
                # far over float64's rounding: what does not move at all moves by less
                depends = torch.stack([(m[number] - old).abs() > 1e-10 * (1 + old.abs()) for m in moves]).any(
                    0
                )
                assert new[depends].isnan().all(), (isa, i, number)


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("name", examples())
def test_kernels_compute_the_definition(name, dtype, nan_outputs):
    example = examples(dtype)[name]
    if example.refusal("cpu") is not None:
        pytest.skip(example.refusal("cpu"))
    for isa in testing.isas():
        with _native.use_cpu_isa(isa):
            testing.check_example(example, "cpu")


@each
def test_second_derivatives_are_refused_where_there_are_none(name):
    fn, inputs = CALLS[name]

    def second(inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        loss = sum(o.square().sum() for o in testing.as_tuple(fn(*inputs)))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    if name in TWICE:
        found = second(inputs)
        with fa.set_backend("reference"):
            true = second([t.double() for t in inputs])
        assert all(
            torch.allclose(g, t.float(), rtol=1e-4, atol=1e-4) for g, t in zip(found, true, strict=True)
        )
        return
    with pytest.raises(NotImplementedError, match="create_graph is not supported"):
        second(inputs)


def test_outputs_that_nobody_reads_change_no_other():
    """`Backend.leading` gives, bit for bit, the first outputs of `run`."""
    compared = set()

    def check(op, backend):
        if backend.leading is None:
            return backend

        def leading(reads, *members):
            whole = backend.run(*members)
            for count in range(1, len(whole) + 1):
                found = backend.leading(count, *members)
                assert len(found) >= count
                for a, b in zip(found, whole, strict=False):
                    assert torch.equal(a, b)
            compared.add((op.name, reads < len(whole)))
            return backend.leading(reads, *members)

        return replace(backend, leading=leading)

    with torch.no_grad(), registry.replaced(check):
        for fn, inputs in CALLS.values():
            fn(*inputs)
        fa.rms_norm(torch.ones(2, 3), residual=torch.ones(2, 3))
    named = {name for name, op in registry.OPS.items() if any(b.leading is not None for b in op.backends)}
    assert compared == {(name, True) for name in named}


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


# focus_groups is plain torch, without a kernel; merge takes pairs of tensors, see the example "merge, two parts"
NOT_OPS = {"cpu_isas", "explain", "focus_groups", "merge", "merge_sums"}
PUBLIC = {name: example for name, example in examples().items() if name in fa.__all__}
# the op behind a function, which messages name
OPS = {"sigmoid_attention": "attention", "lssa_attention": "softplus_attention"}


def test_every_public_function_is_asked_for_its_backend():
    functions = {
        f for name in fa.__all__ if inspect.isfunction(f := getattr(fa, name)) and name not in NOT_OPS
    }
    assert functions == {getattr(fa, name) for name in PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_op_takes_a_backend(name):
    function, options = PUBLIC[name].function, PUBLIC[name].arguments
    assert function is getattr(fa, name)
    with torch.no_grad():
        out = function(**options, backend="reference")
    assert all(t.device.type == "cpu" for t in testing.as_tuple(out))
    assert fa.explain(name, **options, backend="reference").backend == "reference"
    allowed = f"fastattn.{OPS.get(name, name)}: backend must be None or one of reference, cpu, triton, cuda, given 'gpu'"
    with pytest.raises(ValueError, match=f"^{allowed}$"):
        function(**options, backend="gpu")


def test_potentials_leave_nothing_to_a_backend_but_its_name_is_checked():
    scores = testing.random_tensor(1, 5, 3)
    _, potentials = fa.sinkhorn(scores, return_potentials=True)
    with pytest.raises(ValueError, match="sinkhorn: backend must be None or one of"):
        fa.sinkhorn(scores, potentials=potentials, backend="gpu")
