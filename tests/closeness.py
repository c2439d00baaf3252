"""How close a model must be to itself in float64."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastattn import testing


class InDouble(TorchFunctionMode):
    """transformers computes norms, softmax and losses in float32: in a float64 model they stay float64 here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wide = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if wide and function is torch.Tensor.float:
            return args[0]
        if wide and function in (torch.Tensor.to, nn.functional.softmax):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def assert_as_close(actual, plain, true, terms, labels=1.0):
    """Each no further from float64 than a factor of what the model's own forward is, and a few roundings. labels: over what the loss is divided by."""
    (loss, logits, gradients), (_, plain_logits, plain_gradients) = actual, plain
    if logits is not None:
        testing.assert_close_to_truth(logits, true[1], plain_logits, factor=2, terms=terms, name="logits")
    # a log-sum-exp and a logit, each off by what logits are at most; one mean of few numbers says nothing of its own
    off = 2 * testing.max_error(plain_logits, true[1]) + testing.rounding_band(
        true[1], plain_logits.dtype, terms
    )
    assert testing.max_error(loss, true[0]) <= 2 * off * labels
    largest = max(testing.max_finite(g) for g in true[2].values())
    for name, g in gradients.items():
        expected = true[2][name]
        allowed = 3 * testing.max_error(plain_gradients[name], expected)
        allowed += testing.rounding_band(expected, g.dtype, terms)
        if testing.max_finite(expected) < 1e-9 * largest:
            # 0: of a key's bias, which moves all scores of a row alike. What is left are roundings of sums as large as the others
            allowed += 16 * torch.finfo(g.dtype).eps * largest
        error = testing.max_error(g, expected)
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
