"""Peak memory of the vocabulary ops, measured by the kernel's own count in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resetting the peak needs Linux's /proc"
)

_SCRIPT = """
import json, sys
import torch
import fastattn as fa

torch.set_num_threads(2)
N, V, K, d, name = json.loads(sys.argv[1])


def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def problem(N, V, K, d):
    g = torch.Generator().manual_seed(0)
    h, codebook = torch.randn(N, d, generator=g), torch.randn(K, d, generator=g)
    weight = torch.randn(V if name in ("linear", "nearest") else 1, d, generator=g)
    for t in (h, codebook, weight):
        t.requires_grad_(name != "nearest")
    bias = torch.zeros(V, requires_grad=True)
    codes, target = torch.randint(0, K, (V,), generator=g), torch.randint(0, V, (N,), generator=g)
    return h, weight, codebook, bias, codes, target


def run(h, weight, codebook, bias, codes, target):
    if name == "linear":
        fa.linear_cross_entropy(h, weight, target, bias=bias).backward()
    elif name == "codes":
        fa.vq_cross_entropy(h, codebook, codes, target, bias=bias).backward()
    elif name == "choice":
        fa.vq_argmax(h, codebook, codes, bias=bias) + fa.vq_sample(h, codebook, codes, bias=bias)
    elif name == "nearest":
        fa.nearest_codes(weight, codebook)


run(*problem(64, 512, 32, d))  # libraries loaded, thread buffers made
inputs = problem(N, V, K, d)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmRSS:")
run(*inputs)
print(memory("VmHWM:") - before)
"""

MB = 10**6


def peak(N, V, K, d, name):
    """Bytes beyond the inputs, gradients included."""
    argument = json.dumps([N, V, K, d, name])
    done = subprocess.run([sys.executable, "-c", _SCRIPT, argument], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


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
def test_nothing_of_vocabulary_size_a_row_is_held(name, shape, dense):
    """What (N, V) or (V, K) would take is 500 MB and more."""
    assert dense > 500 * MB
    assert peak(*shape, name) < 100 * MB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_large_dense_head_stays_under_300_mb():
    """Of which 268 MB are the gradient of weight and 17 MB that of h."""
    assert peak(8192, 131072, 1, 512, "linear") < 300 * MB
