"""Kernels' parameters: what they point to stays alive, what they cannot hold or address is refused, and so is a call that
memory does not suffice for."""

import subprocess
import sys
import weakref

import pytest
import torch

from fastattn.runtime import native as _native


class _Watched:
    """A tensor whose sizes are read in a call: what the call was given before is still there then."""

    dtype = torch.float32

    def __init__(self, seen):
        self.seen, self.alive = seen, False

    @property
    def shape(self):
        self.alive = self.seen() is not None
        return (2, 3)

    def stride(self):
        return (3, 1)

    def data_ptr(self):
        return 0


def test_a_call_keeps_its_tensors_alive():
    copy = torch.ones(2, 3)
    fields, watched = {"a": copy}, _Watched(weakref.ref(copy))
    del copy

    def given():
        return fields.pop("a")

    with pytest.raises(ValueError, match=r"fastattn.gated: b is needed"):
        _native.run("gated", a=given(), b=watched, threads=1)
    assert watched.alive
    assert watched.seen() is None  # and no longer than that


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        ({"aa": 1}, TypeError, "fastattn.gated has no field 'aa'"),
        ({"a": torch.ones(1, 1, 1, 1, 1)}, ValueError, "fastattn.gated: a must have at most 4 dimensions"),
        ({"a": 1.5}, TypeError, "fastattn.gated: a must be a tensor, given <class 'float'>"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, TypeError, "fastattn.gated: a must have a dtype that"),
        (
            {"a": torch.ones(2), "b": torch.ones(2).double()},
            ValueError,
            "fastattn.gated: b has another dtype",
        ),
        ({"threads": 1.5}, TypeError, "fastattn.gated: threads must be an integer, given <class 'float'>"),
        ({"threads": 1 << 32}, ValueError, "fastattn.gated: threads must fit in 32 bits, given 4294967296"),
        ({"serial": 1 << 64}, ValueError, "fastattn.gated: serial must fit in 64 bits"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_field_cannot_hold_is_refused(field, error, message):
    with pytest.raises(error, match=message):
        _native.run("gated", **field)


def test_names_and_numbers_that_are_none_are_refused():
    with pytest.raises(TypeError, match="fastattn has no kernel 'gate'"):
        _native.run("gate")
    with pytest.raises(TypeError, match="run takes a kernel's name"):
        _native.run("gated", torch.ones(2))
    with pytest.raises(TypeError, match=r"fastattn.rms_norm: eps must be a number, given <class 'str'>"):
        _native.run("rms_norm", eps="1e-6")


@pytest.mark.parametrize(
    ("begin", "count", "prefix", "message"),
    [
        (-1, 2, None, r"cu_seqlens must lie in \[0, 4\], given -1"),
        (0, -1, None, r"lengths must lie in \[0, 4\], given -1"),
        (3, 2, None, r"lengths must lie in \[0, 1\], given 2"),
        (1, 2, 3, r"prefix_lengths must lie in \[0, 2\], given 3"),
        (1, 2, -1, r"prefix_lengths must lie in \[0, 2\], given -1"),
    ],
)
def test_rows_of_no_scores_are_refused(begin, count, prefix, message):
    fields = {name: torch.zeros(4, 3) for name in ("scores", "out")}
    begins, counts = torch.tensor([begin]), torch.tensor([count])
    if prefix is not None:
        fields |= {"prefixes": torch.tensor([prefix]), "causal": 1}
    with pytest.raises(ValueError, match=message):
        _native.run("sinkhorn_forward", begins=begins, counts=counts, potentials=torch.zeros(1, 3), **fields)


def _step():
    """Fields of a decode step of two rows: one call of one layer a stack, hidden 6, two heads of four, inner 3."""
    z, caches = torch.zeros(2, 6), torch.zeros(4, 2, 4, 4)
    sizes = ((32, 6), (6, 8), (6, 6), (6, 3))
    weights = [torch.zeros(*size) for _ in range(2) for size in sizes]
    angles = torch.zeros(5, 2)
    fields = {
        "z_h": z,
        "z_l": z,
        "out": z.clone(),
        "keys": caches,
        "values": caches.clone(),
        "cos": angles,
        "sin": angles,
    }
    fields |= {
        "weights": torch.tensor([w.data_ptr() for w in weights]),
        "layers": 1,
        "inner": 3,
        "longest": 4,
    }
    fields |= {
        "positions": torch.tensor([3, 0], dtype=torch.int32),
        "rows": torch.zeros(2, 1, 1, 1, dtype=torch.int32),
    }
    return fields | {"lengths": fields["positions"] + 1}, weights


def test_a_decode_step_that_does_not_fit_is_refused():
    fields, weights = _step()
    _native.run("decode_step", **fields)
    assert len(weights) == 8  # alive until then
    for name, value, message in (
        (
            "positions",
            torch.tensor([3, 4], dtype=torch.int32),
            r"position must lie in \[0, 3\], given 4 at position 1",
        ),
        ("positions", torch.tensor([3, 4]), "decode_step: positions has another dtype"),
        ("longest", 5, r"decode_step: longest must lie in \[1, 4\], given 5"),
        ("h_cycles", 2, "decode_step: keys must be those of every call"),
        ("cos", torch.zeros(5, 3), r"decode_step: cos must have sizes \(1, 1, 5, 2\), given \(1, 1, 5, 3\)"),
        ("rows", torch.full((2, 1, 1, 1), 5, dtype=torch.int32), r"rows must lie in \[0, 4\], given 5"),
        ("weights", torch.zeros(8, dtype=torch.int64), "decode_step: weights must all be there"),
        ("values", torch.zeros(4, 2, 3, 4), "decode_step: values must have sizes"),
        ("threads", 0, "decode_step: threads must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.run("decode_step", **fields | {name: value})


def _attention_fields():
    q, k, v = torch.ones(1, 4, 5, 8), torch.ones(1, 2, 7, 8), torch.ones(1, 2, 7, 6)
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": torch.empty(1, 4, 5, 6),
        "lse": torch.empty(1, 4, 5),
        "state": torch.empty(1, 4, 5, 2),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": 5}, r"attention_forward: score must lie in \[0, 4\], given 5"),
        ({"score": -1}, "score must lie in"),
        (
            {"k": torch.ones(1, 2, 7, 9)},
            r"attention_forward: k must have sizes \(1, 2, 7, 8\), given \(1, 2, 7, 9\)",
        ),
        ({"k": torch.ones(1, 3, 7, 8)}, "k must have a number of heads that divides q's"),
        ({"v": torch.ones(1, 2, 7, 6).double()}, "v has another dtype"),
        ({"q": torch.ones(1, 4, 5, 8).double()}, "q must be float32, bfloat16 or float16"),
        ({"lse": torch.empty(1, 4, 6)}, "lse must have sizes"),
        ({"state": torch.empty(1, 4, 5, 3)}, "state must have sizes"),
        (
            {"out": torch.empty(1, 4, 6, 5).mT},
            "out must have the elements of its last dimension side by side",
        ),
        ({"key_lengths": torch.tensor([7])}, "key_lengths has another dtype"),
        ({"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens_k goes with cu_seqlens_q"),
        ({"dense": torch.ones(1, 4, 5, 6, dtype=torch.bool)}, "dense must have sizes"),
        ({"block_q": 0}, "block_q must lie in"),
        ({"window_left": 1 << 40}, "window_left must lie in"),
    ],
)
def test_attention_that_does_not_fit_is_refused(isa, change, message):
    fields = _attention_fields()
    _native.run("attention_forward", **fields)
    with pytest.raises(ValueError, match=message):
        _native.run("attention_forward", **fields | change)


def _program(slope=-1, loads=()):
    """Words of s + tables[h]; with a slope of 1 and tables' gradient where they are asked for."""
    op = {name: code for code, name in enumerate(_native._core.score_ops)}
    one = torch.tensor([1.0]).view(torch.int32).item()
    steps = [op["load_f"], 4, 1, -1, -1, op["add_f"], 5, 5, 4, -1]  # r4 = tables[h], s += r4
    header = [1, 2, 5, 2, 5, slope, len(loads) // 2, 1]
    return torch.tensor([*header, one, *loads, *steps], dtype=torch.int32)


def test_a_score_program_is_part_of_a_call(isa):
    fields = _attention_fields()
    fields["q"] = torch.randn(1, 4, 5, 8)
    _native.run("attention_forward", **fields)
    plain = fields["lse"].clone()
    tables = torch.tensor([0.5, -1.0, 2.0, 0.0])
    _native.run("attention_forward", **fields, program=_program(), tables=tables)
    torch.testing.assert_close(
        fields["lse"], plain + tables[:, None], rtol=0, atol=1e-6
    )  # 16 roundings of up to 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"program": None}, "masked_program goes with program"),
        ({"program": _program().long()}, "program has another dtype"),
        ({"masked_program": _program()[::2]}, "masked_program must be contiguous"),
        ({"program": _program()[:-1]}, "program must be as long as its header says"),
        ({"masked_program": _program() * 2}, "masked_program must be of this version"),
        ({"tables": None}, "program loads from an empty table"),
        ({"tables": torch.zeros(4, dtype=torch.float64)}, "tables has another dtype"),
        ({"indices": torch.zeros(4)}, "indices has another dtype"),
        ({"softcap": 1.0}, "program goes without bias, distances and softcap"),
        ({"bias": torch.zeros(1, 4, 5, 7)}, "program goes without bias, distances and softcap"),
        ({"grad_tables": torch.zeros(1, 4)}, "grad_tables is of a backward"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_score_programs_that_do_not_fit_are_refused(change, message):
    fields = _attention_fields() | {
        "program": _program(),
        "masked_program": _program(),
        "tables": torch.zeros(4),
    }
    _native.run("attention_forward", **fields)
    with pytest.raises(ValueError, match=f"attention_forward: {message}"):
        _native.run("attention_forward", **fields | change)


def test_what_a_backward_needs_of_score_programs(isa):
    fields = _attention_fields() | {"tables": torch.zeros(4)}
    _native.run("attention_forward", **fields, program=_program())
    fields |= {"grad_out": fields["out"]} | {f"grad_{n}": torch.empty_like(fields[n]) for n in "qkv"}
    gradient = {"program": _program(slope=3, loads=(1, 3)), "grad_tables": torch.zeros(2, 4)}
    _native.run("attention_backward", **fields, **gradient)
    for change, message in (
        ({"program": _program()}, "program must give a slope"),
        ({"grad_tables": None}, "grad_tables is needed"),
        ({"grad_tables": torch.zeros(2, 3)}, "grad_tables must have sizes"),
        ({"grad_tables": torch.zeros(4, 2).mT}, "grad_tables must be contiguous"),
    ):
        with pytest.raises(ValueError, match=f"attention_backward: {message}"):
            _native.run("attention_backward", **fields | gradient | change)


def test_statistics_may_be_left_out_forward_and_not_backward(isa):
    fields = _attention_fields()
    _native.run("attention_forward", **fields)
    out = fields["out"].clone()
    for absent in ({"lse": None}, {"state": None}, {"lse": None, "state": None}):
        fields["out"].fill_(float("nan"))
        _native.run("attention_forward", **fields | absent)
        assert torch.equal(fields["out"], out)
    backward = fields | {"grad_out": out} | {f"grad_{n}": torch.empty_like(fields[n]) for n in "qkv"}
    _native.run("attention_backward", **backward)
    for name in ("lse", "state"):
        with pytest.raises(ValueError, match=f"attention_backward: {name} is needed"):
            _native.run("attention_backward", **backward | {name: None})


def test_every_kernel_refuses_parameters_that_are_not_set():
    for name in _native._core.fields:
        with pytest.raises(ValueError, match=f"fastattn.{name}: "):
            _native.run(name)


def test_a_struct_has_the_fields_of_its_base():
    fields = {name: tuple(of) for name, of in _native._core.fields.items()}
    assert fields["rms_norm"][:5] == ("serial", "prefetch", "threads", "x", "residual")
    assert fields["swiglu"] == fields["swiglu_backward"] == fields["gated"]
    assert set(fields["attention_forward"]) < set(fields["grouped_forward"])
    for name, names in fields.items():
        assert len(set(names)) == len(names), name


# Two threads that would each have to take 256 MiB for themselves, with 128 MiB left for the process.
_SCARCE = """
import resource
import torch
from fastattn.runtime import native as _native

torch.set_num_threads(2)


def collect(classes, tokens):
    codes = torch.zeros(tokens, dtype=torch.int64)
    scores, logits = torch.empty(2, classes), torch.ones(2, tokens)
    def call():
        _native.run("vocab_collect", scores=scores, codes=codes, logits=logits, threads=2)
        return scores[:, 0].tolist()
    return call


small, large = collect(8, 8192), collect(1 << 25, 8192)
small()  # the threads are there
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + (128 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    large()
except MemoryError:
    print("refused", small())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the process by Linux's /proc")
def test_memory_that_is_not_there_is_an_error_and_no_end():
    done = subprocess.run([sys.executable, "-c", _SCARCE], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "refused [8192.0, 8192.0]", done.stderr
