"""The loss of rows with several positive classes, in chunks of rows: the products, the positives' logits set to -inf, and a backend's
row kernel of the cross-entropies over the negatives, without a target."""

import torch

from ..cross_entropy.chunked import chunks, product, returned
from .checks import PADDING


class _Positives:
    """A chunk's positive classes (rows, P). Padding is replaced by a positive of its row, or by class 0 in rows without positives."""

    def __init__(self, positives: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.counted = positives != PADDING
        largest = positives.amax(1, keepdim=True)
        self.any = largest != PADDING
        self.index = torch.where(self.counted, positives, torch.where(self.any, largest, 0)).long()
        self._bias = None if bias is None else bias.float()[self.index]

    def take_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of the positives (rows, P), with their bias. In x they are overwritten with -inf."""
        picked = x.gather(1, self.index)
        x.scatter_(1, self.index, torch.where(self.any, -torch.inf, picked))
        return picked if self._bias is None else picked + self._bias

    def below(self, picked, largest, total) -> torch.Tensor:
        """The log-sum-exp of the negatives minus each positive's logit; -inf for padding and in rows without negatives."""
        below = (largest[:, None] - picked) + total.log()[:, None]
        return below.masked_fill(~self.counted | (total == 0)[:, None], -torch.inf)


def _parts(mib, h, weight, bias, positives):
    """For each chunk: (rows, the negatives' logits, the positives, the positives' logits)."""
    if positives.shape[1] == 0:
        positives = positives.new_full((positives.shape[0], 1), PADDING)
    for begin, end in chunks(h.shape[0], weight.shape[0], mib):
        x = product(h[begin:end], weight.T)
        own = _Positives(positives[begin:end], bias)
        yield slice(begin, end), x, own, own.take_logits(x)


def multi_label_cross_entropy(statistics_of, mib, h, weight, bias, positives):
    """statistics_of(x, bias): (2, rows), for logits x (rows, V) float32 the largest and the sum of e^(x - largest)."""
    loss = h.new_empty(h.shape[0], dtype=torch.float32)
    statistics = h.new_empty(2, h.shape[0], dtype=torch.float32)
    for rows, x, own, picked in _parts(mib, h, weight, bias, positives):
        chunk_statistics = statistics_of(x, bias)
        statistics[:, rows] = chunk_statistics
        below = own.below(picked, *chunk_statistics)
        loss[rows] = torch.logaddexp(below, torch.zeros_like(below)).masked_fill(~own.counted, 0).sum(1)
    return loss, statistics


def multi_label_cross_entropy_backward(
    gradient_of, mib, grad, h, weight, bias, statistics, positives, wanted
):
    """gradient_of(x, bias, statistics, mass): overwrites x with mass times the softmax that has these statistics."""
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if wanted & 1 else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if wanted & 2 else None
    dbias = h.new_zeros(weight.shape[0], dtype=torch.float32) if wanted & 4 else None
    for rows, x, own, picked in _parts(mib, h, weight, bias, positives):
        largest, total = statistics[:, rows]
        share = own.below(picked, largest, total).sigmoid() * grad[rows, None]
        no_negatives = total == 0  # every logit is -inf and gets no gradient
        kept = torch.stack((largest.masked_fill(no_negatives, 0), total.masked_fill(no_negatives, 1)))
        gradient_of(x, bias, kept, share.sum(1))
        x.scatter_add_(1, own.index, -share)
        # on a CPU the product converts 16-bit operands to float32, so nothing is rounded before it
        dtype = x.dtype if x.device.type == "cpu" else h.dtype
        g = x.to(dtype)
        if dh is not None:
            dh[rows] = product(g, weight.to(dtype)).to(h.dtype)
        if dweight is not None:
            dweight += product(g.T, h[rows].to(dtype))
        if dbias is not None:
            dbias += x.sum(0)
    return returned((dh, dweight, dbias), (h, weight, bias))
