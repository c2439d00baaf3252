"""Sinkhorn in CUDA C++."""

from ...runtime import cuda
from ...runtime import tuning as _tuning
from . import tuning  # noqa: F401  declares what `_tuning.lookup` serves


def refusal(scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal) -> str | None:
    """Why the kernel cannot serve this call, or None."""
    if cu_seqlens is not None:
        return "it does not serve packed documents"
    if causal:
        return "it serves column sums over the whole sequence, not causal=True"
    return cuda.unserved_dtype(scores) or cuda.missing()


def configure(scores, *_) -> _tuning.Choice:
    batch, length, groups = scores.shape
    return _tuning.lookup(
        "sinkhorn",
        "cuda",
        structural={"dtype": str(scores.dtype).removeprefix("torch."), "groups": groups},
        sizes={"batch": batch, "length": length},
        device=scores.device,
    )


def sinkhorn(scores, lengths, cu_seqlens, prefix_lengths, temperature, iterations, causal):
    return cuda.sinkhorn(scores, lengths, temperature, iterations, configure(scores).values["threads"])
