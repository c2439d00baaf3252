"""Sigma reparametrisation: a weight whose largest singular value is a parameter."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Sigma(nn.Module):
    """``gamma / sigma(W) W``, sigma by one step of power iteration each time the weight is read in training."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, keep: bool) -> None:
        super().__init__()
        with torch.no_grad():
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            start = values[0] if keep else torch.ones_like(values[0])
            self.gamma = nn.Parameter(start.to(weight))
            self.register_buffer("u", left[:, 0].to(weight).contiguous())
            self.register_buffer("v", right[0].to(weight).contiguous())

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.v.copy_(nn.functional.normalize(weight.T @ self.u, dim=0, eps=1e-12))
                self.u.copy_(nn.functional.normalize(weight @ self.v, dim=0, eps=1e-12))
        u, v = self.u.clone(), self.v.clone()  # the next read changes them; the backward needs these
        return (self.gamma / torch.dot(u, weight @ v)) * weight


def sigma_reparam(linear: nn.Linear, *, keep: bool = False) -> nn.Linear:
    """Makes the weight W of a linear layer ``gamma / sigma(W) W``, sigma its largest singular value ("Stabilizing Transformer Training by
    Preventing Attention Entropy Collapse", arXiv 2303.06296), in place; returns the layer.

    sigma is u . W v, with u and v, buffers, moved by one step of power iteration at each read of the weight in training. With both held fixed the
    gradients are, for the gradient G of the new weight: ``gamma / sigma (G - <G, W> / sigma u v^T)`` of W and ``<G, W> / sigma`` of gamma.

    Args:
        linear: nn.Linear, or a module with a ``weight`` (out, in), not reparametrised yet.
        keep: gamma starts at sigma(W), so that the layer does what it did; default False: at 1, as its authors have it.

    The layer's parameters are then ``parametrizations.weight.original`` (W), ``parametrizations.weight.0.gamma`` and the bias.
    ``torch.nn.utils.parametrize.remove_parametrizations(linear, "weight")`` writes the weight back. Each read of the weight in training gives a
    new tensor: a product that keeps a packed copy of the weight (`fused_linear`) packs it again in every call, and blocks whose layers are
    reparametrised take torch's product.

    Raises:
        TypeError: no weight of two dimensions. ValueError: a layer that is reparametrised already.
    """
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(f"sigma_reparam: {type(linear).__name__} has no weight of two dimensions")
    if parametrize.is_parametrized(linear, "weight"):
        raise ValueError("sigma_reparam: the weight is reparametrised already")
    parametrize.register_parametrization(linear, "weight", _Sigma(weight, keep))
    return linear
