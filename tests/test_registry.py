"""Backend selection, explain, errors, and what importing fastattn costs."""

import subprocess
import sys
import threading

import pytest
import torch

import fastattn as fa
from fastattn.runtime import native as _native
from fastattn.runtime.explain import collecting


def test_the_best_backend_serves_and_says_why():
    x = torch.ones(3, 8)
    assert fa.explain("rms_norm", x).backend == "cpu"
    found = fa.explain("rms_norm", x.double())
    assert found.backend == "reference"
    assert "float64" in found.ruled_out["cpu"]
    assert "rms_norm: reference backend" in str(found)


def test_explain_runs_nothing_but_checks_everything():
    with pytest.raises(ValueError, match="gate must have shape"):
        fa.explain("gated", torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="op_name must name a fastattn op, given 'nonsense'"):
        fa.explain("nonsense", torch.ones(3))


def test_explain_leaves_other_threads_calls_alone():
    x = torch.tensor([[2.0, 3.0]])
    found = []
    thread = threading.Thread(target=lambda: found.append(fa.swiglu(x)))
    with collecting() as explained:  # as `explain` does while it makes its call
        thread.start()
        thread.join()
    assert not explained
    torch.testing.assert_close(found[0], torch.nn.functional.silu(x[:, :1]) * x[:, 1:])


def test_contents_are_checked_while_another_thread_compiles(monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # torch's flag is the process's
    assert torch.compiler.is_compiling()
    h, codebook, codes = torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 3\), given 3"):
        fa.vq_argmax(h, codebook, codes)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 3\) or -100, given 9"):
        fa.linear_cross_entropy(h, codebook, torch.tensor([0, 9]))
    mask = fa.Mask(cu_seqlens_q=torch.tensor([0, 2, 5]))
    assert (mask.max_seqlen_q, mask.total_q) == (3, 5)


def test_set_backend_is_a_setter_and_a_context():
    x = torch.ones(2, 4)
    with fa.set_backend("reference"):
        assert fa.explain("swiglu", x).backend == "reference"
        with fa.set_backend(None):
            assert fa.explain("swiglu", x).backend == "cpu"
        assert fa.explain("swiglu", x).backend == "reference"
    assert fa.explain("swiglu", x).backend == "cpu"
    with pytest.raises(
        ValueError, match="backend must be None or one of reference, cpu, triton, cuda, given 'gpu'"
    ):
        fa.set_backend("gpu")


def test_a_backend_asked_for_by_name_never_falls_back():
    with (
        fa.set_backend("cpu"),
        pytest.raises(NotImplementedError, match="swiglu: no backend can serve this call"),
    ):
        fa.swiglu(torch.ones(2, 4, dtype=torch.float64))
    with fa.set_backend("cuda"), pytest.raises(NotImplementedError, match="swiglu"):
        fa.swiglu(torch.ones(2, 4))


def test_instruction_sets_can_be_forced():
    assert fa.cpu_isas()[0] == "baseline"
    for isa in fa.cpu_isas():
        with _native.use_cpu_isa(isa):
            assert _native.cpu_isa() == isa
    with pytest.raises(ValueError, match="FASTATTN_CPU_ISA must be one of baseline"):
        _native.select_cpu_isa("sse9")


def run(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    return result.stdout + result.stderr


def test_the_environment_forces_an_instruction_set_and_a_backend():
    code = "import fastattn as fa, torch; print(fa.runtime.native.cpu_isa(), fa.explain('swiglu', torch.ones(2, 4)).backend)"
    assert run(code, FASTATTN_CPU_ISA="baseline", FASTATTN_BACKEND="reference").split() == [
        "baseline",
        "reference",
    ]
    assert "FASTATTN_CPU_ISA must be one of" in run(code, FASTATTN_CPU_ISA="nonsense")


def test_import_brings_no_optional_package():
    heavy = ("triton", "cupy", "optuna", "transformers", "matplotlib", "tokenizers", "typer", "rich")
    code = (
        "import sys, torch; before = set(sys.modules); import fastattn; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    assert run(code).strip() == "[]"
