"""The checks of matvec's arguments, run for every caller."""

from ...runtime import checks


def check_matvec(x, weight) -> None:
    op = "matvec"
    checks.check_floating(op, x=x, weight=weight)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"fastattn.{op}: weight must have shape (N, K), where K is x's last dim, given {checks.describe(weight)} "
            f"for x {checks.describe(x)}"
        )
