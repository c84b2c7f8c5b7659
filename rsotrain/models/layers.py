"""What models are made of: norms, linears with or without a bias, and how linears share their input."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rsotrain.models.architecture import Kind
from rsotrain.models.functional import normed_linear, rms_norm, shared_input_linear, swiglu_linear


class RMSNorm(nn.Module):
    """RMSNorm that keeps only its input for the backward pass."""

    kinds: ClassVar = {"weight": Kind.gain}

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """x Wᵀ, plus a bias where there is one, in x's dtype whatever the parameters'.

    How the products are computed, and what they keep, is for ``products``, ``products_of_normed`` and
    ``product_of_swiglu`` to say, which a subclass overrides; none of these adds a bias.
    """

    kinds: ClassVar = {"weight": Kind.linear, "bias": Kind.bias}

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return apply_shared(x, self)[0]

    def apply_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Of silu(gate) · up, which is not kept."""
        return self._with_bias(self.product_of_swiglu(gate, up))

    def flops_per_token(self, seq_len: int) -> int:
        """Of the product forward, and of the two backward."""
        return 6 * self.weight.numel()

    @staticmethod
    def products(layers: Sequence["Linear"], x: Tensor) -> tuple[Tensor, ...]:
        """x Wᵀ of several linears that read the same input, which is kept once."""
        return shared_input_linear(x, *(layer.weight for layer in layers))

    @staticmethod
    def products_of_normed(layers: Sequence["Linear"], x: Tensor, norm: RMSNorm) -> tuple[Tensor, ...]:
        """``products`` of norm(x), whose output is not kept."""
        return normed_linear(x, norm.weight, norm.eps, *(layer.weight for layer in layers))

    def product_of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu_linear(gate, up, self.weight)

    def _with_bias(self, product: Tensor) -> Tensor:
        # in place: the products keep their inputs, and never what they give
        return product if self.bias is None else product.add_(self.bias.to(product.dtype))


def apply_normed(x: Tensor, norm: RMSNorm, *layers: Linear) -> tuple[Tensor, ...]:
    """``apply_shared(norm(x), …)``, through the class of the layers where they are of one."""
    kind = type(layers[0])
    if all(type(layer) is kind for layer in layers):
        return _with_biases(layers, kind.products_of_normed(layers, x, norm))
    return apply_shared(norm(x), *layers)


def apply_shared(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """``layer(x)`` for each, through their class's way to share what they keep of x."""
    kind = type(layers[0])
    same = [layer for layer in layers if type(layer) is kind]
    if len(same) == len(layers):
        return _with_biases(layers, kind.products(layers, x))
    others = [layer for layer in layers if type(layer) is not kind]
    outputs = dict(zip(same, apply_shared(x, *same), strict=True))
    outputs |= zip(others, apply_shared(x, *others), strict=True)
    return tuple(outputs[layer] for layer in layers)


def _with_biases(layers: Sequence[Linear], products: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(layer._with_bias(product) for layer, product in zip(layers, products, strict=True))
