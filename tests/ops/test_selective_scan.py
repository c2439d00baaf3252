"""Mamba's selective scan against loops written from its documentation, transformers' function, and the kernels against the definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native

INTERVAL = _native.defaults("selective_scan_backward")["interval"]
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def tensors(batch, length, channels, states, *, dtype=torch.float32, sequences=None, own=None, without=()):
    """A call's tensors by name, in memory order, that require gradients; those named in `without` are None."""
    tokens, numbers = (batch, length, channels), (batch, length, states)
    state = (batch if sequences is None else sequences, channels, states)
    shapes = dict(
        zip(
            NAMES,
            (tokens, tokens, (channels, states), numbers, numbers, (channels,), tokens, (channels,), state),
            strict=True,
        )
    )
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    of = dict.fromkeys(("A", "D", "dt_bias"), own or dtype) | {"initial_state": wide}
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        t = testing.random_tensor(*shape, seed=i, dtype=of.get(name, dtype))
        t = -t.abs() if name == "A" else t
        made[name] = None if name in without else t.requires_grad_()
    return made


def call(given, **options):
    return fa.selective_scan(**given, **options)


def looped(u, dt, A, B, C, D, z, dt_bias, initial_state, softplus=True):
    """Number by number, of one sequence."""
    h, out = initial_state.clone(), []
    for t in range(u.shape[0]):
        row, new = [], []
        for e in range(u.shape[1]):
            x = dt[t, e] + dt_bias[e]
            d = (1 + x.exp()).log() if softplus else x
            state = [(d * A[e, n]).exp() * h[e, n] + d * u[t, e] * B[t, n] for n in range(A.shape[1])]
            y = sum(c * s for c, s in zip(C[t], state, strict=True)) + D[e] * u[t, e]
            row.append(y * z[t, e] / (1 + (-z[t, e]).exp()))
            new.append(torch.stack(state))
        h = torch.stack(new)
        out.append(torch.stack(row))
    return torch.stack(out), h


@pytest.mark.parametrize("softplus", [False, True])
def test_the_definition_is_the_documented_recurrence(softplus):
    given = tensors(2, 5, 3, 2, dtype=torch.float64)
    out, state = call(given, dt_softplus=softplus, return_state=True)
    for i in range(2):
        parts = {n: t[i] if n in ("u", "dt", "B", "C", "z", "initial_state") else t for n, t in given.items()}
        expected, last = looped(**parts, softplus=softplus)
        # a few products and an exponential of numbers of a few units, in float64, over five tokens
        assert testing.max_error(out[i], expected) < 1e-12 and testing.max_error(state[i], last) < 1e-12


def test_the_definition_is_transformers_function():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if not hasattr(modeling, "mamba_selective_scan"):
        pytest.skip("this transformers has no function of it")
    given = {
        n: None if t is None else t.detach()
        for n, t in tensors(2, 40, 5, 4, without=("initial_state",)).items()
    }
    swapped = {n: given[n].transpose(1, 2) for n in ("u", "dt", "B", "C", "z")}
    expected, last = modeling.mamba_selective_scan(
        swapped["u"], swapped["dt"], given["A"], swapped["B"], swapped["C"], D=given["D"], z=swapped["z"],
        delta_bias=given["dt_bias"], delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    out, state = call(given, return_state=True, backend="cpu")
    # both in float32: sums of 40 tokens' products, whose roundings are 2^-24 of the largest
    bound = 40 * 2**-24
    assert testing.max_error(out, expected.transpose(1, 2)) < bound * testing.max_finite(expected)
    assert testing.max_error(state, last) < bound * testing.max_finite(last)


LENGTHS = (0, 1, 2, 3, 5, 16, INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL + 3)


def laid_out(t, how):
    """The same values: as they are, time last, and every other channel of a wider tensor."""
    if t is None or how == 0 or t.dim() != 3:
        return t
    return t.transpose(1, 2).contiguous().transpose(1, 2) if how == 1 else torch.stack([t, t], -1)[..., 0]


@settings(max_examples=60)
@given(data=st.data())
def test_kernels_compute_the_definition(isa, data, nan_outputs):
    dtype = data.draw(st.sampled_from(testing.LOW_DTYPES))
    length, packed = data.draw(st.sampled_from(LENGTHS)), data.draw(st.booleans())
    channels, states = (
        data.draw(st.sampled_from((1, 3, 8, 20, 70))),
        data.draw(st.sampled_from((1, 4, 5, 16))),
    )
    batch = 1 if packed else data.draw(st.integers(0, 2))
    cuts = None
    if packed:
        cuts = torch.tensor([0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))])
    without = data.draw(st.sets(st.sampled_from(NAMES[5:])))
    given = tensors(
        batch, length, channels, states, dtype=dtype, own=data.draw(st.sampled_from((dtype, torch.float32))),
        sequences=len(cuts) - 1 if packed else None, without=without,
    )  # fmt: skip
    softplus, how = data.draw(st.booleans()), data.draw(st.integers(0, 2))
    if not softplus:  # a step that is negative grows, without bound over many tokens
        given["dt"] = given["dt"].detach().abs().requires_grad_()
        if given["dt_bias"] is not None:
            given["dt_bias"] = given["dt_bias"].detach().abs().requires_grad_()
    inputs = [None if t is None else laid_out(t.detach(), how).requires_grad_() for t in given.values()]

    def op(backend):
        def run(*inputs):
            named = dict(zip(NAMES, inputs, strict=True))
            return call(named, cu_seqlens=cuts, dt_softplus=softplus, return_state=True, backend=backend)

        return run

    # the gradients of A, D and dt_bias are sums over tokens, those of B and C over channels
    terms = max(1, batch * length * max(1, states), channels)
    # they may cancel: their terms are as large as the gradients of tokens and states are, the largest of which stands for them
    truth = testing.differentiate(op("reference"), testing.to_float64(inputs))[1]
    largest = max((testing.max_finite(t) for t in truth), default=0.0)
    wanted = [n for n, t in given.items() if t is not None]
    testing.check_op(
        op("cpu"), op("reference"), inputs, terms=terms, names=wanted, magnitudes=[largest] * len(wanted)
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_documents_are_scanned_one_by_one(backend):
    cuts = [0, 0, 1, INTERVAL, INTERVAL, INTERVAL + 30, 2 * INTERVAL + 5]
    given = tensors(1, 2 * INTERVAL + 9, 20, 4, sequences=6)
    outputs = call(given, cu_seqlens=torch.tensor(cuts), return_state=True, backend=backend)
    grads = [testing.random_tensor(*t.shape, seed=i + 20) for i, t in enumerate(outputs)]
    slopes = dict(zip(NAMES, torch.autograd.grad(outputs, list(given.values()), grads), strict=True))
    total = {n: torch.zeros_like(given[n]) for n in ("A", "D", "dt_bias")}
    for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
        parts = {
            n: t[:, begin:end]
            if n in ("u", "dt", "B", "C", "z")
            else t[i : i + 1]
            if n == "initial_state"
            else t
            for n, t in given.items()
        }
        parts = {n: t.detach().requires_grad_() for n, t in parts.items()}
        alone = call(parts, return_state=True, backend=backend)
        assert torch.equal(outputs[0][:, begin:end], alone[0]) and torch.equal(
            outputs[1][i : i + 1], alone[1]
        )
        incoming = (grads[0][:, begin:end], grads[1][i : i + 1])
        expected = dict(zip(NAMES, torch.autograd.grad(alone, list(parts.values()), incoming), strict=True))
        for name, gradient in expected.items():
            if name in total:
                total[name] += gradient
                continue
            mine = slopes[name][i : i + 1] if name == "initial_state" else slopes[name][:, begin:end]
            # other documents end their vectors elsewhere; a sum over channels is the same
            assert testing.max_error(mine, gradient) <= 2**-20 * (1 + testing.max_finite(gradient)), name
    for name, gradient in total.items():  # sums over the tokens, in float32, in two orders
        bound = len(cuts) * 140**0.5 * 2**-24 * (1 + testing.max_finite(gradient)) * 8
        assert testing.max_error(slopes[name], gradient) < bound, name
    for t in (outputs[0], *(slopes[n] for n in ("u", "dt", "B", "C", "z"))):
        assert not t[:, cuts[-1] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_in_pieces_is_the_sequence(isa, dtype):
    given = {n: t.detach() for n, t in tensors(2, INTERVAL + 20, 20, 4, dtype=dtype).items()}
    whole, last = call(given, return_state=True, backend="cpu")
    state, parts = given["initial_state"], []
    for begin, end in itertools.pairwise((0, 1, 2, 19, 19, INTERVAL + 20)):
        piece = {n: t[:, begin:end] if n in ("u", "dt", "B", "C", "z") else t for n, t in given.items()}
        out, state = call(piece | {"initial_state": state}, return_state=True, backend="cpu")
        parts.append(out)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(state, last)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_gradient_through_the_state_alone(backend):
    given = tensors(1, INTERVAL + 3, 5, 3, dtype=torch.float64 if backend == "reference" else torch.float32)
    state = call(given, return_state=True, backend=backend)[1]
    found = torch.autograd.grad(state.sum(), list(given.values()), allow_unused=True, materialize_grads=True)
    slopes = dict(zip(NAMES, found, strict=True))
    assert slopes["u"].any() and slopes["A"].any() and slopes["initial_state"].any()
    assert not any(slopes[n].any() for n in ("C", "D", "z"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_steps_that_forget_everything_or_nothing(backend):
    """d A far below what e^ has a number for, a step next to 0, and A = 0: finite, and equal in float64."""
    given = tensors(1, 12, 6, 3, without=("dt_bias",))
    dt = given["dt"].detach().clone()
    dt[:, 3], dt[:, 7] = 5e4, -200.0
    A = given["A"].detach().clone()
    A[0] = 0
    given |= {"dt": dt.requires_grad_(), "A": A.requires_grad_()}

    def run(backend):
        return lambda *inputs: call(dict(zip(NAMES, inputs, strict=True)), backend=backend)

    out, grads = testing.differentiate(run(backend), list(given.values()))
    truth, true = testing.differentiate(run("reference"), testing.to_float64(list(given.values())))
    # the step of 50000 makes the largest numbers; a sum of 12 tokens' products in float32 each
    for mine, t in zip(out + grads, truth + true, strict=True):
        if t is not None:
            assert mine.isfinite().all() and testing.max_error(mine, t) < 64 * 2**-24 * (
                1 + testing.max_finite(t)
            )


def test_results_do_not_depend_on_the_number_of_threads():
    given, found = tensors(2, INTERVAL + 9, 150, 4), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            outputs = call(given, return_state=True)
            found.append(
                (*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], list(given.values())))
            )
    finally:
        torch.set_num_threads(2)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


def test_lanes_without_a_channel_keep_nothing_of_an_earlier_call(isa):
    """A call of NaN leaves working memory full of it; the next one has fewer channels, and tokens beyond a checkpoint."""
    for channels, scale in ((64, torch.nan), (37, 1.0)):
        given = tensors(1, 2 * INTERVAL + 3, channels, 5)
        given["u"] = (given["u"].detach() * scale).requires_grad_()
        out = call(given, backend="cpu")
        grads = torch.autograd.grad(out.sum(), list(given.values()))
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_no_tensor_of_states_for_every_token(peak_bytes):
    """The backward of 2048 tokens, 256 channels and 16 numbers: 32 MiB would be every state, once."""
    case = """
def problem(length):
    shapes = [(1, length, 256), (1, length, 256), (256, 16), (1, length, 16), (1, length, 16)]
    u, dt, A, B, C = (torch.randn(*shape) for shape in shapes)
    return [t.requires_grad_() for t in (u, dt, -A.abs(), B, C)]

def run(*inputs):
    fa.selective_scan(*inputs).sum().backward()
"""
    rows = 2048 * 256 * 4
    # out, its gradient, two rows' gradients, checkpoints of a quarter of a row, and B's and C's of four slices: less than 8 rows
    assert peak_bytes(case, (70,), (2048,)) < 8 * rows < 2048 * 256 * 16 * 4


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    cuts = torch.tensor([0, 2, 2, 4]) if packed else None
    given = tensors(1, 5, 2, 2, dtype=torch.float64, sequences=3 if packed else None)
    for without, softplus in (((), True), (("D", "z", "dt_bias", "initial_state"), False)):
        inputs = [None if n in without else t for n, t in given.items()]

        def run(*inputs, softplus=softplus):
            named = dict(zip(NAMES, inputs, strict=True))
            return call(named, cu_seqlens=cuts, dt_softplus=softplus, return_state=True)

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    given = tensors(1, 6, 3, 2, sequences=2 if packed else None, without=() if packed else ("z", "D"))
    cuts = torch.tensor([0, 2, 6]) if packed else None
    torch.library.opcheck(torch.ops.fastattn.selective_scan.default, (*given.values(), cuts, True, ""))


def test_one_graph():
    given = tensors(2, 6, 3, 2)

    def run(*inputs):
        return call(dict(zip(NAMES, inputs, strict=True)), return_state=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = (testing.differentiate(f, list(given.values())) for f in (compiled, run))
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert torch.equal(a, b)


def test_bad_arguments_are_refused():
    given = {n: None if t is None else t.detach() for n, t in tensors(2, 5, 3, 2).items()}
    cuts = torch.tensor([0, 2, 5])
    one = {n: t[:1] if n in ("u", "dt", "B", "C", "z") else t for n, t in given.items()}
    for options, error, message in (
        ({"u": given["u"][0]}, ValueError, "u must have 3 dimensions"),
        ({"dt": given["dt"][:, :4]}, ValueError, r"dt must have shape \(2x5x3\)"),
        ({"dt": given["dt"].half()}, TypeError, "dt is float16 but u is float32"),
        ({"A": given["A"][:2]}, ValueError, r"A must be \(E, N\) with u's 3 channels and N of 1 or more"),
        ({"A": given["A"][:, :0]}, ValueError, r"A must be \(E, N\) with u's 3 channels and N of 1 or more"),
        ({"A": given["A"].double()}, TypeError, "A must be float32, u's dtype, given"),
        ({"B": given["B"][..., :1]}, ValueError, r"B must have shape \(2x5x2\)"),
        ({"C": given["C"].transpose(0, 1)}, ValueError, r"C must have shape \(2x5x2\)"),
        ({"D": given["D"][:2]}, ValueError, r"D must have shape \(3\)"),
        ({"dt_bias": given["D"].half()}, TypeError, "dt_bias must be float32"),
        ({"z": given["z"][..., :2]}, ValueError, r"z must have shape \(2x5x3\)"),
        (
            {"initial_state": given["initial_state"].mT},
            ValueError,
            r"initial_state must have shape \(2x3x2\)",
        ),
        ({"initial_state": given["initial_state"].half()}, TypeError, "initial_state must be float32"),
        ({"cu_seqlens": cuts}, ValueError, "cu_seqlens needs a batch of one, given 2"),
        (one | {"cu_seqlens": cuts * 2}, ValueError, "cu_seqlens .* end at most at 5, given"),
        (one | {"cu_seqlens": cuts[:2]}, ValueError, r"initial_state must have shape \(1x3x2\)"),
        ({"backend": "triton"}, NotImplementedError, "there is no triton backend; there are: cpu, reference"),
    ):
        with pytest.raises(error, match=f"fastattn.selective_scan: {message}"):
            fa.selective_scan(**{**given, **options})


def test_what_the_kernels_cannot_hold_is_refused():
    u, numbers, A = torch.zeros(1, 5, 3), torch.zeros(1, 5, 2), torch.zeros(3, 2)
    fields = {"u": u, "dt": u, "A": A, "B": numbers, "C": numbers, "out": torch.zeros(1, 5, 3)}
    _native.run("selective_scan_forward", **fields)
    for change, message in (
        ({"u": u.double()}, "u must be float32, bfloat16 or float16"),
        ({"dt": torch.zeros(1, 5, 4)}, "dt must have sizes"),
        ({"A": A.half()}, "A has another dtype"),
        ({"A": torch.zeros(2, 3).mT}, "A must be contiguous"),
        ({"B": torch.zeros(1, 5, 3)}, "B must have sizes"),
        ({"state": torch.zeros(1, 2, 3)}, "state must have sizes"),
        ({"checkpoints": torch.zeros(1, 2, 2, 3)}, "checkpoints must have sizes"),
        ({"interval": 1}, "interval must lie in"),
        ({"slice": 0}, "slice must lie in"),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, r"cu_seqlens must lie in \[3, 5\], given 6 at position 2"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.run("selective_scan_forward", **fields | change)
    back = fields | {"grad_out": u, "grad_u": torch.zeros(1, 5, 3), "grad_dt": torch.zeros(1, 5, 3)}
    back |= {
        "grad_A": torch.zeros(1, 2, 3),
        "grad_B": torch.zeros(1, 1, 5, 2),
        "grad_C": torch.zeros(1, 1, 5, 2),
    }
    _native.run("selective_scan_backward", **back, checkpoints=torch.zeros(1, 1, 2, 3))
    for change, message in (
        ({}, "checkpoints is needed"),
        (
            {"checkpoints": torch.zeros(1, 1, 2, 3), "grad_B": torch.zeros(2, 1, 5, 2)},
            "grad_B must have sizes",
        ),
        ({"checkpoints": torch.zeros(1, 1, 2, 3), "z": u}, "grad_z is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.run("selective_scan_backward", **back | change)
