"""What stands for transformers' functions of linear-time layers on a CPU, where these are chunks or loops in torch: delta rules, Mamba's
scans and short convolutions, and the calls that prove each of them."""

import contextvars
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.causal_conv1d import causal_conv1d
from ..ops.linear_attention import linear_attention, linear_attention_step
from ..ops.selective_scan import selective_scan
from ..runtime import native
from ..runtime.registry import needs_grad
from ._replaced import DTYPES

UNSERVED = object()  # what `ours` gives for arguments that the original gets
ACTIVATIONS = (None, "silu", "swish")

# offsets of the documents that the running layer's tokens are packed of
documents: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("documents", default=None)


def _plain(*tensors: Any) -> bool:
    """Whether all but None are tensors of the CPU and nothing more, of a dtype that the kernels take."""
    return all(
        t is None or (type(t) in (Tensor, nn.Parameter) and t.dtype in DTYPES and t.device.type == "cpu")
        for t in tensors
    )


def _parameters(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether all but None have x's dtype, or float32."""
    return all(t is None or t.dtype in (x.dtype, torch.float32) for t in tensors)


class Function:
    """Stands for one function of a modeling file on tensors of the CPU; the function gets all other calls."""

    roundings = 1  # of numbers of half precision, in the function or in ours

    def __init__(self, function: Callable) -> None:
        self.function = self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.ours(*args, **kwargs)
        if result is not UNSERVED:
            return result
        if documents.get() is not None:
            raise NotImplementedError(
                f"fastattn: accelerate: {self.function.__name__} keeps packed documents apart for float32, bfloat16 and float16 "
                "tensors of a CPU, whose tokens are those documents' and not a cache's"
            )
        return self.function(*args, **kwargs)

    def ours(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def probes(self, draw: "Draw") -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """Calls that prove this one equal. The dtype is draw's."""
        raise NotImplementedError


class Draw:
    """Random tensors of a dtype, the same at every run."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def gate(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Between 0 and 1."""
        return torch.rand(shape, generator=self.generator).to(dtype or self.dtype)


class Nothing(Function):
    """A whole layer in one kernel of another package, which says None where the package is absent."""

    def ours(self, *args: Any, **kwargs: Any) -> Any:
        return None if all(a.device.type == "cpu" for a in args if isinstance(a, Tensor)) else UNSERVED

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        required = inspect.signature(self.function).parameters.values()
        yield [None for p in required if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD], {}


# --- short convolutions ----------------------------------------------------------------------------------------------


class Convolution(Function):
    """causal_conv1d_fn: x (B, D, L), weight (D, K)."""

    roundings = 3  # the sum, the bias and the activation are rounded apart

    def ours(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        offsets = documents.get()
        if (
            not _plain(hidden_states, weight, bias)
            or not _parameters(hidden_states, weight, bias)
            or not 1 <= weight.shape[-1] <= native.limits.taps
            or activation not in ACTIVATIONS
        ):
            return UNSERVED
        if offsets is not None and int(offsets[-1]) != hidden_states.shape[-1]:
            return UNSERVED  # behind inputs of a cache
        x = hidden_states.transpose(1, 2)
        return causal_conv1d(x, weight, bias=bias, activation=activation, cu_seqlens=offsets).transpose(1, 2)

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        for taps, length, activation in ((4, 9, "silu"), (3, 2, None)):
            for bias in (draw(6), None):
                yield [draw(2, 6, length), draw(6, taps), bias], {"activation": activation}


class ConvolutionUpdate(Function):
    """causal_conv1d_update: x (B, D, 1); the state (B, D, K or more) is written in place."""

    roundings = 3

    def ours(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Any:
        before = weight.shape[-1] - 1
        if (
            not _plain(hidden_states, conv_state, weight, bias)
            or not _parameters(hidden_states, weight, bias)
            or conv_state.dtype != hidden_states.dtype
            or not 0 <= before < native.limits.taps
            or conv_state.shape[-1] < before
            or activation not in ACTIVATIONS
            or documents.get() is not None
            or needs_grad((hidden_states, conv_state, weight, bias))
        ):
            return UNSERVED
        kept = conv_state.shape[-1]
        out = causal_conv1d(
            hidden_states.transpose(1, 2),
            weight,
            bias=bias,
            activation=activation,
            initial_state=conv_state[..., kept - before :].transpose(1, 2),
        ).transpose(1, 2)
        conv_state.copy_(torch.cat([conv_state, hidden_states], -1)[..., hidden_states.shape[-1] :])
        return out

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        for taps, length, activation in ((4, 1, "silu"), (3, 2, None)):
            for bias in (draw(6), None):
                yield [draw(2, 6, length), draw(2, 6, 4), draw(6, taps), bias], {"activation": activation}


# --- delta rules -----------------------------------------------------------------------------------------------------


class _Delta(Function):
    """The delta rule, q and k (B, L, Hk, dk), v (B, L, Hv, dv), beta (B, L, Hv), and the logarithm g of the decay: (B, L, Hv), or
    (B, L, Hv, dk) of KDA; the state (B, Hv, dk, dv) float32."""

    def __init__(self, function: Callable, channels: bool = False) -> None:
        super().__init__(function)
        self.channels = channels

    def serves(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> bool:
        offsets = documents.get()
        return (
            _plain(q, k, v, g, beta, state)
            and q.dtype == k.dtype == v.dtype
            and max(q.shape[-1], v.shape[-1]) <= native.limits.state_dim
            and g.dim() == (4 if self.channels else 3)
            and (offsets is None or (state is None and int(offsets[-1]) == q.shape[1]))
        )

    def whole(
        self, tensors: tuple[Tensor, ...], initial: Tensor | None, returns_state: bool, norm: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Any number of tokens; tensors: q, k, v, g, beta."""
        q, k, v, g, beta = (t.transpose(1, 2) for t in tensors)
        out, state = linear_attention(
            q,
            k,
            v,
            decay=g,
            beta=beta,
            qk_norm=norm,
            initial_state=None if initial is None else initial.float(),
            return_state=True,
            cu_seqlens=documents.get(),
        )
        return out.transpose(1, 2).contiguous(), state if returns_state else None

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        heads, dk, dv = (1 if not self.channels else 2), 8, 6
        for length, norm, state in ((70, True, True), (5, True, False), (5, False, True)):
            shape = (2, length, 2, dk) if self.channels else (2, length, 2)
            yield (
                [
                    *(draw(2, length, heads, dk) * (1 if norm else dk**-0.5) for _ in range(2)),
                    draw(2, length, 2, dv),
                    -0.5 * draw.gate(*shape, dtype=torch.float32),
                    draw.gate(2, length, 2),
                ],
                {
                    "initial_state": draw(2, 2, dk, dv, dtype=torch.float32) if state else None,
                    "output_final_state": state,
                    "use_qk_l2norm_in_kernel": norm,
                },
            )


class DeltaRule(_Delta):
    """torch_chunk_gated_delta_rule and chunk_kimi_delta_attention: of a whole sequence."""

    def ours(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        tensors = query, key, value, g, beta
        if not self.serves(*tensors, initial_state):
            return UNSERVED
        return self.whole(tensors, initial_state, output_final_state, use_qk_l2norm_in_kernel)


class DeltaRuleStep(_Delta):
    """torch_recurrent_gated_delta_rule and recurrent_kimi_delta_attention: token by token, for decoding."""

    def ours(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        tensors = query, key, value, g, beta
        if not self.serves(*tensors, initial_state):
            return UNSERVED
        if initial_state is None or query.shape[1] != 1 or needs_grad((*tensors, initial_state)):
            return self.whole(tensors, initial_state, output_final_state, use_qk_l2norm_in_kernel)
        q, k, v, decay, write = (t[:, 0] for t in tensors)
        state = initial_state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        out = linear_attention_step(q, k, v, state, decay=decay, beta=write, qk_norm=use_qk_l2norm_in_kernel)
        return out[:, None], state if output_final_state else None

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        for tensors, options in super().probes(draw):
            yield [t[:, -1:] for t in tensors], options
            yield [t[:, -3:] for t in tensors], options


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


class StateSpace(Function):
    """mamba2_chunk_scan: x (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N); the state (B, H, P, N). All float32 out."""

    def ours(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        offsets = documents.get()
        if (
            not _plain(hidden_states, dt, A, B, C, D, dt_bias, initial_states)
            or max(hidden_states.shape[-1], B.shape[-1]) > native.limits.state_dim
            or A.dim() != 1
            or (D is not None and D.dim() != 1)
            or kwargs.get("z") is not None
            or (
                offsets is not None
                and (initial_states is not None or int(offsets[-1]) != hidden_states.shape[1])
            )
        ):
            return UNSERVED
        dt = _step_size(dt, dt_bias, dt_softplus).clamp(*dt_limit)
        x = hidden_states.float()
        out, state = linear_attention(
            *(t.float().transpose(1, 2) for t in (C, B, x)),
            decay=(A.float() * dt.float()).transpose(1, 2),
            beta=dt.transpose(1, 2),
            delta_rule=False,
            scale=1.0,
            initial_state=None if initial_states is None else initial_states.float().mT,
            return_state=True,
            cu_seqlens=offsets,
        )
        out = out.transpose(1, 2)
        out = out.contiguous() if D is None else torch.addcmul(out, D.float()[:, None], x).contiguous()
        return (out, state.mT.contiguous()) if return_final_states else out

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        for length, more in ((20, True), (3, False)):
            yield (
                [
                    draw(2, length, 4, 6),
                    draw(2, length, 4) if more else draw.gate(2, length, 4),
                    -draw.gate(4, dtype=torch.float32),
                    draw(2, length, 2, 8),
                    draw(2, length, 2, 8),
                    8,
                ],
                {
                    "D": draw(4) if more else None,
                    "dt_bias": draw(4) if more else None,
                    "initial_states": draw(2, 4, 6, 8, dtype=torch.float32) if more else None,
                    "dt_softplus": more,
                    "dt_limit": (0.1, 2.0) if more else (0.0, math.inf),
                    "return_final_states": more,
                },
            )


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """As transformers rounds it."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _alike(t: Tensor | None, dims: int) -> bool:
    """Whether t holds one number, expanded, along each of its last `dims` dims."""
    return t is None or all(t.shape[d] == 1 or t.stride(d) == 0 for d in range(-dims, 0))


class StateSpaceStep(Function):
    """mamba2_selective_state_update: a token of the above. x and dt (B, H, P), A (H, P, N), B and C (B, G, N), D (H, P); the state
    (B, H, P, N) is written in place."""

    roundings = 8  # dt, dt B, their product with x, the state, C h, D x and their sum

    def ours(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if (
            not _plain(state, hidden_states, dt, A, B, C, D, dt_bias)
            or state.dtype != torch.float32
            or max(hidden_states.shape[-1], B.shape[-1]) > native.limits.state_dim
            or not (_alike(dt, 1) and _alike(A, 2) and _alike(dt_bias, 1))
            or z is not None
            or documents.get() is not None
            or needs_grad((state, hidden_states, dt, A, B, C, D, dt_bias))
        ):
            return UNSERVED
        of_head = _step_size(dt[..., 0], None if dt_bias is None else dt_bias[..., 0], dt_softplus)
        out = linear_attention_step(
            C.float(),
            B.float(),
            hidden_states.float(),
            state.mT,
            decay=A[:, 0, 0].float() * of_head.float(),
            beta=of_head,
            delta_rule=False,
            scale=1.0,
        )
        if D is not None:
            out = out + hidden_states * D
        return out.to(hidden_states.dtype)

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        heads, width, states = 4, 6, 8
        for more in (True, False):
            yield (
                [
                    draw(2, heads, width, states, dtype=torch.float32),
                    draw(2, heads, width),
                    draw.gate(2, heads, 1).expand(-1, -1, width),
                    (-draw.gate(heads, 1, 1, dtype=torch.float32)).expand(-1, width, states),
                    draw(2, 2, states),
                    draw(2, 2, states),
                ],
                {
                    "D": draw(heads, 1).expand(-1, width) if more else None,
                    "dt_bias": draw(heads, 1).expand(-1, width) if more else None,
                    "dt_softplus": more,
                },
            )


# --- Mamba -----------------------------------------------------------------------------------------------------------


def _selective_scan(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], A: Tensor, D: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """u, dt, B, C, z of (B, L, ...), of one dtype or in float32."""
    u, dt, B, C, z = tokens
    if any(t is not None and t.dtype != u.dtype for t in tokens):
        u, dt, B, C = (t.float() for t in (u, dt, B, C))
        z = None if z is None else z.float()
    return selective_scan(u, dt, A.float(), B, C, D=D, z=z, return_state=True, **options)


class SelectiveScan(Function):
    """mamba_selective_scan: u, dt and z (B, E, L), A (E, N), B and C (B, N, L), D and the bias of dt (E,); the state (B, E, N) float32."""

    roundings = 12  # dt, its bias and softplus, each read for decay and input; the state, C h, D u, their sum, the gate

    def ours(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> Any:
        offsets = documents.get()
        if (
            not _plain(hidden_states, dt, A, B, C, D, z, delta_bias)
            or not _parameters(hidden_states, D, delta_bias)
            or B.dim() != 3
            or (offsets is not None and int(offsets[-1]) != hidden_states.shape[-1])
        ):
            return UNSERVED
        dtype = hidden_states.dtype
        for t in (D, z):
            dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
        turned = tuple(None if t is None else t.transpose(1, 2) for t in (hidden_states, dt, B, C, z))
        out, state = _selective_scan(
            turned,  # type: ignore[arg-type]
            A,
            D,
            dt_bias=delta_bias,
            dt_softplus=delta_softplus,
            cu_seqlens=offsets,
        )
        out = out.to(dtype).transpose(1, 2)
        return (out, state) if return_last_state else out

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        wide = torch.float32
        for length, more in ((9, True), (3, False)):
            yield (
                [
                    draw(2, 6, length),
                    draw(2, 6, length) if more else draw.gate(2, 6, length),
                    -draw.gate(6, 4, dtype=wide),
                    draw(2, 4, length),
                    draw(2, 4, length),
                ],
                {
                    "D": draw(6, dtype=wide) if more else None,
                    "z": draw(2, 6, length) if more else None,
                    "delta_bias": draw(6, dtype=wide) if more else None,
                    "delta_softplus": more,
                    "return_last_state": more,
                },
            )


class SelectiveStep(Function):
    """mamba_selective_state_update: a token of the above. u, dt and z (B, E), B and C (B, N); the state (B, E, N) is written in place."""

    roundings = 12

    def ours(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if (
            not _plain(state, hidden_states, dt, A, B, C, D, z, dt_bias)
            or not _parameters(hidden_states, D, dt_bias)
            or state.dtype != torch.float32
            or hidden_states.dim() != 2
            or documents.get() is not None
            or needs_grad((state, hidden_states, dt, A, B, C, D, z, dt_bias))
        ):
            return UNSERVED
        turned = tuple(None if t is None else t[:, None] for t in (hidden_states, dt, B, C, z))
        out, after = _selective_scan(
            turned,  # type: ignore[arg-type]
            A,
            D,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_state=state,
        )
        state.copy_(after)
        return out[:, 0].to(hidden_states.dtype)

    def probes(self, draw: Draw) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        wide = torch.float32
        for more in (True, False):
            yield (
                [
                    draw(2, 6, 4, dtype=wide),
                    draw(2, 6),
                    draw(2, 6) if more else draw.gate(2, 6),
                    -draw.gate(6, 4, dtype=wide),
                    draw(2, 4),
                    draw(2, 4),
                ],
                {
                    "D": draw(6) if more else None,
                    "z": draw(2, 6) if more else None,
                    "dt_bias": draw(6, dtype=wide) if more else None,
                    "dt_softplus": more,
                },
            )


# --- all of them -----------------------------------------------------------------------------------------------------


def _of_channels(kind: type[_Delta]) -> Callable[[Callable], Function]:
    return lambda function: kind(function, channels=True)


# the name of a kind, and of its functions
KINDS: dict[str, dict[str, Callable[[Callable], Function]]] = {
    "gated_delta_rule": {
        "torch_chunk_gated_delta_rule": DeltaRule,
        "torch_recurrent_gated_delta_rule": DeltaRuleStep,
    },
    "kimi_delta_attention": {
        "chunk_kimi_delta_attention": _of_channels(DeltaRule),
        "recurrent_kimi_delta_attention": _of_channels(DeltaRuleStep),
    },
    "mamba2": {
        "mamba2_chunk_scan": StateSpace,
        "mamba2_selective_state_update": StateSpaceStep,
        "mamba2_split_conv1d_scan_combined": Nothing,
    },
    "mamba": {
        "mamba_selective_scan": SelectiveScan,
        "mamba_selective_state_update": SelectiveStep,
        "mamba_inner_fn": Nothing,
    },
    "causal_conv1d": {"causal_conv1d_fn": Convolution, "causal_conv1d_update": ConvolutionUpdate},
}
