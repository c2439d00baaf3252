"""The definitions of the cross-entropies and their gradients, in plain torch: dense, over every class."""

import torch

from ...runtime.arithmetic import wide


def symlog(x: torch.Tensor) -> torch.Tensor:
    """sign(x) log(1 + |x|), whose softmax is StableMax."""
    return torch.where(x >= 0, torch.log1p(x.clamp(min=0)), -torch.log1p(-x.clamp(max=0)))


def counted_rows(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return (target != ignore_index).nonzero()[:, 0]


def reduced(
    loss: torch.Tensor,
    where: torch.Tensor,
    count: int,
    reduction: str,
    divisor: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The losses of the rows `where` as the op returns them. "none": (count,), zero for the other rows. "sum" and "mean": a scalar;
    "mean" divides by `divisor`, by default the number of rows."""
    if reduction == "none":
        return at_rows(loss, where, count)
    return loss.sum() / _divisor(where, divisor) if reduction == "mean" else loss.sum()


def at_rows(t: torch.Tensor, where: torch.Tensor, count: int) -> torch.Tensor:
    """(..., count): t (..., rows) at the indices `where`, zero elsewhere."""
    return t.new_zeros(*t.shape[:-1], count).index_copy(t.dim() - 1, where, t)


def _divisor(where: torch.Tensor, divisor: torch.Tensor | float | None) -> torch.Tensor | float:
    return max(1, where.shape[0]) if divisor is None else divisor


def shares(
    target: torch.Tensor,
    classes: int,
    dtype: torch.dtype,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """(rows, V): the factor s_c of each class in each row's loss, from class indices (rows,) or probabilities (rows, V)."""
    t = target if target.is_floating_point() else torch.nn.functional.one_hot(target.long(), classes)
    t = t.to(dtype)
    if label_smoothing:
        t = (1 - label_smoothing) * t + label_smoothing / classes
    return t if class_weight is None else t * class_weight.to(dtype)


def _weights(x: torch.Tensor, tau: torch.Tensor | None, stablemax: bool) -> tuple[torch.Tensor, ...]:
    """(logarithms of the classes' weights minus the row's largest, `top`; the weights; top (rows, 1)).

    Neither softmax nor loss depends on a constant subtracted from the logarithms, so `top` has no gradient.
    """
    if stablemax:
        x, tau = symlog(x if tau is None else x / tau), None
    top = x.detach().amax(1, keepdim=True)
    distance = x - top  # before the division, which would round both at their own magnitude
    if tau is not None:
        distance, top = distance / tau, top / tau
    return distance, distance.exp(), top


def row_loss(
    x: torch.Tensor,
    shares: torch.Tensor,
    tau: torch.Tensor | None = None,
    stablemax: bool = False,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From logits x (rows, V), temperatures tau (rows, 1) and shares (rows, V): (loss, statistics, logarithm of the normaliser). The
    statistics (2, rows) are the largest logit (divided by tau for stablemax), and the sum of the weights relative to that logit's."""
    distance, weights, top = _weights(x, tau, stablemax)
    total = weights.sum(1)
    # not logsumexp - x, whose terms are rounded at their own magnitude
    own = total.log()[:, None] - distance
    lse = top[:, 0] + total.log()
    if z_loss:
        own = own + z_loss * lse.square()[:, None]
    loss = torch.where(shares == 0, 0.0, shares * own).sum(1)
    largest = (x if tau is None or not stablemax else x / tau).amax(1)
    return loss, torch.stack((largest, total)).detach(), lse


def row_loss_gradient(
    x: torch.Tensor,
    shares: torch.Tensor,
    grad: torch.Tensor,
    tau: torch.Tensor | None = None,
    stablemax: bool = False,
    z_loss: float = 0.0,
    grad_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of sum(grad * loss + grad_lse * lse) with respect to x / tau, (rows, V); the sum of its products with x / tau,
    (rows,); and the gradient with respect to `shares`, (rows, V)."""
    distance, weights, top = _weights(x, tau, stablemax)
    total = weights.sum(1, keepdim=True)
    lse = top + total.log()
    mass = shares.sum(1, keepdim=True)
    excess = mass * (2 * z_loss * lse) if z_loss else torch.zeros_like(top)
    g = (weights / total * (mass + excess) - shares) * grad[:, None]
    own = (total.log() - distance + (z_loss * lse.square() if z_loss else 0.0)) * grad[:, None]
    excess = excess * grad[:, None]
    if grad_lse is not None:
        g, excess = g + weights / total * grad_lse[:, None], excess + grad_lse[:, None]
    if stablemax:
        y = x if tau is None else x / tau
        g = g / (1 + y.abs())
        return g, torch.where(g == 0, g, g * y).sum(1), own
    # sum g x = sum g distance + top sum g, where sum g is the excess, and g is small where the distance is large
    products = torch.where(g == 0, g, g * distance).sum(1)
    return g, products + torch.where(excess == 0, 0.0, excess * top)[:, 0], own


def grad_of_rows(
    grad: torch.Tensor,
    where: torch.Tensor,
    reduction: str,
    divisor: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The gradients of the losses of the rows `where`, from the gradient of the reduced loss."""
    if reduction == "none":
        return grad.index_select(0, where)
    return grad.expand(where.shape) / (_divisor(where, divisor) if reduction == "mean" else 1)


def spread(g: torch.Tensor, where: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient of `like`: the rows of g at the indices `where`, zero elsewhere."""
    return torch.zeros_like(like).index_copy(0, where, g.to(like.dtype))


class _Linear:
    """The rows of a call that are not ignored, and their logits."""

    def __init__(self, h, weight, bias, target, temperature, class_weight, softcap, smoothing, ignore_index):
        soft = target.is_floating_point()  # probabilities: every row counts
        self.where = torch.arange(h.shape[0], device=h.device) if soft else counted_rows(target, ignore_index)
        self.rows = wide(h.index_select(0, self.where))
        x = self.rows @ wide(weight).T  # (rows, V)
        if bias is not None:
            x = x + wide(bias)
        self.slope: torch.Tensor | float = 1.0
        if softcap:
            x = softcap * torch.tanh(x / softcap)
            self.slope = 1 - (x / softcap).square()
        self.x = x
        self.tau = None if temperature is None else temperature.index_select(0, self.where)[:, None]
        target = target.index_select(0, self.where)
        self.shares = shares(target, x.shape[1], x.dtype, class_weight, smoothing)
        self.divisor = None
        if class_weight is not None and not soft:
            weights = class_weight.to(x.dtype).index_select(0, target.long()).sum()
            self.divisor = torch.where(weights == 0, 1.0, weights)


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    transform: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss () or (N,), statistics (2, N), lse (N,)). transform: 0 none, 1 stablemax. softcap: 0 for none. target: (N,) class indices
    or (N, V) probabilities."""
    c = _Linear(h, weight, bias, target, temperature, class_weight, softcap, label_smoothing, ignore_index)
    loss, statistics, lse = row_loss(c.x, c.shares, c.tau, transform == 1, z_loss)
    count = h.shape[0]
    loss = reduced(loss, c.where, count, reduction, c.divisor)
    return loss, at_rows(statistics, c.where, count), at_rows(lse, c.where, count)


def linear_cross_entropy_gradients(
    grad, grad_lse, h, weight, bias, target, temperature, class_weight, transform, softcap, z_loss, label_smoothing,
    ignore_index, reduction,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """The gradients of h, weight, bias, temperature and probabilities, from `grad`, the loss's, and `grad_lse` or None: the chain rule
    applied to `linear_cross_entropy`."""
    c = _Linear(h, weight, bias, target, temperature, class_weight, softcap, label_smoothing, ignore_index)
    g, products, own = row_loss_gradient(
        c.x,
        c.shares,
        grad_of_rows(grad, c.where, reduction, c.divisor),
        c.tau,
        transform == 1,
        z_loss,
        None if grad_lse is None else grad_lse.index_select(0, c.where),
    )
    dtemperature = dtarget = None
    if c.tau is not None:
        dtemperature = spread(-products / c.tau[:, 0], c.where, temperature)
        g = g / c.tau
    if target.is_floating_point():
        dtarget = (1 - label_smoothing) * own
        if class_weight is not None:
            dtarget = dtarget * class_weight.to(own.dtype)
        dtarget = dtarget.to(target.dtype)
    g = g * c.slope  # (rows, V), the gradient of the logits before softcap
    return (
        spread(g @ wide(weight), c.where, h),
        (g.T @ c.rows).to(weight.dtype),
        None if bias is None else g.sum(0).to(bias.dtype),
        dtemperature,
        dtarget,
    )


def stablemax_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (N,), statistics (2, N))."""
    where = counted_rows(target, ignore_index)
    x = wide(logits.index_select(0, where))
    targets = shares(target.index_select(0, where), x.shape[1], x.dtype)
    loss, statistics, _ = row_loss(x, targets, stablemax=True)
    count = target.shape[0]
    return reduced(loss, where, count, "none"), at_rows(statistics, where, count)


def stablemax_cross_entropy_backward(
    grad_out: torch.Tensor,
    logits: torch.Tensor,
    statistics: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    where = counted_rows(target, ignore_index)
    x = wide(logits.index_select(0, where))
    targets = shares(target.index_select(0, where), x.shape[1], x.dtype)
    g, *_ = row_loss_gradient(x, targets, grad_out.index_select(0, where), stablemax=True)
    return spread(g, where, logits)
