"""torch.ops.fastattn's ops, as compiled graphs and exported programs call them: a hostile call gives a clear error or an
ordinary result, whatever a public function would have refused before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn  # noqa: F401  registers the ops
from fastattn.runtime.registry import OPS

sys.path.insert(0, str(Path(__file__).parent))
import hostile

PROGRAM = Path(__file__).with_name("hostile.py")


def _run(seed: int, first: int, last: int) -> tuple[list[str], int]:
    """(the program's lines, its exit status)."""
    command = [sys.executable, str(PROGRAM), str(seed), str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines() or [done.stderr], done.returncode


def _complaints(seed: int, first: int, last: int) -> list[str]:
    """What is wrong with calls first .. last; a call that ends its process is one, and the next ones go on."""
    found: list[str] = []
    while first < last and len(found) < 20:
        lines, status = _run(seed, first, last)
        for before, line in zip([""] + lines, lines, strict=False):
            if line.startswith("wrong "):
                found.append(f"{before}\n    {line.removeprefix('wrong ')}")
        if lines[-1] == "done":
            break
        found.append(f"{lines[-1]}\n    ended the process with status {status}")
        number = lines[-1].split(" ", 1)[0]
        if not number.isdecimal():
            break
        first = int(number) + 1
    return found


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_hostile_call_is_refused_or_served(seed):
    complaints = _complaints(seed, 0, 3000 if seed == 1 else 30000)
    assert not complaints, "\n".join(complaints)


def test_results_of_every_op_are_compared():
    """What a backend keeps for itself is not, nor what is written to."""
    for name, op in OPS.items():
        if not op.writes and not name.endswith("_backward"):
            assert 0 in hostile.followed(name), name
    assert [hostile.followed(n) for n in ("attention", "attention_backward", "swiglu_backward")] == [
        (0, 1),
        (),
        (0,),
    ]


def _refused():
    """(op, arguments less the backend, error, message): what a public function would refuse, past it."""
    q, wide = torch.ones(1, 2, 4, 8), torch.ones(1, 9, 65)
    mask = (False, -1, -1, None, None, None, 4, 4, None, None, None, None, 1, 1, 1, 1)
    out, lse = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4)
    h, codes, target = torch.ones(3, 8), torch.tensor([0, 1, 2, 9]), torch.tensor([0, 3, 4])
    sinkhorn = (None, None, None, 0.1, 3, False)
    yield "sinkhorn", (wide, *sinkhorn), ValueError, r"G in \[1, 63\], given G = 65"
    yield "sinkhorn_backward", (wide, wide, *sinkhorn), ValueError, r"G in \[1, 63\], given G = 65"
    yield (
        "sinkhorn",
        (wide[..., :4], None, None, None, 0.1, 10**9, False),
        ValueError,
        "iterations must be at most 10000",
    )
    prefix = (wide[..., :4], None, None, torch.tensor([3]))
    yield "sinkhorn", (*prefix, 0.1, 3, False), ValueError, "prefix_lengths needs causal to be True"
    cuts = torch.tensor([0, 7, 3])
    yield (
        "sinkhorn",
        (wide[..., :4], None, cuts, None, 0.1, 3, False),
        ValueError,
        "cu_seqlens must start at 0, not decrease",
    )
    cuts, lengths = torch.tensor([0, 3, 5]), torch.tensor([3, 4])
    packed = (wide[..., :4], lengths, cuts, None, 0.1, 3, False)
    yield (
        "sinkhorn",
        packed,
        ValueError,
        r"lengths\[1\] must lie in \[0, 2\], the length of its document, given 4",
    )
    cuts, taps = torch.tensor([0, 4, 3]), torch.ones(8, 3)
    yield "causal_conv1d", (wide, taps, None, None, None, True), ValueError, "with x's 65 channels"
    x = wide[..., :8]
    yield (
        "causal_conv1d",
        (x, taps, None, None, cuts, True),
        ValueError,
        "cu_seqlens must start at 0, not decr",
    )
    yield (
        "causal_conv1d_backward",
        (x, x, x, taps, None, None, None, True, 0),
        ValueError,
        r"grad_state must have shape \(1x2x8\)",
    )
    yield "linear_scan", (x, wide, None, None, False, False), ValueError, "a must broadcast to b's shape"
    yield "linear_scan", (x, x, None, cuts, False, False), ValueError, "cu_seqlens must start at 0, not decr"
    yield (
        "linear_scan_backward",
        (wide, x, None, x, None, False, False, 3),
        ValueError,
        "grad_out must have shape",
    )
    selective = (x, x, torch.ones(8, 3), x[..., :3], x[..., :3], None, None, None, None)
    yield "selective_scan", (x, *selective[:2], *selective[3:], None, True), ValueError, "A must"
    yield "selective_scan", (*selective, cuts, True), ValueError, "cu_seqlens must start at 0, not decr"
    yield (
        "selective_scan_backward",
        (x, None, *selective, torch.ones(1, 1, 8, 3), None, True),
        ValueError,
        r"checkpoints must have shape \(1x1x3x8\)",
    )
    plain = (None, None, 0, None)
    for score in (-1, 3, 2**40):
        message = rf"score must be one of 0 \(softmax\), 1 \(sigmoid\), 2 \(softplus\), given {score}"
        yield "attention", (q, q, q, None, None, score, 1.0, *plain, *mask), ValueError, message
    softmax = (None, None, 0, 1.0)
    yield "attention", (q, q[:, :, :3], q, *softmax, *plain, *mask), ValueError, "v must have k's batch"
    short, rng = torch.ones(3), torch.tensor([1, 2, 3])
    yield (
        "attention",
        (q, q, q, None, short, 0, 1.0, *plain, *mask),
        ValueError,
        "sink must be float32 of shape",
    )
    yield (
        "attention",
        (q, q, q, *softmax, None, -1.0, 0, None, *mask),
        ValueError,
        "softcap must be a finite number",
    )
    yield (
        "attention",
        (q, q, q, *softmax, None, None, 65537, rng[:2], *mask),
        ValueError,
        "dropped must lie in",
    )
    yield (
        "attention",
        (q, q, q, *softmax, None, None, 1, rng, *mask),
        ValueError,
        "rng must be int64 of shape",
    )
    yield "attention", (q, q, q, *softmax, None, None, 1, None, *mask), TypeError, "rng must be a tensor"
    lengths = torch.tensor([4])
    yield (
        "attention",
        (q, q, q, *softmax, *plain, *mask[:8], lengths, *mask[9:]),
        TypeError,
        "key_lengths must be int32",
    )
    state = lse.new_empty(*lse.shape, 2)
    backward = (q, q, q, None, None, out, lse, state, q.new_empty(0), 0, 1.0, *plain, *mask, 0)
    yield "attention_backward", (out[:, :1], None, *backward), ValueError, "grad_out must have shape"
    wrong = (*backward[:6], lse[:, :1], *backward[7:])
    yield "attention_backward", (out, None, *wrong), ValueError, "lse must have shape"
    wrong = (*backward[:7], state[..., :1], *backward[8:])
    yield "attention_backward", (out, None, *wrong), ValueError, "state must have shape"
    wrong = (*backward[:8], out, *backward[9:])
    yield "attention_backward", (out, None, *wrong), ValueError, "residual must have shape"
    statistics = lse.new_ones(*lse.shape, 3)
    lssar = (out, lse, q, q, q, out, statistics, 3.0, *mask)
    yield "softplus_attention_backward", lssar, ValueError, "grad_lse must have shape"
    groups = torch.ones(1, 4, dtype=torch.int64)
    causal = (True, *mask[1:])
    grouped = (out, lse[:, :1], q, q, q, out, state, groups, groups, 2, 1.0, *causal)
    yield "grouped_attention_backward", grouped, ValueError, "grad_lse must have shape"
    gates = (torch.ones(1, 4, 3), torch.tensor(1.0))
    gated = (out, lse[:, :1], q, q, q, *gates, out, state, 2, 0, 1.0, *causal)
    yield "gated_attention_backward", gated, ValueError, "grad_lse must have shape"
    yield "vq_argmax", (h, h, codes, None), ValueError, r"codes must lie in \[0, 3\), given 9 at position 3"
    loss = (torch.ones(()), h, h, codes[:3], None, None, target, torch.ones(2, 3), -100, "mean", 3)
    yield "vq_cross_entropy_backward", loss, ValueError, r"target must lie in \[0, 3\) or -100, given 3"
    yield (
        "linear_cross_entropy",
        (h, h, None, target, None, None, 2, 0.0, 0.0, 0.0, 4, "mean", False, 0),
        ValueError,
        "transform must be",
    )
    yield (
        "linear_cross_entropy",
        (h, h, None, codes[:3], None, None, 0, 0.0, 0.0, 0.0, 4, "mean", False, 4),
        ValueError,
        "gradients must be",
    )
    yield (
        "linear_cross_entropy",
        (h, h, None, h, None, None, 0, 0.0, 0.0, 0.0, 4, "mean", False, 0),
        ValueError,
        r"target must have shape \(3x3\)",
    )
    yield (
        "linear_cross_entropy",
        (h, h, None, codes[:3], None, h[0], 0, 0.0, 0.0, 2.0, 4, "mean", False, 0),
        ValueError,
        "class_weight must have shape",
    )
    yield (
        "linear_cross_entropy",
        (h, h, None, codes[:3], None, None, 0, 0.0, 0.0, 2.0, 4, "mean", False, 0),
        ValueError,
        "label_smoothing must lie",
    )
    yield "rms_norm_backward", (h, None, h, None, torch.ones(2), 0.0, 0.0), ValueError, "rstd must have shape"
    yield "nearest_codes", (h, h[:, :5]), ValueError, "x must have a last dim of 5"


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(_refused())],
)
def test_what_a_public_function_refuses_is_refused_past_it(op, arguments, error, message):
    call = getattr(torch.ops.fastattn, op)
    for backend in ("", "cpu", "reference"):
        with pytest.raises(error, match=rf"^fastattn\.{op}: .*{message}"):
            call(*arguments, backend)


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_what_has_no_contents_is_checked_alike(device):
    """As where a graph is traced."""
    scores, q = torch.ones(1, 9, 65, device=device), torch.ones(1, 2, 4, 8, device=device)
    with pytest.raises(ValueError, match="given G = 65"):
        torch.ops.fastattn.sinkhorn(scores, None, None, None, 0.1, 3, False, "")
    mask = (False, -1, -1, None, None, None, 4, 4, None, None, None, None, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="score must be one of"):
        torch.ops.fastattn.attention(q, q, q, None, None, 3, 1.0, None, None, 0, None, *mask, "")


def test_a_backend_that_is_not_there_is_named():
    with pytest.raises(
        NotImplementedError, match="there is no fpga backend; there are: cpu, triton, reference"
    ):
        torch.ops.fastattn.swiglu(torch.ones(2, 4), "fpga")


def test_results_of_ops_without_gradients_need_none():
    h = torch.ones(3, 8, requires_grad=True)
    assert not torch.ops.fastattn.nearest_codes(h, h, "").requires_grad
