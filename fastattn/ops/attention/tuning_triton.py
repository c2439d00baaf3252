"""The tunable parameters of the Triton attention kernels, and the configurations that fit a device."""

from ...runtime.tuning import Parameter, declare

_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
SCORED = ("dtype", "score", "head_dim", "value_dim", "mask")
LENGTHS = ("batch", "heads", "kv_heads", "q_length", "k_length")


def _padded(key, name: str) -> int:
    return max(16, 1 << (key[name] - 1).bit_length())


def _tile_bytes(key, rows: int, *names: str) -> int:
    return rows * sum(_padded(key, name) for name in names) * _WIDTHS[key["dtype"]]


def _reads_shared(key, target) -> bool:
    """Whether products read their operands from shared memory: on Hopper and later, and for float32 as three TF32 products."""
    return key["dtype"] == "float32" or target.arch.startswith(("sm_9", "sm_10"))


def _pair_bytes(values, key, target) -> int:
    """On AMD, shared memory for the tiles of a bias or mask in flight. On other devices the rest of the estimate covers them."""
    if key["mask"] != "dense" or target.kind != "hip":
        return 0
    return values["block_m"] * values["block_n"] * _WIDTHS[key["dtype"]] * max(1, values["num_stages"] - 1)


def forward_bytes(values, key, target) -> int:
    """Shared memory: the key and value tiles in flight, the weights, and the query tile if products read it from there."""
    one = _tile_bytes(key, values["block_n"], "head_dim", "value_dim")
    flying, queries = one * values["num_stages"], _tile_bytes(key, values["block_m"], "head_dim")
    if _reads_shared(key, target):
        # from 64 rows on, Hopper's three TF32 products hold the query tile as two tiles, of upper and of lower bits
        split = (
            key["dtype"] == "float32"
            and target.arch.startswith(("sm_9", "sm_10"))
            and values["block_m"] >= 64
        )
        flying += queries * (1 + split)
    elif target.kind == "cuda":
        # the query tile passes through on its way to registers, while the first key tiles are there
        flying = max(flying, queries + one * max(1, values["num_stages"] - 1))
    flying += _pair_bytes(values, key, target)
    return flying + values["block_m"] * values["block_n"] * _WIDTHS[key["dtype"]]


def forward_fits(values, key, target) -> str | None:
    if target.kind == "cpu":
        return None
    needed = forward_bytes(values, key, target)
    if needed > target.shared:
        return f"needs {needed >> 10} KiB of shared memory, the device has {target.shared >> 10}"
    # float32 accumulator and scores of a program, in 32-bit registers of its threads
    registers = (
        values["block_m"] * (_padded(key, "value_dim") + values["block_n"]) // (32 * values["num_warps"])
    )
    return f"needs about {registers} registers a thread" if registers > 224 else None


def _largest(shapes, key, target, fits):
    """The first shape that fits the device; the last shape if none fits."""
    names = ("block_m", "block_n", "num_warps", "num_stages")
    for shape in shapes:
        values = dict(zip(names, shape, strict=True))
        if fits(values, key, target) is None:
            return values
    return values


def forward_default(key, target):
    if target.kind == "cpu":  # the interpreter: several tiles even at test sizes
        return {"block_m": 32, "block_n": 16}
    if not key:
        return {}
    shapes = ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2))
    small = ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1))
    # float32 products unroll to three times the code: large tiles take half a minute to compile
    return _largest(small if key["dtype"] == "float32" else shapes + small, key, target, forward_fits)


def declare_forward(op: str, fits=forward_fits, default=forward_default) -> None:
    """Declare the tile sizes of a forward kernel that is built like attention's."""
    declare(
        op,
        "triton",
        parameters={
            "block_m": Parameter(64, (16, 32, 64, 128, 256)),
            "block_n": Parameter(32, (16, 32, 64, 128, 256)),
            "num_warps": Parameter(4, (1, 2, 4, 8)),
            "num_stages": Parameter(2, (1, 2, 3, 4)),
        },
        structural=SCORED,
        sizes=LENGTHS,
        feasible=fits,
        default=default,
    )


declare_forward("attention")


def _decode_fits(values, key, target) -> str | None:
    return forward_fits(values | {"block_m": 64}, key, target)


def _decode_default(key, target):
    if target.kind == "cpu":
        return {"block_n": 16, "keys_per_split": 32}
    if not key:
        return {}
    for block_n, stages in ((128, 3), (64, 3), (64, 2), (32, 2), (16, 1)):
        values = {"block_n": block_n, "num_stages": stages, "num_warps": 4}
        if _decode_fits(values, key, target) is None:
            break
    return values


declare(
    "attention_decode",
    "triton",
    parameters={
        "block_n": Parameter(32, (16, 32, 64, 128, 256)),
        "keys_per_split": Parameter(256, (32, 128, 256, 512, 1024, 4096)),
        "waves": Parameter(2, (1, 2, 4)),
        "num_warps": Parameter(4, (1, 2, 4, 8)),
        "num_stages": Parameter(2, (1, 2, 3, 4)),
    },
    structural=SCORED,
    sizes=LENGTHS,
    feasible=_decode_fits,
    default=_decode_default,
)


def backward_bytes(values, key, target) -> int:
    """Shared memory of the larger kernel: the tiles in flight of one side, and the other side's tile if products read it from there."""
    m, n, names = values["block_m"], values["block_n"], ("head_dim", "value_dim")
    flying = _tile_bytes(key, max(m, n), *names) * values["num_stages"]
    if _reads_shared(key, target):
        flying += _tile_bytes(key, max(m, n), *names)
    elif target.kind == "cuda":  # as in the forward, for the program's own tile
        passing = _tile_bytes(key, m, *names) * max(1, values["num_stages"] - 1)
        flying = max(flying, _tile_bytes(key, n, *names) + passing)
    return flying + 2 * m * n * _WIDTHS[key["dtype"]] + _pair_bytes(values, key, target)


def backward_fits(values, key, target) -> str | None:
    if target.kind == "cpu":
        return None
    needed = backward_bytes(values, key, target)
    if needed > target.shared:
        return f"needs {needed >> 10} KiB of shared memory, the device has {target.shared >> 10}"
    rows = max(values["block_m"], values["block_n"])
    held = (
        rows * (_padded(key, "head_dim") + _padded(key, "value_dim"))
        + 2 * values["block_m"] * values["block_n"]
    )
    registers = held // (32 * values["num_warps"])
    return f"needs about {registers} registers a thread" if registers > 224 else None


def backward_default(key, target, fits=backward_fits):
    if target.kind == "cpu":
        return {"block_m": 16, "block_n": 32}
    if not key:
        return {}
    shapes = ((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1))
    small = ((32, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1))
    return _largest(small if key["dtype"] == "float32" else shapes + small, key, target, fits)


def declare_backward(op: str, fits=backward_fits, default=backward_default) -> None:
    """Declare the tile sizes of two backward kernels that are built like attention's."""
    declare(
        op,
        "triton",
        parameters={
            "block_m": Parameter(32, (16, 32, 64, 128)),
            "block_n": Parameter(32, (16, 32, 64, 128)),
            "num_warps": Parameter(4, (1, 2, 4, 8)),
            "num_stages": Parameter(1, (1, 2, 3, 4)),
        },
        structural=SCORED,
        sizes=LENGTHS,
        feasible=fits,
        default=default,
    )


declare_backward("attention_backward")
