"""CUDA C++: every kernel compiles for every target, and its arithmetic, run as one thread on the host, is the reference's."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastattn import testing
from fastattn.ops.grouped.reference import sinkhorn
from fastattn.ops.vocab import reference as vocab

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
CXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def compile_for(architecture: str, source: Path, out: Path) -> None:
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={architecture}", "-o", out, source],
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stat().st_size


@needs_nvcc
def test_one_instantiation_compiles(tmp_path):
    """One kernel for one target; the slow test has all of src/cuda for all."""
    source = tmp_path / "decode.cu"
    source.write_text(
        f'#include "{ROOT}/src/cuda/decode.cuh"\n'
        "template __global__ void fastattn::cuda::decode_step<fastattn::cuda::bf16, 128>(fastattn::cuda::DecodeParams);\n"
    )
    compile_for("sm_90a", source, tmp_path / "decode.cubin")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_compiles(architecture, tmp_path):
    compile_for(architecture, ROOT / "src/cuda/kernels.cu", tmp_path / "kernels.cubin")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    out = tmp_path_factory.mktemp("host") / "host.so"
    source = Path(__file__).with_name("host.cpp")
    subprocess.run(
        [CXX, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", out, source], check=True, capture_output=True
    )
    return ctypes.CDLL(str(out))


def address(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


@needs_cxx
@pytest.mark.parametrize("lengths", (None, [0, 13]))
@pytest.mark.parametrize("iterations", (0, 1, 10))
def test_sinkhorn(host, lengths, iterations):
    scores = testing.random_tensor(2, 20, 8)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    assignment, potentials = torch.full_like(scores, math.nan), torch.full((2, 8), math.nan)
    partial = torch.empty(2 * 8 * 2)
    host.host_sinkhorn(
        *map(address, (scores, assignment, potentials, lengths, partial)),
        *map(ctypes.c_int64, (2, 20)), ctypes.c_int32(iterations), ctypes.c_float(0.1),
    )  # fmt: skip
    testing.assert_within_budget(
        (assignment, potentials[:, None]),
        lambda s: sinkhorn(s, lengths, None, 0.1, iterations, False),
        (scores,),
        terms=20,
    )


@needs_cxx
@pytest.mark.parametrize("stablemax", (0, 1))
@pytest.mark.parametrize(("softcap", "z_loss"), ((0.0, 0.0), (3.0, 0.01)))
def test_vocab_rows(host, stablemax, softcap, z_loss):
    """The identity as weight makes h the logits, so that the reference's gradients are the kernel's."""
    rows, classes = 4, 30
    logits, bias = (
        testing.random_tensor(rows, classes, seed=1, scale=3.0),
        testing.random_tensor(classes, seed=2),
    )
    temperature = testing.random_tensor(rows, seed=3).abs() + 0.5
    target = torch.tensor([3, -100, 29, 0])
    grad = testing.random_tensor(rows, seed=4)
    eye = torch.eye(classes)

    def defined(h, weight, bias, temperature, grad):
        options = (stablemax, softcap, z_loss, -100, "none")
        loss, lse = vocab.linear_cross_entropy(h, weight, bias, target, temperature, *options)
        found = vocab.linear_cross_entropy_gradients(grad, h, weight, bias, target, temperature, *options)
        return loss, lse, found[0], found[3]

    x, loss, lse, dtau = logits.clone(), *torch.full((3, rows), math.nan)
    host.host_vocab_rows(
        *map(address, (x, bias, target, temperature, grad, loss, lse, dtau)), *map(ctypes.c_int64, (rows, classes)),
        ctypes.c_float(softcap), ctypes.c_float(z_loss), ctypes.c_int32(stablemax),
    )  # fmt: skip
    testing.assert_within_budget(
        (loss, lse, x, dtau), defined, (logits, eye, bias, temperature, grad), terms=classes
    )


@needs_cxx
@pytest.mark.parametrize("transform", (None, "stablemax"))
def test_linear_cross_entropy(host, monkeypatch, transform):
    """The backend's products around the row kernel, which runs on the host."""
    from fastattn import _cuda
    from fastattn.ops.vocab import cuda

    def rows(
        logits, bias, target, temperature, grad, loss, lse, dtau, *, stablemax, softcap, z_loss, ignore_index, threads
    ):  # fmt: skip
        assert ignore_index == -100 and threads == _cuda.THREADS
        host.host_vocab_rows(
            *map(address, (logits, bias, target, temperature, grad, loss, lse, dtau)),
            *map(ctypes.c_int64, logits.shape), ctypes.c_float(softcap), ctypes.c_float(z_loss),
            ctypes.c_int32(stablemax),
        )  # fmt: skip

    monkeypatch.setattr(_cuda, "vocab_rows", rows)
    h, weight = testing.random_tensor(5, 8, seed=1), testing.random_tensor(30, 8, seed=2)
    bias, target = testing.random_tensor(30, seed=3), torch.tensor([3, -100, 29, 0, 7])
    options = (int(transform is not None), 3.0, 0.01, -100, "mean")

    def run(h, weight, bias):
        _, lse, *first = cuda.linear_cross_entropy(h, weight, bias, target, None, *options, 7)
        one = torch.ones(())
        again = cuda.linear_cross_entropy_backward(one, h, weight, bias, target, None, lse, *options, 7)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
        return (_, *first[:3])

    def defined(h, weight, bias):
        arguments = (h, weight, bias, target, None, *options)
        found = vocab.linear_cross_entropy_gradients(torch.ones((), dtype=h.dtype), *arguments)
        return (vocab.linear_cross_entropy(*arguments)[0], *found[:3])

    testing.assert_within_budget(run(h, weight, bias), defined, (h, weight, bias), terms=30)


def test_backends_say_why_not():
    from fastattn._registry import _OPS

    cuda = torch.device("cuda")
    h, weight, target = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)
    for op, args in (
        ("linear_cross_entropy", (h, weight, None, target, None, 0, 0.0, 0.0, -100, "mean", 0)),
        ("sinkhorn", (torch.ones(1, 4, 2), None, None, 0.1, 3, False)),
    ):
        backend = next(b for b in _OPS[op].backends if b.name == "cuda")
        if not torch.cuda.is_available():
            assert backend.refusal(cuda, args) == "there is no NVIDIA device"
        double = tuple(
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
        )
        assert "not float64" in backend.refusal(cuda, double)


def decoded(weights, k_cache, v_cache, z_h, z_l, cos, sin, position, heads, h_cycles, l_cycles, eps):
    """One token by definition: (final high state, keys and values of every slot at `position`)."""
    calls, layers, _, _, dim = k_cache.shape
    gqkv, out, gate_up, down = weights

    def rms(x):
        return x * torch.rsqrt(x.square().mean() + eps)

    def rotate(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    new_k, new_v = (torch.zeros(calls, layers, heads, dim, dtype=z_h.dtype) for _ in range(2))

    def stack(which, call, z):
        for layer in range(layers):
            g, q, k, v = (gqkv[which][layer] @ rms(z)).view(4, heads, dim)
            q, k = rotate(q), rotate(k)
            new_k[call, layer], new_v[call, layer] = k, v
            keys = torch.cat(
                [k_cache[call, layer, :, :position], k[:, None]], 1
            )  # (heads, position + 1, dim)
            values = torch.cat([v_cache[call, layer, :, :position], v[:, None]], 1)
            weight = torch.softmax((keys @ q[..., None])[..., 0] / math.sqrt(dim), -1)
            o = torch.sigmoid(g) * (weight[:, None] @ values)[:, 0]
            z = z + out[which][layer] @ o.flatten()
            gate, up = (gate_up[which][layer] @ rms(z)).chunk(2)
            z = z + down[which][layer] @ (torch.nn.functional.silu(gate) * up)
        return rms(z)

    for h in range(h_cycles):
        call = h * (l_cycles + 1)
        for l in range(l_cycles):
            z_l = stack(0, call + l, z_l + z_h)
        z_h = stack(1, call + l_cycles, z_h + z_l)
    return z_h, new_k, new_v


@needs_cxx
@pytest.mark.parametrize("position", (0, 63, 64, 99))
def test_decode_step(host, position):
    hidden, heads, dim, inner, layers, h_cycles, l_cycles, capacity, eps = 24, 2, 8, 36, 2, 2, 3, 100, 1e-6
    calls, width = h_cycles * (l_cycles + 1), heads * dim
    shapes = ((4 * width, hidden), (hidden, width), (2 * inner, hidden), (hidden, inner))
    weights = [
        testing.random_tensor(2, layers, *shape, seed=i, scale=1 / math.sqrt(shape[1]))
        for i, shape in enumerate(shapes)
    ]
    k_cache, v_cache = (testing.random_tensor(calls, layers, heads, capacity, dim, seed=i) for i in (10, 11))
    z_h, z_l = testing.random_tensor(2, hidden, seed=12)
    angle = position * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angle.cos(), angle.sin()
    result = torch.full((hidden,), math.nan)
    host.host_decode_workspace.restype = ctypes.c_int64
    sizes = (hidden, heads, dim, inner)
    workspace = torch.full((host.host_decode_workspace(ctypes.c_int64(capacity), *sizes),), math.nan)
    before = k_cache.clone(), v_cache.clone()
    tensors = [part for w in weights for part in w] + [
        k_cache,
        v_cache,
        z_h,
        z_l,
        cos,
        sin,
        result,
        workspace,
    ]
    host.host_decode(
        (ctypes.c_void_p * 16)(*(t.data_ptr() for t in tensors)), *map(ctypes.c_int64, (capacity, position)), *sizes,
        layers, h_cycles, l_cycles, ctypes.c_float(eps),
    )  # fmt: skip
    actual = result, k_cache[:, :, :, position], v_cache[:, :, :, position]
    # 8 stacks follow one another, each of which may add its own rounding to what it is given
    testing.assert_within_budget(
        actual,
        lambda k, v, h, l, c, s, *w: decoded(w, k, v, h, l, c, s, position, heads, h_cycles, l_cycles, eps),
        (*before, z_h, z_l, cos, sin, *weights),
        terms=8 * inner,
    )
    untouched = torch.arange(capacity) != position
    assert torch.equal(k_cache[:, :, :, untouched], before[0][:, :, :, untouched])


def test_params_are_mirrored(host):
    """Structs of fastattn/_cuda.py have the size and the last field's offset of src/cuda/params.h."""
    from fastattn import _cuda

    for i, struct in enumerate((_cuda.SinkhornParams, _cuda.VocabRowsParams, _cuda.DecodeParams)):
        assert host.host_size_of_params(i) == ctypes.sizeof(struct)
        assert host.host_last_field_of_params(i) == getattr(struct, struct._fields_[-1][0]).offset


def nvrtc() -> ctypes.CDLL | None:
    home = shutil.which("nvcc")
    places = [] if home is None else sorted(Path(home).resolve().parents[1].glob("lib64/libnvrtc.so*"))
    return ctypes.CDLL(str(places[0])) if places else None


@pytest.mark.skipif(nvrtc() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize(
    ("header", "kernel"),
    [
        ("sinkhorn.cuh", "fastattn::cuda::sinkhorn<fastattn::cuda::bf16, 24, 128>"),
        ("vocab_rows.cuh", "fastattn::cuda::vocab_rows<true, 512>"),
    ],
)
def test_compiles_at_run_time(header, kernel):
    """What CuPy's RawModule would be given compiles without the standard library, with other tile constants."""
    from fastattn import _cuda

    library, program = nvrtc(), ctypes.c_void_p()
    source = f'#include "{header}"\n'.encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"program.cu", 0, None, None) == 0
    assert library.nvrtcAddNameExpression(program, kernel.encode()) == 0
    include = Path(shutil.which("nvcc")).resolve().parents[1] / "include"
    options = [f"-I{_cuda.sources()}", f"-I{include}", "--gpu-architecture=sm_90a", "-std=c++17"]
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = library.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    assert size.value


def test_threads_whose_statistics_do_not_fit_are_no_candidates():
    from fastattn.autotune.space import Space

    from fastattn import _config, _cuda, _device

    target = _device.Target("cuda", "a GPU", "sm_90", units=132)
    for groups, most in ((8, 1024), (400, 256)):
        key = {"dtype": "float32", "groups": groups, "batch": 1, "length": 64}
        space = Space(_config.tunings()["sinkhorn", "cuda"], [key], target)
        assert max(space.config(point)["threads"] for point in space.points) == most
    rows = _config.tunings()["vocab_rows", "cuda"]
    assert rows.defaults({}, target) == {"threads": _cuda.THREADS}
