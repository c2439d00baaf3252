"""What an installed wheel has to do in an environment that has nothing but it: `python tests/wheel_check.py`, in any folder.

Its threads are torch's, its kernels run, its command answers. In the wheel for any platform plain torch serves, and says so.
"""

import json
import os
import subprocess
import sys

import torch

import fastattn as fa
from fastattn.runtime.registry import OPS


def main() -> None:
    assert "site-packages" in fa.__file__, f"{fa.__file__}: is not the installed package"
    kernels = bool(fa.cpu_isas())
    fast = "cpu" if kernels else "reference"
    q = torch.randn(1, 8, 300, 64, requires_grad=True)
    k, v = torch.randn(2, 1, 2, 300, 64).unbind(0)
    packed = fa.Mask(prefix_lengths=torch.tensor([40, 0]), cu_seqlens_q=torch.tensor([0, 120, 300]))
    for mask in (packed, fa.Mask(causal=True, window=(128, 0))):
        results = {}
        for backend in (fast, "reference"):
            out = fa.attention(q, k, v, mask=mask, backend=backend)
            results[backend] = (out.detach(), *torch.autograd.grad(out.sum(), q))
        for found, exact in zip(results[fast], results["reference"], strict=True):
            # sums of up to 300 products of rounded numbers on either side
            assert (found - exact).abs().max() <= 300 * 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    normed, total = fa.rms_norm(torch.randn(4, 512), residual=torch.randn(4, 512))
    assert normed.shape == total.shape == (4, 512)
    assert fa.explain(fa.sigmoid_attention, q, k, v).backend == fast
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            pools = {line.split()[-1] for line in maps if "libgomp" in line}
        assert len(pools) <= 1, f"two thread pools: {sorted(pools)}"
    command = [sys.executable, "-m", "fastattn.cli", "doctor", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["devices"]["cpu"]["ops"]["attention"]["float32"].startswith(fast)
    assert any("no compiled kernels" in line for line in found["why_not_fast"]) != kernels
    print(
        f"fastattn {fa.__version__}: {len(OPS)} ops, {fa.cpu_isas()[-1] if kernels else 'no kernels'}, "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
