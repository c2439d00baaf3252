"""`accelerate`: an unmodified transformers model whose norms, MLPs, rotary embeddings, attention, linear-time layers and loss run on fastattn."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nn.plain import is_untouched
from . import _linear_time, _loss, _recurrent, _replaced, _rotary
from ._replaced import HALF, Left, Replaced

_OWN = "_fastattn_accelerated"
_KINDS = (
    "attention",
    "rms_norm",
    "swiglu",
    "rotary",
    *_linear_time.KINDS,
    "linear",
    "linear_cross_entropy",
)
_LISTED = ("Norm", "MLP", "Experts")  # classes whose instances are named when they are left alone
_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    None,
)  # attention that "fastattn" stands for; a user has chosen any other


class Accelerated:
    """What `accelerate` has replaced in a model and what it left alone.

    replaced: {kind: number of modules}: "attention" (configs), "rms_norm", "swiglu", "rotary", the linear-time layers "gated_delta_rule",
    "kimi_delta_attention", "mamba2", "mamba" and "causal_conv1d", "linear", "linear_cross_entropy".
    left: [(name of the module, its class, why it keeps its own forward)].
    `undo()` takes all of it back, and so does the end of a `with` block; `explain()` is the whole as text.
    """

    def __init__(self, model: nn.Module, loss: bool, exact: bool) -> None:
        self.model, self.loss, self.exact = model, loss, exact
        self.replaced: dict[str, int] = {}
        self.left: list[tuple[str, str, str]] = []
        self._forwards: list[Replaced] = []
        self._configs: list[tuple[Any, Any]] = []  # (config, the attention implementation that it had)

    def undo(self) -> None:
        """Give the model its own forwards and attention back. A second call does nothing.

        Raises RuntimeError, and undoes nothing, where another program has put its forward over one of ours since.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        covered = [
            names[id(r.module)]
            for r in self._forwards
            if id(r.module) in names and vars(r.module).get("forward", r) is not r
        ]
        if covered:
            raise RuntimeError(
                f"fastattn: accelerate: another forward was set since on {', '.join(covered[:5])}"
            )
        for replaced in self._forwards:
            vars(replaced.module).pop("forward", None)
        for config, implementation in self._configs:
            if config._attn_implementation == "fastattn":
                config._attn_implementation_internal = implementation
        self._forwards, self._configs = [], []
        if vars(self.model).get(_OWN) is self:
            delattr(self.model, _OWN)

    def __enter__(self) -> "Accelerated":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def explain(self) -> str:
        """A line for each kind that was replaced, and for each class and reason that was left alone."""
        lines = [f"{type(self.model).__name__}: replaced"]
        lines += [f"  {count} x {kind}" for kind, count in self.replaced.items()] or ["  nothing"]
        reasons = Counter((kind, why) for _, kind, why in self.left)
        if reasons:
            lines.append("left alone")
            lines += [f"  {count} x {kind}: {why}" for (kind, why), count in reasons.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind} {count}" for kind, count in self.replaced.items()) or "nothing"
        return f"Accelerated({type(self.model).__name__}: {counts}; {len(self.left)} left alone)"

    def _put(self, replaced: Replaced) -> None:
        replaced.module.forward = replaced
        self._forwards.append(replaced)
        self.replaced[replaced.kind] = self.replaced.get(replaced.kind, 0) + 1


def accelerate(model: nn.Module, loss: bool = False, exact: bool = False) -> Accelerated:
    """Run the parts of a transformers model, which stays as it is, through fastattn's ops.

    Replaced are, on instances of this model alone: attention (the "fastattn" implementation), RMSNorms, gated MLPs with SiLU, rotary
    embeddings, and on a CPU linear-time layers (delta rules, Mamba's scans, short convolutions; packed documents by `seq_idx` or
    `cu_seq_lens_q` are kept apart in them) and the products of half-precision linear layers. Each replacement is proved: the module's forward and ours
    get the same random rows and weights, in training and in evaluation, in float32 and in the model's dtype, and have to agree
    within roundings. What does not agree is left alone, and named with its reason by `Accelerated.explain()`.

    loss: also the loss of a causal language model. `model(input_ids, labels=labels)` then gives the loss of
        `linear_cross_entropy` and logits None: the logits are never formed. A loss over no label at all is 0, not nan. Default False.
    exact: ValueError for a model with 16-bit weights, whose results are rounded in other places than transformers' (once, where
        it rounds twice), so that they differ within one rounding. Default False.

    On a CPU the products of 16-bit layers keep a packed copy of their weights, as large as these (`fastattn.fused_linear`). Calls of few
    rows on a CPU, where torch's functions are faster, run the modules' own forwards.

    The model's weights, state_dict, hooks and config (aside of its attention implementation) are not touched; deep copies and
    pickles of the model are accelerated too. A layer that is exchanged or hooked later (LoRA, quantisation) is called as it is.
    Under torch.compile, which fuses norms, MLPs and rotary embeddings itself, only attention and the loss are ours. A second call
    changes nothing and returns the same object.

    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4))
    >>> with fastattn.integrations.transformers.accelerate(model) as accelerated:
    ...     print(accelerated.explain())

    Raises ImportError without transformers, TypeError for what is no torch.nn.Module, ValueError for `exact` (above), and for a
    model that is accelerated with other options: `undo()` those first.
    """
    from .transformers import register

    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fastattn: accelerate: model must be a torch.nn.Module, given {type(model).__name__}"
        )
    before = vars(model).get(_OWN)
    if isinstance(before, Accelerated):
        if (before.loss, before.exact) != (loss, exact):
            raise ValueError(
                f"fastattn: accelerate: the model is accelerated with loss={before.loss}, exact={before.exact}; undo() that first"
            )
        return before
    if exact:
        half = next((n for n, p in model.named_parameters() if p.dtype in HALF), None)
        if half is not None:
            raise ValueError(
                f"fastattn: accelerate: exact=True serves float32 weights, {half} is "
                f"{str(model.get_parameter(half).dtype).removeprefix('torch.')}: its results would differ by roundings"
            )
    register()
    accelerated = Accelerated(model, loss, exact)
    _replace_attention(accelerated)
    inside = _replace_modules(accelerated)
    _replace_linears(accelerated, inside)
    if loss:
        _replace_loss(accelerated)
    accelerated.replaced = {
        kind: accelerated.replaced[kind] for kind in _KINDS if kind in accelerated.replaced
    }
    setattr(model, _OWN, accelerated)
    return accelerated


def _replace_attention(accelerated: Accelerated) -> None:
    from transformers import PreTrainedModel

    from .transformers import NAME, has_interface

    seen: list[Any] = []
    for name, module in accelerated.model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(module.config is c for c in seen):
            continue
        config = module.config
        seen.append(config)
        why = None
        if not has_interface(type(config)) or not module._can_set_attn_implementation():
            why = "its attention does not go through transformers' AttentionInterface"
        elif config._attn_implementation not in _IMPLEMENTATIONS:
            why = f"its attention is {config._attn_implementation}"
        elif getattr(config, "output_attentions", False):
            why = "output_attentions needs the weights, which are never formed"
        if why is not None:
            accelerated.left.append((name, type(module).__name__, why))
            continue
        accelerated._configs.append((config, config._attn_implementation))
        config._attn_implementation_internal = NAME
        accelerated.replaced["attention"] = accelerated.replaced.get("attention", 0) + 1


def _replace_modules(accelerated: Accelerated) -> set[int]:
    """Replace norms, MLPs and rotary embeddings; the ids of layers whose products a replaced MLP makes itself."""
    inside: set[int] = set()
    rotations: dict[Any, Any] = {}
    functions: dict[Any, str | None] = {}
    kinds: tuple[Callable[[nn.Module], Replaced | None], ...] = (
        _replaced.norm,
        _replaced.mlp,
        lambda module: _rotary.rotated(module, rotations),
        lambda module: _recurrent.recurrent(module, functions),
    )
    for name, module in accelerated.model.named_modules():
        try:
            _check_own_forward(module)
            found = next((r for find in kinds if (r := find(module)) is not None), None)
        except Left as left:
            accelerated.left.append((name, type(module).__name__, str(left)))
            continue
        if found is None and any(word in type(module).__name__ for word in _LISTED):
            accelerated.left.append((name, type(module).__name__, "it is not of a form that is replaced"))
        if found is not None:
            accelerated._put(found)
            accelerated.left += [(name, type(module).__name__, why) for why in found.left]
            if isinstance(found, _replaced.GatedMLP):
                inside |= {id(module._modules[n]) for n in found.names}
    return inside


def _check_own_forward(module: nn.Module) -> None:
    """Raises Left for a norm, MLP or attention layer whose forward someone else has replaced."""
    if isinstance(vars(module).get("forward"), Replaced):
        raise Left("it is accelerated as a part of another call")
    if "forward" in vars(module) and any(word in type(module).__name__ for word in (*_LISTED, "Attention")):
        raise Left("it has a forward of its own")
    if torch.nn.utils.parametrize.is_parametrized(module):
        raise Left("it is parametrised")


def _replace_linears(accelerated: Accelerated, inside: set[int]) -> None:
    for name, module in accelerated.model.named_modules():
        if id(module) in inside or not is_untouched(module, nn.Linear):
            continue
        try:
            found = _replaced.linear(module)
        except Left as left:
            accelerated.left.append((name, type(module).__name__, str(left)))
            continue
        if found is not None:
            accelerated._put(found)


def _replace_loss(accelerated: Accelerated) -> None:
    model = accelerated.model
    try:
        losses, output = _loss.losses(model)
    except Left as left:
        accelerated.left.append(("", type(model).__name__, str(left)))
        return
    output.inner = vars(output.module).get("forward")
    accelerated._forwards = [r for r in accelerated._forwards if r.module is not output.module]
    output.module.forward = output
    accelerated._forwards.append(output)
    accelerated._put(losses)
