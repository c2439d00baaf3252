"""Every Triton kernel compiles ahead of time, without a driver, within each target's shared memory."""

import functools
import importlib
import importlib.util
import itertools
import pkgutil
import re
from pathlib import Path

import flex_mods
import pytest
import torch
import triton

from fastattn import ops
from fastattn.ops.attention.scores import SCORES
from fastattn.runtime import triton as _triton

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


@pytest.mark.parametrize("mask", ("full", "packed"))
def test_options(mask):
    """Aligned keys draw eight numbers at a time, packed ones one."""
    options = {"mask": mask, "head_dim": 64, "sink": True, "softcap": 30.0, "dropped": 6554}
    compile_all("sm_90", launches.attention("sm_90", **options))
    compile_all("sm_90", launches.attention_backward("sm_90", **options))


def test_options_of_decoding():
    options = {
        "mask": "causal",
        "q_length": 1,
        "k_length": 4096,
        "sink": True,
        "softcap": 30.0,
        "dropped": 6554,
    }
    compile_all("gfx942", launches.attention("gfx942", **options))


@pytest.mark.parametrize("shape", ((1, 16, 1, 4096), (1, 1, 4096, 1), (1, 16, 1, 1)), ids=str)
def test_gradients_of_smaller_biases(shape):
    """A tile's sums over its rows, its keys and both."""
    compile_all(
        "sm_80", launches.attention_backward("sm_80", score="sigmoid", head_dim=64, mask="causal", bias=shape)
    )


def test_bias_of_narrow_heads():
    """On AMD a bias goes through shared memory, and narrow heads leave room for the largest tiles."""
    compile_all("gfx942", launches.attention("gfx942", mask="full", bias=True, head_dim=16))


@pytest.mark.parametrize("target", ("sm_86", "sm_90"))
def test_decoding(target):
    compile_all(target, launches.attention(target, mask="causal", q_length=1, k_length=4096))


@pytest.mark.parametrize("target", ("sm_90", "gfx942"))
def test_rowwise(target):
    compile_all(target, launches.rowwise(target))


def test_cross_entropy_and_codes():
    compile_all("sm_100", launches.cross_entropy("sm_100") + launches.codes("sm_100"))


@pytest.mark.parametrize("target", ("sm_80", "gfx942"))
def test_fused_linear(target):
    compile_all(target, launches.fused_linear(target))


def test_sinkhorn():
    compile_all("sm_90", launches.sinkhorn("sm_90"))


def test_lssa():
    compile_all("sm_90", launches.lssa("sm_90"))


FUNCTIONS = {
    "sm_80": ("T5", "documents"),
    "sm_90": ("powers", None),
    "sm_100": ("graph distances", "causal"),
    "gfx942": ("sandwich", "by head"),
}


@pytest.mark.parametrize("target", launches.SAMPLED)
def test_functions(target):
    """Each with functions of its own; the slow tests have all."""
    compile_all(target, launches.flex(target, *FUNCTIONS[target]))


def test_numbers_of_a_function_compile_nothing_new():
    """A cap that is annealed, and lengths that are multiples of 16."""

    def hashes(cap, length):
        return compiled_as(launches.flex("sm_90", launches.capped(cap), None, length=length))

    assert len({tuple(hashes(cap, length)) for cap in (3.0, 7.25) for length in (256, 320)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("score", flex_mods.SCORES)
@pytest.mark.parametrize("target", _triton.TARGETS)
def test_all_functions(target, score):
    """Each score with one of the masks, another one on each target."""
    mask = turn((None, *flex_mods.MASKS), (_triton.TARGETS, target), (flex_mods.SCORES, score))
    dtype = turn(_triton.DTYPES, (_triton.TARGETS, target), (flex_mods.SCORES, score))
    compile_all(target, launches.flex(target, score, mask, dtype))


def kernels() -> set[triton.JITFunction]:
    """Every kernel of the package: the `_<op>_kernel` of its Triton modules."""
    found = set()
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if module.name.rpartition(".")[2].startswith("triton"):
            values = vars(importlib.import_module(module.name)).items()
            found |= {
                f for name, f in values if name.endswith("_kernel") and isinstance(f, triton.JITFunction)
            }
    return found


@functools.cache
def of_examples(target: str) -> list[_triton.Launch]:
    return launches.of_examples(target)


def test_kernels_take_few_arguments():
    """Operands come as named tuples, constants as one object."""
    recorded = (
        of_examples("sm_90") + launches.attention("sm_90", mask="dense") + launches.fused_linear("sm_90")
    )
    assert {launch.kernel for launch in recorded} == kernels()
    for kernel in kernels():
        assert len(kernel.arg_names) <= 24, kernel.__name__


# Functions of launches.py, whose kernels the tests here compile; any other kernel is compiled as its op's examples launch it.
NAMED = (
    "attention_backward",
    "rowwise",
    "cross_entropy",
    "codes",
    "fused_linear",
    "sinkhorn",
    "lssa",
    "grouped",
    "gated",
)


def of_examples_alone(target: str, dtype: torch.dtype = torch.bfloat16) -> list[_triton.Launch]:
    """Launches of kernels that no function of launches.py names, each that differs once."""
    named = launches.attention("sm_90", mask="dense") + launches.attention("sm_90", mask="full", q_length=1)
    for name in NAMED:
        named += getattr(launches, name)("sm_90")
    known = {launch.kernel for launch in named}
    recorded = of_examples(target) if dtype == torch.bfloat16 else launches.of_examples(target, dtype)
    rest = [launch for launch in recorded if launch.kernel not in known]
    return list(dict(zip(compiled_as(rest), rest, strict=True)).values())


@pytest.mark.parametrize("target", ("sm_90", "gfx942"))
def test_examples(target):
    for launch in of_examples_alone(target):
        compile_all(target, [launch])


def test_members_of_an_operand_are_specialised():
    """Loads are as wide as a stride's divisibility allows, in a tuple as anywhere."""
    [forward] = launches.attention("sm_90", head_dim=64)
    source = _triton.source(forward)
    assert source.signature["q"] == _triton.Rows("*bf16", "i32", "i32", "i32")
    first = forward.kernel.arg_names.index("q")
    assert all(source.attrs[first, i] == [["tt.divisibility", 16]] for i in range(4))
    narrow = _triton.Rows(*forward.args[first][:3], 1)
    source = _triton.source(_triton.Launch(forward.kernel, (1,), (narrow, *forward.args[1:]), forward.meta))
    assert source.signature["q"].row == "constexpr" and source.constants[first, 3] == 1


def test_any_window_has_the_same_binaries():
    """Also one of 1 key, or of a multiple of 16, which Triton would compile anew for."""
    for record in (launches.attention, launches.attention_backward):
        assert (
            len(
                {
                    tuple(compiled_as(record("sm_90", mask="window", window=w)))
                    for w in (0, 1, 100, 512, 1 << 31)
                }
            )
            == 1
        )


# The slow tests: each kernel with each dtype and score on every target that launches or compiles something of its own.
# sm_89 and sm_120 launch what sm_86 does (`test_small_cards_launch_alike`) and are compiled for once a dtype.
DISTINCT = ("sm_90", "gfx942", "sm_80", "sm_100", "sm_86")
ALIKE = ("sm_86", "sm_89", "sm_120")
HEAD_DIMS = (16, 64, 96, 128, 256)
every_target = pytest.mark.parametrize("target", DISTINCT)
every_dtype = pytest.mark.parametrize("dtype", _triton.DTYPES, ids=str)


def turn(values, *choices) -> object:
    """One of `values`, by the places of (options, choice): over all choices each meets every other option."""
    return list(values)[sum(list(options).index(choice) for options, choice in choices) % len(values)]


def compiled_as(recorded: list[_triton.Launch]) -> list[tuple]:
    """What the binaries depend on besides the target."""
    options = ("num_warps", "num_stages")
    return [(_triton.source(one).hash(), *(one.meta.get(option) for option in options)) for one in recorded]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_small_cards_launch_alike(dtype):
    def recorded(target):
        attention = launches.attention(target, dtype=dtype) + launches.attention_backward(target, dtype=dtype)
        attention += launches.attention(target, dtype=dtype, mask="full", q_length=1)
        focus = launches.grouped(target, dtype) + launches.gated(target, dtype)
        rows = (
            launches.cross_entropy(target, dtype)
            + launches.codes(target, dtype)
            + launches.fused_linear(target, dtype)
            + launches.rowwise(target, dtype)
        )
        return attention + focus + rows + launches.lssa(target, dtype)

    first, *others = (compiled_as(recorded(target)) for target in ALIKE)
    assert all(other == first for other in others)
    assert compiled_as(recorded("sm_90")) != first


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("target", ALIKE[1:])
def test_cards_alike(target, dtype):
    """The target's own assembler, once a dtype."""
    compile_all(target, launches.attention(target, dtype=dtype))
    compile_all(target, launches.attention_backward(target, dtype=dtype))


@pytest.mark.slow
@every_target
@every_dtype
@pytest.mark.parametrize("head_dim", (32, 64, 128, 256))
def test_all_grouped_and_gated(target, dtype, head_dim):
    gate = turn((0, 1), (_triton.DTYPES, dtype), ((32, 64, 128, 256), head_dim))
    compile_all(target, launches.grouped(target, dtype, head_dim))
    compile_all(target, launches.gated(target, dtype, head_dim, gate))


@pytest.mark.slow
@every_target
@every_dtype
def test_all_examples(target, dtype):
    for launch in of_examples_alone(target, dtype):
        compile_all(target, [launch])


@pytest.mark.slow
@every_target
@every_dtype
@pytest.mark.parametrize("op", ("rowwise", "cross_entropy", "codes", "fused_linear", "sinkhorn", "lssa"))
def test_all_row_kernels(target, dtype, op):
    if op == "sinkhorn":
        groups = turn((2, 16, 63), (_triton.DTYPES, dtype), (DISTINCT, target))
        compile_all(target, launches.sinkhorn(target, dtype, groups))
    elif op == "lssa":
        compile_all(target, launches.lssa(target, dtype))
        compile_all(target, launches.lssa(target, dtype, None))
    else:
        compile_all(target, getattr(launches, op)(target, dtype))


def test_float32():
    compile_all("sm_86", launches.attention("sm_86", dtype=torch.float32, head_dim=32))


@pytest.mark.slow
@every_target
@every_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_all_attention(target, dtype, head_dim):
    """Any three of dtype, head dim, mask and score meet: a score takes each mask, another one in the next dtype or head dim."""
    masks = (("packed", False), ("full", True), ("dense", False))
    for mask in masks:
        score = turn(SCORES, (_triton.DTYPES, dtype), (HEAD_DIMS, head_dim), (masks, mask))
        options = {"score": score, "dtype": dtype, "head_dim": head_dim, "mask": mask[0], "bias": mask[1]}
        compile_all(target, launches.attention(target, **options))
        compile_all(target, launches.attention_backward(target, **options))
    decoding = {"score": score, "dtype": dtype, "head_dim": head_dim, "mask": "full", "q_length": 1}
    compile_all(target, launches.attention(target, **decoding))


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("op", ("attention", "attention_backward"))
def test_largest_feasible_tiles_of_attention(target, op):
    """The estimate of shared memory lets nothing by that the device has no room for.

    It grows with both tile sides and the stages: for each number of warps, the tiles that no such step leaves feasible.
    """
    from fastattn.runtime import tuning as _config

    declaration = _config.tunings()[op, "triton"]
    allowed = {name: parameter.allowed for name, parameter in declaration.parameters.items()}
    key = {"score": "softmax", "dtype": "bfloat16", "head_dim": 128, "value_dim": 128, "mask": "packed"}
    key |= {"batch": 1, "heads": 16, "kv_heads": 4, "q_length": 4096, "k_length": 4096}
    device = _triton.TARGETS[target][1]

    def feasible(config):
        return declaration.refuses(config, key, device) is None

    def larger(config):
        for name in ("block_m", "block_n", "num_stages"):
            for value in allowed[name]:
                if value > config[name]:
                    yield config | {name: value}

    configs = [dict(zip(allowed, values, strict=True)) for values in itertools.product(*allowed.values())]
    largest = [config for config in configs if feasible(config) and not any(map(feasible, larger(config)))]
    assert {config["num_warps"] for config in largest} == set(allowed["num_warps"])
    for config in largest:
        with _config.override({(op, "triton"): config}):
            compile_all(target, getattr(launches, op)(target))


def test_products_do_not_wait_for_loads():
    """Tiles are on their way while the ones before them are multiplied. The compiler arranges that in a `for` that takes every tile,
    not in a `while` and not where a tile may be skipped. (The gradient of a bias skips members of a plane that have no such pair.)"""
    recorded = launches.attention("sm_90", score="sigmoid", mask="full", head_dim=64)
    recorded += launches.attention_backward("sm_90", score="sigmoid", mask="full", head_dim=64)
    recorded += launches.attention("sm_90", mask="dense", bias=True, head_dim=64)
    recorded += launches.attention_backward("sm_90", mask="dense", bias=True, head_dim=64)
    recorded += launches.grouped("sm_90") + launches.gated("sm_90") + launches.lssa("sm_90")
    with_products = [(one, k) for one, k in compiled("sm_90", recorded) if "wgmma.mma_async" in k.asm["ptx"]]
    assert len(with_products) >= 15
    for launch, kernel in with_products:
        if launch.kernel.__name__ == "_attention_backward_bias_kernel":
            continue
        assert "cp.async.c" in kernel.asm["ptx"], launch.kernel.__name__


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
    recorded += launches.fused_linear("sm_90") + launches.sinkhorn("sm_90") + launches.rowwise("sm_90")[-2:]
    recorded += [one for one in launches.codes("sm_90") if one.kernel.__name__ == "_sample_kernel"]
    for launch, kernel in compiled("sm_90", recorded):
        ttir = kernel.asm["ttir"]
        assert re.search(r"arith\.muli .*i64", ttir)
        assert not narrow_products(ttir), launch.kernel.__name__
    planted = "%3 = arith.muli %1, %2 : i32\n%4 = tt.splat %3 : i32 -> tensor<16xi32>\n%6 = tt.addptr %5, %4 : tensor<16x!tt.ptr<f32>>"
    assert narrow_products(planted)
