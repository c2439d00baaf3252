"""The definitions of the vocabulary ops and their gradients, in plain torch: dense, over every class or token."""

import torch


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def symlog(x: torch.Tensor) -> torch.Tensor:
    """sign(x) log(1 + |x|): softmax of it is StableMax."""
    return torch.where(x >= 0, torch.log1p(x.clamp(min=0)), -torch.log1p(-x.clamp(max=0)))


def _rows(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return (target != ignore_index).nonzero()[:, 0]


def _reduced(
    loss: torch.Tensor, lse: torch.Tensor, where: torch.Tensor, count: int, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, lse) of the rows `where` as the op returns them: zero for the others of `count`, then reduced."""
    rows = torch.zeros(count, dtype=loss.dtype, device=loss.device)
    loss, lse = rows.index_copy(0, where, loss), rows.index_copy(0, where, lse.detach())
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / max(1, where.shape[0])
    return loss, lse


def _loss(x: torch.Tensor, target: torch.Tensor, z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logsumexp(x, dim=1)
    return lse - x.gather(1, target.long()[:, None])[:, 0] + z_loss * lse.square(), lse


def _loss_gradient(
    x: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Of sum(grad * loss) with respect to x (rows, V)."""
    lse = torch.logsumexp(x, dim=1, keepdim=True)
    g = torch.exp(x - lse) * (1 + 2 * z_loss * lse)
    g = g - torch.nn.functional.one_hot(target.long(), x.shape[1])
    return g * grad[:, None]


def _of_rows(grad: torch.Tensor, where: torch.Tensor, reduction: str) -> torch.Tensor:
    """The gradient of the loss of each row `where`, from that of the reduced loss."""
    if reduction == "none":
        return grad.index_select(0, where)
    return grad.expand(where.shape) / (max(1, where.shape[0]) if reduction == "mean" else 1)


def _spread(g: torch.Tensor, where: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
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
    """(loss () or (N,), lse (N,)); transform 0 is none and 1 stablemax, softcap 0 is none."""
    where = _rows(target, ignore_index)
    x = _wide(h.index_select(0, where)) @ _wide(weight).T  # (rows, V)
    if bias is not None:
        x = x + _wide(bias)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    if temperature is not None:
        x = x / temperature.index_select(0, where)[:, None]
    if transform == 1:
        x = symlog(x)
    loss, lse = _loss(x, target.index_select(0, where), z_loss)
    return _reduced(loss, lse, where, target.shape[0], reduction)


def linear_cross_entropy_gradients(
    grad, h, weight, bias, target, temperature, transform, softcap, z_loss, ignore_index, reduction
) -> tuple[torch.Tensor | None, ...]:
    """For h, weight, bias and temperature, from `grad` of the loss: the chain rule through the lines above."""
    where = _rows(target, ignore_index)
    rows = _wide(h.index_select(0, where))
    x = rows @ _wide(weight).T
    if bias is not None:
        x = x + _wide(bias)
    slope = 1.0
    if softcap:
        x = softcap * torch.tanh(x / softcap)
        slope = 1 - (x / softcap).square()
    tau = None if temperature is None else temperature.index_select(0, where)[:, None]
    if tau is not None:
        x = x / tau
    y = symlog(x) if transform == 1 else x
    g = _loss_gradient(y, target.index_select(0, where), _of_rows(grad, where, reduction), z_loss)
    if transform == 1:
        g = g / (1 + x.abs())
    dtemperature = None
    if tau is not None:
        dtemperature = _spread(-(g * x).sum(1) / tau[:, 0], where, temperature)
        g = g / tau
    g = g * slope  # (rows, V), of the raw logits
    dbias = None if bias is None else g.sum(0).to(bias.dtype)
    return (
        _spread(g @ _wide(weight), where, h),
        (g.T @ rows).to(weight.dtype),
        dbias,
        dtemperature,
    )


def stablemax_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (N,), lse (N,))."""
    where = _rows(target, ignore_index)
    loss, lse = _loss(symlog(_wide(logits.index_select(0, where))), target.index_select(0, where))
    return _reduced(loss, lse, where, target.shape[0], "none")


def stablemax_cross_entropy_backward(
    grad: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    where = _rows(target, ignore_index)
    x = _wide(logits.index_select(0, where))
    g = _loss_gradient(symlog(x), target.index_select(0, where), grad.index_select(0, where))
    return _spread(g / (1 + x.abs()), where, logits)


def vq_logits(
    h: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return dense_logits(h, _wide(codebook)[codes.long()], bias).to(h.dtype)


def vq_logits_gradients(grad, h, codebook, codes, bias) -> tuple[torch.Tensor | None, ...]:
    """For h, codebook and bias."""
    g = _wide(grad)
    rows = g.T @ _wide(h)  # (V, d)
    return (
        (g @ _wide(codebook)[codes.long()]).to(h.dtype),
        _by_code(rows, codes, codebook),
        None if bias is None else g.sum(0).to(bias.dtype),
    )


def _by_code(rows: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(V, d) summed over the tokens of each code."""
    return torch.zeros_like(codebook, dtype=rows.dtype).index_add(0, codes.long(), rows).to(codebook.dtype)


def dense_logits(h: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    logits = _wide(h) @ rows.T  # (N, V)
    return logits if bias is None else logits + _wide(bias)


def vq_cross_entropy(
    h: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None,
    shadow: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss () or (N,), lse (N,)); shadow has a gradient, as if its rows were those of the codes, and no value."""
    where = _rows(target, ignore_index)
    x = dense_logits(h.index_select(0, where), _wide(codebook)[codes.long()], bias)
    loss, lse = _loss(x, target.index_select(0, where))
    return _reduced(loss, lse, where, target.shape[0], reduction)


def vq_cross_entropy_gradients(
    grad, h, codebook, codes, bias, shadow, target, ignore_index, reduction
) -> tuple[torch.Tensor | None, ...]:
    """For h, codebook, bias and shadow."""
    where = _rows(target, ignore_index)
    valid = h.index_select(0, where)
    x = dense_logits(valid, _wide(codebook)[codes.long()], bias)
    g = _loss_gradient(x, target.index_select(0, where), _of_rows(grad, where, reduction))
    rows = g.T @ _wide(valid)  # (V, d)
    return (
        _spread(g @ _wide(codebook)[codes.long()], where, h),
        _by_code(rows, codes, codebook),
        None if bias is None else g.sum(0).to(bias.dtype),
        None if shadow is None else rows.to(shadow.dtype),
    )


def vq_argmax(
    h: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    scores = (h.double() @ codebook.double().T)[:, codes.long()]  # (N, V), bitwise one value a code
    return _first_largest(scores if bias is None else scores + bias)


def _first_largest(x: torch.Tensor) -> torch.Tensor:
    """torch.argmax with the lowest index among equals, which torch leaves open."""
    positions = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(1, keepdim=True), positions, x.shape[1] - 1).amin(1)


def vq_sample(
    h: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    bias: torch.Tensor | None,
    uniform: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """uniform (N, 2) in [0, 1): the first picks the code, the second the token within it, by cumulative probability."""
    logits = dense_logits(h.double(), codebook.double()[codes.long()], bias)
    logits = (logits - logits.amax(1, keepdim=True)) / max(temperature, torch.finfo(torch.float64).tiny)
    tokens = torch.softmax(logits, dim=1)  # (N, V)
    shape = (h.shape[0], codebook.shape[0])
    of_code = tokens.new_zeros(shape).index_add(1, codes.long(), tokens)  # (N, K)
    code = _pick(of_code, uniform[:, 0])
    within = torch.where(codes.long()[None] == code[:, None], tokens, 0.0)
    return _pick(within, uniform[:, 1])


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight is over uniform times the total; some index where a weight is NaN."""
    cumulative = weights.cumsum(1)
    found = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return found.clamp(max=weights.shape[1] - 1)


def nearest_codes(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    x, codebook = x.double(), codebook.double()
    return _first_largest(x @ codebook.T - codebook.square().sum(1) / 2)
