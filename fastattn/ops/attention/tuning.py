"""The tunable parameters of the attention kernels, and their defaults where no table has an entry."""

from ...runtime import native
from ...runtime.tuning import Parameter, declare
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

_DEFAULT = native.defaults("attention_forward")
_ROWS = (24, 48, 72, 96, 144, 192)
_KEYS = (32, 64, 128, 192, 256)
_FEW = 96  # rows or keys of a tile, where larger tiles would leave cores without work
# bytes of one step of a panel in whole cache lines, from kPanel of src/cpu/tile.h
_PANEL_BYTES = {"avx2": 64, "avx512": 256, "avx512bf16": 256}
_L1, _L2 = 32 << 10, 512 << 10  # cache sizes where the machine does not report them


def _steps(key, target) -> int:
    """The number of keys or rows in one 32-bit word: two bf16 where they are multiplied in pairs."""
    return 2 if key.get("dtype") == "bfloat16" and target.arch == "avx512bf16" else 1


def _largest(allowed: tuple[int, ...], limit: float) -> int:
    return max((size for size in allowed if size <= limit), default=allowed[0])


def _forward_tiles(key, target) -> dict[str, int]:
    """block_q: rows that use a panel of keys while it is in the first-level cache. block_k: keys whose panel of values fits there.

    Every core gets four tiles or more, so that waiting for the last one costs little. No result depends on the rows of a tile.
    """
    if target.arch not in _PANEL_BYTES:
        return {}
    rows = _ROWS[-1]
    if key["batch"] * key["heads"] * -(-key["q_length"] // rows) < 4 * target.units:
        rows = _FEW
    steps = (target.l1 or _L1) // _PANEL_BYTES[target.arch]
    return {"block_q": rows, "block_k": _largest((64, 128, 192, 256), steps * _steps(key, target))}


def _backward_tiles(key, target) -> dict[str, int]:
    """Square tiles that take half of the second-level cache: the weights and dS for products over rows, and dS for products over keys.

    With fewer than two heads for each core, the keys of a head are divided into slices, which small tiles make even. Lengths are not
    used: the order in which slices are summed would depend on the other documents of a packed batch.
    """
    element = 6 if _steps(key, target) == 2 else 8  # bytes of a pair: three bf16, or two float32
    side = ((target.l2 or _L2) / 2 / element) ** 0.5
    few = key["batch"] * key["kv_heads"] < 2 * target.units
    keys = min(side, _FEW) if few else side
    return {"block_q": _largest(_ROWS, side), "block_k": _largest((32, 64, 96, 128, 192), keys)}


# The kernel rounds block_q up to its register rows and block_k to its panel.
declare(
    "attention",
    "cpu",
    parameters={
        "block_q": Parameter(_DEFAULT["block_q"], _ROWS),
        "block_k": Parameter(_DEFAULT["block_k"], _KEYS),
        "pack_kib": Parameter(_DEFAULT["pack_kib"], (4096, 16384, 65536)),
        "decode_rows": Parameter(_DEFAULT["decode_rows"], (0, 4, 8, 16)),
        "chunk_k": Parameter(_DEFAULT["chunk_k"], (64, 256, 512, 1024, 2048)),
    },
    structural=("dtype", "score", "head_dim", "value_dim"),
    sizes=("batch", "heads", "kv_heads", "q_length", "k_length"),
    default=_forward_tiles,
)

declare(
    "attention_backward",
    "cpu",
    parameters={
        "block_q": Parameter(_DEFAULT["block_q"], _ROWS),
        "block_k": Parameter(96, (32, 64, 96, 128, 192, 256)),
        "pack_kib": Parameter(_DEFAULT["pack_kib"], (4096, 16384, 65536)),
    },
    structural=("dtype", "score", "head_dim", "value_dim"),
    sizes=("batch", "heads", "kv_heads", "q_length", "k_length"),
    default=_backward_tiles,
)
