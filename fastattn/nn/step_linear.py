"""Linear layers with a low-rank term of their own at each step of a recursion."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Clock:
    """The step that is running, None outside of one: shared by a Recursive and its layers."""

    step: int | None = None


class StepLinear(nn.Linear):
    """``W x + b + B_s (A_s x)`` at step s ("Relaxed Recursive Transformers", arXiv 2410.20672).

    Parameters: ``weight`` and ``bias``, the linear layer's own; ``lora_A`` (steps, rank, in), uniform as nn.Linear's weights;
    ``lora_B`` (steps, out, rank), zero.
    """

    def __init__(self, linear: nn.Linear, steps: int, rank: int, clock: Clock) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        rank = min(rank, self.in_features, self.out_features)
        self.lora_A = nn.Parameter(self.weight.new_empty(steps, rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(steps, self.out_features, rank))
        bound = math.sqrt(1 / self.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)
        self._clock = clock

    @classmethod
    def put_into(cls, block: nn.Module, steps: int, rank: int, clock: Clock) -> nn.Module:
        """The block, with every nn.Linear of it replaced in place; itself if it is one."""
        if type(block) is nn.Linear:
            return cls(block, steps, rank, clock)
        made: dict[nn.Linear, StepLinear] = {}  # a layer that is in two places stays one
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and type(child) is not nn.Linear:
                    raise NotImplementedError(
                        f"Recursive: {name} is a {type(child).__name__}, which does more than a linear layer; "
                        "lora_rank needs plain ones"
                    )
                if type(child) is nn.Linear:
                    made[child] = made.get(child) or cls(child, steps, rank, clock)
                    setattr(parent, name, made[child])
        if not made:
            raise ValueError("Recursive: lora_rank is given, but the block has no nn.Linear")
        return block

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, steps={len(self.lora_A)}, rank={self.lora_A.shape[1]}"

    def forward(self, x: Tensor) -> Tensor:
        step = self._clock.step
        if step is None:
            raise RuntimeError(
                "Recursive: a layer with a LoRA a step ran outside of a step; activation checkpointing inside of the block "
                "does that: set activation_checkpointing of the Recursive"
            )
        return F.linear(x, self.weight, self.bias) + F.linear(
            F.linear(x, self.lora_A[step]), self.lora_B[step]
        )

    @torch.no_grad()
    def start_from(self, weights: Sequence[Tensor]) -> None:
        """The terms of this rank that bring ``weight`` closest to each step's own (Eckart-Young)."""
        rank = self.lora_A.shape[1]
        for step, own in enumerate(weights):
            U, S, V = torch.linalg.svd(own.double() - self.weight.double(), full_matrices=False)
            root = S[:rank].sqrt()
            self.lora_A[step] = root[:, None] * V[:rank]
            self.lora_B[step] = U[:, :rank] * root
