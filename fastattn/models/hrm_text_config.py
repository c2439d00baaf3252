"""HrmTextConfig, and the forms of ``config.json`` it is read from."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

SIZES = {  # hidden, heads, intermediate, layers per stack
    "B": (1024, 8, 2816, 6),
    "L": (1280, 10, 3584, 12),
    "XL": (1536, 12, 4096, 16),
    "XXL": (1792, 14, 4864, 36),
}

DERIVED: Any = None  # a field's default that __post_init__ replaces by what the others give

# Keys of a config.json that describe the file or its training, not the model.
_DESCRIPTIVE = {
    *("architectures", "auto_map", "transformers_version", "_name_or_path", "dtype", "torch_dtype"),
    *("attention_dropout", "output_attentions", "output_hidden_states", "return_dict", "use_cache"),
}
_MOST, _MOST_CYCLES = 2**31 - 1, 4096  # beyond them nothing can be computed
# Keys with one value that the model can be.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True)
class HrmTextConfig:
    """Shape of an HRM-Text model. Names are those of the released ``config.json``.

    Args:
        vocab_size: tokens.
        hidden_size, intermediate_size: widths of the states and of the SwiGLU.
        num_hidden_layers: blocks in each of the two stacks.
        num_attention_heads, head_dim: head_dim defaults to hidden_size / num_attention_heads.
        H_cycles, L_cycles: H calls, and L calls before each.
        cycles: for another number of levels than two (a third, slower stack, ...): each level's calls in a cycle of the
            level above it, the fastest first, in place of L_cycles and H_cycles. Default: two levels.
        L_bp_cycles: how many of the last L calls of each H cycle carry gradients when ``bp_steps`` is not
            given; one entry an H cycle, shorter lists are padded with 1 on the left. Default: all of the
            last H cycle's, none of the others'. With ``cycles`` the whole last cycle of the slowest level carries them.
        max_position_embeddings: longest sample, in tokens.
        rope_theta, rms_norm_eps: of the rotary embedding and the norms.
        initializer_range: default 1/sqrt(hidden_size).
        embedding_scale: factor on the embeddings; default 1 / initializer_range.
        prefix_lm: False refuses prefix lengths: every sample is causal.
        head: "dense", or "vq": a fastattn.nn.VQHead of codebook_size vectors.
        codebook_size, codebook_bias, codebook_assignment: of the "vq" head; the last as VQHead's ``assignment``,
            whose codes move when the training loop calls ``model.lm_head.update_codes()``.
        pad_token_id, bos_token_id, eos_token_id: kept for the tokenizer's sake; padding of generated rows.
    """

    vocab_size: int
    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    head_dim: int = DERIVED
    H_cycles: int = 2
    L_cycles: int = 3
    cycles: tuple[int, ...] | None = None
    L_bp_cycles: tuple[int, ...] = DERIVED
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = DERIVED
    embedding_scale: float = DERIVED
    prefix_lm: bool = True
    head: str = "dense"
    codebook_size: int | None = None
    codebook_bias: bool = True
    codebook_assignment: str = "fixed"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("H_cycles", "L_cycles", "max_position_embeddings"),
        ):
            value = getattr(self, name)
            most = _MOST_CYCLES if name.endswith("cycles") else _MOST
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                wanted = (
                    "an int of at least 1" if not isinstance(value, int) or value < 1 else f"at most {most}"
                )
                raise ValueError(f"HrmTextConfig: {name} is {value!r}; it must be {wanted}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"HrmTextConfig: num_attention_heads {self.num_attention_heads} does not divide "
                    f"hidden_size {self.hidden_size}; give head_dim"
                )
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        if not isinstance(self.head_dim, int) or not 2 <= self.head_dim <= _MOST or self.head_dim % 2:
            raise ValueError(f"HrmTextConfig: head_dim is {self.head_dim}; rotary positions need an even one")
        if self.initializer_range is None:
            self._set("initializer_range", self.hidden_size**-0.5)
        for name in ("rope_theta", "rms_norm_eps", "initializer_range", "embedding_scale"):
            value = getattr(self, name)
            if name == "embedding_scale" and value is None:
                value = 1.0 / self.initializer_range
                self._set(name, value)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"HrmTextConfig: {name} is {value!r}; it must be a positive number")
        if self.head not in ("dense", "vq"):
            raise ValueError(f"HrmTextConfig: head is {self.head!r}; it must be 'dense' or 'vq'")
        if (self.head == "vq") != (self.codebook_size is not None):
            raise ValueError(
                f"HrmTextConfig: codebook_size is {self.codebook_size!r}; head 'vq' needs one and 'dense' has none"
            )
        size = self.codebook_size
        if size is not None and (not isinstance(size, int) or not 1 <= size <= self.vocab_size):
            raise ValueError(
                f"HrmTextConfig: codebook_size is {size!r}; it must be an int from 1 to vocab_size {self.vocab_size}"
            )
        if isinstance(self.eos_token_id, list):
            self._set("eos_token_id", tuple(self.eos_token_id))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else (value,) if value is not None else ():
                if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"HrmTextConfig: {name} is {value!r}; tokens are from 0 to {self.vocab_size - 1}"
                    )
        if self.cycles is not None:
            self._check_cycles()
            return
        credit = self.L_bp_cycles
        if credit is None:
            credit = (0,) * (self.H_cycles - 1) + (self.L_cycles,)
        if not isinstance(credit, list | tuple) or not all(isinstance(count, int) for count in credit):
            raise ValueError(
                f"HrmTextConfig: L_bp_cycles is {credit!r}; it must be a list of counts, one an H cycle"
            )
        if len(credit) > self.H_cycles or not all(0 <= count <= self.L_cycles for count in credit):
            raise ValueError(
                f"HrmTextConfig: L_bp_cycles is {list(credit)}; at most {self.H_cycles} counts "
                f"from 0 to {self.L_cycles} are allowed"
            )
        self._set("L_bp_cycles", (1,) * (self.H_cycles - len(credit)) + tuple(credit))

    def _check_cycles(self) -> None:
        cycles = self.cycles
        if not isinstance(cycles, list | tuple) or len(cycles) < 3:
            raise ValueError(
                f"HrmTextConfig: cycles is {cycles!r}; it must be a list of three or more counts (two: L_cycles, H_cycles)"
            )
        if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= _MOST_CYCLES for n in cycles):
            raise ValueError(
                f"HrmTextConfig: cycles is {cycles!r}; each must be an int from 1 to {_MOST_CYCLES}"
            )
        if self.L_bp_cycles is not None:
            raise ValueError(
                "HrmTextConfig: L_bp_cycles is for two levels; with cycles give bp_steps in the call"
            )
        self._set("cycles", tuple(cycles))

    @property
    def level_cycles(self) -> tuple[int, ...]:
        """Of two or more levels, the fastest first."""
        return (self.L_cycles, self.H_cycles) if self.cycles is None else self.cycles

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def size(cls, name: str, vocab_size: int, **changes: Any) -> "HrmTextConfig":
        """The published shapes: "B", "L", "XL" (the released 1B model) and "XXL"."""
        if name not in SIZES:
            raise ValueError(f"HrmTextConfig.size: name is {name!r}; it must be one of {', '.join(SIZES)}")
        hidden, heads, intermediate, layers = SIZES[name]
        shape = {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
        }
        return cls(vocab_size=vocab_size, **(shape | changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HrmTextConfig":
        """From a ``config.json``: as released, or as transformers saves it again.

        The latter has ``num_hidden_layers`` = layers per stack * H_cycles * (L_cycles + 1), the former in
        ``num_layers_per_stack``, and ``rope_parameters`` in place of ``rope_theta``. Where ``num_layers_per_stack`` is given,
        ``num_hidden_layers`` may also be itself or, as HRM-Text's own converter writes it, twice it.

        Raises:
            ValueError: an unknown key, or one with a value that the model cannot be.
        """
        values = {key: value for key, value in values.items() if key not in _DESCRIPTIVE}
        model_type = values.pop("model_type", "hrm_text")
        if model_type != "hrm_text":
            raise ValueError(f"HrmTextConfig: model_type is {model_type!r}; it must be 'hrm_text'")
        for key, allowed in _FIXED.items():
            given = values.pop(key, allowed)
            if given is not None and given != allowed:
                raise ValueError(f"HrmTextConfig: {key} is {given!r}; only {allowed!r} is supported")
        if "L_bp_steps" in values:  # the name the reference's converter writes
            values["L_bp_cycles"] = values.pop("L_bp_steps")
        kv_heads = values.pop("num_key_value_heads", None)
        if kv_heads is not None and kv_heads != values.get("num_attention_heads"):
            raise ValueError(
                f"HrmTextConfig: num_key_value_heads is {kv_heads}; it must equal num_attention_heads "
                f"({values.get('num_attention_heads')})"
            )
        rope = values.pop("rope_parameters", None)
        if rope is not None:
            rope = dict(rope)
            kind = rope.pop("rope_type", "default")
            if kind != "default" or rope.keys() - {"rope_theta"}:
                raise ValueError(
                    f"HrmTextConfig: rope_parameters has type {kind!r} and {sorted(rope)}; "
                    "only type 'default' with rope_theta is supported"
                )
            values.update(rope)
        per_stack = values.pop("num_layers_per_stack", None)
        if per_stack is not None:
            calls = values.get("H_cycles", cls.H_cycles) * (values.get("L_cycles", cls.L_cycles) + 1)
            if values.get("num_hidden_layers") not in (per_stack * calls, 2 * per_stack, per_stack):
                raise ValueError(
                    f"HrmTextConfig: num_hidden_layers is {values.get('num_hidden_layers')}; with "
                    f"num_layers_per_stack {per_stack} and {calls} stack calls it must be {per_stack * calls} (or {2 * per_stack}, both "
                    f"stacks' layers, or {per_stack})"
                )
            values["num_hidden_layers"] = per_stack
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"HrmTextConfig: unknown key {key!r}{hint}")
        if "vocab_size" not in values:
            raise ValueError("HrmTextConfig: the key 'vocab_size' is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The released form, which transformers reads too."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("L_bp_cycles", "eos_token_id", "cycles"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        unused = ("cycles",) if self.cycles is None else ("L_bp_cycles",)
        for name in unused:
            del values[name]
        if self.head == "dense":  # the released form has no such keys
            for name in ("head", "codebook_size", "codebook_bias", "codebook_assignment"):
                del values[name]
        return {"model_type": "hrm_text", "architectures": ["HrmTextForCausalLM"], **values}
