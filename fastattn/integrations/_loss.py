"""The loss of a causal language model from its last hidden states, without its logits."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.plain import is_untouched
from ..ops.cross_entropy import linear_cross_entropy
from ._replaced import Left, Linear, Replaced, _undisturbed, is_plain

_IGNORED = -100


class Output(Replaced):
    """An output layer that hands its input to a `Losses` that asks for it, and makes no logits of it."""

    kind = "output layer"

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.inner: Linear | None = None  # this layer's replaced product
        self.asked: dict[int, list[Tensor]] = {}  # by thread

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "asked": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        asked = self.asked.get(_thread())
        if asked is None or len(args) != 1 or kwargs:
            return (self.original if self.inner is None else self.inner)(*args, **kwargs)
        asked.append(args[0])
        return self.original(args[0][..., :0, :])


class Losses(Replaced):
    """A causal language model's forward, whose loss of labels comes from `linear_cross_entropy`; its logits are then None."""

    kind = "linear_cross_entropy"

    def __init__(self, module: Any, output: Output, options: dict[str, Any]) -> None:
        super().__init__(module)
        self.output, self.options = output, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        layer = self.output.module
        if (
            labels is None
            or isinstance(kwargs.get("logits_to_keep", 0), Tensor)
            or kwargs.get("logits_to_keep", 0) != 0
            or kwargs.get("return_dict") is False
            or kwargs.get("output_router_logits")
            or getattr(self.module.config, "output_router_logits", False)
            or not getattr(self.module.config, "return_dict", True)
            or vars(layer).get("forward") is not self.output
            or not is_plain(layer.weight)
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or torch.is_autocast_enabled(layer.weight.device.type)
            or not _is_causal_loss(self.module)
        ):
            return self.original(*args, **kwargs)
        of_loss = ("num_items_in_batch", "ignore_index", "shift_labels")
        asked: list[Tensor] = []
        self.output.asked[_thread()] = asked
        try:
            given = {k: v for k, v in kwargs.items() if k != "labels" and k not in of_loss}
            result = self.original(*args, **given)
        finally:
            del self.output.asked[_thread()]
        if len(asked) != 1:
            raise RuntimeError(
                f"fastattn: accelerate(loss=True) of {type(self.module).__name__}: its output layer was called {len(asked)} times"
            )
        fields = {k: v for k, v in result.items() if k != "logits"}
        fields["loss"] = self._loss(asked[0], labels, *(kwargs.get(name) for name in of_loss))
        return type(result)(**fields)

    def _loss(
        self, hidden: Tensor, labels: Tensor, items: Any, ignore_index: int | None, shifted: Tensor | None
    ) -> Tensor:
        """transformers' ForCausalLMLoss."""
        ignored = _IGNORED if ignore_index is None else ignore_index
        if shifted is None:
            shifted = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
        layer = self.output.module
        loss = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            layer.weight,
            shifted.reshape(-1).to(hidden.device),
            bias=layer.bias,
            ignore_index=ignored,
            reduction="mean" if items is None else "sum",
            **self.options,
        )
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        return loss


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _is_causal_loss(model: Any) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return getattr(model, "loss_function", None) is ForCausalLMLoss


def losses(model: Any) -> tuple[Losses, Output]:
    """The proved replacement of a causal language model's forward, and of its output layer. Raises Left."""
    if not _is_causal_loss(model):
        raise Left("its loss is not transformers' ForCausalLMLoss")
    layer = model.get_output_embeddings()
    inner = vars(layer).get("forward") if isinstance(layer, nn.Linear) else None
    if not is_untouched(layer, nn.Linear) and not isinstance(inner, Linear):
        raise Left("its output layer is not a plain torch.nn.Linear")
    if not is_plain(layer.weight):
        raise Left("its output layer's weight is not a plain floating tensor on a CPU or a GPU")
    device, dtype, classes = layer.weight.device, layer.weight.dtype, layer.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, classes, (2, 6), generator=generator).to(device)
    labels = ids.clone()
    labels[0, :3] = _IGNORED
    # logits of many sizes in place of the output layer's: they show a cap, a scale, or anything else between it and the loss
    drawn = torch.randn(2, 6, classes, generator=generator) * torch.tensor([0.3, 1, 3, 10, 30, 100])[:, None]
    drawn = drawn.to(device, dtype)
    output = Output(layer)
    found = Losses(model, output, {})
    try:
        with _undisturbed(device), _evaluating(model):
            layer.forward = lambda hidden: drawn
            own = type(model).forward(model, input_ids=ids, labels=labels, use_cache=False)
            found.options = _options(model, drawn, own.logits)
            expected = nn.functional.cross_entropy(
                own.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=_IGNORED
            )
            layer.forward = output
            actual = found(input_ids=ids, labels=labels, use_cache=False)
    except Left:
        raise
    except Exception as error:
        raise Left(f"its forward does not take input_ids and labels alone: {type(error).__name__}") from error
    finally:
        vars(layer).pop("forward", None)
        if inner is not None:
            layer.forward = inner
    # a loss is a sum of a log-sum-exp and a logit, each off by an eps of the largest logit
    bound = 4 * torch.finfo(torch.float32).eps * float(own.logits.abs().max())
    if not abs(float(own.loss) - float(expected)) <= bound or actual.logits is not None:
        raise Left("its loss is more than the cross-entropy of its logits")
    output.inner = inner
    return found, output


def _options(model: Any, drawn: Tensor, logits: Tensor) -> dict[str, Any]:
    """How the model's logits follow from its output layer's. Raises Left where it is neither a soft cap nor a factor."""
    config = model.config.get_text_config()
    forms: list[tuple[dict[str, Any], Tensor]] = [({}, drawn)]
    cap = getattr(config, "final_logit_softcapping", None)
    if isinstance(cap, (int, float)) and cap > 0:
        forms.append(({"softcap": float(cap)}, cap * torch.tanh(drawn / cap)))
    for name, power in (("logits_scaling", 1), ("logit_scale", -1)):
        scale = getattr(config, name, None)
        if isinstance(scale, (int, float)) and scale > 0:
            forms.append(({"temperature": float(scale) ** power}, drawn / float(scale) ** power))
    for options, expected in forms:
        # a quotient, a tanh and a product, each rounded
        bound = 4 * torch.finfo(logits.dtype).eps * expected.double().abs()
        if logits.shape == drawn.shape and bool(((logits.double() - expected.double()).abs() <= bound).all()):
            return options
    raise Left("its logits are neither its output layer's product nor that with a soft cap or a factor")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Every module in evaluation; afterwards each as it was."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
