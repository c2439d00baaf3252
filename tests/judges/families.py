"""Every transformers model type that calls its AttentionInterface, as a tiny model with random weights: "eager" against "fastattn"
and against `accelerate`, without a mask, with padding on each side, with the gradients of every parameter, and in training.

    python -P tests/judges/families.py                    all types, compared with families.json: 10 to 20 minutes
    python -P tests/judges/families.py llama bert         these
    python -P tests/judges/families.py --jobs 2 --write   all, and their verdicts to families.json

A line a type: its verdict on "fastattn", in training, and with `accelerate`. A verdict begins with a word: equal | refused | wrong |
crashed; and where nothing could be judged: not built (no class, or a package is missing) | not run (the model, or what it is given
here, fails with "eager" too) | no call (of the interface, in a model this small). Each type has a process of its own, so that a crash
is a verdict, and a limit of processor time.
"""

import argparse
import contextlib
import copy
import importlib.util
import inspect
import io
import json
import os
import re
import resource
import select
import signal
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers as hf  # noqa: E402
from transformers.models.auto.configuration_auto import (  # noqa: E402
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from fastattn.integrations import _class_tables, _replaced  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import tiny_models  # noqa: E402

FROZEN = Path(__file__).with_name("families.json")
SECONDS = 15  # of processor time for a type
PARAMETERS = 1e8  # at most
# Differences over the largest number of a tensor. A wrong mask gives 0.01 and more. The worst of all types is mobilebert's 0.0002, whose
# 24 layers without norms multiply roundings: there "sdpa" is off by as much.
# A gradient is compared with its own largest number, or with a ten-thousandth of the largest of all, where it is only roundings.
OUTPUTS, GRADIENTS, FLOOR = 5e-4, 2e-2, 1e-4
SKIPPED = (
    "past_key_values",
    "cache",
    "attentions",
    "hidden_states",
    "decoder_attentions",
    "cross_attentions",
    "loss",
)

calls = 0  # of the attention function


def counted(function):
    def attention(*args, **kwargs):
        global calls
        calls += 1
        return function(*args, **kwargs)

    return attention


def floats(out, into=None, name=""):
    """The floating tensors of a model's output, by name."""
    into = {} if into is None else into
    if isinstance(out, torch.Tensor):
        if out.is_floating_point():
            into[name] = out
    elif hasattr(out, "items"):
        for key, value in out.items():
            if key not in SKIPPED:
                floats(value, into, f"{name}.{key}")
    elif isinstance(out, (list, tuple)):
        for i, value in enumerate(out):
            floats(value, into, f"{name}[{i}]")
    return into


def run(model, given, gradients=False):
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        return floats(model(**given))


def error(actual, expected, rows=None):
    """The largest difference over the largest number, of the worst tensor; where the expected number is finite."""
    worst = 0.0
    for name, x in actual.items():
        y = expected.get(name)
        if y is None or x.shape != y.shape:
            return float("inf")
        if rows is not None and x.dim() >= 2 and x.shape[:2] == rows.shape:
            x, y = x[rows], y[rows]
        x, y = x[torch.isfinite(y)], y[torch.isfinite(y)]
        if x.numel():
            off = float((x - y).abs().max() / (y.abs().max() + 1e-20))
            worst = max(worst, off if off == off else float("inf"))
    return worst


def brief(e):
    """An error's name and first line, without numbers and shapes that other models of a type would have."""
    text = (str(e).strip().splitlines() or [""])[0]
    return f"{type(e).__name__}: {text[:160]}"


def judged(e):
    """The verdict of an error of ours: refused, if it says so by our name."""
    ours = isinstance(e, (NotImplementedError, ValueError, KeyError)) and "fastattn" in str(e)
    return f"{'refused' if ours else 'crashed'}: {brief(e)}"


def gradients(model, given):
    model.zero_grad()
    generator = torch.Generator().manual_seed(5)
    weighed = [
        (v.float() * torch.randn(v.shape, generator=generator)).sum()
        for v in run(model, given, True).values()
        if v.requires_grad and bool(torch.isfinite(v).all())
    ]
    sum(weighed).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.numel()}


def gradient_error(actual, expected):
    largest = max(float(g.abs().max()) for g in expected.values())
    if actual.keys() != expected.keys():
        return float("inf")
    return max(
        float((actual[n] - g).abs().max()) / (float(g.abs().max()) + FLOOR * largest + 1e-30)
        for n, g in expected.items()
    )


def examine(model_type, layers=2):
    """[verdict, in training, accelerated] of a type."""
    names = tiny_models.classes(model_type)
    built, why = False, ""
    for level in tiny_models.LEVELS:
        try:
            config = tiny_models.config(model_type, level, layers)
        except ImportError as e:
            return [f"not built: {brief(e)}", "", ""]
        except Exception as e:
            why = why or brief(e)
            continue
        for name in names:
            kind = getattr(hf, name, None)
            if not hasattr(kind, "_from_config"):
                continue
            try:
                eager = build(kind, config)
            except ImportError as e:
                return [f"not built: {brief(e)}", "", ""]
            except Exception as e:
                why = why or brief(e)
                continue
            if eager is None:
                why = why or "it is large"
                continue
            built = True
            for given, expected in runs(eager, config):
                found = [compare(kind, config, eager, given, expected), "", ""]
                if found[0] == "no call" and layers == 2:
                    return examine(model_type, 8)  # hybrids have their full attention late
                if found[0].startswith("equal"):
                    found[1:] = in_training(kind, config, given), accelerated(eager, given, expected)
                return found
    return ["not run: with eager" if built else f"not built: {why}", "", ""]


def build(kind, config):
    """The model with eager attention; None if it is large."""
    with torch.device("meta"), contextlib.suppress(Exception):
        meta = kind._from_config(copy.deepcopy(config))
        if sum(p.numel() for p in meta.parameters()) > PARAMETERS:
            return None
    return kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()


def runs(eager, config):
    """(arguments, eager's outputs) that the model takes, and gives again when asked again."""
    for gentle in (False, True):
        tiny_models.randomise(eager, gentle)
        for kind in tiny_models.KINDS:
            try:
                given = tiny_models.inputs(eager, config, kind)
                if given is None:
                    continue
                expected = run(eager, given)
                finite = expected and all(bool(torch.isfinite(v).any()) for v in expected.values())
                if finite and error(run(eager, given), expected) <= 1e-6:
                    yield given, expected
            except Exception:  # another kind of input
                continue


def fast_model(kind, config, eager):
    fast = kind._from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
    fast.load_state_dict(eager.state_dict(), strict=False)
    for (_, b), (_, c) in zip(eager.named_buffers(), fast.named_buffers(), strict=True):
        if b.shape == c.shape:
            c.copy_(b)
    return fast


def compare(kind, config, eager, given, expected):
    global calls
    try:
        fast = fast_model(kind, config, eager)
        calls = 0
        off = error(run(fast, given), expected)
    except Exception as e:
        return judged(e)
    if calls == 0:
        return "no call"
    if not off < OUTPUTS:
        return f"wrong: without a mask by {off:.0e}"
    takes = inspect.signature(fast.forward).parameters
    padded = []
    if "input_ids" in given and "attention_mask" in takes:
        for side in ("right", "left"):
            keep = torch.ones(2, tiny_models.TOKENS, dtype=torch.long)
            keep[1, slice(-4, None) if side == "right" else slice(0, 4)] = 0
            more = {**given, "attention_mask": keep}
            try:
                wanted = run(eager, more)
            except Exception:  # eager does not take it
                continue
            try:
                off = error(run(fast, more), wanted, keep.bool())
            except Exception as e:
                return f"{judged(e)} ({side} padding)"
            if not off < OUTPUTS:
                return f"wrong: with {side} padding by {off:.0e}"
            padded.append(side)
    try:
        true = gradients(eager, given)
    except Exception:  # eager has none
        return " ".join(["equal:", *padded]).rstrip(":")
    try:
        off = gradient_error(gradients(fast, given), true)
    except Exception as e:
        return f"{judged(e)} (gradients)"
    if not off < GRADIENTS:
        return f"wrong: gradients by {off:.0e}"
    return " ".join(["equal:", *padded, "gradients"])


def in_training(kind, config, given):
    """Forward and backward in training, with the dropout that the type has by default."""
    try:
        fast = kind._from_config(copy.deepcopy(config), attn_implementation="fastattn").train()
        tiny_models.randomise(fast, True)
        found = gradients(fast, given)
    except Exception as e:
        try:
            gradients(kind._from_config(copy.deepcopy(config), attn_implementation="eager").train(), given)
        except Exception:
            return "not run: nor eager"
        return judged(e)
    return "runs" if all(bool(g.isfinite().all()) for g in found.values()) else "wrong: not finite"


def accelerated(eager, given, expected):
    """Outputs and gradients of the eager model with `accelerate`, and its outputs after `undo`."""
    try:
        true = gradients(eager, given)
    except Exception:
        true = {}
    try:
        with integration.accelerate(eager) as accelerated:
            off = error(run(eager, given), expected)
            if not off < OUTPUTS:
                return f"wrong: by {off:.0e}"
            off = gradient_error(gradients(eager, given), true) if true else 0.0
            if not off < GRADIENTS:
                return f"wrong: gradients by {off:.0e}"
    except Exception as e:
        return judged(e)
    again = run(eager, given)
    if not all(torch.equal(again[n].nan_to_num(), v.nan_to_num()) for n, v in expected.items()):
        return "wrong: after undo"
    return " ".join(["equal:", *(f"{kind} {count}" for kind, count in accelerated.replaced.items())])


# --- processes -------------------------------------------------------------------------------------------------------


def model_types():
    """The types of the folders that call ALL_ATTENTION_FUNCTIONS or choose attention from a table of classes."""
    root = Path(hf.__file__).parent / "models"
    calling = {
        folder.name
        for folder in root.iterdir()
        if any(
            re.search(r"ALL_ATTENTION_FUNCTIONS|ATTENTION_CLASSES", p.read_text(encoding="utf-8"))
            for p in folder.glob("modeling_*.py")
        )
    }
    types = [t for t in sorted(CONFIG_MAPPING_NAMES) if model_type_to_module_name(t) in calling]
    return [t for t in types if tiny_models.classes(t)]  # the others are parts of models


def warm():
    """Import what every child would import again."""
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for name in (
        "BertModel",
        "T5Model",
        "WhisperModel",
        "CLIPModel",
        "LlavaForConditionalGeneration",
        "Wav2Vec2Model",
    ):
        getattr(hf, name, None)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**small))
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        keep = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
        model(torch.ones(2, 8, dtype=torch.long), attention_mask=keep).logits.sum().backward()


def start(model_type):
    """(process id, where its verdict can be read) of a child that examines the type."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.close(reading)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    signal.alarm(20 * SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = examine(model_type)
    except BaseException as e:
        found = [f"crashed: the judge, {brief(e)}", "", ""]
    os.write(writing, json.dumps(found).encode())
    os._exit(0)


def ended(pid, reading):
    """[verdict, in training, accelerated] of a child that has closed its end."""
    data = b""
    while chunk := os.read(reading, 1 << 16):
        data += chunk
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if data:
        return json.loads(data)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if killed in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL):
        return ["not run: it takes long", "", ""]
    return [f"crashed: signal {killed}" if killed else f"crashed: status {os.WEXITSTATUS(status)}", "", ""]


def examined(types, jobs=1):
    """(type, its three verdicts, seconds), in the order in which they end."""
    waiting, running = list(types), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type = waiting.pop(0)
            pid, reading = start(model_type)
            running[reading] = model_type, pid, time.time()
        for reading in select.select(list(running), [], [])[0]:
            model_type, pid, since = running.pop(reading)
            yield model_type, ended(pid, reading), time.time() - since


def setup():
    torch.set_num_threads(1)
    _replaced.FEWEST_NUMBERS = _replaced.FEWEST_PRODUCTS = (
        0  # small models would run their own forwards, which are faster there
    )
    # of the interface, and of the classes in tables of their own
    _class_tables.scaled_dot_product_attention = counted(_class_tables.scaled_dot_product_attention)
    integration.register()
    integration.register_as("fastattn", counted(integration.attention_forward), "families")
    warm()


def same(found, frozen):
    """Whether two verdicts are one: reasons why nothing could be judged differ with the packages that are installed."""

    def key(verdict):
        return verdict.split(":")[0] if verdict.startswith("not ") else re.sub(r"by \S+", "", verdict)

    return [key(v) for v in found] == [key(v) for v in frozen]


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("types", nargs="*", help="model types; default all")
    arguments.add_argument("--jobs", type=int, default=1, help="processes at a time")
    arguments.add_argument("--write", action="store_true", help="write the verdicts to families.json")
    arguments.add_argument("--missing", action="store_true", help="the types that families.json has not")
    given = arguments.parse_args()
    assert (
        importlib.util.find_spec("accelerate") is None
        or "fastattn" not in importlib.util.find_spec("accelerate").origin
    )
    setup()
    frozen = json.loads(FROZEN.read_text()) if FROZEN.exists() else {"verdicts": {}}
    verdicts, seconds = dict(frozen["verdicts"]), dict(frozen.get("seconds", {}))
    types = given.types or [t for t in model_types() if not (given.missing and t in verdicts)]
    changed = 0
    for model_type, found, took in examined(types, given.jobs):
        before = frozen["verdicts"].get(model_type)
        mark = "" if before is not None and same(found, before) else f"   CHANGED from {before}"
        changed += bool(mark)
        print(f"{model_type}: {' | '.join(filter(None, found))} ({took:.1f} s){mark}", flush=True)
        verdicts[model_type], seconds[model_type] = found, round(took, 1)
        if given.write:  # each time: a sweep that is stopped goes on with the types that are missing
            written(verdicts, seconds)
    return int(changed > 0 and not given.write)


def written(verdicts, seconds):
    """families.json: a line a type, and how long each took."""
    lines = {"verdicts": verdicts, "seconds": seconds}
    parts = [
        f'  "{name}": {{\n'
        + ",\n".join(f"    {json.dumps(t)}: {json.dumps(v)}" for t, v in sorted(table.items()))
        + "\n  }"
        for name, table in lines.items()
    ]
    FROZEN.write_text(
        "{\n" + ",\n".join([f'  "transformers": {json.dumps(hf.__version__)}', *parts]) + "\n}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
