"""Where the CPU kernel sums the gradient of a tensor bias (src/cpu/attention_bias.h)."""

from collections.abc import Mapping

import torch

from ...runtime import native


class BiasGradient:
    """`fields` are the kernel's parameters that it sums into; `gradient()` returns the gradient after its call.

    The sums are float32. A float32 bias is summed in the gradient's own memory. Several sums are kept and added at the end if the
    batch entries and heads that share a bias are the only work to divide among threads. Such parts, and float32 sums for a 16-bit
    bias, are used only if they take no more memory than the kernel packs at a time.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, config: Mapping[str, int]):
        self._bias = bias
        # sums over each query's keys, (B, Hq, Lq), for a bias of one key
        self._rows: torch.Tensor | None = None
        if bias.dim() == 2:
            self._sums = bias.new_zeros((q.shape[1], bias.shape[1]), dtype=torch.float32)
            self.fields: dict = {"grad_distances": self._sums if bias.numel() else None}
            return
        if bias.shape[3] == 1:
            self._rows = q.new_empty(q.shape[:3], dtype=torch.float32)
            self.fields = {"grad_row_bias": self._rows}
            return
        parts, max_sums = self._parts(q, k, config), config["pack_kib"] << 8
        summed = bias.dtype == torch.float32 or parts * bias.numel() <= max_sums
        dtype = torch.float32 if summed else bias.dtype
        self._sums = bias.new_zeros((parts if summed else 1, *bias.shape), dtype=dtype)
        self.fields = {
            "grad_bias": self._sums[0].expand(*q.shape[:3], k.shape[2]),
            "bias_parts": len(self._sums),
            "bias_part": bias.numel() or None,
        }

    def _parts(self, q: torch.Tensor, k: torch.Tensor, config: Mapping[str, int]) -> int:
        bias, threads = self._bias, native.threads()
        sharing = (k.shape[0] if bias.shape[0] == 1 else 1) * (k.shape[1] if bias.shape[1] == 1 else 1)
        tasks = k.shape[0] * k.shape[1] // max(sharing, 1) * -(-k.shape[2] // config["block_k"])
        parts = -(-2 * threads // max(tasks, 1)) if threads > 1 else 1
        return max(1, min(parts, sharing, (config["pack_kib"] << 8) // max(bias.numel(), 1)))

    def gradient(self) -> torch.Tensor:
        if self._bias.dim() == 2:
            sums = self._sums if self._bias.shape[0] != 1 else self._sums.double().sum(0, keepdim=True)
            return sums.to(self._bias.dtype)
        if self._rows is not None:
            shared = [dim for dim in range(3) if self._bias.shape[dim] == 1]
            rows = self._rows.double()
            return (rows.sum(shared, keepdim=True) if shared else rows)[..., None].to(self._bias.dtype)
        return (self._sums[0] if len(self._sums) == 1 else self._sums.sum(0)).to(self._bias.dtype)
