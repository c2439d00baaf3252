"""torch.ops.fastattn.{sinkhorn, grouped_attention, gated_attention} and their backwards: schema, fake, autograd, backends."""

import torch

from ... import masks
from ..._registry import Backend, reference_backward, register_op, triton_backend


def _contiguous_like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _statistics_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _reference(name: str) -> Backend:
    def load():
        from . import reference

        return getattr(reference, name)

    return Backend("reference", load)


def _cpu(name: str) -> Backend:
    def load():
        from . import cpu

        return getattr(cpu, name)

    def supports(*args):
        from . import cpu

        return cpu.refusal(name, *args)

    def configure(*args):
        from . import cpu

        return cpu.configure(name, *args)

    return Backend("cpu", load, supports, configure, devices=("cpu",))


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


def _save(ctx, inputs, tensors) -> None:
    """Keep an op's inputs for its backward: tensors by save_for_backward, `tensors` (results) after them, the rest as they are."""
    ctx.where = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
    ctx.inputs = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.where), *tensors)
    ctx.set_materialize_grads(False)


def _saved(ctx) -> tuple[list, tuple]:
    inputs = list(ctx.inputs)
    for i, t in zip(ctx.where, ctx.saved_tensors, strict=False):
        inputs[i] = t
    return inputs, ctx.saved_tensors[len(ctx.where) :]


def _load_cuda_sinkhorn():
    from ... import _cuda

    def sinkhorn(scores, lengths, temperature, iterations, causal):
        return _cuda.sinkhorn(scores, lengths, temperature, iterations)

    return sinkhorn


def _cuda_sinkhorn_refusal(scores, lengths, temperature, iterations, causal) -> str | None:
    from ... import _cuda

    if causal:
        return "it serves column sums over the whole sequence, not causal ones"
    if scores.dtype not in _cuda.DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(scores.dtype).removeprefix('torch.')}"
    return _cuda.missing()


# --- sinkhorn ------------------------------------------------------------------------------------------------------


def _sinkhorn_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, ())


def _sinkhorn_backward(ctx, grad, _):
    inputs, _ = _saved(ctx)
    if grad is None:
        return (None,) * 6
    return torch.ops.fastattn.sinkhorn_backward(grad, *inputs), None, None, None, None, None


register_op(
    "sinkhorn",
    "(Tensor scores, Tensor? lengths, float temperature, int iterations, bool causal, str backend) -> (Tensor, Tensor)",
    fake=lambda scores, *_: (
        _contiguous_like(scores),
        scores.new_empty(scores.shape[0], 1, scores.shape[2], dtype=_statistics_dtype(scores)),
    ),
    backends=(
        Backend("cuda", _load_cuda_sinkhorn, _cuda_sinkhorn_refusal, devices=("cuda",)),
        _reference("sinkhorn"),
    ),
    backward=_sinkhorn_backward,
    setup_context=_sinkhorn_setup,
)
register_op(
    "sinkhorn_backward",
    "(Tensor grad, Tensor scores, Tensor? lengths, float temperature, int iterations, bool causal, str backend) -> Tensor",
    fake=lambda grad, scores, *_: _contiguous_like(scores),
    backends=(_reference_backward("sinkhorn", (0,), 0, 1),),
)


# --- grouped_attention ----------------------------------------------------------------------------------------------

_GROUPED_OPTIONS = f"Tensor groups, Tensor key_groups, int window, float scale, {masks.SCHEMA}"


def _attention_fake(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_statistics_dtype(q))


def _attention_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output)


def _grouped_backward(ctx, grad_out, _):
    (q, k, v, *options), (out, lse) = _saved(ctx)
    none = (None,) * len(options)
    if grad_out is None:
        return None, None, None, *none
    return *torch.ops.fastattn.grouped_attention_backward(grad_out, q, k, v, out, lse, *options), *none


register_op(
    "grouped_attention",
    f"(Tensor q, Tensor k, Tensor v, {_GROUPED_OPTIONS}, str backend) -> (Tensor, Tensor)",
    fake=_attention_fake,
    backends=(
        _cpu("grouped_attention"),
        triton_backend(f"{__package__}.triton", "grouped_attention", configure="configure"),
        _reference("grouped_attention"),
    ),
    backward=_grouped_backward,
    setup_context=_attention_setup,
)
register_op(
    "grouped_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_GROUPED_OPTIONS}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda grad_out, q, k, v, *rest: tuple(_contiguous_like(t) for t in (q, k, v)),
    backends=(
        _cpu("grouped_attention_backward"),
        triton_backend(f"{__package__}.triton_backward", "grouped_attention_backward", configure="configure"),
        _reference_backward("grouped_attention", (0, 1, 2), saved=2, first=3),
    ),
)


# --- gated_attention -------------------------------------------------------------------------------------------------

_GATED_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor assignment, Tensor sharpness"
_GATED_OPTIONS = f"int window, int gate, float scale, {masks.SCHEMA}"


def _gated_backward(ctx, grad_out, _):
    inputs, results = _saved(ctx)
    tensors, options = inputs[:5], inputs[5:]
    none = (None,) * len(options)
    if grad_out is None:
        return (None,) * 5 + none
    return *torch.ops.fastattn.gated_attention_backward(grad_out, *tensors, *results, *options), *none


register_op(
    "gated_attention",
    f"({_GATED_INPUTS}, {_GATED_OPTIONS}, str backend) -> (Tensor, Tensor)",
    fake=_attention_fake,
    backends=(
        _cpu("gated_attention"),
        triton_backend(f"{__package__}.triton_gated", "gated_attention", configure="configure"),
        _reference("gated_attention"),
    ),
    backward=_gated_backward,
    setup_context=_attention_setup,
)
register_op(
    "gated_attention_backward",
    f"(Tensor grad_out, {_GATED_INPUTS}, Tensor out, Tensor lse, {_GATED_OPTIONS}, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad_out, *tensors: tuple(_contiguous_like(t) for t in tensors[:5]),
    backends=(
        _cpu("gated_attention_backward"),
        triton_backend(
            f"{__package__}.triton_gated",
            "gated_attention_backward",
            refusal="refusal_backward",
            configure="configure_backward",
        ),
        _reference_backward("gated_attention", (0, 1, 2, 3, 4), saved=2, first=5),
    ),
)
