"""The definitions of the cross-entropies and their gradients, in plain torch: dense, over every class."""

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def symlog(x: torch.Tensor) -> torch.Tensor:
    """sign(x) log(1 + |x|): softmax of it is StableMax."""
    return torch.where(x >= 0, torch.log1p(x.clamp(min=0)), -torch.log1p(-x.clamp(max=0)))


def counted_rows(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return (target != ignore_index).nonzero()[:, 0]


def reduced(
    loss: torch.Tensor, statistics: torch.Tensor, where: torch.Tensor, count: int, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, statistics) of the rows `where` as the op returns them: zero for the others of `count`; the loss reduced."""
    rows = torch.zeros(count, dtype=loss.dtype, device=loss.device)
    loss, statistics = rows.index_copy(0, where, loss), rows.repeat(2, 1).index_copy(1, where, statistics)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / max(1, where.shape[0])
    return loss, statistics


def _weights(x: torch.Tensor, tau: torch.Tensor | None, stablemax: bool) -> tuple[torch.Tensor, ...]:
    """(logarithms of the weights of the classes, less the row's largest `top`; the weights; top (rows, 1)).

    A constant may be taken off the logarithms, since neither softmax nor loss depends on it: `top` has no gradient.
    """
    if stablemax:
        x, tau = symlog(x if tau is None else x / tau), None
    top = x.detach().amax(1, keepdim=True)
    distance = x - top  # before the division, which would round both at their own size
    if tau is not None:
        distance, top = distance / tau, top / tau
    return distance, distance.exp(), top


def row_loss(
    x: torch.Tensor,
    target: torch.Tensor,
    tau: torch.Tensor | None = None,
    stablemax: bool = False,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the logits x (rows, V) over tau (rows, 1), and statistics (2, rows): the largest logit (over tau for stablemax), and
    the sum of the weights, of which the largest logit's is 1."""
    distance, weights, top = _weights(x, tau, stablemax)
    total = weights.sum(1)
    # not logsumexp - x[target], whose terms are rounded at their own size
    loss = total.log() - distance.gather(1, target.long()[:, None])[:, 0]
    if z_loss:
        loss = loss + z_loss * (top[:, 0] + total.log()).square()
    largest = (x if tau is None or not stablemax else x / tau).amax(1)
    return loss, torch.stack((largest, total)).detach()


def row_loss_gradient(
    x: torch.Tensor,
    target: torch.Tensor,
    grad: torch.Tensor,
    tau: torch.Tensor | None = None,
    stablemax: bool = False,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sum(grad * loss) with respect to x / tau (rows, V), and the sum of its products with x / tau (rows,)."""
    distance, weights, top = _weights(x, tau, stablemax)
    total = weights.sum(1, keepdim=True)
    spread = 2 * z_loss * (top + total.log()) if z_loss else torch.zeros_like(top)
    g = weights / total * (1 + spread) - torch.nn.functional.one_hot(target.long(), x.shape[1])
    g = g * grad[:, None]
    if stablemax:
        y = x if tau is None else x / tau
        g = g / (1 + y.abs())
        return g, torch.where(g == 0, g, g * y).sum(1)
    # g adds up to grad * spread, and what is far from the largest has next to none of it
    products = torch.where(g == 0, g, g * distance).sum(1)
    return g, products + grad * (spread * top)[:, 0] if z_loss else products


def grad_of_rows(grad: torch.Tensor, where: torch.Tensor, reduction: str) -> torch.Tensor:
    """The gradient of the loss of each row `where`, from that of the reduced loss."""
    if reduction == "none":
        return grad.index_select(0, where)
    return grad.expand(where.shape) / (max(1, where.shape[0]) if reduction == "mean" else 1)


def spread(g: torch.Tensor, where: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows of g at `where` of a gradient of `like`, zero elsewhere."""
    return torch.zeros_like(like).index_copy(0, where, g.to(like.dtype))


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    transform: int,
    softcap: float,
    z_loss: float,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss () or (N,), statistics (2, N)); transform 0 is none and 1 stablemax, softcap 0 is none."""
    where = counted_rows(target, ignore_index)
    x = wide(h.index_select(0, where)) @ wide(weight).T  # (rows, V)
    if bias is not None:
        x = x + wide(bias)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    tau = None if temperature is None else temperature.index_select(0, where)[:, None]
    loss, statistics = row_loss(x, target.index_select(0, where), tau, transform == 1, z_loss)
    return reduced(loss, statistics, where, target.shape[0], reduction)


def linear_cross_entropy_gradients(
    grad, h, weight, bias, target, temperature, transform, softcap, z_loss, ignore_index, reduction
) -> tuple[torch.Tensor | None, ...]:
    """For h, weight, bias and temperature, from `grad` of the loss: the chain rule through the lines above."""
    where = counted_rows(target, ignore_index)
    rows = wide(h.index_select(0, where))
    x = rows @ wide(weight).T
    if bias is not None:
        x = x + wide(bias)
    slope = 1.0
    if softcap:
        x = softcap * torch.tanh(x / softcap)
        slope = 1 - (x / softcap).square()
    tau = None if temperature is None else temperature.index_select(0, where)[:, None]
    g, products = row_loss_gradient(
        x, target.index_select(0, where), grad_of_rows(grad, where, reduction), tau, transform == 1, z_loss
    )
    dtemperature = None
    if tau is not None:
        dtemperature = spread(-products / tau[:, 0], where, temperature)
        g = g / tau
    g = g * slope  # (rows, V), of the raw logits
    dbias = None if bias is None else g.sum(0).to(bias.dtype)
    return (
        spread(g @ wide(weight), where, h),
        (g.T @ rows).to(weight.dtype),
        dbias,
        dtemperature,
    )


def stablemax_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (N,), statistics (2, N))."""
    where = counted_rows(target, ignore_index)
    x = wide(logits.index_select(0, where))
    loss, statistics = row_loss(x, target.index_select(0, where), stablemax=True)
    return reduced(loss, statistics, where, target.shape[0], "none")


def stablemax_cross_entropy_backward(
    grad_out: torch.Tensor,
    logits: torch.Tensor,
    statistics: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    where = counted_rows(target, ignore_index)
    x = wide(logits.index_select(0, where))
    g, _ = row_loss_gradient(
        x, target.index_select(0, where), grad_out.index_select(0, where), stablemax=True
    )
    return spread(g, where, logits)
