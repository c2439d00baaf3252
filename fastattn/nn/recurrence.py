"""Hierarchical recurrence: stacks from fast to slow, called in nested cycles."""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from .plain import replaceable


@replaceable
class HierarchicalRecurrence(nn.Module):
    """Stacks called in nested cycles, as in HRM (arXiv 2506.21734) and HRM-Text (arXiv 2605.20613). With two::

        for h in range(H_cycles):
            for l in range(L_cycles):
                zL = L_stack(zL, zH + inject)
            zH = H_stack(zH, zL)

    With any number, ``HierarchicalRecurrence(stacks, cycles)``, the fastest first: level l is called ``cycles[l]`` times in
    each cycle of the level above it, each time after the cycles of the level below::

        z[l] = stacks[l](z[l], z[l - 1] + z[l + 1])      the levels that are there; the fastest gets inject too

    ``HierarchicalRecurrence(L_stack, H_stack, H_cycles, L_cycles)`` is ``([L_stack, H_stack], [L_cycles, H_cycles])``. Two
    stacks are the attributes ``L_stack`` and ``H_stack``, more are ``stack_0`` and so on; ``stacks`` lists them.

    A stack is a module called as ``stack(state, injection, cache=..., **shared)``; it adds the injection to
    its state itself, so that the addition can be fused with its first norm. The same stack may serve as several.

    Calls are numbered in the order they run: with two, H call ``h`` comes after its L calls and is call
    ``h * (L_cycles + 1) + L_cycles``. A cache is indexed by the same number. ``schedule`` has each call's level.
    """

    @overload
    def __init__(self, stacks: Sequence[nn.Module], cycles: Sequence[int], /) -> None: ...
    @overload
    def __init__(self, *, stacks: Sequence[nn.Module], cycles: Sequence[int]) -> None: ...
    @overload
    def __init__(self, L_stack: nn.Module, H_stack: nn.Module, H_cycles: int, L_cycles: int) -> None: ...
    def __init__(
        self,
        L_stack: Any = None,
        H_stack: Any = None,
        H_cycles: Any = None,
        L_cycles: Any = None,
        *,
        stacks: Any = None,
        cycles: Any = None,
    ) -> None:
        super().__init__()
        if stacks is None and isinstance(L_stack, list | tuple | nn.ModuleList):
            stacks, cycles, L_stack, H_stack = L_stack, H_stack, None, None
        if stacks is None:
            stacks, cycles = [L_stack, H_stack], [L_cycles, H_cycles]
        elif any(value is not None for value in (L_stack, H_stack, H_cycles, L_cycles)) or cycles is None:
            raise TypeError("HierarchicalRecurrence: stacks need cycles, and nothing else")
        stacks, cycles = list(stacks), list(cycles)
        if len(stacks) != len(cycles) or not stacks:
            raise ValueError(
                f"HierarchicalRecurrence: there are {len(stacks)} stacks and {len(cycles)} cycles; each stack has one"
            )
        two = len(stacks) == 2
        for level, count in enumerate(cycles):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                name = ("L_cycles", "H_cycles")[level] if two else f"cycles[{level}]"
                raise ValueError(
                    f"HierarchicalRecurrence: {name} is {count!r}; it must be an int of at least 1"
                )
        self.cycles = tuple(cycles)
        self._names = (
            ("L_stack", "H_stack") if two else tuple(f"stack_{level}" for level in range(len(stacks)))
        )
        for name, stack in zip(self._names, stacks, strict=True):
            self.add_module(name, stack)
        self.schedule = _schedule(self.cycles)

    @property
    def stacks(self) -> list[nn.Module]:
        """The fastest first."""
        return [getattr(self, name) for name in self._names]

    @property
    def H_cycles(self) -> int:
        """Cycles of the slowest level."""
        return self.cycles[-1]

    @property
    def L_cycles(self) -> int:
        """Cycles of the fastest level, in each of the level above it."""
        return self.cycles[0]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each stack by itself, in place, as ``torch.compile`` with the same arguments would.

        What is compiled does not grow with the cycles: a stack is traced once with gradients and once without.
        (``torch.compile`` of the whole module is right too, but traces every call.)
        """
        for stack in dict.fromkeys(self.stacks):
            stack.compile(*args, **kwargs)

    def activation_checkpointing(self, on: bool = True) -> None:
        """Sets ``activation_checkpointing`` of the stacks, which then recompute in the backward."""
        stack: Any
        for stack in self.stacks:
            if not hasattr(stack, "activation_checkpointing"):
                raise NotImplementedError(
                    f"HierarchicalRecurrence: {type(stack).__name__} has no activation_checkpointing"
                )
            stack.activation_checkpointing = on

    @property
    def calls(self) -> int:
        """Stack calls in one forward."""
        return len(self.schedule)

    def gradient_calls(self, bp_steps: int) -> tuple[bool, ...]:
        """Which calls carry gradients when ``bp_steps`` of them do: the last ones. With two levels, as HRM-Text has it: the
        last ``min(H_cycles, bp_steps - 1)`` H calls and, of the L calls, as many of the last as are left over."""
        if not isinstance(bp_steps, int) or isinstance(bp_steps, bool):
            raise TypeError(f"HierarchicalRecurrence: bp_steps is {bp_steps!r}; it must be an int")
        least = min(2, len(self.cycles))
        if not least <= bp_steps <= self.calls:
            raise ValueError(
                f"HierarchicalRecurrence: bp_steps is {bp_steps}; it must be from {least} to {self.calls}"
            )
        if len(self.cycles) == 2:
            H_steps = min(self.H_cycles, bp_steps - 1)
            return self.credit(H_steps, bp_steps - H_steps)
        return tuple(call >= self.calls - bp_steps for call in range(self.calls))

    def credit(self, *steps: int) -> tuple[bool, ...]:
        """Flags for gradients in the last ``steps`` calls of each level, the slowest first: ``credit(H_steps, L_steps)``."""
        if len(steps) != len(self.cycles):
            raise ValueError(
                f"HierarchicalRecurrence: credit has {len(steps)} counts; there are {len(self.cycles)} levels"
            )
        left = [math.prod(self.cycles[level:]) - count for level, count in enumerate(reversed(steps))]
        flags = []
        for level in self.schedule:
            flags.append(left[level] <= 0)
            left[level] -= 1
        return tuple(flags)

    def forward(
        self,
        *states: Tensor,
        inject: Tensor | None = None,
        gradient_calls: Sequence[bool] | None = None,
        cache: Any = None,
        **shared: Any,
    ) -> tuple[Tensor, ...]:
        """Runs every cycle and returns the states: ``zH, zL = recurrence(zH, zL)``.

        Args:
            states: (B, L, D), one for each level, the slowest first.
            inject: (B, L, D), added to what the fastest level gets (HRM); None for HRM-Text.
            gradient_calls: one flag per call; a call whose flag is False runs under ``no_grad`` and saves nothing.
                Default: every call carries gradients.
            cache: indexed by call, passed to the stacks as ``cache=cache[call]``.
            shared: passed to every call unchanged.
        """
        stacks = self.stacks
        if len(states) != len(stacks):
            raise ValueError(
                f"HierarchicalRecurrence: there are {len(states)} states; each of the {len(stacks)} levels has one"
            )
        if gradient_calls is None:
            gradient_calls = (True,) * self.calls
        elif len(gradient_calls) != self.calls:
            raise ValueError(
                f"HierarchicalRecurrence: gradient_calls has {len(gradient_calls)} flags; "
                f"there are {self.calls} calls"
            )
        enabled = torch.is_grad_enabled()
        z = list(reversed(states))
        top = len(z) - 1
        for call, level in enumerate(self.schedule):
            with torch.set_grad_enabled(enabled and gradient_calls[call]):
                injection = z[level - 1] if level else None
                if level < top:
                    injection = z[level + 1] if injection is None else injection + z[level + 1]
                if level == 0 and inject is not None:
                    injection = inject if injection is None else injection + inject
                if injection is None:  # one level, and nothing injected
                    injection = torch.zeros_like(z[0])
                slot = cache[call] if cache is not None else None
                z[level] = stacks[level](z[level], injection, cache=slot, **shared)
        return tuple(reversed(z))


def _schedule(cycles: Sequence[int]) -> tuple[int, ...]:
    """The level of each call, in order."""
    calls: tuple[int, ...] = ()
    for level, count in enumerate(cycles):
        calls = (*calls, level) * count
    return calls
