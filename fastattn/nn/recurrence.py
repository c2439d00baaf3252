"""Hierarchical recurrence: a fast low-level stack and a slow high-level one, called in nested cycles."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .plain import replaceable


@replaceable
class HierarchicalRecurrence(nn.Module):
    """Two stacks called in cycles, as in HRM (arXiv 2506.21734) and HRM-Text (arXiv 2605.20613)::

        for h in range(H_cycles):
            for l in range(L_cycles):
                zL = L_stack(zL, zH + inject)
            zH = H_stack(zH, zL)

    A stack is a module called as ``stack(state, injection, cache=..., **shared)``; it adds the injection to
    its state itself, so that the addition can be fused with its first norm. The same stack may serve as both.

    Calls are numbered in the order they run, H call ``h`` after its L calls: call ``h * (L_cycles + 1) + l``
    with ``l = L_cycles`` for H. A cache is indexed by the same number.
    """

    def __init__(self, L_stack: nn.Module, H_stack: nn.Module, H_cycles: int, L_cycles: int) -> None:
        super().__init__()
        for name, cycles in (("H_cycles", H_cycles), ("L_cycles", L_cycles)):
            if not isinstance(cycles, int) or cycles < 1:
                raise ValueError(
                    f"HierarchicalRecurrence: {name} is {cycles!r}; it must be an int of at least 1"
                )
        self.L_stack = L_stack
        self.H_stack = H_stack
        self.H_cycles = H_cycles
        self.L_cycles = L_cycles

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each stack by itself, in place, as ``torch.compile`` with the same arguments would.

        What is compiled does not grow with the cycles: a stack is traced once with gradients and once without.
        (``torch.compile`` of the whole module is right too, but traces every call.)
        """
        for stack in {self.L_stack: None, self.H_stack: None}:
            stack.compile(*args, **kwargs)

    def activation_checkpointing(self, on: bool = True) -> None:
        """Sets ``activation_checkpointing`` of both stacks, which then recompute in the backward."""
        stack: Any
        for stack in (self.L_stack, self.H_stack):
            if not hasattr(stack, "activation_checkpointing"):
                raise NotImplementedError(
                    f"HierarchicalRecurrence: {type(stack).__name__} has no activation_checkpointing"
                )
            stack.activation_checkpointing = on

    @property
    def calls(self) -> int:
        """Stack calls in one forward."""
        return self.H_cycles * (self.L_cycles + 1)

    def gradient_calls(self, bp_steps: int) -> tuple[bool, ...]:
        """Which calls carry gradients when ``bp_steps`` of them do: the last ``min(H_cycles, bp_steps - 1)``
        H calls and, of the L calls, as many of the last as are left over."""
        if not isinstance(bp_steps, int) or isinstance(bp_steps, bool):
            raise TypeError(f"HierarchicalRecurrence: bp_steps is {bp_steps!r}; it must be an int")
        if not 2 <= bp_steps <= self.calls:
            raise ValueError(
                f"HierarchicalRecurrence: bp_steps is {bp_steps}; it must be from 2 to {self.calls}"
            )
        H_steps = min(self.H_cycles, bp_steps - 1)
        return self.credit(H_steps, bp_steps - H_steps)

    def credit(self, H_steps: int, L_steps: int) -> tuple[bool, ...]:
        """Flags for gradients in the last ``H_steps`` H calls and the last ``L_steps`` L calls."""
        first_L = self.H_cycles * self.L_cycles - L_steps
        first_H = self.H_cycles - H_steps
        flags = []
        for h in range(self.H_cycles):
            flags += [h * self.L_cycles + l >= first_L for l in range(self.L_cycles)]
            flags.append(h >= first_H)
        return tuple(flags)

    def forward(
        self,
        zH: Tensor,
        zL: Tensor,
        *,
        inject: Tensor | None = None,
        gradient_calls: Sequence[bool] | None = None,
        cache: Any = None,
        **shared: Any,
    ) -> tuple[Tensor, Tensor]:
        """Runs every cycle and returns ``(zH, zL)``.

        Args:
            zH, zL: states (B, L, D).
            inject: (B, L, D), added to zH in every L call (HRM); None for HRM-Text.
            gradient_calls: one flag per call; a call whose flag is False runs under ``no_grad`` and saves nothing.
                Default: every call carries gradients.
            cache: indexed by call, passed to the stacks as ``cache=cache[call]``.
            shared: passed to every call unchanged.
        """
        if gradient_calls is None:
            gradient_calls = (True,) * self.calls
        elif len(gradient_calls) != self.calls:
            raise ValueError(
                f"HierarchicalRecurrence: gradient_calls has {len(gradient_calls)} flags; "
                f"there are {self.calls} calls"
            )
        enabled = torch.is_grad_enabled()
        call = 0
        for _ in range(self.H_cycles):
            for _ in range(self.L_cycles):
                with torch.set_grad_enabled(enabled and gradient_calls[call]):
                    injection = zH if inject is None else zH + inject
                    zL = self.L_stack(
                        zL, injection, cache=cache[call] if cache is not None else None, **shared
                    )
                call += 1
            with torch.set_grad_enabled(enabled and gradient_calls[call]):
                zH = self.H_stack(zH, zL, cache=cache[call] if cache is not None else None, **shared)
            call += 1
        return zH, zL
