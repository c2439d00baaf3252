"""Argument checks shared by all public functions: they raise before any kernel runs and name op and argument."""

import numbers
import operator
from typing import Any, cast

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int32, torch.int64)


def traced() -> bool:
    """Whether this call is being traced, so that tensors have no contents. torch.compiler.is_compiling is true in every thread
    while one of them compiles; it counts only where a dispatch mode of this thread traces (torch.export without Dynamo)."""
    return torch.compiler.is_dynamo_compiling() or (
        torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
    )


def has_contents(value: torch.Tensor) -> bool:
    """Whether a tensor's values can be read now: not while tracing, not on the meta device and not under vmap."""
    if traced() or value.is_meta or torch._subclasses.fake_tensor.is_fake(value):
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return False
        value = functorch.get_unwrapped(value)
    return True


def as_integer(value: Any) -> int | None:
    """value as an int or SymInt; None if it is not an integer. A bool does not count as one."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else cast(int, value)
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    return None


def is_number(value: object) -> bool:
    """Whether value is to go through `as_number`: a number or a tensor. A bool is refused elsewhere; a SymFloat stays symbolic."""
    return isinstance(value, (torch.Tensor, numbers.Real)) and not isinstance(value, (bool, torch.SymFloat))


def as_number(op: str, name: str, value: Any, *, kind: str = "a number") -> float:
    """value as a float. It may be a real number of Python, of numpy or of a compiler, or a 0-dim CPU tensor, as in torch's functions."""
    number = value
    if isinstance(value, torch.Tensor):
        if value.dim() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"fastattn.{op}: {name} must be {kind}, given {describe(value)}")
        if value.requires_grad:
            raise TypeError(
                f"fastattn.{op}: {name} gets no gradient; multiply q by it, or give float({name})"
            )
        if value.device.type != "cpu":
            raise TypeError(
                f"fastattn.{op}: {name} is a tensor on {value.device}, and reading it would wait for the device; give float({name})"
            )
        number = value.item()
    elif isinstance(value, bool) or not isinstance(
        value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
    ):
        raise TypeError(f"fastattn.{op}: {name} must be {kind}, given {describe(value)}")
    return float(number)


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            return f"a {str(value.dtype).removeprefix('torch.')} nested tensor"
        shape = "x".join(map(str, value.shape)) or "a scalar"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape ({shape})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # an array of another library
        shape = "x".join(map(str, value.shape)) or "a scalar"
        kind = type(value)
        return f"a {kind.__module__.partition('.')[0]} {kind.__name__} of shape ({shape})"
    return f"{type(value).__name__} {value!r}"


def check_any_tensor(op: str, name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"fastattn.{op}: {name} must be a tensor, given {describe(value)}")
    return value


def check_tensor(
    op: str, name: str, value: Any, *, dims: int | tuple[int, ...] | None = None
) -> torch.Tensor:
    """`value` must be a dense strided tensor, and have one of the ranks `dims` when given."""
    check_any_tensor(op, name, value)
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise NotImplementedError(
            f"fastattn.{op}: {name} is a {layout} tensor, only dense strided ones are served"
        )
    allowed = (dims,) if isinstance(dims, int) else dims
    if allowed is not None and value.dim() not in allowed:
        ranks = " or ".join(map(str, allowed))
        raise ValueError(f"fastattn.{op}: {name} must have {ranks} dimensions, given {describe(value)}")
    return value


def check_floating(op: str, *, absent: tuple[str, ...] = (), **tensors: torch.Tensor | None) -> None:
    """All tensors are floating, of one dtype and on one device; those named in `absent` may be None."""
    first: tuple[str, torch.Tensor] | None = None
    for name, t in tensors.items():
        if t is None and name in absent:
            continue
        t = check_tensor(op, name, t)
        if t.dtype not in FLOATING:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
            raise TypeError(f"fastattn.{op}: {name} must be one of {allowed}, given {describe(t)}")
        if first is None:
            first = (name, t)
        elif t.dtype != first[1].dtype:
            raise TypeError(
                f"fastattn.{op}: {name} is {str(t.dtype).removeprefix('torch.')} but {first[0]} is "
                f"{str(first[1].dtype).removeprefix('torch.')}; convert one of them"
            )
    check_same_device(op, **tensors)


def check_exact(
    op: str,
    name: str,
    value: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    why: str,
) -> None:
    """Check a tensor that has exactly one allowed shape, dtype and device, such as an incoming gradient or a saved result."""
    if (
        isinstance(value, torch.Tensor)
        and value.shape == shape
        and value.dtype is dtype
        and value.device == device
    ):
        return
    check_tensor(op, name, value)
    check_shape(op, name, value, shape, why)
    if value.dtype is not dtype:
        raise TypeError(
            f"fastattn.{op}: {name} must be {str(dtype).removeprefix('torch.')}, given {describe(value)}"
        )
    raise ValueError(
        f"fastattn.{op}: {name} is on {value.device} but the rest is on {device}; nothing is copied between devices silently"
    )


def check_like(op: str, name: str, value: torch.Tensor, other: str, like: torch.Tensor) -> None:
    """`value` has the shape, dtype and device of `like`, which messages call `other`."""
    check_exact(op, name, value, like.shape, like.dtype, like.device, f"{other}'s")


def check_written(op: str, name: str, value: torch.Tensor) -> None:
    """No two elements of a tensor that is written in place share memory by a stride of 0."""
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        raise ValueError(f"fastattn.{op}: {name} is written in place and must not be an expanded tensor")


def check_parameter(op: str, name: str, value: torch.Tensor, other: str, like: torch.Tensor) -> None:
    """`value` has the dtype of `like`, which messages call `other`. It may be float32 beside a 16-bit `like`: kernels use it in float32."""
    check_tensor(op, name, value)
    if value.dtype is not like.dtype and (value.dtype is not torch.float32 or like.dtype.itemsize != 2):
        dtype = str(like.dtype).removeprefix("torch.")
        also = ", or float32" if like.dtype.itemsize == 2 else ""
        raise TypeError(
            f"fastattn.{op}: {name} must be {dtype}, {other}'s dtype{also}, given {describe(value)}"
        )


def statistics_dtype(t: torch.Tensor) -> torch.dtype:
    """The dtype of the log-sum-exps, losses and norms that an op computes from t."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    first: tuple[str, torch.Tensor] | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if first is None:
            first = (name, t)
        elif t.device != first[1].device:
            raise ValueError(
                f"fastattn.{op}: {name} is on {t.device} but {first[0]} is on {first[1].device}; "
                "nothing is copied between devices silently"
            )


def check_integer(
    op: str, name: str, value: torch.Tensor, *, dims: int | tuple[int, ...] | None = None
) -> None:
    check_tensor(op, name, value, dims=dims)
    if value.dtype not in INTEGER:
        raise TypeError(f"fastattn.{op}: {name} must be int32 or int64, given {describe(value)}")


def check_shape(op: str, name: str, value: torch.Tensor, shape: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != tuple(shape):
        expected = "x".join(map(str, shape))
        raise ValueError(
            f"fastattn.{op}: {name} must have shape ({expected}) ({why}), given {describe(value)}"
        )


def broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` broadcasts to `full`, which has as many dims. Sizes are compared by ==, which adds a guard for
    a symbolic size while tracing; `in` would compare by identity and miss the size that a symbol stands for."""
    return all(a == 1 or a == b for a, b in zip(shape, full, strict=True))


def common_shape(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape to which all broadcast, or None if there is none. Unlike torch.broadcast_shapes, it leaves no call in a compiler's graph."""
    result = [1] * max(len(shape) for shape in shapes)
    for shape in shapes:
        for i, size in enumerate(shape, len(result) - len(shape)):
            if result[i] == 1:
                result[i] = size
            elif size != 1 and size != result[i]:
                return None
    return tuple(result)


def check_choice(op: str, name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(
            f"fastattn.{op}: {name} must be one of {', '.join(map(repr, allowed))}, given {value!r}"
        )


def check_positive(op: str, name: str, value: object, *, zero: bool = False) -> None:
    number = as_number(op, name, value)
    if not (number > 0 or (zero and number == 0)):
        raise ValueError(
            f"fastattn.{op}: {name} must be {'zero or more' if zero else 'more than zero'}, given {value!r}"
        )


def as_positive(op: str, name: str, value: object, *, zero: bool = False) -> float:
    check_positive(op, name, value, zero=zero)
    return as_number(op, name, value)


def check_range(
    op: str, name: str, value: torch.Tensor, low: int, high: int, *, also: int | None = None
) -> None:
    """The elements of an index tensor on the CPU lie in [low, high), or equal `also`. Not checked where they cannot be read (`has_contents`)."""
    if value.device.type != "cpu" or not has_contents(value) or value.numel() == 0:
        return
    least, most = torch.aminmax(value)
    if least >= low and most < high:
        return
    bad = (value < low) | (value >= high)
    if also is not None:
        bad &= value != also
    if bool(bad.any()):
        position = int(bad.flatten().nonzero()[0])
        element = int(value.flatten()[position])
        allowed = f"[{low}, {high})" + (f" or {also}" if also is not None else "")
        if also == high:
            allowed = f"[{low}, {high}]"
        raise ValueError(
            f"fastattn.{op}: {name} must lie in {allowed}, given {element} at position {position}"
        )
