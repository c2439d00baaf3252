"""Every Triton kernel compiles ahead of time, without a driver, within each target's shared memory."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch

from fastattn import _triton
from fastattn.scores import SCORES

_spec = importlib.util.spec_from_file_location("compile_launches", Path(__file__).with_name("launches.py"))
launches = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launches)


def compiled(target: str, recorded: list[_triton.Launch]):
    gpu, device = _triton.TARGETS[target]
    assert recorded
    for launch in recorded:
        kernel = _triton.compile_ahead(launch, gpu)
        name = launch.kernel.__name__
        assert kernel.metadata.shared <= device.shared, (
            f"{name} for {target} uses {kernel.metadata.shared} bytes of shared memory, {device.shared} are there: {launch.meta}"
        )
        assert kernel.asm["hsaco" if device.kind == "hip" else "cubin"]
        yield launch, kernel


def compile_all(target: str, recorded: list[_triton.Launch]) -> None:
    for _ in compiled(target, recorded):
        pass


@pytest.mark.parametrize("target", launches.SAMPLED)
def test_attention(target):
    score = list(SCORES)[launches.SAMPLED.index(target) % len(SCORES)]
    compile_all(target, launches.attention(target, score=score, head_dim=64))
    compile_all(target, launches.attention_backward(target, score=score, head_dim=64))


@pytest.mark.parametrize(("target", "score"), [("sm_90", "sigmoid")])
def test_other_scores(target, score):
    compile_all(target, launches.attention(target, score=score, mask="full", head_dim=64))
    compile_all(target, launches.attention_backward(target, score=score, mask="full", head_dim=64))


def test_wide_heads():
    compile_all("sm_80", launches.attention("sm_80", head_dim=128, v_dim=256))


def test_dense_masks_and_bias():
    compile_all("sm_90", launches.attention("sm_90", mask="dense", bias=True, head_dim=64))
    compile_all("sm_90", launches.attention_backward("sm_90", mask="dense", bias=True, head_dim=64))


@pytest.mark.parametrize("target", ("sm_86", "sm_90"))
def test_decoding(target):
    compile_all(target, launches.attention(target, mask="causal", q_length=1, k_length=4096))


@pytest.mark.parametrize("target", ("sm_90", "gfx942"))
def test_recurrence(target):
    compile_all(target, launches.recurrence(target))


def test_vocab():
    compile_all("sm_100", launches.vocab("sm_100"))


@pytest.mark.parametrize("target", ("sm_80", "gfx942"))
def test_linear(target):
    compile_all(target, launches.linear(target))


def test_sinkhorn():
    compile_all("sm_90", launches.sinkhorn("sm_90"))


def test_reweighted():
    compile_all("sm_90", launches.reweighted("sm_90"))


@pytest.mark.slow
@pytest.mark.parametrize("target", _triton.TARGETS)
@pytest.mark.parametrize("dtype", _triton.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (32, 64, 128, 256))
def test_all_grouped_and_gated(target, dtype, head_dim):
    compile_all(target, launches.grouped(target, dtype, head_dim))
    for gate in (0, 1):
        compile_all(target, launches.gated(target, dtype, head_dim, gate))


@pytest.mark.slow
@pytest.mark.parametrize("target", _triton.TARGETS)
@pytest.mark.parametrize("dtype", _triton.DTYPES, ids=str)
def test_all_row_kernels(target, dtype):
    compile_all(target, launches.recurrence(target, dtype))
    compile_all(target, launches.vocab(target, dtype))
    compile_all(target, launches.linear(target, dtype))
    for groups in (2, 16, 63):
        compile_all(target, launches.sinkhorn(target, dtype, groups))
    compile_all(target, launches.reweighted(target, dtype))
    compile_all(target, launches.reweighted(target, dtype, None))


def test_float32():
    compile_all("sm_86", launches.attention("sm_86", dtype=torch.float32, head_dim=32))


@pytest.mark.slow
@pytest.mark.parametrize("target", _triton.TARGETS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", _triton.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (16, 64, 96, 128, 256))
def test_all_attention(target, score, dtype, head_dim):
    for mask, bias in itertools.chain((("packed", False), ("full", True), ("dense", False))):
        options = {"score": score, "dtype": dtype, "head_dim": head_dim, "mask": mask, "bias": bias}
        compile_all(target, launches.attention(target, **options))
        compile_all(target, launches.attention_backward(target, **options))
    compile_all(
        target,
        launches.attention(target, score=score, dtype=dtype, head_dim=head_dim, mask="full", q_length=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", _triton.TARGETS)
def test_every_feasible_tile_of_attention(target):
    """The analytic estimate of shared memory is never under what the compiler asks for."""
    from fastattn import _config

    for op, record in (
        ("attention", launches.attention),
        ("attention_backward", launches.attention_backward),
    ):
        declaration = _config.tunings()[op, "triton"]
        names = list(declaration.parameters)
        key = {"score": "softmax", "dtype": "bfloat16", "head_dim": 128, "value_dim": 128, "mask": "packed"}
        key |= {"batch": 5, "heads": 16, "kv_heads": 4, "q_length": 4096, "k_length": 4096}
        for values in itertools.product(*(declaration.parameters[name].allowed for name in names)):
            config = dict(zip(names, values, strict=True))
            if declaration.refuses(config, key, _triton.TARGETS[target][1]) is None:
                with _config.override({(op, "triton"): config}):
                    compile_all(target, record(target))


def narrow_products(ttir: str) -> list[str]:
    """32-bit multiplications that an address is formed from without having been widened first."""
    defined = {m[1]: m[2] for m in re.finditer(r"^\s*(%[\w.]+)(?::\d+)? = (.*)$", ttir, re.M)}
    pending = re.findall(r"tt\.addptr %[\w.#]+, (%[\w.]+)", ttir)
    seen, found = set(), []
    while pending:
        name = pending.pop()
        op = defined.get(name, "")
        if name in seen or "arith.extsi" in op or "tt.load" in op or op.startswith("scf."):
            continue
        seen.add(name)
        if "arith.muli" in op and "i32" in op:
            found.append(op)
        pending += re.findall(r"%[\w.]+", op)
    return found


def test_offsets_are_64_bits_wide():
    """No row is multiplied by its stride in 32 bits; the probe finds such a product when there is one."""
    recorded = launches.attention("sm_90", score="sigmoid", mask="full", head_dim=64)
    recorded += launches.attention_backward("sm_90", score="sigmoid", mask="full", head_dim=64)
    recorded += launches.grouped("sm_90") + launches.gated("sm_90")
    recorded += launches.linear("sm_90") + launches.sinkhorn("sm_90") + launches.recurrence("sm_90")[-2:]
    recorded += [one for one in launches.vocab("sm_90") if one.kernel.__name__ == "_sample_kernel"]
    for launch, kernel in compiled("sm_90", recorded):
        ttir = kernel.asm["ttir"]
        assert re.search(r"arith\.muli .*i64", ttir)
        assert not narrow_products(ttir), launch.kernel.__name__
    planted = "%3 = arith.muli %1, %2 : i32\n%4 = tt.splat %3 : i32 -> tensor<16xi32>\n%6 = tt.addptr %5, %4 : tensor<16x!tt.ptr<f32>>"
    assert narrow_products(planted)
