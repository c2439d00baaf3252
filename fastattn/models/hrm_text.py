"""HRM-Text (arXiv 2605.20613): a language model that calls two small stacks many times."""

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masks import Mask
from ..masks import positions as document_positions
from ..nn.blocks import PreNormBlock, PreNormStack, Routing, clipped_normal_
from ..nn.cache import KeyValueCache
from ..nn.plain import linear
from ..nn.recurrence import HierarchicalRecurrence
from ..nn.vq_head import VQHead
from ..ops.cross_entropy import linear_cross_entropy
from ..runtime.checks import check_tensor
from . import checkpoint, decode
from .generate import generate
from .hrm_text_config import HrmTextConfig

IGNORE = -100


@dataclass
class HrmTextOutput:
    logits: Tensor | None  # (B, L, V)
    loss: Tensor | None  # (), float32
    cache: KeyValueCache | None


# FSDP2 of torch before 2.12 finds only the tensors of a pytree; an output without any reduces no gradient
torch.export.register_dataclass(HrmTextOutput)


class HrmText(nn.Module):
    """HRM-Text with PrefixLM attention on padded batches or packed samples.

    ::

        zH = embedding_scale * emb[ids];  zL = z_L_init
        for h in range(H_cycles):
            for l in range(L_cycles): zL = L_stack(zL + zH)
            zH = H_stack(zH + zL)
        logits = zH @ lm_head.T

    ``config.cycles`` makes three levels or more (see :class:`fastattn.nn.HierarchicalRecurrence`); the slowest starts with
    the embeddings, each other one with a vector of its own.

    Weights are drawn from a clipped normal with deviation 1/sqrt(fan in); ``z_L_init`` is drawn once and
    never trained.
    """

    z_L_init: Tensor
    lm_head: nn.Linear | VQHead

    def __init__(self, config: HrmTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.codebook_size is not None:  # head "vq"
            self.lm_head = VQHead(
                config.hidden_size,
                config.vocab_size,
                config.codebook_size,
                config.codebook_bias,
                assignment=config.codebook_assignment,
            )
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("z_L_init", torch.empty(config.hidden_size))

        def stack() -> PreNormStack:
            blocks = [
                PreNormBlock(
                    config.hidden_size,
                    config.num_attention_heads,
                    config.head_dim,
                    config.intermediate_size,
                    rope_theta=config.rope_theta,
                    eps=config.rms_norm_eps,
                )
                for _ in range(config.num_hidden_layers)
            ]
            return PreNormStack(blocks, eps=config.rms_norm_eps)

        cycles = config.level_cycles
        for level in range(1, len(cycles) - 1):
            self.register_buffer(f"z_{level}_init", torch.empty(config.hidden_size))
        self.recurrence = HierarchicalRecurrence([stack() for _ in cycles], cycles)
        self.reset_parameters()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the stacks in place; see :meth:`HierarchicalRecurrence.compile`."""
        self.recurrence.compile(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Draws every weight again, from torch's default generator."""
        std = self.config.initializer_range
        clipped_normal_(self.embed_tokens.weight, std)
        if isinstance(self.lm_head, VQHead):
            self.lm_head.reset_parameters(std)
        else:
            clipped_normal_(self.lm_head.weight, std)
        for z in self._initial():
            clipped_normal_(z, 1.0)
        for block in self.recurrence.modules():
            if isinstance(block, PreNormBlock):
                block.attn.reset_parameters(std, std)
                block.mlp.reset_parameters(std, self.config.intermediate_size**-0.5)

    def _initial(self) -> list[Tensor]:
        """The states that a forward starts with, all but the slowest's, in falling order of speed."""
        return [
            self.z_L_init,
            *(getattr(self, f"z_{level}_init") for level in range(1, len(self.config.level_cycles) - 1)),
        ]

    def quantize_head(self, codebook_size: int, *, assignment: str = "fixed", **options: Any) -> None:
        """Replaces the dense output layer by a VQHead fitted to it, in place; see VQHead.from_linear for the options.

        Its parameters are new: make the optimizer after this.
        """
        if isinstance(self.lm_head, VQHead):
            raise ValueError("HrmText: quantize_head needs a dense output layer, and this one is a VQHead")
        head = VQHead.from_linear(self.lm_head, codebook_size, assignment=assignment, **options)
        self.lm_head = head
        self.config = dataclasses.replace(
            self.config,
            head="vq",
            codebook_size=codebook_size,
            codebook_bias=head.bias is not None,
            codebook_assignment=assignment,
        )

    def activation_checkpointing(self, on: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.recurrence.activation_checkpointing(on)

    def make_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        """An empty cache for ``capacity`` tokens a row: one key/value slot for each layer of each stack call."""
        limit = self.config.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"HrmText: capacity {capacity} exceeds max_position_embeddings {limit}")
        weight = self.embed_tokens.weight
        return KeyValueCache(
            self.recurrence.calls,
            self.config.num_hidden_layers,
            batch_size,
            self.config.num_attention_heads,
            capacity,
            self.config.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def forward(
        self,
        input_ids: Tensor,
        prefix_lengths: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        labels: Tensor | None = None,
        bp_steps: int | None = None,
        cache: KeyValueCache | None = None,
        return_logits: bool | None = None,
    ) -> HrmTextOutput:
        """Runs the model on a batch of samples, or on samples packed into a batch of one.

        Args:
            input_ids: (B, L) int64 or int32.
            prefix_lengths: (B,), or one a document when packed: tokens before it see each other both ways,
                the rest is causal. Default: all causal.
            cu_seqlens: (documents + 1,), from 0 to L: packed documents, B = 1. Positions restart in each.
            lengths: (B,), tokens of each row that are not padding on the right. Default: all.
            labels: (B, L), as input_ids; -100 is ignored. Shifted inside: the output at t is compared with
                the label at t + 1 of the same document.
            bp_steps: 2 to the number of stack calls: how many of the last calls carry gradients (warm-up deep
                credit assignment). Default: config.L_bp_cycles.
            cache: from :meth:`make_cache`. The first call fills it with the prompt, later calls extend each row
                with response tokens. Runs without gradients.
            return_logits: default: only when there are no labels, so that training never holds (B, L, V).

        Returns:
            An HrmTextOutput: ``logits`` (B, L, V) or None; ``loss``, the mean over the labels that count (0
            when none does) or None; ``cache`` as given.

        Raises:
            ValueError, TypeError: shapes, dtypes or ids that don't fit; a sample longer than
                max_position_embeddings; a prompt for a cache that already holds one.
        """
        if return_logits is None:
            return_logits = labels is None
        for name, value in (("labels", labels), ("bp_steps", bp_steps)):
            if cache is not None and value is not None:
                raise ValueError(
                    f"HrmText: {name} and cache exclude each other: a cached forward has no gradients"
                )
        if cache is not None:
            with torch.no_grad():
                hidden, _ = self.hidden_states(
                    input_ids,
                    prefix_lengths,
                    cu_seqlens=cu_seqlens,
                    lengths=lengths,
                    cache=cache,
                )
        else:
            hidden, positions = self.hidden_states(
                input_ids,
                prefix_lengths,
                cu_seqlens=cu_seqlens,
                lengths=lengths,
                bp_steps=bp_steps,
            )
        loss = None
        if labels is not None:
            target = _shift(labels, input_ids, positions, lengths)
            if isinstance(self.lm_head, VQHead):
                loss = self.lm_head.loss(hidden, target, ignore_index=IGNORE)
            else:
                loss = linear_cross_entropy(hidden, self.lm_head.weight, target, ignore_index=IGNORE)
        return HrmTextOutput(linear(hidden, self.lm_head) if return_logits else None, loss, cache)

    def hidden_states(
        self,
        input_ids: Tensor,
        prefix_lengths: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        bp_steps: int | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` does before the output layer: (zH (B, L, D), positions (L,) or (B, L))."""
        self._check_ids(input_ids)
        routing = self._route(input_ids, prefix_lengths, cu_seqlens, lengths, cache)
        zH = self.embed_tokens(input_ids) * self.config.embedding_scale
        *middle, zL = (z.to(zH.dtype).expand_as(zH) for z in reversed(self._initial()))
        stepped = None
        if cache is not None and lengths is None and not middle:
            stepped = decode.step(self, zH, zL, cache)
        if stepped is not None:
            zH = stepped
        else:
            if cache is not None and cache.longest:
                routing = Routing(self._extension_mask(cache, routing.positions), routing.positions)
            credit = self._credit(bp_steps)
            zH, *_ = self.recurrence(zH, *middle, zL, gradient_calls=credit, routing=routing, cache=cache)
        if cache is not None:
            cache.commit(input_ids.shape[1], lengths, prefix=prefix_lengths)
        return zH, routing.positions

    def _credit(self, bp_steps: int | None) -> tuple[bool, ...]:
        if bp_steps is not None:
            return self.recurrence.gradient_calls(bp_steps)
        if self.config.cycles is not None:
            return self.recurrence.gradient_calls(self.recurrence.calls // self.config.cycles[-1])
        L = self.config.L_cycles
        return tuple(
            flag for n in self.config.L_bp_cycles for flag in (*(l >= L - n for l in range(L)), True)
        )

    def _check_ids(self, input_ids: Tensor) -> None:
        check_tensor("HrmText", "input_ids", input_ids)
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"HrmText: input_ids is {input_ids.dtype}; it must be int32 or int64")
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"HrmText: input_ids has shape {tuple(input_ids.shape)}; it must be (B, L), not empty"
            )
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in torch.aminmax(input_ids))
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"HrmText: input_ids holds {low if low < 0 else high}; "
                    f"ids are from 0 to {self.config.vocab_size - 1}"
                )

    def _route(
        self,
        input_ids: Tensor,
        prefix_lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        lengths: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Routing:
        """Checks how the samples lie in the batch; builds the mask and the positions."""
        B, L = input_ids.shape
        device = input_ids.device
        limit = self.config.max_position_embeddings
        if prefix_lengths is not None and not self.config.prefix_lm:
            raise ValueError("HrmText: prefix_lengths is given, but the config has prefix_lm False")
        if cache is not None and cu_seqlens is not None:
            raise ValueError(
                "HrmText: cu_seqlens and cache exclude each other: a cache holds one sample a row"
            )
        if cu_seqlens is not None:
            if B != 1:
                raise ValueError(
                    f"HrmText: input_ids has {B} rows; packed samples (cu_seqlens) need a batch of one"
                )
            if lengths is not None:
                raise ValueError("HrmText: lengths and cu_seqlens exclude each other")
            mask = Mask(causal=True, prefix_lengths=prefix_lengths, cu_seqlens_q=cu_seqlens)
            if not torch.compiler.is_compiling():
                if mask.total_q != L:
                    raise ValueError(f"HrmText: cu_seqlens ends at {mask.total_q}; input_ids has {L} tokens")
                if mask.max_seqlen_q > limit:
                    raise ValueError(
                        f"HrmText: a sample of {mask.max_seqlen_q} tokens exceeds max_position_embeddings {limit}"
                    )
            return Routing(mask, document_positions(cu_seqlens.to(device), L, device)[1])
        if cache is not None and cache.longest:
            return self._route_extension(input_ids, prefix_lengths, lengths, cache)
        if limit < L:
            raise ValueError(f"HrmText: a sample of {L} tokens exceeds max_position_embeddings {limit}")
        if lengths is not None:
            self._check_lengths("lengths", lengths, B, 1, L)
        if prefix_lengths is not None:
            self._check_lengths("prefix_lengths", prefix_lengths, B, 0, L)
        mask = Mask(causal=True, prefix_lengths=prefix_lengths, key_lengths=lengths)
        if cache is not None:
            cache.reserve(B, L)
        return Routing(mask, torch.arange(L, device=device))

    def _route_extension(
        self, input_ids: Tensor, prefix_lengths: Tensor | None, lengths: Tensor | None, cache: KeyValueCache
    ) -> Routing:
        B, L = input_ids.shape
        if prefix_lengths is not None:
            raise ValueError(
                "HrmText: prefix_lengths is given for a filled cache; the prompt's tokens see each other "
                "both ways, so a prompt can't be extended: reset the cache and prefill the whole prompt"
            )
        if lengths is not None:
            raise ValueError(
                "HrmText: lengths is given for a filled cache; every row grows by all of input_ids"
            )
        # the mask is made where the layers need it: of rows that differ in length it waits for a GPU
        return Routing(None, cache.reserve(B, L))

    @staticmethod
    def _extension_mask(cache: KeyValueCache, positions: Tensor) -> Mask:
        """Of tokens at positions (B, L) that follow what the cache holds."""
        if not cache.ragged:
            return Mask(causal=True)
        if positions.shape[1] == 1:
            return Mask(key_lengths=cache.lengths + 1)
        key = torch.arange(cache.longest + positions.shape[1], device=positions.device)
        return Mask(dense=key <= positions[:, None, :, None])

    @staticmethod
    def _check_lengths(name: str, value: Tensor, B: int, low: int, high: int) -> None:
        check_tensor("HrmText", name, value)
        if value.shape != (B,) or value.is_floating_point():
            raise ValueError(
                f"HrmText: {name} has shape {tuple(value.shape)} and dtype {value.dtype}; "
                f"it must be int, one a row: ({B},)"
            )
        if torch.compiler.is_compiling():
            return
        if value.device.type == "cpu" and (value.min() < low or value.max() > high):
            raise ValueError(f"HrmText: {name} is {value.tolist()}; each must be from {low} to {high}")

    generate = generate

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        *,
        config: HrmTextConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "HrmText":
        """Loads ``config.json`` and ``model.safetensors`` (or its shards), one tensor at a time.

        Reads the released layout, the one with split projections, and the reference's own names; missing
        or unexpected tensors are an error that lists them. ``num_hidden_layers`` in config.json may count the layers of one
        stack, of both, or of all calls: the file has the layers.

        Args:
            config: in place of ``config.json``.
            dtype: default: the file's.
        """
        directory = os.fspath(directory)
        checkpoint.check_converted(directory)
        if config is None:
            path = os.path.join(directory, checkpoint.CONFIG)
            try:
                config = HrmTextConfig.from_dict(checkpoint.load_json(path))
            except checkpoint.CheckpointError:
                raise
            except (TypeError, ValueError) as error:
                raise checkpoint.CheckpointError(f"{path}: {error}") from error
            config = _counted_by_stack(config, checkpoint.TensorFile(directory))
        return cls._from_file(config, checkpoint.TensorFile(directory), dtype, device)

    @classmethod
    def _from_file(
        cls,
        config: HrmTextConfig,
        file: checkpoint.TensorFile,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "HrmText":
        model = checkpoint.on_meta(lambda: cls(config), config.num_hidden_layers, file)
        sources = checkpoint.resolve({name: _layouts(name) for name in model.state_dict()}, file, _unused)
        checkpoint.fill(model, file, sources, dtype=dtype, device=device)
        checkpoint.check_one_dtype(model, file.path)
        return model

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes ``config.json`` and ``model.safetensors`` in the released layout. Each file is replaced
        whole: an interrupted save leaves the old one."""
        tensors = {released_name(name): tensor for name, tensor in self.state_dict().items()}
        checkpoint.save_tensors(os.path.join(directory, checkpoint.WEIGHTS), tensors)
        checkpoint.save_json(os.path.join(directory, checkpoint.CONFIG), self.config.to_dict())


def _counted_by_stack(config: HrmTextConfig, file: checkpoint.TensorFile) -> HrmTextConfig:
    """The config with the layers that a stack has in the file, where it counts those of both stacks or of all calls."""
    found = [re.search(r"\b[LH]_(?:module|level)\..*?\blayers\.(\d+)\.", name) for name in file]
    layers = max((int(match[1]) + 1 for match in found if match), default=0)
    calls = config.H_cycles * (config.L_cycles + 1)
    if config.cycles is not None:
        return config
    if layers and config.num_hidden_layers in (2 * layers, layers * calls):
        return dataclasses.replace(config, num_hidden_layers=layers)
    return config


def _shift(labels: Tensor, input_ids: Tensor, positions: Tensor, lengths: Tensor | None) -> Tensor:
    """Targets (B, L): at t the label at t + 1, unless that is padding or opens another document."""
    check_tensor("HrmText", "labels", labels)
    if labels.shape != input_ids.shape or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"HrmText: labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; "
            f"it must be int, {tuple(input_ids.shape)} as input_ids"
        )
    following = positions[1:] > 0
    if lengths is not None:
        following = following & (positions[1:] < lengths.to(labels.device)[:, None])
    target = labels[:, 1:].long().masked_fill(~following, IGNORE)
    return F.pad(target, (0, 1), value=IGNORE)


def released_name(name: str) -> str:
    """The name that a tensor of :meth:`HrmText.state_dict` has in the released files."""
    return _layouts(name)[0][0]


def _layouts(name: str) -> list[checkpoint.Source]:
    """The names that a tensor has in files: in the released layout, with split projections, in the reference's own."""
    plain: dict[str, list[checkpoint.Source]] = {
        "embed_tokens.weight": [("model.embed_tokens.weight",), ("embed_tokens.embedding_weight",)],
        "lm_head.weight": [("lm_head.weight",)],
        "z_L_init": [("model.z_L_init",), ("model.zL_init",)],
    }
    if name in plain:
        return plain[name]
    if name.startswith("lm_head."):  # of a quantised head
        return [(name,)]
    if name.startswith(("recurrence.stack_", "z_")):  # of three levels or more, which no other code has
        return [(f"model.{name}",)]
    _, stack, rest = name.split(".", 2)  # recurrence.L_stack.layers.0.attn.o_proj.weight
    layer, _, projection = rest.rpartition(".")[0].rpartition(".")
    split = {
        "gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }.get(projection, (projection,))
    module = f"model.{stack[0]}_module.{layer}"
    separate = module.replace(".attn", ".self_attn")
    return [
        (f"{module}.{projection}.weight",),
        tuple(f"{separate}.{part}.weight" for part in split),
        (f"model.{stack[0]}_level.core.{layer}.{projection}.weight",),
    ]


def _unused(name: str) -> bool:
    return name == "model.zH_init" or ".rotary_emb." in name
