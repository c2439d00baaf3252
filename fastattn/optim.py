"""Optimizers of the recurrent models: Adam-atan2 with averaged weights, sign descent on puzzle embeddings."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

_LOW = (torch.bfloat16, torch.float16)


class AdamATan2(Optimizer):
    """Adam with ``atan2(m, sqrt(v))`` in place of ``m / (sqrt(v) + eps)`` (arXiv 2407.05872)::

        p *= 1 - lr * weight_decay
        m  = lerp(m, g, 1 - beta1);  v = lerp(v, g^2, 1 - beta2)
        p -= lr / (1 - beta1^t) * atan2(m, sqrt(v) / sqrt(1 - beta2^t))

    Each parameter has its own step count t, and one without a gradient is left alone. A parameter in
    bfloat16 or float16 has a float32 master copy: it, the moments and the average are float32, and the
    parameter is rounded from the master after each step.

    A parameter that was frozen when the optimizer was made starts with its first gradient. After ``model.to()`` its
    state follows in the next step: a parameter that became 16-bit gets a master, one that no longer is loses it.
    Sparse gradients are refused (NotImplementedError) before any parameter changes.

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
        full = p.detach().float() if p.dtype in _LOW else p.detach()
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(full)
        state["exp_avg_sq"] = torch.zeros_like(full)
        if p.dtype in _LOW:
            state["master"] = full
        if group["ema"] is not None:
            state["ema"] = full.clone()

    def _state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The parameter's state, in the dtype and on the device that the parameter has now."""
        if p not in self.state:
            self._start(p, group)
        state = self.state[p]
        full = torch.float32 if p.dtype in _LOW else p.dtype
        if (state["exp_avg"].dtype, state["exp_avg"].device) != (full, p.device):
            state |= {k: v.to(p.device, full) for k, v in state.items() if isinstance(v, Tensor)}
        if p.dtype not in _LOW:
            state.pop("master", None)
        elif "master" not in state:
            state["master"] = p.detach().to(full)
        return state

    def _check_dense(self) -> None:
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"{i} of group {number}" for i in range(len(group["params"]))
            ]
            for name, p in zip(names, group["params"], strict=True):
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise NotImplementedError(
                        f"AdamATan2: parameter {name} has a gradient of layout {p.grad.layout}; only dense ones are "
                        "served (nn.Embedding: sparse=False)"
                    )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; ``closure``, as torch's, computes the gradients first, and its loss is returned."""
        loss = _evaluated(closure)
        self._check_dense()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state(p, group)
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
        return loss

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


def _evaluated(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class SparseRows(Protocol):
    """What `SignSGD` trains. Once ``trained`` is True, each backward adds to ``weights.grad``, a sparse tensor."""

    weights: Tensor  # (rows, dim)
    trained: bool


class SignSGD(Optimizer):
    """Sign descent with decoupled weight decay on the rows of a puzzle embedding that were used::

        w[id] = (1 - lr * weight_decay) * w[id] - lr * sign(sum of the gradients of id's uses)

    An optimizer like torch's: its param_groups have ``lr`` and ``weight_decay`` for schedulers to change, gradients
    add up until ``zero_grad``, which may come anywhere before the backward, and each step takes those that are there.

    Where torch.distributed is initialised, every rank has to call :meth:`step`: the identifiers and gradients of all
    ranks are gathered, so that their copies of the rows stay equal. That is what DistributedDataParallel and FSDP, which
    know parameters alone, leave to be done.

    Args:
        embedding: a module such as ``Hrm.puzzle_emb``.
        lr, weight_decay: as above.
        process_group: the ranks that share the rows; default: all of them.
    """

    process_group: Any = None

    def __init__(
        self, embedding: SparseRows, lr: float = 1e-3, weight_decay: float = 1e-2, process_group: Any = None
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"SignSGD: {name} is {value}; it must not be negative")
        embedding.trained = True
        self.embedding = embedding
        self.process_group = process_group
        super().__init__([embedding.weights], {"lr": lr, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"embedding": self.embedding, "process_group": self.process_group}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError(
                "SignSGD: add_param_group is not served; each embedding has an optimizer of its own"
            )
        super().add_param_group(param_group)

    def _weights(self) -> Tensor:
        """The rows as they are now: ``model.to()`` puts a new tensor in a buffer's place."""
        self.param_groups[0]["params"] = [self.embedding.weights]
        return self.embedding.weights

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, whatever ``set_to_none``: they name the rows that were used."""
        self._weights().grad = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; ``closure``, as torch's, computes the gradients first, and its loss is returned."""
        loss = _evaluated(closure)
        weights, group = self._weights(), self.param_groups[0]
        if weights.grad is None:
            ids, grad = torch.empty(0, dtype=torch.int64, device=weights.device), weights[:0]
        else:
            sparse = weights.grad.coalesce()
            ids, grad = sparse.indices()[0], sparse.values()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            ids, grad = _of_all_ranks(ids, grad, self.process_group)
        decay = 1 - group["lr"] * group["weight_decay"]
        weights[ids] = weights[ids] * decay - group["lr"] * grad.sign()
        return loss


def _of_all_ranks(ids: Tensor, grad: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(identifiers, each once, and the sums of their gradients) over the ranks, whose numbers of rows may differ."""
    from .distributed import _carrier

    device, world = grad.device, dist.get_world_size(group)
    count = torch.tensor([len(ids)], device=_carrier(group))
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group=group)
    longest = max(int(n) for n in counts)
    gathered = []
    for rows in (ids, grad):
        padded = rows.new_zeros(longest, *rows.shape[1:], device=count.device)
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in range(world)]
        if longest:
            dist.all_gather(every, padded, group=group)
        gathered.append(torch.cat([part[: int(n)] for part, n in zip(every, counts, strict=True)]).to(device))
    return summed_rows(*gathered)


def summed_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(identifiers, each once and rising, and the sum of each one's rows)."""
    ids, place = ids.unique(return_inverse=True)
    return ids, rows.new_zeros(len(ids), *rows.shape[1:]).index_add_(0, place, rows)


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
