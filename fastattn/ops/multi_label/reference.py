"""The definition of the loss of rows with several positive classes, in plain torch: dense, over every class."""

import torch

from ...runtime.arithmetic import wide
from .checks import PADDING


def multi_label_cross_entropy(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, positives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (N,), statistics (2, N): the largest negative logit, and the sum of e^(x - largest) over the negatives)."""
    x = wide(h) @ wide(weight).T
    if bias is not None:
        x = x + wide(bias)
    counted = positives != PADDING
    classes = weight.shape[0]
    index = torch.where(counted, positives.long(), classes)  # padding marks column V, which is cut off
    is_positive = torch.zeros(x.shape[0], classes + 1, dtype=torch.bool, device=x.device)
    is_positive = is_positive.scatter(1, index, True)[:, :classes]
    negatives = x.masked_fill(is_positive, -torch.inf)
    top = negatives.detach().amax(1, keepdim=True)
    finite = torch.where(top == -torch.inf, 0.0, top)
    total = (negatives - finite).exp().sum(1)
    # without negatives the log-sum-exp is -inf, and the loss does not depend on it
    log_total = torch.where(total == 0, -torch.inf, torch.where(total == 0, 1.0, total).log())
    picked = x.gather(1, torch.where(counted, positives.long(), 0))
    below = (finite - picked) + log_total[:, None]
    loss = torch.where(counted, torch.logaddexp(below, torch.zeros_like(below)), 0.0).sum(1)
    return loss, torch.stack((top[:, 0], total)).detach()
