"""Peak memory of the vocabulary ops."""

import pytest

_CASE = """
def problem(N, V, K, d, name):
    g = torch.Generator().manual_seed(0)
    h, codebook = torch.randn(N, d, generator=g), torch.randn(K, d, generator=g)
    weight = torch.randn(V if name in ("linear", "nearest") else 1, d, generator=g)
    for t in (h, codebook, weight):
        t.requires_grad_(name != "nearest")
    bias = torch.zeros(V, requires_grad=True)
    codes, target = torch.randint(0, K, (V,), generator=g), torch.randint(0, V, (N,), generator=g)
    return name, h, weight, codebook, bias, codes, target


def run(name, h, weight, codebook, bias, codes, target):
    if name == "linear":
        fa.linear_cross_entropy(h, weight, target, bias=bias).backward()
    elif name == "codes":
        fa.vq_cross_entropy(h, codebook, codes, target, bias=bias).backward()
    elif name == "choice":
        fa.vq_argmax(h, codebook, codes, bias=bias) + fa.vq_sample(h, codebook, codes, bias=bias)
    elif name == "nearest":
        fa.nearest_codes(weight, codebook)
"""

MB = 10**6


@pytest.fixture
def peak(peak_bytes):
    """Bytes beyond the inputs, gradients included."""
    return lambda N, V, K, d, name: peak_bytes(_CASE, (64, 512, 32, d, name), (N, V, K, d, name))


@pytest.mark.parametrize(
    ("name", "shape", "dense"),
    [
        ("linear", (1024, 131072, 1, 32), 1024 * 131072 * 4),  # gradients: 17 MB of weight
        ("codes", (8192, 131072, 1024, 32), 8192 * 131072 * 4),
        ("choice", (2048, 131072, 1024, 32), 2048 * 131072 * 4),
        ("nearest", (1, 131072, 1024, 16), 131072 * 1024 * 4),
    ],
    ids=["linear", "codes", "choice", "nearest"],
)
def test_nothing_of_vocabulary_size_a_row_is_held(peak, name, shape, dense):
    """What (N, V) or (V, K) would take is 500 MB and more."""
    assert dense > 500 * MB
    assert peak(*shape, name) < 100 * MB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_large_dense_head_stays_under_300_mb(peak):
    """Of which 268 MB are the gradient of weight and 17 MB that of h."""
    assert peak(8192, 131072, 1, 512, "linear") < 300 * MB
