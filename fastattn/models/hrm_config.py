"""HrmConfig, and the arch files of HRM's and TRM's own code that it is read from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .hrm_text_config import DERIVED

POSITIONS = ("rope", "learned", "none")
LOSSES = ("stablemax", "softmax")


def inner_width(expansion: float, width: int) -> int:
    """Of a SwiGLU: 2/3 * expansion * width, rounded up to a multiple of 256."""
    return -(round(expansion * width * 2 / 3) // -256) * 256


@dataclass(frozen=True, kw_only=True)
class HrmConfig:
    """Shape of an HRM; the defaults are the published Sudoku model (27,275,266 parameters).

    Args:
        vocab_size, seq_len: tokens, and cells of a puzzle.
        num_puzzles, puzzle_emb_dim: a trained vector for each puzzle identifier, put before the cells. Default dim:
            hidden_size; 0 has none.
        puzzle_emb_len: positions that the vector takes, filled up with zeros. Default: as many as it needs.
        hidden_size, num_heads, intermediate_size: intermediate_size defaults to 8/3 * hidden_size rounded up
            to a multiple of 256.
        H_layers, L_layers, H_cycles, L_cycles: blocks of each stack, and its calls.
        positions: "rope" (rotary), "learned" (a vector for each position) or "none".
        mlp_t, mlp_t_size: a SwiGLU over the positions in place of attention (TRM), and its inner width; default: as
            intermediate_size, of the number of positions.
        shared_stack: one stack in both roles (TRM).
        full_last_cycle: gradients through the whole last H cycle (TRM) in place of its last two calls.
        halt_max_steps: the largest number of segments, and the number in evaluation.
        halt_exploration: probability that a sample may not halt before a random number of segments.
        q_continue: learn the value of another segment, which costs one more forward a step. Without it (TRM) a sample
            halts when q_halt > 0.
        loss: "stablemax" or "softmax" cross-entropy.
    """

    vocab_size: int = 11
    seq_len: int = 81
    num_puzzles: int = 1
    puzzle_emb_dim: int = DERIVED
    puzzle_emb_len: int = DERIVED
    hidden_size: int = 512
    num_heads: int = 8
    intermediate_size: int = DERIVED
    H_layers: int = 4
    L_layers: int = 4
    H_cycles: int = 2
    L_cycles: int = 2
    shared_stack: bool = False
    full_last_cycle: bool = False
    halt_max_steps: int = 16
    halt_exploration: float = 0.1
    q_continue: bool = True
    positions: str = "rope"
    mlp_t: bool = False
    mlp_t_size: int = DERIVED
    loss: str = "stablemax"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.puzzle_emb_dim is None:
            object.__setattr__(self, "puzzle_emb_dim", self.hidden_size)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", inner_width(4, self.hidden_size))
        for name in (
            *("vocab_size", "seq_len", "num_puzzles", "hidden_size", "num_heads", "intermediate_size"),
            *("H_layers", "L_layers", "H_cycles", "L_cycles", "halt_max_steps"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"HrmConfig: {name} is {value!r}; it must be an int of at least 1")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"HrmConfig: hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}"
            )
        if not isinstance(self.puzzle_emb_dim, int) or self.puzzle_emb_dim < 0:
            raise ValueError(
                f"HrmConfig: puzzle_emb_dim is {self.puzzle_emb_dim!r}; it must be an int, not negative"
            )
        least = -(self.puzzle_emb_dim // -self.hidden_size)
        if self.puzzle_emb_len is None:
            object.__setattr__(self, "puzzle_emb_len", least)
        if not isinstance(self.puzzle_emb_len, int) or self.puzzle_emb_len < least:
            raise ValueError(
                f"HrmConfig: puzzle_emb_len is {self.puzzle_emb_len!r}; puzzle_emb_dim {self.puzzle_emb_dim} takes at "
                f"least {least} positions of hidden_size {self.hidden_size}"
            )
        if self.puzzle_emb_len and not self.puzzle_emb_dim:
            raise ValueError(
                f"HrmConfig: puzzle_emb_len is {self.puzzle_emb_len}; without puzzle vectors (puzzle_emb_dim 0) it is 0"
            )
        for name, allowed in (("positions", POSITIONS), ("loss", LOSSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"HrmConfig: {name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                )
        if self.mlp_t_size is None and self.mlp_t:
            object.__setattr__(self, "mlp_t_size", inner_width(4, self.seq_len + self.puzzle_emb_len))
        size = self.mlp_t_size
        if size is not None and (not isinstance(size, int) or size < 1 or not self.mlp_t):
            raise ValueError(
                f"HrmConfig: mlp_t_size is {size!r}; it is an int of at least 1 with mlp_t, else None"
            )
        if not isinstance(self.halt_exploration, int | float) or not 0 <= self.halt_exploration <= 1:
            raise ValueError(
                f"HrmConfig: halt_exploration is {self.halt_exploration!r}; it must be from 0 to 1"
            )
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"HrmConfig: {name} is {value!r}; it must be a positive number")
        for name in ("shared_stack", "full_last_cycle", "q_continue", "mlp_t"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"HrmConfig: {name} is {getattr(self, name)!r}; it must be true or false")
        if self.shared_stack and self.H_layers != self.L_layers:
            raise ValueError(
                f"HrmConfig: shared_stack needs as many H_layers ({self.H_layers}) as L_layers ({self.L_layers})"
            )

    @property
    def puzzle_len(self) -> int:
        """Positions before the cells."""
        return self.puzzle_emb_len

    @classmethod
    def trm(cls, **changes: Any) -> "HrmConfig":
        """The shape of TRM (arXiv 2510.04871): one stack of two blocks, 3 x 6 cycles, no second forward, and 16
        positions for the puzzle's vector, as its published checkpoints have."""
        shape = {
            "H_layers": 2,
            "L_layers": 2,
            "H_cycles": 3,
            "L_cycles": 6,
            "shared_stack": True,
            "full_last_cycle": True,
            "q_continue": False,
        }
        if changes.get("puzzle_emb_dim") != 0:
            shape["puzzle_emb_len"] = 16
        return cls(**(shape | changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HrmConfig":
        """From a ``config.json``, or from the keys of an arch file of HRM's or TRM's own code with those that it takes
        from the data (vocab_size, seq_len, num_puzzle_identifiers).

        Raises:
            ValueError: an unknown key, or one with a value that the model cannot be.
        """
        values = {key: value for key, value in values.items() if key != "model_type"}
        if values.keys() & REFERENCE_KEYS:
            values = _of_reference(values)
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"HrmConfig: unknown key {unknown[0]!r}; take it out where the model does not depend on it"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "hrm", **asdict(self)}


_RENAMED = {
    "puzzle_emb_ndim": "puzzle_emb_dim",
    "num_puzzle_identifiers": "num_puzzles",
    "halt_exploration_prob": "halt_exploration",
    "pos_encodings": "positions",
}
# what says that a file is of their code
REFERENCE_KEYS = {
    *_RENAMED,
    *("name", "expansion", "no_ACT_continue", "forward_dtype", "batch_size", "causal"),
}
_HRM, _TRM = "HierarchicalReasoningModel_ACTV1", "TinyRecursiveReasoningModel_ACTV1"
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _of_reference(values: Mapping[str, Any]) -> dict[str, Any]:
    """HrmConfig's keys for those of an arch file; what is not among them is left as it is.

    ``forward_dtype`` and ``batch_size`` are no part of the model here: it computes in the dtype of its weights, or under
    autocast. HRM's code has no puzzle_emb_len, mlp_t or no_ACT_continue.
    """
    values = dict(values)
    name = values.pop("name", None)
    if name is None:
        trm = values.get("H_layers") == 0 or bool(
            values.keys() & {"puzzle_emb_len", "mlp_t", "no_ACT_continue"}
        )
    else:
        kind = str(name).rpartition("@")[2]
        if kind not in (_HRM, _TRM) or (kind == _TRM and _variant(str(name)) not in ("", "trm")):
            raise ValueError(f"HrmConfig: name is {name!r}; only {_HRM} and {_TRM} (trm) are served")
        trm = kind == _TRM
    for key in ("vocab_size", "seq_len"):
        if key not in values:
            raise ValueError(f"HrmConfig: {key} is missing: an arch file leaves it to the data")
    values.pop("batch_size", None)
    if values.pop("causal", False):
        raise ValueError("HrmConfig: causal is true; the cells attend each other both ways here")
    dtype = values.pop("forward_dtype", "bfloat16")
    if dtype not in _DTYPES:
        raise ValueError(f"HrmConfig: forward_dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    loss = values.pop("loss", None)
    if isinstance(loss, Mapping):
        loss = loss.get("loss_type", "stablemax_cross_entropy")
    if loss is not None:
        values["loss"] = str(loss).removesuffix("_cross_entropy")
    for theirs, ours in _RENAMED.items():
        if theirs in values:
            if ours in values:
                raise ValueError(f"HrmConfig: {theirs} and {ours} are the same; give one")
            values[ours] = values.pop(theirs)
    values.setdefault("puzzle_emb_dim", 0)  # their default
    continues = not values.pop("no_ACT_continue", trm)
    if trm:
        length = values.pop("puzzle_emb_len", 16)
        values |= {
            "shared_stack": True,
            "full_last_cycle": True,
            "q_continue": continues,
            "H_layers": values.get("L_layers", HrmConfig.L_layers),  # theirs is not used
            "puzzle_emb_len": length or None,  # 0: as many as the vector needs
        }
    else:
        for key in ("puzzle_emb_len", "mlp_t"):
            if values.pop(key, None):
                raise ValueError(f"HrmConfig: {key} is given for {_HRM}, whose own code leaves it unread")
        if not continues:
            raise ValueError(
                f"HrmConfig: no_ACT_continue is given for {_HRM}, whose own code leaves it unread"
            )
    expansion = values.pop("expansion", None)
    if expansion is not None:
        if not isinstance(expansion, int | float) or not expansion > 0:
            raise ValueError(f"HrmConfig: expansion is {expansion!r}; it must be a positive number")
        values.setdefault(
            "intermediate_size", inner_width(expansion, values.get("hidden_size", HrmConfig.hidden_size))
        )
        if values.get("mlp_t"):
            sizes = {
                key: values.get(key) for key in ("seq_len", "puzzle_emb_dim", "puzzle_emb_len", "hidden_size")
            }
            shape = HrmConfig(**{key: value for key, value in sizes.items() if value is not None})
            values.setdefault("mlp_t_size", inner_width(expansion, shape.seq_len + shape.puzzle_len))
    return values


def _variant(name: str) -> str:
    """ "trm" of recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1: other files hold other models."""
    return name.rpartition("@")[0].rpartition(".")[2]
