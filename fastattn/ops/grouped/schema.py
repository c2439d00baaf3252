"""torch.ops.fastattn.{sinkhorn, grouped_attention, gated_attention} and their backwards: schema, fake, autograd, backends."""

import torch

from ... import masks
from ...runtime import tuning as _config
from ...runtime.registry import (
    Backend,
    cpu_backend,
    dispatch,
    reference_backend,
    reference_backward,
    register_op,
    save_inputs,
    saved_inputs,
    triton_backend,
)
from . import checks


def _contiguous_like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _statistics_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _reference_backward(name: str, wrt: tuple[int, ...], saved: int, first: int) -> Backend:
    """Vector-Jacobian products of the definition's first output; `saved` arguments follow the first `first` inputs."""

    def load():
        from . import reference

        definition = getattr(reference, name)
        pull = reference_backward(lambda *args: definition(*args)[0], 1, wrt)

        def backward(grad_out, *args):
            return pull(grad_out, *args[:first], *args[first + saved :])

        return backward

    return Backend("reference", load)


def _configure_cuda_sinkhorn(scores, *_):
    from . import tuning  # noqa: F401  declares what the look-up serves

    batch, length, groups = scores.shape
    return _config.lookup(
        "sinkhorn",
        "cuda",
        structural={"dtype": str(scores.dtype).removeprefix("torch."), "groups": groups},
        sizes={"batch": batch, "length": length},
        device=scores.device,
    )


def _load_cuda_sinkhorn():
    from ...runtime import cuda as _cuda

    def sinkhorn(scores, lengths, cu_seqlens, temperature, iterations, causal):
        return _cuda.sinkhorn(
            scores, lengths, temperature, iterations, _configure_cuda_sinkhorn(scores).values["threads"]
        )

    return sinkhorn


def _cuda_sinkhorn_refusal(scores, lengths, cu_seqlens, temperature, iterations, causal) -> str | None:
    from ...runtime import cuda as _cuda

    if cu_seqlens is not None:
        return "it does not serve packed documents"
    if causal:
        return "it serves column sums over the whole sequence, not causal ones"
    if scores.dtype not in _cuda.DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(scores.dtype).removeprefix('torch.')}"
    return _cuda.missing()


# --- sinkhorn ------------------------------------------------------------------------------------------------------


def _sinkhorn_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    save_inputs(ctx, inputs, ())


def _sinkhorn_backward(ctx, grad, _):
    inputs, _ = saved_inputs(ctx)
    none = (None,) * (len(inputs) - 1)
    if grad is None:
        return None, *none
    return dispatch("sinkhorn_backward", grad, *inputs), *none


def _sinkhorn_fake(scores, lengths, cu_seqlens, *_):
    sequences = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    potentials = scores.new_empty(sequences, 1, scores.shape[2], dtype=_statistics_dtype(scores))
    return _contiguous_like(scores), potentials


register_op(
    "sinkhorn",
    "(Tensor scores, Tensor? lengths, Tensor? cu_seqlens, float temperature, SymInt iterations, bool causal, str backend) -> (Tensor, Tensor)",
    fake=_sinkhorn_fake,
    check=checks.check_sinkhorn,
    check_contents=checks.check_sinkhorn_contents,
    backends=(
        Backend(
            "cuda", _load_cuda_sinkhorn, _cuda_sinkhorn_refusal, _configure_cuda_sinkhorn, devices=("cuda",)
        ),
        cpu_backend(__package__, "sinkhorn", tuned=False),
        triton_backend(f"{__package__}.triton_sinkhorn", "sinkhorn", configure="configure"),
        reference_backend(__package__, "sinkhorn"),
    ),
    backward=_sinkhorn_backward,
    setup_context=_sinkhorn_setup,
)
register_op(
    "sinkhorn_backward",
    "(Tensor grad, Tensor scores, Tensor? lengths, Tensor? cu_seqlens, float temperature, SymInt iterations, bool causal, str backend) -> Tensor",
    fake=lambda grad, scores, *_: _contiguous_like(scores),
    check=checks.check_sinkhorn_backward,
    check_contents=checks.check_sinkhorn_backward_contents,
    backends=(
        cpu_backend(__package__, "sinkhorn_backward", tuned=False),
        triton_backend(f"{__package__}.triton_sinkhorn", "sinkhorn_backward", configure="configure_backward"),
        _reference_backward("sinkhorn", (0,), 0, 1),
    ),
)


# --- grouped_attention ----------------------------------------------------------------------------------------------

_GROUPED_OPTIONS = f"Tensor groups, Tensor key_groups, SymInt window, float scale, {masks.SCHEMA}"


def _attention_fake(q, k, v, *rest):
    """out, and state as in attention's schema, of gated scores where there are gates."""
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], 2, dtype=_statistics_dtype(q))


def _attention_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    save_inputs(ctx, inputs, output)


def _grouped_backward(ctx, grad_out, _):
    (q, k, v, *options), (out, state) = saved_inputs(ctx)
    none = (None,) * len(options)
    if grad_out is None:
        return None, None, None, *none
    return *dispatch("grouped_attention_backward", grad_out, q, k, v, out, state, *options), *none


register_op(
    "grouped_attention",
    f"(Tensor q, Tensor k, Tensor v, {_GROUPED_OPTIONS}, str backend) -> (Tensor, Tensor)",
    fake=_attention_fake,
    check=checks.check_grouped_attention,
    check_contents=checks.check_grouped_contents,
    backends=(
        cpu_backend(__package__, "grouped_attention"),
        triton_backend(f"{__package__}.triton", "grouped_attention", configure="configure"),
        reference_backend(__package__, "grouped_attention"),
    ),
    backward=_grouped_backward,
    setup_context=_attention_setup,
)
register_op(
    "grouped_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor state, {_GROUPED_OPTIONS}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda grad_out, q, k, v, *rest: tuple(_contiguous_like(t) for t in (q, k, v)),
    check=checks.check_grouped_attention_backward,
    backends=(
        cpu_backend(__package__, "grouped_attention_backward"),
        triton_backend(f"{__package__}.triton_backward", "grouped_attention_backward", configure="configure"),
        _reference_backward("grouped_attention", (0, 1, 2), saved=2, first=3),
    ),
)


# --- gated_attention -------------------------------------------------------------------------------------------------

_GATED_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor assignment, Tensor sharpness"
_GATED_OPTIONS = f"SymInt window, int gate, float scale, {masks.SCHEMA}"


def _gated_backward(ctx, grad_out, _):
    inputs, results = saved_inputs(ctx)
    tensors, options = inputs[:5], inputs[5:]
    none = (None,) * len(options)
    if grad_out is None:
        return (None,) * 5 + none
    return *dispatch("gated_attention_backward", grad_out, *tensors, *results, *options), *none


register_op(
    "gated_attention",
    f"({_GATED_INPUTS}, {_GATED_OPTIONS}, str backend) -> (Tensor, Tensor)",
    fake=_attention_fake,
    check=checks.check_gated_attention,
    backends=(
        cpu_backend(__package__, "gated_attention"),
        triton_backend(f"{__package__}.triton_gated", "gated_attention", configure="configure"),
        reference_backend(__package__, "gated_attention"),
    ),
    backward=_gated_backward,
    setup_context=_attention_setup,
)
register_op(
    "gated_attention_backward",
    f"(Tensor grad_out, {_GATED_INPUTS}, Tensor out, Tensor state, {_GATED_OPTIONS}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad_out, *tensors: tuple(_contiguous_like(t) for t in tensors[:5]),
    check=checks.check_gated_attention_backward,
    backends=(
        cpu_backend(__package__, "gated_attention_backward"),
        triton_backend(
            f"{__package__}.triton_gated",
            "gated_attention_backward",
            refusal="refusal_backward",
            configure="configure_backward",
        ),
        _reference_backward("gated_attention", (0, 1, 2, 3, 4), saved=2, first=5),
    ),
)
