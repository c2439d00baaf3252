"""The grid on the host finds what it is there to find."""

import ctypes
import math

import pytest
import torch

FAULTS = {
    1: "never written|with no barrier between",
    2: "shared memory that .* with no barrier between",
    3: "global memory that .* with no barrier between",
    4: "do not reach the same barrier: 64 are at a barrier of the block; 64 have returned",
    5: "do not reach the same barrier: 64 are at a shuffle; 64 have returned",
    6: "reads shared memory that was never written",
    7: "writes global memory outside of every tensor",
    8: "reads beyond the dynamic shared memory asked for",
    9: "writes global memory that .* wrote, with no barrier between",
    10: "an access off its type's alignment",
    11: "an index beyond its array",
    12: "reads what another block wrote, not by __ldcg",
    13: "do not reach the same barrier: 64 are at a barrier of the grid; 64 have returned",
}


def run(host, which):
    data = torch.full((128,), math.nan)
    address = ctypes.c_void_p(host.allow(data))
    host.launch("faulty", host.library.host_faulty, address, which)
    return data


@pytest.mark.parametrize("seed", (0, 1, 2, 3))
def test_every_fault_is_found_in_any_order(host, seed):
    host.schedule(seed)
    for which, message in FAULTS.items():
        with pytest.raises(RuntimeError, match=message):
            run(host, which)
    assert run(host, 0)[:3].tolist() == [63, 63, 126]  # and nothing where there is none


def test_a_cooperative_grid_has_to_be_resident(host):
    from fastattn.runtime import cuda as _cuda

    params = _cuda.SinkhornParams()
    with pytest.raises(RuntimeError, match="out of resources"):
        host.launch_compiled("sinkhorn.cuh", "sinkhorn<float, 6, 64>", 3, 64, params, cooperative=True)
