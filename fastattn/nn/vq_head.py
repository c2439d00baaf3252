"""VQHead: an output layer whose vocabulary shares a few vectors, and the fitting of those vectors."""

import json
import os
import sys
from collections.abc import Iterable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..ops.codes import nearest_codes, vq_argmax, vq_cross_entropy, vq_logits, vq_sample
from ..runtime.files import parse_json, write_tensors

ASSIGNMENTS = ("fixed", "straight_through", "ema")
_KEYS = {"d_model", "vocab_size", "codebook_size", "bias", "assignment", "decay"}


class VQHead(nn.Module):
    """Logits h . codebook[codes[i]] + bias[i] for V tokens that share K vectors (VQ-logits, arXiv 2505.10202).

    Loss, greedy choice and sampling cost K products per row and never form (N, V). A bias per token (not in the paper)
    tells the tokens of one code apart.

    Args:
        d_model, vocab_size, codebook_size: d, V and K; K is 1 to V.
        bias: one per token, zero at first.
        assignment: how tokens get their codes.
            "fixed": codes stay as given; codebook and bias train.
            "straight_through": ``weight`` (V, d) gets the gradient that the rows of a dense head would get, the codebook trains
            by its own gradient, and :meth:`update_codes` gives each token the code nearest to its row.
            "ema": as "straight_through", but each codebook vector is the running mean of its tokens' rows.
            With the last two call :meth:`update_codes` after optimizer steps, as often as wanted.
        decay: of the running means of "ema", 0 to 1.
        codes: (V,) in [0, K), the first assignment. Default: i mod K ("fixed"), the nearest (others).
        device, dtype: of the parameters.

    Raises ValueError or TypeError naming the argument.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        codebook_size: int,
        bias: bool = True,
        *,
        assignment: str = "fixed",
        decay: float = 0.99,
        codes: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("vocab_size", vocab_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"fastattn.VQHead: {name} must be an int of 1 or more, given {value!r}")
        _check_codebook_size(codebook_size, vocab_size)
        if assignment not in ASSIGNMENTS:
            raise ValueError(
                f"fastattn.VQHead: assignment must be one of {', '.join(ASSIGNMENTS)}, given {assignment!r}"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"fastattn.VQHead: decay must lie in [0, 1), given {decay!r}")
        self.d_model, self.vocab_size, self.codebook_size = d_model, vocab_size, codebook_size
        self.assignment, self.decay = assignment, decay

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self.codebook = nn.Parameter(empty(codebook_size, d_model), requires_grad=assignment != "ema")
        self.bias = nn.Parameter(empty(vocab_size)) if bias else None
        self.weight = None if assignment == "fixed" else nn.Parameter(empty(vocab_size, d_model))
        self.register_buffer("codes", torch.empty(vocab_size, dtype=torch.int64, device=device))
        if assignment == "ema":
            self.register_buffer("counts", torch.empty(codebook_size, dtype=torch.float32, device=device))
            self.register_buffer(
                "sums", torch.empty(codebook_size, d_model, dtype=torch.float32, device=device)
            )
        self.reset_parameters()
        if codes is not None:
            if tuple(codes.shape) != (vocab_size,) or codes.is_floating_point():
                raise ValueError(
                    f"fastattn.VQHead: codes must be integers of shape ({vocab_size},), given {codes.dtype} of "
                    f"shape {tuple(codes.shape)}"
                )
            if not _in_range(codes, codebook_size):
                raise ValueError(f"fastattn.VQHead: codes must lie in [0, {codebook_size})")
            self.codes.copy_(codes)
            self._restart_means()

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None) -> None:
        """Vectors from a normal of deviation `std` (default 1/sqrt(d)), bias 0, codes as first assigned."""
        std = self.d_model**-0.5 if std is None else std
        if self.bias is not None:
            self.bias.zero_()
        if self.weight is None:
            self.codebook.normal_(0, std)
            places = torch.arange(self.vocab_size, device=self.codes.device)
            self.codes.copy_(places % self.codebook_size)
            return
        self.weight.normal_(0, std)
        self.codebook.copy_(self.weight[: self.codebook_size])
        self.codes.copy_(nearest_codes(self.weight, self.codebook))
        self._restart_means()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | Tensor,
        codebook_size: int,
        *,
        bias: bool | Tensor = True,
        assignment: str = "fixed",
        decay: float = 0.99,
        iterations: int = 200,
        batch_size: int = 4096,
        seed: int = 0,
        progress: bool | None = None,
    ) -> "VQHead":
        """A head fitted to a dense one by mini-batch k-means on its rows ("Web-Scale K-Means Clustering", Sculley 2010).

        Args:
            linear: nn.Linear, or its weight (V, d). A Linear's own bias becomes the head's.
            bias: True (zero unless the Linear has one), False, or the (V,) to start from.
            assignment, decay: as in VQHead. Beyond "fixed", ``weight`` starts as the dense rows.
            iterations, batch_size: steps of k-means, and the rows of each step; last passes over all rows set the means.
            seed: equal seeds give equal heads on equal machines.
            progress: show a bar on stderr; default: when it is a terminal.
        """
        weight = linear.weight if isinstance(linear, nn.Linear) else linear
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise TypeError(
                "fastattn.VQHead.from_linear: linear must be nn.Linear or a floating (V, d) tensor"
            )
        if isinstance(linear, nn.Linear) and linear.bias is not None and bias is True:
            bias = linear.bias
        weight = weight.detach()
        vocab_size, d_model = weight.shape
        _check_codebook_size(codebook_size, vocab_size)
        codebook, codes = fit_codebook(
            weight,
            codebook_size,
            iterations=iterations,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        head = cls(
            d_model,
            vocab_size,
            codebook_size,
            bias is not False,
            assignment=assignment,
            decay=decay,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            head.codebook.copy_(codebook)
            head.codes.copy_(codes)
            if head.weight is not None:
                head.weight.copy_(weight)
            if isinstance(bias, Tensor) and head.bias is not None:
                if tuple(bias.shape) != (vocab_size,):
                    raise ValueError(
                        f"fastattn.VQHead.from_linear: bias must have shape ({vocab_size},), given {tuple(bias.shape)}"
                    )
                head.bias.copy_(bias.detach())
        head._restart_means()
        return head

    def forward(self, h: Tensor) -> Tensor:
        """All logits, (..., d) -> (..., V). The other methods never form them."""
        return vq_logits(h, self.codebook, self.codes, bias=self.bias)

    def loss(self, h: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
        """fastattn.vq_cross_entropy of this head."""
        return vq_cross_entropy(
            h,
            self.codebook,
            self.codes,
            target,
            bias=self.bias,
            shadow=self.weight,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    def argmax(self, h: Tensor) -> Tensor:
        """The likeliest token of each row, (..., d) -> (...)."""
        return vq_argmax(h, self.codebook, self.codes, bias=self.bias)

    def sample(
        self, h: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """A token drawn for each row, (..., d) -> (...)."""
        return vq_sample(
            h, self.codebook, self.codes, bias=self.bias, temperature=temperature, generator=generator
        )

    @torch.no_grad()
    def update_codes(self, *, generator: torch.Generator | None = None) -> int:
        """Gives every token the code nearest to its row, moves the means of "ema", and reseeds dead codes.

        A code is dead when it has no token ("straight_through"), or a running count under a tenth ("ema"). It starts again
        at a token's row, drawn in proportion to the squared distance from the token's present code ("k-means++", 2007).

        Returns the number of codes reseeded. Raises ValueError for fixed codes, and where a code has to be reseeded while
        weight or codebook holds NaN or infinity.
        """
        if self.weight is None:
            raise ValueError("fastattn.VQHead.update_codes: assignment is 'fixed', whose codes stay")
        rows = self.weight.detach()
        self.codes.copy_(nearest_codes(rows, self.codebook))
        counts, sums = _totals(rows, self.codes, self.codebook_size)
        dead = counts == 0
        if self.assignment == "ema":
            self.counts.lerp_(counts, 1 - self.decay)
            self.sums.lerp_(sums, 1 - self.decay)
            dead &= self.counts < 0.1
            live = self.counts >= 0.1
            self.codebook[live] = (self.sums[live] / self.counts[live, None]).to(self.codebook.dtype)
        return self._reseed(rows, dead.nonzero()[:, 0], generator)

    def _reseed(self, rows: Tensor, dead: Tensor, generator: torch.Generator | None) -> int:
        if dead.numel() == 0:
            return 0
        far = (rows.double() - self.codebook.double()[self.codes]).square().sum(1)
        if not bool(far.isfinite().all()):
            raise ValueError("fastattn.VQHead.update_codes: weight or codebook holds NaN or infinity")
        count = min(dead.numel(), int((far > 0).sum()))
        if count == 0:
            return 0
        chosen = torch.multinomial(far, count, generator=generator)
        dead = dead[:count]
        self.codebook[dead] = rows[chosen]
        self.codes[chosen] = dead
        if self.assignment == "ema":
            self.counts[dead] = 1
            self.sums[dead] = rows[chosen].float()
        return count

    @torch.no_grad()
    def _restart_means(self) -> None:
        if self.assignment == "ema" and self.weight is not None:
            counts, sums = _totals(self.weight.detach(), self.codes, self.codebook_size)
            self.counts.copy_(counts)
            self.sums.copy_(sums)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, replaced whole."""
        shape = {
            "d_model": self.d_model,
            "vocab_size": self.vocab_size,
            "codebook_size": self.codebook_size,
            "bias": self.bias is not None,
            "assignment": self.assignment,
            "decay": self.decay,
        }
        write_tensors(path, self.state_dict(), {"format": "pt", "vq_head": json.dumps(shape)})

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu") -> "VQHead":
        """Reads what :meth:`save` wrote. Raises ValueError where the file is something else."""
        try:
            with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
                shape = parse_json((file.metadata() or {}).get("vq_head", "null"))
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"fastattn.VQHead.load: {path} is unreadable: {error}") from error
        if not isinstance(shape, dict) or shape.keys() != _KEYS or "codebook" not in tensors:
            raise ValueError(f"fastattn.VQHead.load: {path} holds no VQHead")
        try:
            head = cls(**shape, device="meta", dtype=tensors["codebook"].dtype)
            head.load_state_dict(tensors, assign=True)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"fastattn.VQHead.load: {path} holds no VQHead: {error}") from error
        mixed = len({parameter.dtype for parameter in head.parameters()}) > 1
        if mixed or head.codes.dtype != torch.int64 or not _in_range(head.codes, head.codebook_size):
            raise ValueError(f"fastattn.VQHead.load: {path} holds no VQHead: its dtypes differ, or its codes")
        head.codebook.requires_grad_(head.assignment != "ema")
        return head

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, vocab_size={self.vocab_size}, codebook_size={self.codebook_size}, "
            f"bias={self.bias is not None}, assignment={self.assignment}"
        )


def _in_range(codes: Tensor, count: int) -> bool:
    return int(codes.min()) >= 0 and int(codes.max()) < count


def _check_codebook_size(codebook_size: int, vocab_size: int) -> None:
    if isinstance(codebook_size, bool) or not isinstance(codebook_size, int):
        raise TypeError(f"fastattn.VQHead: codebook_size must be an int, given {codebook_size!r}")
    if not 1 <= codebook_size <= vocab_size:
        raise ValueError(
            f"fastattn.VQHead: codebook_size must be 1 to vocab_size {vocab_size}, given {codebook_size}"
        )


def _totals(rows: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(number of rows (K,), their sum (K, d)) of each code, float32."""
    wide = rows.float()
    counts = wide.new_zeros(count).index_add_(0, codes, wide.new_ones(codes.shape[0]))
    return counts, wide.new_zeros(count, rows.shape[1]).index_add_(0, codes, wide)


@torch.no_grad()
def fit_codebook(
    rows: Tensor,
    count: int,
    *,
    iterations: int = 200,
    batch_size: int = 4096,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(codebook (K, d) in rows' dtype, codes (V,)) by mini-batch k-means on rows (V, d).

    Starts at K different rows; each batch moves a code towards the mean of its rows by their share of all it has seen.
    Then two passes over all rows set exact means, codes without rows moving to the rows farthest from theirs.
    """
    total = rows.shape[0]
    generator = torch.Generator().manual_seed(seed)

    def shuffled(n: int) -> Tensor:
        return torch.randperm(total, generator=generator)[:n].to(rows.device)

    codebook = rows[shuffled(count)].float()
    seen = codebook.new_zeros(count)
    for _ in _shown(range(iterations if count < total else 0), progress):
        batch = rows[shuffled(batch_size)].float()
        counts, sums = _totals(batch, nearest_codes(batch, codebook), count)
        seen += counts
        codebook += (sums - counts[:, None] * codebook) / seen.clamp(min=1)[:, None]
    for _ in range(2):
        codes = nearest_codes(rows.float(), codebook)
        counts, sums = _totals(rows, codes, count)
        live = counts > 0
        codebook[live] = sums[live] / counts[live, None]
        empty = (~live).nonzero()[:, 0]
        far = (rows.float() - codebook[codes]).square().sum(1)
        codebook[empty] = rows[far.topk(empty.numel()).indices].float()
    codebook = codebook.to(rows.dtype)
    return codebook, nearest_codes(rows, codebook)


def _shown(steps: range, progress: bool | None) -> Iterable[int]:
    """The steps, with a bar on stderr when wanted."""
    if not (sys.stderr.isatty() if progress is None else progress):
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, description="Fitting the codebook", console=Console(stderr=True))
