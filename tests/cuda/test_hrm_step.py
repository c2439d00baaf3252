"""The persistent decode kernel, run on the host, against the definition; and HrmText's decoding by it."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.models import HrmText, HrmTextConfig
from fastattn.ops.hrm_step import reference, workload
from fastattn.runtime import cuda as _cuda
from fastattn.runtime import device as _device
from fastattn.runtime import tuning as _config


def problem(dtype, *, hidden=24, heads=2, dim=8, inner=36, layers=1, cycles=(1, 1), capacity=9):
    """(states and caches, weights) of a call."""
    calls = cycles[0] * (cycles[1] + 1)
    shapes = ((4 * heads * dim, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner))
    weights = [
        testing.random_tensor(*shape, seed=i, scale=shape[1] ** -0.5, dtype=dtype)
        for i, shape in enumerate(shapes * 2 * layers)
    ]
    states = [testing.random_tensor(1, hidden, seed=90 + i, dtype=dtype) for i in range(2)]
    caches = [
        testing.random_tensor(calls, layers, 1, heads, capacity, dim, seed=80 + i, dtype=dtype)
        for i in range(2)
    ]
    return [*states, *caches], weights


def check(host, dtype, position, *, cycles=(1, 1), theta=100.0, config=None, on_device=None, **sizes):
    """on_device: an integer type, and the position is read from a tensor of it."""
    tensors, weights = problem(dtype, cycles=cycles, **sizes)
    z_h, z_l, k_cache, v_cache = tensors
    k, v = k_cache.clone(), v_cache.clone()
    # what lies beyond the position is not read
    k[..., position:, :] = v[..., position:, :] = torch.nan
    with _config.override({("decode_step", "cuda"): config or {}}):
        result = fa.decode_step(
            z_h,
            z_l,
            weights,
            k,
            v,
            position if on_device is None else torch.tensor([position], dtype=on_device),
            h_cycles=cycles[0],
            l_cycles=cycles[1],
            theta=theta,
            backend="cuda",
        )

    def defined(z_h, z_l, k, v, *weights):
        k, v = k.clone(), v.clone()
        result = reference.decode_step(z_h, z_l, weights, k, v, None, position, *cycles, theta, 1e-6)
        return result, k[..., position, :], v[..., position, :]

    # the stacks follow one another, each of which may add its own rounding to what it is given
    calls, layers = k_cache.shape[:2]
    longest = max(w.shape[1] for w in weights)
    testing.assert_within_budget(
        (result, k[..., position, :], v[..., position, :]),
        defined,
        (*tensors, *weights),
        terms=calls * layers * longest,
    )
    for new, old in ((k, k_cache), (v, v_cache)):
        assert torch.equal(new[..., :position, :], old[..., :position, :])
        assert new[..., position + 1 :, :].isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_built_kernels(host, dtype):
    check(host, dtype, 5, layers=2, cycles=(2, 3))
    assert host.launches == ["decode_step"]


@pytest.mark.parametrize("position", (0, 1, 63, 64, 130))
def test_positions_in_several_pieces(host, position):
    check(host, torch.float32, position, capacity=131)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("position", (0, 64, 130))
def test_positions_on_the_device(host, position, dtype):
    """The host knows no more than the capacity."""
    check(host, torch.float32, position, capacity=140, on_device=dtype)
    assert host.launches == ["decode_step"]


@pytest.mark.parametrize("kib", (52, 48, 47))
def test_shared_memory_that_has_to_be_asked_for(host, monkeypatch, kib):
    """The kernel's own arrays count towards the 48 KiB that need no asking: 12288 floats do not fit in."""
    monkeypatch.setattr(_cuda, "most_shared", lambda device: 52 << 10)
    monkeypatch.setattr(_cuda, "decode_shared", lambda *sizes: kib << 10)
    # head dims over 128 for another kernel than those that have asked before
    check(
        host,
        torch.bfloat16 if kib == 52 else torch.float32 if kib == 48 else torch.float16,
        3,
        heads=1,
        dim=136,
    )
    assert host.launches == ["decode_step"]


def test_the_tuner_s_calls(host):
    shape = {
        "hidden": 32,
        "heads": 1,
        "head_dim": 32,
        "inner": 40,
        "layers": 1,
        "cached": 3,
        "dtype": "bfloat16",
    }
    (found,) = workload.WORKLOADS
    inputs = found.inputs(shape, torch.device("cpu"), 0)
    actual = found.call(shape, *inputs)
    assert host.launches == ["decode_step"]
    testing.assert_within_budget(
        actual, lambda *a: found.reference(shape, *a), inputs, terms=found.terms(shape)
    )
    target = _device.Target("cuda", "a GPU", "sm_90", units=132, shared=227 << 10)
    for call in found.shapes("full", target) + found.shapes("quick", target):
        assert call.keys() == shape.keys()


def test_wide_heads_and_odd_sizes(host):
    """The built kernel for head dims over 128; rows that are no multiple of 16 bytes or of the warps."""
    check(host, torch.bfloat16, 3, hidden=19, heads=1, dim=136, inner=5)
    assert host.launches == ["decode_step"]


SMALL = {"threads": 128, "rows": 4, "span": 16}
COMPILED = (
    (torch.float32, {"dim": 8}, SMALL, "float, 32, 128, 4, 16"),
    (torch.float32, {"dim": 132, "heads": 1, "hidden": 30}, SMALL | {"rows": 2, "span": 32}, "float, 160, 128, 2, 32"),
    (torch.bfloat16, {"dim": 34, "heads": 3}, SMALL | {"rows": 2}, "fastattn::cuda::bf16, 64, 128, 2, 16"),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "sizes", "config", "constants"), COMPILED)
def test_kernels_compiled_at_run_time(host, dtype, sizes, config, constants):
    check(host, dtype, 37, capacity=40, config=config, **sizes)
    assert host.launches == [f"decode_step<{constants}>"]


@pytest.mark.parametrize("seed", (1, 2, 3))
def test_in_any_order(host, seed):
    host.schedule(seed)
    check(host, torch.float32, 37, capacity=40, config=SMALL, layers=2)


def test_what_it_cannot_serve_says_why(host):
    def reason(batch=1, **changes):
        tensors, weights = problem(changes.pop("dtype", torch.float32), **changes)
        z_h, z_l, k, v = tensors
        if batch != 1:
            z_h, z_l = z_h.expand(batch, -1), z_l.expand(batch, -1)
            k, v = (c.repeat(1, 1, batch, 1, 1, 1) for c in (k, v))
        options = {"h_cycles": 1, "l_cycles": 1}
        found = fa.explain("decode_step", z_h, z_l, weights, k, v, 2, **options)
        with pytest.raises(NotImplementedError, match="decode_step: no backend can serve this call"):
            fa.decode_step(z_h, z_l, weights, k, v, 2, **options, backend="cuda")
        return found.ruled_out["cuda"]

    assert reason(dtype=torch.float64) == "it serves float32, bfloat16 and float16, not float64"
    assert reason(batch=2) == "it serves a batch of one, not of 2"
    assert "256 and 40 layers a stack, not 258 and 1" in reason(dim=258)
    assert "not 2 and 41" in reason(dim=2, layers=41, hidden=4, inner=4)
    assert "needs 20000 bytes of shared memory, the device has 16384" in reason(inner=5000)
    assert host.launches == []


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HrmText(
        HrmTextConfig(
            vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
            max_position_embeddings=64,
        )
    )  # fmt: skip


@torch.no_grad()
def decoded(model, ids, prompt):
    cache = model.make_cache(1, ids.shape[1])
    model(ids[:, :prompt], prefix_lengths=torch.tensor([prompt]), cache=cache)
    return torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(prompt, ids.shape[1])], 1)


def test_a_model_decodes_by_it(host, model):
    ids = torch.randint(40, (1, 8))
    got = decoded(model, ids, 5)
    assert host.launches == ["decode_step"] * 3
    with fa.set_backend("reference"):
        eager = decoded(model, ids, 5)
    assert len(host.launches) == 3
    # 8 calls of 2 layers follow one another, and sums are over 36 at most
    truth = decoded(model.double(), ids, 5)
    assert len(host.launches) == 3  # no kernel for float64
    testing.assert_close_to_truth(got, truth, eager, terms=8 * 2 * 36)


def test_explain_shows_backend_and_configuration(host):
    tensors, weights = problem(torch.bfloat16)
    z_h, z_l, k, v = tensors
    found = fa.explain("decode_step", z_h, z_l, weights, k, v, 2, h_cycles=1, l_cycles=1)
    assert (found.backend, found.source) == ("cuda", "default")
    assert found.config == {"threads": 512, "rows": 1, "span": 64}
    assert host.launches == []
