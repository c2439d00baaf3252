"""Every private name of torch that the package uses, each looked up once.

`KNOWN` is False if this torch lacks one. Then every call goes through torch's dispatcher, which handles the same cases itself.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad


def _look_up() -> tuple[Any, ...]:
    functorch = torch._C._functorch
    return (
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        functorch.peek_interpreter_stack,
        torch._C._get_tracing_state,
        functorch.is_functorch_wrapped_tensor,
        functorch.is_gradtrackingtensor,
        functorch.get_unwrapped,
        torch._C.DispatchKeySet,
        torch._C.DispatchKey.AutogradFunctionality,
        torch._C._dispatch_tls_local_include_set,
        torch._C._dispatch_tls_local_exclude_set,
        torch._C._ForceDispatchKeyGuard,
        torch.autograd.profiler._is_profiler_enabled,  # a bool
        forward_ad._current_level,  # an int
    )


try:
    (
        _dispatch_modes,
        _function_modes,
        _transform,
        _tracing,
        _is_wrapped,
        _tracks_gradients,
        _unwrapped,
        _KeySet,
        _AUTOGRAD,
        _included,
        _excluded,
        _force_keys,
        _,
        _,
    ) = _look_up()
    KNOWN = True
except AttributeError:
    KNOWN = False


def observed() -> bool:
    """Whether a mode, a transform, tracing, a compiler or the profiler watches the calls of this thread."""
    return (
        not KNOWN
        or torch.compiler.is_compiling()
        or _dispatch_modes() != 0
        or _function_modes() != 0
        or _transform() is not None
        or _tracing() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def transformed() -> bool:
    """Whether this thread is inside a transform of torch.func."""
    return KNOWN and _transform() is not None


def differentiates_forward() -> bool:
    """Whether forward-mode differentiation is on."""
    return KNOWN and forward_ad._current_level >= 0


def has_functional_gradient(t: torch.Tensor) -> bool:
    """Whether torch.func's grad, vjp or jacrev records what is done with t."""
    while KNOWN and _is_wrapped(t):
        if _tracks_gradients(t) and t.requires_grad:
            return True
        t = _unwrapped(t)
    return False


@contextmanager
def autograd_inside_an_op() -> Iterator[None]:
    """Record gradients although an op's implementation runs below autograd."""
    keys = _KeySet(_AUTOGRAD)
    with _force_keys(_included(), _excluded() - keys), torch.enable_grad():
        yield


def indexing_by_values() -> AbstractContextManager:
    """Inside, `tensor[index]` accepts an index that torch.vmap maps, as in torch's own flex_attention."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()
