"""Optimizers of the recurrent models: Adam-atan2 with averaged weights, sign descent on puzzle embeddings."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class AdamATan2(Optimizer):
    """Adam with ``atan2(m, sqrt(v))`` in place of ``m / (sqrt(v) + eps)`` (arXiv 2407.05872)::

        p *= 1 - lr * weight_decay
        m  = lerp(m, g, 1 - beta1);  v = lerp(v, g^2, 1 - beta2)
        p -= lr / (1 - beta1^t) * atan2(m, sqrt(v) / sqrt(1 - beta2^t))

    Each parameter has its own step count t, and one without a gradient is left alone. A parameter in
    bfloat16 or float16 has a float32 master copy: it, the moments and the average are float32, and the
    parameter is rounded from the master after each step.

    Args:
        lr, betas, weight_decay: as above.
        ema: decay of the moving average of the weights, e.g. 0.9999; None keeps none. See :meth:`averaged`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ema: float | None = None,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"AdamATan2: lr is {lr}; it must not be negative")
        if not weight_decay >= 0:
            raise ValueError(f"AdamATan2: weight_decay is {weight_decay}; it must not be negative")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"AdamATan2: betas[{i}] is {beta}; it must be at least 0 and under 1")
        if ema is not None and not 0 <= ema < 1:
            raise ValueError(f"AdamATan2: ema is {ema}; it must be at least 0 and under 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "ema": ema})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.requires_grad:
                self._start(p, group)

    @torch.no_grad()
    def _start(self, p: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[p]
        low = p.dtype in (torch.bfloat16, torch.float16)
        full = p.detach().float() if low else p.detach()
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(full)
        state["exp_avg_sq"] = torch.zeros_like(full)
        if low:
            state["master"] = full
        if group["ema"] is not None:
            state["ema"] = full.clone()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> NoReturn: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise ValueError("AdamATan2: closure is not supported")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                weight = state.get("master", p)
                grad = p.grad.to(weight.dtype)
                state["step"] += 1
                t = state["step"]
                m, v = state["exp_avg"], state["exp_avg_sq"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                m.lerp_(grad, 1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                scale = v.sqrt().div_((1 - beta2**t) ** 0.5)
                weight.add_(torch.atan2(m, scale), alpha=-group["lr"] / (1 - beta1**t))
                if weight is not p:
                    p.copy_(weight)
                if "ema" in state:
                    state["ema"].lerp_(weight, 1 - group["ema"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state keeps its own dtype: torch would round masters to the parameters'."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for entry, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][entry] = value.detach().to(p.device, copy=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their moving averages, for evaluation or saving. Afterwards they hold their own
        values again, so that steps taken inside are lost."""
        held = {}
        with torch.no_grad():
            for p, state in self.state.items():
                if "ema" in state:
                    held[p] = p.detach().clone()
                    p.copy_(state["ema"])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in held.items():
                    p.copy_(value)


class TouchedRows(Protocol):
    """What `SignSGD` trains."""

    weights: Tensor  # (rows, dim)
    touched: (
        list[tuple[Tensor, Tensor]] | None
    )  # each use: identifiers (B,), and a leaf (B, dim) that gets the gradient


class SignSGD:
    """Sign descent with decoupled weight decay on the rows of a puzzle embedding that were used::

        w[id] = (1 - lr * weight_decay) * w[id] - lr * sign(sum of the gradients of id's uses)

    Args:
        embedding: a module with ``weights`` (rows, dim) and ``touched``, to which it adds each of its uses:
            identifiers (B,) and the leaf (B, dim) whose gradient counts.
        lr, weight_decay: as above.
    """

    def __init__(self, embedding: TouchedRows, lr: float = 1e-3, weight_decay: float = 1e-2) -> None:
        if not lr >= 0 or not weight_decay >= 0:
            raise ValueError(f"SignSGD: lr {lr} and weight_decay {weight_decay} must not be negative")
        embedding.touched = []
        self.embedding = embedding
        self.lr = lr
        self.weight_decay = weight_decay

    def zero_grad(self) -> None:
        self.embedding.touched = []

    @torch.no_grad()
    def step(self) -> None:
        uses, self.embedding.touched = self.embedding.touched or [], []
        used = [(ids, rows.grad) for ids, rows in uses if rows.grad is not None]
        if not used:
            return
        weights = self.embedding.weights
        ids, place = torch.cat([ids for ids, _ in used]).unique(return_inverse=True)
        grad = torch.zeros(len(ids), weights.shape[1], dtype=weights.dtype, device=weights.device)
        grad.index_add_(0, place, torch.cat([grad for _, grad in used]).to(weights.dtype))
        weights[ids] = weights[ids] * (1 - self.lr * self.weight_decay) - self.lr * grad.sign()


def state_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as tensors named ``<parameter>.<entry>``, for a safetensors file."""
    tensors = {}
    for name, p in model.named_parameters():
        for entry, value in optimizer.state.get(p, {}).items():
            tensors[f"{name}.{entry}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


@torch.no_grad()
def load_state_tensors(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restores what :func:`state_tensors` gave, into an optimizer that was made with the same options.

    Raises:
        ValueError: missing or surplus names, or a shape or dtype that does not fit.
    """
    expected = state_tensors(optimizer, model)
    differing = sorted(expected.keys() ^ tensors.keys())
    if differing:
        raise ValueError(f"load_state_tensors: missing or unexpected: {', '.join(differing)}")
    for name, p in model.named_parameters():
        state = optimizer.state.get(p, {})
        for entry, value in state.items():
            key = f"{name}.{entry}"
            given, known = tensors[key], expected[key]
            if given.shape != known.shape or given.dtype != known.dtype:
                raise ValueError(
                    f"load_state_tensors: {key} has shape {tuple(given.shape)} and dtype {given.dtype}; "
                    f"{tuple(known.shape)} and {known.dtype} are needed"
                )
            if hasattr(value, "device_mesh"):  # a DTensor; every rank was given the whole one
                from torch.distributed.tensor import distribute_tensor

                given = distribute_tensor(given, value.device_mesh, value.placements, src_data_rank=None)
            if isinstance(value, Tensor):
                value.copy_(given)
            else:
                state[entry] = type(value)(given)
