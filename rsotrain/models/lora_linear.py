"""Linears with a low-rank adapter beside a frozen weight: y = x (W + s B A)ᵀ, A: r × in, B: out × r.

The backward pass gives gradients to x, A and B, and none to W (LoRA: arXiv 2106.09685, equation 3):

    dZ = s dY B,  dB = s dYᵀ (x Aᵀ),  dA = dZᵀ x,  dx = dY W + dZ A.

As in ``rsotrain.models.functional`` autograd keeps what it needs in any case: x itself, or behind an RMSNorm
or a SwiGLU what x is made from again. x Aᵀ (tokens × r) is made again, too.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rsotrain.errors import UserError
from rsotrain.models.architecture import Kind, input_groups
from rsotrain.models.functional import (
    Context,
    input_gradient,
    norm_gradients,
    norm_output,
    normalize,
    swiglu,
)
from rsotrain.models.layers import Linear, RMSNorm
from rsotrain.parallel.sharding import Shard
from rsotrain.subspace.projection import resolve_rank

A, B = ".lora_A", ".lora_B"  # how names of factors end, instead of ".weight"
_PARTS = 3  # tensors of a linear: W, A, B


def adapted_products(x: Tensor, tensors: Sequence[Tensor], scales: Sequence[float]) -> tuple[Tensor, ...]:
    """x (W + s B A)ᵀ for each linear. ``tensors``: W, A and B of each, which are cast to x's dtype."""
    outputs = []
    for (weight, down, up), scale in zip(_by_linear(tensors), scales, strict=True):
        output = F.linear(x, weight.to(x.dtype))
        inner = F.linear(x, down.to(x.dtype)).flatten(0, -2)
        output.flatten(0, -2).addmm_(inner, up.to(x.dtype).t(), alpha=scale)
        outputs.append(output)
    return tuple(outputs)


def _by_linear(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [tensors[i : i + _PARTS] for i in range(0, len(tensors), _PARTS)]


def _gradients(
    grads: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    *,
    of_input: bool = True,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Of x (tokens × in) and of ``tensors``, in which W has none. ``grads``: dY of each, tokens × out."""
    linears = _by_linear(tensors)
    grad_x = input_gradient(grads, [weight for weight, _, _ in linears], x.dtype) if of_input else None
    result: list[Tensor | None] = []
    for grad, (_, down, up), scale in zip(grads, linears, scales, strict=True):
        own_down = down.to(x.dtype)
        inner = x @ own_down.t()
        grad_inner = (grad @ up.to(x.dtype)).mul_(scale)
        grad_up = (grad.t() @ inner).mul_(scale)
        grad_down = grad_inner.t() @ x
        result += [None, grad_down.to(down.dtype), grad_up.to(up.dtype)]
        if grad_x is not None:
            grad_x.addmm_(grad_inner, own_down)
    return grad_x, result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, scales: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *tensors)
        ctx.scales = scales
        return adapted_products(x, tensors, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        inputs = x.reshape(-1, x.shape[-1])
        grad_x, rest = _gradients(grads, inputs, tensors, ctx.scales, of_input=ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.view_as(x), None, *rest


class _LoraNormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, norm_weight: Tensor, eps: float, scales: Sequence[float], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, norm_weight, *tensors)
        ctx.eps, ctx.scales = eps, scales
        return adapted_products(norm_output(x, norm_weight, eps), tensors, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, *tensors = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        normalized, rstd = normalize(x.reshape(-1, x.shape[-1]), ctx.eps)
        normed = (normalized * norm_weight).to(x.dtype)
        grad_normed, rest = _gradients(grads, normed, tensors, ctx.scales)
        del normed
        assert grad_normed is not None
        grad_x, grad_norm = norm_gradients(
            normalized, rstd, norm_weight, grad_normed, ctx.needs_input_grad[1], x.dtype
        )
        return grad_x.view_as(x), grad_norm, None, None, *rest


class _LoraSwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor, scale: float, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, *tensors)
        ctx.scale = scale
        return adapted_products(F.silu(gate).mul_(up), tensors, (scale,))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *tensors = ctx.saved_tensors
        activated = F.silu(gate)
        product = (activated * up).flatten(0, -2)
        grad_product, rest = _gradients([grad_output.flatten(0, -2)], product, tensors, (ctx.scale,))
        del product
        assert grad_product is not None
        grad_product = grad_product.view_as(gate)
        grad_up = activated.mul_(grad_product)
        return torch.ops.aten.silu_backward(grad_product.mul_(up), gate), grad_up, None, *rest


class LoraLinear(Linear):
    """x (W + s B A)ᵀ plus a bias, with W frozen. ``scale``: s = α/r.

    ``lora_A`` (r × in) and ``lora_B`` (out × r) are parameters of the weight's dtype.
    """

    kinds: ClassVar = Linear.kinds | {"lora_A": Kind.down_factor, "lora_B": Kind.up_factor}

    def __init__(self, replaced: Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.weight = replaced.weight
        self.weight.requires_grad_(False)
        self.bias = replaced.bias
        rows, columns = self.weight.shape
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, columns))
        self.lora_B = nn.Parameter(self.weight.new_empty(rows, rank))
        self.scale = alpha / rank

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.lora_A, self.lora_B

    @staticmethod
    def products(layers: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
        tensors, scales = _parts_of(layers)
        if not torch.is_grad_enabled():  # as in shared_input_linear
            return adapted_products(x, tensors, scales)
        return _LoraLinear.apply(x, scales, *tensors)

    @staticmethod
    def products_of_normed(layers: Sequence[Linear], x: Tensor, norm: RMSNorm) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return LoraLinear.products(layers, norm(x))
        tensors, scales = _parts_of(layers)
        return _LoraNormedLinear.apply(x, norm.weight, norm.eps, scales, *tensors)

    def product_of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.products([self], swiglu(gate, up))[0]
        return _LoraSwiGLULinear.apply(gate, up, self.scale, *self.tensors())


def _parts_of(layers: Sequence[Linear]) -> tuple[list[Tensor], tuple[float, ...]]:
    adapted = cast(Sequence[LoraLinear], layers)
    return [tensor for layer in adapted for tensor in layer.tensors()], tuple(x.scale for x in adapted)


def attach_adapters(
    model: nn.Module, names: Collection[str], rank: int | float, alpha: float
) -> dict[str, LoraLinear]:
    """Give the linears whose weights are ``names`` an adapter, without values yet; return them by name.

    The weights stay the same parameters under the same names, with ``requires_grad`` off; biases are still
    trained. ``rank``: as in ``resolve_rank``, with the smaller dimension of each weight. Raises UserError and
    leaves the model unchanged if a name is no linear of a block or if the rank does not fit.
    """
    places = {place.name: place for group in input_groups(model) for place in group if place.name in names}
    if missing := sorted(set(names) - places.keys()):
        raise UserError(
            f"optimizer.block_parameters matches {missing[0]}, which can have no adapter: only the linears of"
            " the blocks can; narrow the pattern"
        )
    layers = {
        name: LoraLinear(
            getattr(place.parent, place.attribute), resolve_rank(rank, min(place.weight.shape), name), alpha
        )
        for name, place in places.items()
    }
    for name, place in places.items():
        setattr(place.parent, place.attribute, layers[name])
    return layers


def adapter_values(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A (r × in) at its beginning, float32: uniform in ±1/√in, as LoRA's and ReLoRA's code draw it.

    That is Kaiming's uniform distribution with a = √5. The numbers are those of the generator's device.
    """
    values = torch.empty(*shape, dtype=torch.float32, device=generator.device)
    bound = shape[1] ** -0.5
    return values.uniform_(-bound, bound, generator=generator)


def factor_names(name: str) -> tuple[str, str]:
    """The names of A and B of the weight ``name``."""
    stem = name.removesuffix(".weight")
    return stem + A, stem + B


def is_factor(name: str) -> bool:
    return name.endswith((A, B))


@torch.no_grad()
def merged(
    tensors: Mapping[str, Tensor], alpha: float, shards: Mapping[str, Shard] | None = None
) -> dict[str, Tensor]:
    """The tensors of a model without adapters: W + (α/r) B A in at least float32, and the others.

    ``tensors``: by name, the factors whole. ``shards``: of a weight of which only this piece is here.
    """
    result = {name: tensor for name, tensor in tensors.items() if not is_factor(name)}
    for name in list(result):
        down, up = (tensors.get(factor) for factor in factor_names(name))
        weight = result[name]
        if down is None or up is None or weight.is_meta:
            continue
        shard = (shards or {}).get(name)
        if shard is not None and shard.dim is not None:
            own = slice(shard.start, shard.stop)
            down, up = (down, up[own]) if shard.dim == 0 else (down[:, own], up)
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = alpha / down.shape[0]
        result[name] = weight.to(wide).addmm(up.to(wide), down.to(wide), alpha=scale)
    return result
