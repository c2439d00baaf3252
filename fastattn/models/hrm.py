"""HRM (arXiv 2506.21734) on puzzles: segments of hierarchical recurrence, halting, deep supervision; TRM's shape too."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.blocks import PostNormBlock, PostNormMixerBlock, PostNormStack, Routing
from ..nn.recurrence import HierarchicalRecurrence
from ..ops.cross_entropy import stablemax_cross_entropy
from ..optim import summed_rows
from . import checkpoint
from .hrm_config import HrmConfig

IGNORE = -100


@dataclass
class HrmCarry:
    """Where each row of a batch stands between segments."""

    zH: Tensor  # (B, P + L, D), no gradient
    zL: Tensor  # (B, P + L, D), no gradient
    steps: Tensor  # (B,) int64, segments done on the row's puzzle
    halted: Tensor  # (B,) bool: the row takes the next sample
    inputs: Tensor  # (B, L) int64
    labels: Tensor  # (B, L) int64, -100 ignored
    puzzle_ids: Tensor  # (B,) int64


@dataclass
class HrmOutput:
    logits: Tensor  # (B, L, V)
    q_halt: Tensor  # (B,) float32
    q_continue: Tensor  # (B,) float32
    loss: Tensor  # (), mean over the rows that count; 0 where none does
    correct: Tensor  # (B,) bool, the row counts and every counted cell of it is right
    counted: (
        Tensor  # (B,) bool: the row has a label; one without (padding, an unknown solution) counts nowhere
    )


for _kind in (HrmCarry, HrmOutput):  # as HRM-Text's output is
    torch.export.register_dataclass(_kind)


class PuzzleEmbedding(nn.Module):
    """A vector for each puzzle, trained by :class:`fastattn.optim.SignSGD` on the rows a batch uses.

    ``weights`` (num_puzzles, dim) is a buffer. ``trained`` is False until an optimizer sets it; each backward in training
    then adds the gradients of the rows that were used to ``weights.grad``, a sparse tensor of at most num_puzzles rows.
    """

    weights: Tensor

    def __init__(self, num_puzzles: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(num_puzzles, dim))
        self.trained = False

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weights[ids]  # (B, dim)
        if self.trained and self.training and torch.is_grad_enabled():
            rows.requires_grad_()
            # with the gradient, not with the use: a forward without a backward leaves nothing behind
            rows.register_hook(lambda grad: self._add(ids, grad))
        return rows

    @torch.no_grad()
    def _add(self, ids: Tensor, grad: Tensor) -> None:
        weights = self.weights
        ids, sums = summed_rows(ids, grad)
        used = sums.any(-1)  # what only padding used is left alone, by the weight decay too
        ids, sums = ids[used], sums[used]
        new = torch.sparse_coo_tensor(
            ids[None], sums, weights.shape, is_coalesced=True, check_invariants=False
        )
        weights.grad = new if weights.grad is None else (weights.grad + new).coalesce()


class Hrm(nn.Module):
    """HRM: each segment refines the state by nested cycles of two stacks, most of them without gradients.

    ::

        x = sqrt(D) * concat(puzzle_emb[id], tok_emb[inputs])    (learned positions: sqrt(D / 2) * (concat + embed_pos))
        segment: zL = L_stack(zL + zH + x) per L call; zH = H_stack(zH + zL) per H call
        logits = zH @ lm_head.T on the cells; (q_halt, q_continue) = q_head(zH[:, 0])
    """

    H_init: Tensor
    L_init: Tensor

    def __init__(self, config: HrmConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.q_head = nn.Linear(D, 2)
        if config.puzzle_emb_dim:
            self.puzzle_emb = PuzzleEmbedding(config.num_puzzles, config.puzzle_emb_dim)
        self.register_buffer("H_init", torch.empty(D))
        self.register_buffer("L_init", torch.empty(D))

        if config.positions == "learned":
            self.embed_pos = nn.Embedding(config.puzzle_len + config.seq_len, D)

        def block() -> nn.Module:
            if config.mlp_t:
                length = config.puzzle_len + config.seq_len
                return PostNormMixerBlock(
                    *(length, config.mlp_t_size, D, config.intermediate_size), eps=config.rms_norm_eps
                )
            return PostNormBlock(
                D,
                config.num_heads,
                D // config.num_heads,
                config.intermediate_size,
                rope_theta=config.rope_theta if config.positions == "rope" else None,
                eps=config.rms_norm_eps,
            )

        def stack(layers: int) -> PostNormStack:
            return PostNormStack([block() for _ in range(layers)])

        L_stack = stack(config.L_layers)
        H_stack = L_stack if config.shared_stack else stack(config.H_layers)
        self.recurrence = HierarchicalRecurrence(L_stack, H_stack, config.H_cycles, config.L_cycles)
        self.reset_parameters()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the stacks in place; see :meth:`HierarchicalRecurrence.compile`."""
        self.recurrence.compile(*args, **kwargs)

    def activation_checkpointing(self, on: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.recurrence.activation_checkpointing(on)

    def reset_parameters(self) -> None:
        """Truncated normals of deviation 1/sqrt(fan in); q_head starts at an almost certain "do not halt"."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _truncated_normal_(module.weight, module.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                _truncated_normal_(module.weight, self.config.hidden_size**-0.5)
        _truncated_normal_(self.H_init, 1.0)
        _truncated_normal_(self.L_init, 1.0)
        with torch.no_grad():
            self.q_head.weight.zero_()
            self.q_head.bias.fill_(-5.0)

    def embed(self, inputs: Tensor, puzzle_ids: Tensor) -> Tensor:
        """x (B, P + L, D): the puzzle's vector, then its cells."""
        x = self.embed_tokens(inputs)
        if self.config.puzzle_emb_dim:
            B, P, D = len(inputs), self.config.puzzle_len, self.config.hidden_size
            rows = F.pad(self.puzzle_emb(puzzle_ids), (0, P * D - self.config.puzzle_emb_dim))
            x = torch.cat([rows.view(B, P, D).to(x.dtype), x], 1)
        if self.config.positions == "learned":
            x = 0.5**0.5 * (x + self.embed_pos.weight)
        return x * self.config.hidden_size**0.5

    def segment(self, zH: Tensor, zL: Tensor, inputs: Tensor, puzzle_ids: Tensor) -> tuple[Tensor, ...]:
        """One segment: (zH, zL, logits (B, L, V), q_halt (B,), q_continue (B,)); the q's in float32."""
        credit = self.recurrence.credit(1, self.config.L_cycles if self.config.full_last_cycle else 1)
        positions = torch.arange(zH.shape[1], device=zH.device)
        x = self.embed(inputs, puzzle_ids)
        zH, zL = self.recurrence(zH, zL, inject=x, gradient_calls=credit, routing=Routing(None, positions))
        q = self.q_head(zH[:, 0]).float()
        return zH, zL, self.lm_head(zH[:, self.config.puzzle_len :]), q[:, 0], q[:, 1]

    def initial_carry(self, batch_size: int) -> HrmCarry:
        """Every row halted, so that the first forward takes a sample for each."""
        device, config = self.H_init.device, self.config
        state = self.H_init.expand(batch_size, config.puzzle_len + config.seq_len, -1)
        cells = torch.zeros(batch_size, config.seq_len, dtype=torch.int64, device=device)
        row = cells[:, 0]
        return HrmCarry(state, state, row, torch.ones_like(row, dtype=torch.bool), cells, cells, row)

    def exploration(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """(rows,) int64: the segments that each row must have before it may halt, drawn anew for each call in training."""
        config, device = self.config, self.H_init.device
        explore = torch.rand(rows, device=device, generator=generator)
        least = torch.randint(2, config.halt_max_steps + 1, (rows,), device=device, generator=generator)
        return torch.where(explore < config.halt_exploration, least, 0)

    def forward(
        self,
        carry: HrmCarry,
        batch: Mapping[str, Tensor],
        *,
        generator: torch.Generator | None = None,
        exploration: Tensor | None = None,
    ) -> tuple[HrmCarry, HrmOutput]:
        """One segment on every row. A row that has halted takes the batch's sample first.

        Args:
            carry: from :meth:`initial_carry` or the last call.
            batch: ``inputs`` (B, L), ``labels`` (B, L) with -100 ignored, and ``puzzle_ids`` (B,), integers.
            generator: for the exploration of halting in training.
            exploration: what :meth:`exploration` drew for these rows. Default: drawn here.

        The loss of a row is its cross-entropy (StableMax, or softmax with ``config.loss``) averaged over the counted cells, plus half of the
        binary cross-entropies of q_halt (against "every cell is right") and, with ``q_continue``, of
        q_continue (against the next segment's value). A row without labels has no loss and teaches neither q; in
        training it halts at once, so that the next sample takes its place.
        """
        config = self.config
        inputs, labels, puzzle_ids = self._check(batch, len(carry.halted))
        fresh = carry.halted
        row, cells = fresh[:, None], fresh[:, None, None]
        inputs = torch.where(row, inputs, carry.inputs)
        labels = torch.where(row, labels, carry.labels)
        puzzle_ids = torch.where(fresh, puzzle_ids, carry.puzzle_ids)
        zH = torch.where(cells, self.H_init, carry.zH)
        zL = torch.where(cells, self.L_init, carry.zL)
        steps = torch.where(fresh, 0, carry.steps) + 1

        zH, zL, logits, q_halt, q_continue = self.segment(zH, zL, inputs, puzzle_ids)
        zH, zL = zH.detach(), zL.detach()
        cells_counted = labels != IGNORE
        counted = cells_counted.any(-1)
        correct = ((logits.argmax(-1) == labels) | ~cells_counted).all(-1) & counted
        cross_entropy = stablemax_cross_entropy if config.loss == "stablemax" else F.cross_entropy
        loss = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
        ).view(labels.shape)
        loss = loss.sum(-1) / cells_counted.sum(-1).clamp(min=1)
        q_loss = F.binary_cross_entropy_with_logits(q_halt, correct.float(), reduction="none")

        last = steps >= config.halt_max_steps
        halted = last
        if self.training and config.halt_max_steps > 1:
            with torch.no_grad():
                halted = last | (q_halt > (q_continue if config.q_continue else 0.0))
                if exploration is None:
                    exploration = self.exploration(len(steps), generator)
                halted = halted & (steps >= exploration) | ~counted
                if config.q_continue:
                    *_, next_halt, next_continue = self.segment(zH, zL, inputs, puzzle_ids)
                    target = torch.where(last, next_halt, torch.maximum(next_halt, next_continue)).sigmoid()
            if config.q_continue:
                q_loss = q_loss + F.binary_cross_entropy_with_logits(q_continue, target, reduction="none")
        carry = HrmCarry(zH, zL, steps, halted, inputs, labels, puzzle_ids)
        loss = torch.where(counted, loss + 0.5 * q_loss, 0.0).sum() / counted.sum().clamp(min=1)
        return carry, HrmOutput(logits, q_halt, q_continue, loss, correct, counted)

    @torch.no_grad()
    def solve(
        self, inputs: Tensor, puzzle_ids: Tensor | None = None, *, segments: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields after each segment (tokens (B, L), q_halt (B,)) for inputs (B, L).

        puzzle_ids: (B,); default: 0. segments: default: ``halt_max_steps``.
        """
        if puzzle_ids is None:
            puzzle_ids = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        inputs, _, puzzle_ids = self._check(
            {"inputs": inputs, "labels": inputs, "puzzle_ids": puzzle_ids}, len(inputs)
        )
        shape = (len(inputs), self.config.puzzle_len + self.config.seq_len, -1)
        zH, zL = self.H_init.expand(shape), self.L_init.expand(shape)
        for _ in range(self.config.halt_max_steps if segments is None else segments):
            zH, zL, logits, q_halt, _ = self.segment(zH, zL, inputs, puzzle_ids)
            yield logits.argmax(-1), q_halt

    def _check(self, batch: Mapping[str, Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = {
            "inputs": (rows, self.config.seq_len),
            "labels": (rows, self.config.seq_len),
            "puzzle_ids": (rows,),
        }
        for name, shape in shapes.items():
            if name not in batch:
                raise ValueError(f"Hrm: batch lacks {name!r}")
            value = batch[name]
            if tuple(value.shape) != shape or value.is_floating_point():
                raise ValueError(
                    f"Hrm: {name} has shape {tuple(value.shape)} and dtype {value.dtype}; it must be int, {shape}"
                )
        limits = {"inputs": self.config.vocab_size, "puzzle_ids": self.config.num_puzzles}
        for name, limit in limits.items():
            value = batch[name]
            if value.device.type == "cpu" and value.numel() and not 0 <= value.min() <= value.max() < limit:
                raise ValueError(f"Hrm: {name} must be from 0 to {limit - 1}")
        return batch["inputs"].long(), batch["labels"].long(), batch["puzzle_ids"].long()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        *,
        config: HrmConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "Hrm":
        """Loads ``config.json`` and ``model.safetensors``, under the reference's tensor names (with or without
        ``_orig_mod.``); missing or unexpected ones are an error that lists them."""
        checkpoint.check_converted(directory)
        if config is None:
            path = os.path.join(directory, checkpoint.CONFIG)
            values = checkpoint.load_json(path)
            try:
                config = HrmConfig.from_dict(values)
            except (TypeError, ValueError) as error:
                raise checkpoint.CheckpointError(f"{path}: {error}") from error
        return cls._from_file(config, checkpoint.TensorFile(directory), dtype, device)

    @classmethod
    def _from_file(
        cls,
        config: HrmConfig,
        file: checkpoint.TensorFile,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "Hrm":
        model = checkpoint.on_meta(lambda: cls(config), max(config.H_layers, config.L_layers), file)
        wanted = {name: [(reference_name(name, config),)] for name in model.state_dict()}
        checkpoint.fill(model, file, checkpoint.resolve(wanted, file), dtype=dtype, device=device)
        checkpoint.check_one_dtype(model, file.path)
        for name in (
            "H_init",
            "L_init",
        ):  # theirs are of the dtype they compute in, their weights are float32
            setattr(model, name, getattr(model, name).to(model.lm_head.weight.dtype))
        return model

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes ``config.json`` and ``model.safetensors``, each replaced whole."""
        tensors = {reference_name(name, self.config): tensor for name, tensor in self.state_dict().items()}
        checkpoint.save_tensors(os.path.join(directory, checkpoint.WEIGHTS), tensors)
        checkpoint.save_json(os.path.join(directory, checkpoint.CONFIG), self.config.to_dict())


def reference_name(name: str, config: HrmConfig) -> str:
    """The name in the reference's files of a tensor of :meth:`Hrm.state_dict`."""
    H_level = "L_level" if config.shared_stack else "H_level"
    for name_here, name_in_file in (
        ("recurrence.L_stack", "L_level"),
        ("recurrence.H_stack", H_level),
        ("embed_tokens.weight", "embed_tokens.embedding_weight"),
        ("embed_pos.weight", "embed_pos.embedding_weight"),
    ):
        name = name.replace(name_here, name_in_file)
    return f"model.inner.{name}"


def _truncated_normal_(weight: Tensor, std: float) -> Tensor:
    """Normal within two deviations, widened so that the deviation after truncation is ``std``."""
    wide = std / 0.8796256610342398  # the deviation of a unit normal truncated at +-2
    return nn.init.trunc_normal_(weight, std=wide, a=-2 * wide, b=2 * wide)
