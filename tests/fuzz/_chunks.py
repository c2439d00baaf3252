"""A chunk of linear attention in float64, forward and back, and what float32 kernels may be off by.

With a_t = e^decay_t and rows for tokens, of a state S before the chunk (docs/linear_time.md; D_ij = prod_{j < t <= i} a_t):

    A = scale (q k^T o D),  M = k k^T o D below the diagonal
    (I + M diag(b)) u = v - (p k) S,  w = b u;  without the delta rule u = v
    o = scale (p q) S + A w,  S' = p_C S + (s k)^T w
    z + M^T (b z) = A^T do + (s k) dS',  dv = b z,  db = sum u z
    dq = scale p (do S^T) + (dA o D) k,  dk = -p (b z S^T) + s (w dS'^T) + (dA o D)^T q + (dM o D + (dM o D)^T) k
    dS = p_C dS' + scale (p q)^T do - (p k)^T (b z)

All but u and z are sums of products: `Product` has their bounds. A factor e^x is off by EXP of itself, and a product of n factors
by n times that and n roundings. What is found of u by rows, each from those before, has in row i a residual

    r_i = n roundings of |v| + |p k| |S| + |M| |w|, and what p k and M are off by times |S| and |w|,

n = dk + C and a few, in any order of these sums; so it is off by inv r with inv = (I + M diag(b))^-1, element by element at most
|inv| |r|: as no entry of inv is much above 1 while b |k|^2 <= 2, a stable recurrence has a small bound. |w| is of what is found, which is off
itself: r is evaluated with twice what a first r without that gives, which is an upper bound, row by row, if what follows from it
is no more than this; else nothing is said. z is u's transpose.

A state is off by e, and everything is linear in it: u by -inv (p k) e, o by (scale p q - A b inv (p k)) e, S' by
(p_C - (s k)^T b inv (p k)) e; its absolute values element by element are the bound, so that what the delta rule takes off the
state it takes off its error too. Likewise dS' on the way back. A backward starts with the states that the forward kept.

A decay's gradient sums what goes past it, pairs of tokens on both sides, what later ones read of S and earlier ones leave in S', and what
is left of S in S': `Product` of all of them, no two of which a kernel has to subtract.
"""

from __future__ import annotations

import torch
from _recurrences import Product, Unknown, known, magnitude, most, negative, product, share, total
from _steps import LEAST, Off, U

EXP = 4e-7  # of e^x and its subnormal results: tests/native/math_checks.h has units of 2^-23 and half of one for those


def factors(decay: torch.Tensor) -> Off:
    """e^decay, exactly 0 of -inf."""
    x = decay.double()
    return Off(x.exp(), torch.where(x == -torch.inf, 0.0, EXP * x.exp() + LEAST))


def products(a: Off) -> Off:
    """(..., C, C + 1, d) of factors (..., C, d): those after token j up to token i, j from -1 on; 0 above the diagonal."""
    i, j = torch.arange(a.value.shape[-2])[:, None], torch.arange(-1, a.value.shape[-2])[None]
    past, above = (i > j)[..., None], (i < j)[..., None]

    def running(x: torch.Tensor, other: float) -> torch.Tensor:
        return torch.where(past, x[..., :, None, :], other)

    value = running(a.value, 1.0).cumprod(-3).masked_fill(above, 0.0)
    each = torch.where(a.value > 0, (a.off / a.value.clamp(min=1e-300)).log1p() + U, 0.0)
    relative = running(each, 0.0).cumsum(-3).clamp(max=600).expm1()
    alive = running((a.value == 0).double(), 0.0).cumsum(-3) == 0
    grown = running(a.value.clamp(min=1.0), 1.0).cumprod(-3)
    lost = LEAST * (i - j).clamp(min=0)[..., None] * torch.where(alive, grown, 0.0)
    return Off(value, (value * relative + lost).masked_fill(above, 0.0))


def _decayed(x: torch.Tensor, y: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """sum_d x_id y_jd D_ijd."""
    if d.shape[-1] == 1:
        return (x @ y.mT) * d[..., 0]
    return torch.einsum("...id,...jd,...ijd->...ij", x, y, d)


def _to_left(g: torch.Tensor, y: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """sum_j g_ij y_jd D_ijd."""
    if d.shape[-1] == 1:
        return (g * d[..., 0]) @ y
    return torch.einsum("...ij,...jd,...ijd->...id", g, y, d)


def _to_right(g: torch.Tensor, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """sum_i g_ij x_id D_ijd."""
    if d.shape[-1] == 1:
        return (g * d[..., 0]).mT @ x
    return torch.einsum("...ij,...id,...ijd->...jd", g, x, d)


def _each(g: torch.Tensor, x: torch.Tensor, y: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """g_ij x_id y_jd D_ijd, of all d together where they share D."""
    if d.shape[-1] == 1:
        return (g * (x @ y.mT))[..., None] * d
    return torch.einsum("...ij,...id,...jd,...ijd->...ijd", g, x, y, d)


def _solved(inverse: torch.Tensor, moved: torch.Tensor, b: torch.Tensor, w: torch.Tensor, residual) -> tuple:
    """(what the rows found are off by, what b times them are, their residual) of residual(|w|); moved: what operands moved them by."""

    def off(r: torch.Tensor) -> tuple:
        of_u = inverse.abs() @ r + moved
        return of_u, b.abs() * of_u + U * (w.abs() + b.abs() * of_u)

    _, first = off(residual(w.abs()))
    r = residual(w.abs() + 2 * first)
    of_u, of_w = off(r)
    if not bool((of_w <= 2 * first).all()):
        raise Unknown
    return of_u, of_w, r


class Chunk:
    """q, k (..., C, dk), v (..., C, columns), factors a (..., C, 1 or dk), strengths b (..., C, 1), the state before (..., dk, columns)."""

    def __init__(self, q: Off, k: Off, v: Off, a: Off, b: torch.Tensor, scale: Off, delta: bool, state: Off):
        rows, dk = k.value.shape[-2:]
        self.q, self.k, self.v, self.a, self.b, self.scale, self.delta = q, k, v, a, b, scale, delta
        self.state = state
        decays = products(a)
        self.between = Off(decays.value[..., 1:, :], decays.off[..., 1:, :])
        self.start = start = Off(decays.value[..., 0, :], decays.off[..., 0, :])  # p
        self.end = end = Off(decays.value[..., -1, 1:, :], decays.off[..., -1, 1:, :])  # s
        self.left = Off(start.value[..., -1, :, None], start.off[..., -1, :, None])  # (..., 1 or dk, 1)
        self.q_start = product(lambda x, p, c: x * p * c, q, start, scale, roundings=3)
        self.k_start = product(torch.mul, k, start, roundings=2)
        self.k_end = product(torch.mul, k, end, roundings=2)
        self.few = rows + dk + 8
        lower = torch.ones(rows, rows, dtype=torch.float64).tril()
        self.a_pairs = product(
            lambda x, y, d, c: _decayed(x, y, d) * c * lower, q, k, self.between, scale, roundings=dk + 8
        )
        if delta:
            self.m_pairs = product(
                lambda x, y, d: _decayed(x, y, d) * lower.tril(-1), k, k, self.between, roundings=dk + 8
            )
        else:
            zero = torch.zeros_like(self.a_pairs.value)
            self.m_pairs = Product(zero, zero, zero)
            none = torch.zeros_like(self.k_start.value)
            self.k_start = Product(none, none, none)
        self._solve()

    def _inverse(self, matrix: torch.Tensor, upper: bool) -> torch.Tensor:
        eye = torch.eye(matrix.shape[-1], dtype=torch.float64).expand_as(matrix)
        if not self.delta:
            return eye
        return torch.linalg.solve_triangular(matrix + eye, eye, upper=upper, unitriangular=True)

    def _solve(self) -> None:
        state, pk, m, b = self.state, self.k_start, self.m_pairs, self.b
        inverse = self._inverse(m.value * b.mT, upper=False)
        u = inverse @ (self.v.value - pk.value @ state.value)
        w = b * u
        big = magnitude(state)
        rounded = share(self.few)
        of_state = rounded * (self.v.value.abs() + magnitude(pk) @ big) + pk.off @ big + self.v.off
        lost = LEAST * self.few * most(magnitude(pk), big, magnitude(m), w.abs()) if self.delta else 0.0

        def residual(w: torch.Tensor) -> torch.Tensor:
            return of_state + rounded * (magnitude(m) @ w) + m.off @ w + lost

        self.pulled = inverse @ pk.value  # u changes by -pulled times what the state does
        u_off, w_off, self.residual = _solved(inverse, self.pulled.abs() @ state.off, b, w, residual)
        self.u, self.w = Off(u, u_off), Off(w, w_off)
        self.inverse = inverse
        known(self.u, self.w, self.a_pairs, self.m_pairs)

    def _of_state(self, x: Off, y: Product) -> Product:
        """x S + y w."""
        state, b = self.state, self.b
        big, wide = magnitude(state), magnitude(self.w)
        value = x.value @ state.value + y.value @ self.w.value
        by_w = y.value * b.mT
        size = magnitude(x) @ big + magnitude(y) @ wide
        lost = LEAST * self.few * most(magnitude(x), big, magnitude(y), wide)
        off = (x.value - by_w @ self.pulled).abs() @ state.off + (by_w @ self.inverse).abs() @ self.residual
        off = (
            off
            + x.off @ big
            + y.off @ wide
            + U * (y.value.abs() @ self.w.value.abs())
            + share(self.few) * size
        )
        return Product(value, off + torch.where(size > 0, lost, 0.0), size)

    def outputs(self) -> Product:
        return self._of_state(self.q_start, self.a_pairs)

    def after(self) -> Product:
        """The state after the chunk."""
        kept = self.left.value.squeeze(-1), self.left.off.squeeze(-1)
        dk = self.state.value.shape[-2]
        whole = Off(*(torch.diag_embed(x.expand(*x.shape[:-1], dk)) for x in kept))
        turned = Product(self.k_end.value.mT, self.k_end.off.mT, self.k_end.size.mT)
        found = self._of_state(whole, turned)
        known(found)
        return found

    # --- back -----------------------------------------------------------------------------------------------------

    def back(self, grad: Off, after: Off) -> dict[str, Product]:
        """Gradients of q, k, v, a's logarithm, b and the state before, by the outputs' and that of the state after."""
        dk, columns = self.k.value.shape[-1], self.v.value.shape[-1]
        a, m, b, k_end, w, state = self.a_pairs, self.m_pairs, self.b, self.k_end, self.w, self.state
        few = self.few
        inverse = self._inverse(m.value.mT * b.mT, upper=True)
        z = inverse @ (a.value.mT @ grad.value + k_end.value @ after.value)
        y = b * z
        big, out = magnitude(after), magnitude(grad)
        rounded = share(few)
        of_operands = (
            rounded * (magnitude(a).mT @ out + magnitude(k_end) @ big)
            + a.off.mT @ out
            + a.value.abs().mT @ grad.off
            + k_end.off @ big
            + LEAST * few * most(magnitude(a), out, magnitude(k_end), big, magnitude(m), y.abs())
        )

        def residual(y: torch.Tensor) -> torch.Tensor:
            return of_operands + rounded * (magnitude(m).mT @ y) + m.off.mT @ y

        pulled = inverse @ k_end.value
        z_off, y_off, found = _solved(inverse, pulled.abs() @ after.off, b, y, residual)
        of_z, of_v = Off(z, z_off), Off(y, y_off)
        known(of_z, of_v)
        of_b = product(lambda u, z: (u * z).sum(-1, keepdim=True), self.u, of_z, roundings=columns + 4)

        lower = torch.ones(a.value.shape[-2:], dtype=torch.float64).tril()
        by_a = product(lambda g, w, c: (g @ w.mT) * c * lower, grad, w, self.scale, roundings=columns + 4)
        between, q, k = self.between, self.q, self.k
        reads = product(lambda g, s: g @ s.mT, grad, state, roundings=columns + 2)
        writes = product(lambda w, s: w @ s.mT, w, after, roundings=columns + 2)
        start, end = self.start, self.end
        q_parts = [
            product(lambda p, c, r: p * c * r, start, self.scale, reads, roundings=3),
            product(_to_left, by_a, k, between, roundings=few),
        ]
        k_parts = [
            product(torch.mul, end, writes, roundings=2),
            product(_to_right, by_a, q, between, roundings=few),
        ]
        of_pairs = [product(_each, by_a, q, k, between, roundings=dk + 8)]
        of_reads = [product(torch.mul, self.q_start, reads, roundings=2)]
        if self.delta:
            by_m = product(lambda y, w: (y @ w.mT) * lower.tril(-1), of_v, w, roundings=columns + 2)
            written_reads = product(lambda y, s: y @ s.mT, of_v, state, roundings=columns + 2)
            k_parts += [
                negative(product(torch.mul, start, written_reads, roundings=2)),
                negative(product(_to_left, by_m, k, between, roundings=few)),
                negative(product(_to_right, by_m, k, between, roundings=few)),
            ]
            of_pairs += [negative(product(_each, by_m, k, k, between, roundings=dk + 8))]
            of_reads += [negative(product(torch.mul, self.k_start, written_reads, roundings=2))]
        of_writes = product(torch.mul, k_end, writes, roundings=2)
        carried = product(lambda p, s, g: (p * s * g).sum(-1), self.left, state, after, roundings=columns + 4)
        return {
            "q": total(*q_parts).after(4),
            "k": total(*k_parts).after(4),
            "v": Product(y, y_off, magnitude(of_v)),
            "decay": self._of_decay(total(*of_pairs), total(*of_reads), of_writes, carried),
            "beta": of_b,
            "state": self._of_state_back(grad, after, of_v, y, inverse, pulled, found),
        }

    def _of_decay(self, pairs: Product, reads: Product, writes: Product, carried: Product) -> Product:
        shared = self.a.value.shape[-1] == 1
        rows = self.k.value.shape[-2]

        def past(pairs: torch.Tensor, reads: torch.Tensor, writes: torch.Tensor, left: torch.Tensor):
            """Of token t: pairs (i, j) with j < t <= i, reads of i >= t, writes of j < t, all that is left."""
            later = pairs.flip(-3).cumsum(-3).flip(-3)
            before = torch.ones(rows, rows, dtype=torch.float64).tril(-1)[..., None]
            crossing = (later * before).sum(-2)
            writes = torch.cat([torch.zeros_like(writes[..., :1, :]), writes[..., :-1, :]], -2)
            whole = reads.flip(-2).cumsum(-2).flip(-2) + writes.cumsum(-2) + left[..., None, :]
            return crossing + (whole.sum(-1, keepdim=True) if shared else whole)

        parts = [pairs, reads, writes, carried]
        value, off, size = (past(*(getattr(x, name) for x in parts)) for name in ("value", "off", "size"))
        terms = 2 * rows + self.k.value.shape[-1] + 64  # a partial sum for each row, column, channel and lane
        return Product(value, off + share(terms) * size, size)

    def _of_state_back(self, grad, after, of_v, y, inverse, pulled, residual) -> Product:
        """dS = p_C dS' + scale (p q)^T do - (p k)^T y."""
        q, k, left = self.q_start, self.k_start, self.left
        dk = k.value.shape[-1]
        big, out, wide = magnitude(after), magnitude(grad), magnitude(of_v)
        value = left.value * after.value + q.value.mT @ grad.value - k.value.mT @ y
        size = magnitude(left) * big + magnitude(q).mT @ out + magnitude(k).mT @ wide
        by_y = k.value.mT * self.b.mT
        whole = torch.diag_embed(left.value.squeeze(-1).expand(*left.value.shape[:-2], dk))
        off = (whole - by_y @ pulled).abs() @ after.off + (by_y @ inverse).abs() @ residual
        off = off + left.off * big + q.off.mT @ out + q.value.abs().mT @ grad.off + k.off.mT @ wide
        off = off + U * (k.value.abs().mT @ y.abs()) + share(2 * self.few) * size
        lost = LEAST * self.few * most(magnitude(q), out, magnitude(k), wide, big)
        found = Product(value, off + torch.where(size > 0, lost, 0.0), size)
        known(found)
        return found
