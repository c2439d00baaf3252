"""The decode step as one persistent cooperative kernel (src/cuda/hrm_step.cuh), for a batch of one."""

from ...runtime import cuda
from ...runtime import tuning as _tuning
from ...runtime.tuning import Choice
from . import tuning  # noqa: F401  declares what the look-up serves


def configure(z_h, z_l, weights, k_cache, v_cache, positions, position, *_) -> Choice:
    *_, heads, _, head_dim = k_cache.shape
    return _tuning.lookup(
        "decode_step",
        "cuda",
        structural={"dtype": str(z_h.dtype).removeprefix("torch."), "head_dim": head_dim},
        sizes={
            "hidden": z_h.shape[1],
            "inner": weights[3].shape[1],
            "heads": heads,
            "cached": position + 1,
        },
        device=z_h.device,
    )


def refusal(z_h, z_l, weights, k_cache, v_cache, *_) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    _, layers, batch, heads, _, head_dim = k_cache.shape
    if z_h.dtype not in cuda.DTYPES:
        return cuda.unserved_dtype(z_h)
    if batch != 1:
        return f"it serves a batch of one, not of {batch}"
    if head_dim > cuda.MOST_HEAD_DIM or layers > cuda.MOST_LAYERS:
        return (
            f"it serves head dims up to {cuda.MOST_HEAD_DIM} and {cuda.MOST_LAYERS} layers a stack, "
            f"not {head_dim} and {layers}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "it serves contiguous caches"
    if not all(w.is_contiguous() and w.data_ptr() % 16 == 0 for w in weights):
        return "it serves contiguous weights aligned to 16 bytes"
    missing = cuda.missing()
    if missing is None:
        shared = cuda.decode_shared(z_h.shape[1], heads * head_dim, weights[3].shape[1])
        available = cuda.most_shared(z_h.device)
        if shared > available:
            return f"its longest vector needs {shared} bytes of shared memory, the device has {available}"
    return missing


def decode_step(z_h, z_l, weights, k_cache, v_cache, *options):
    arguments = (z_h.contiguous(), z_l.contiguous(), weights, k_cache, v_cache, *options)
    return cuda.decode_step(*arguments, **configure(*arguments).values)
