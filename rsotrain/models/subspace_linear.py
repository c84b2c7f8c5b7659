"""Linears under RSO: the backward pass computes dB instead of dW, from Z = x P (tokens × r).

For y = x (W + B Pᵀ)ᵀ (P: in × r, B: out × r) the gradient of B is dB = dYᵀ X P = dYᵀ Z. The optimizer adds
each change ΔB Pᵀ to W in place, so the forward pass is one product with W and does not read B. Linears that
read the same input form an input group and share P and Z. (RSO: arXiv 2502.07222; see
``rsotrain.optim.rso``.)

Autograd saves Z instead of x, or neither: behind an RMSNorm or a SwiGLU the backward pass makes x again from
the tensors that it needs in any case, and Z from x, at no more operations than before.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rsotrain.errors import UserError
from rsotrain.models.architecture import input_groups
from rsotrain.models.functional import (
    Context,
    input_gradient,
    norm_gradients,
    norm_output,
    normalize,
    products,
    shared_input_linear,
    swiglu,
)
from rsotrain.models.layers import Linear, RMSNorm
from rsotrain.parallel.sharding import local
from rsotrain.subspace.gram import add_gram_, mirrored_
from rsotrain.subspace.projection import resolve_rank

Basis = Tensor | Callable[[], Tensor]  # or what makes it anew for each use


class _SubspaceLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, basis: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, ctx.B_dtypes = _split(tensors)
        ctx.save_for_backward(x @ basis, *weights)
        return products(x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        projected, *weights = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grads, weights, projected.dtype).view(*projected.shape[:-1], -1)
        grad_B = _coefficient_gradients(grads, projected.reshape(-1, projected.shape[-1]), ctx.B_dtypes)
        return grad_x, None, *(None for _ in weights), *grad_B


class _SubspaceNormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, norm_weight: Tensor, eps: float, basis: Basis, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, ctx.B_dtypes = _split(tensors)
        _save(ctx, basis, x, norm_weight, *weights)
        ctx.eps = eps
        return products(norm_output(x, norm_weight, eps), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        basis, (x, norm_weight, *weights) = _saved(ctx)
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        normalized, rstd = normalize(x.reshape(-1, x.shape[-1]), ctx.eps)
        projected = (normalized * norm_weight).to(x.dtype) @ basis
        del basis
        grad_B = _coefficient_gradients(grads, projected, ctx.B_dtypes)
        grad_normed = input_gradient(grads, weights, x.dtype)
        grad_x, grad_norm = norm_gradients(
            normalized, rstd, norm_weight, grad_normed, ctx.needs_input_grad[1], x.dtype
        )
        return grad_x.view_as(x), grad_norm, None, None, *(None for _ in weights), *grad_B


class _SubspaceSwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor, basis: Basis, weight: Tensor, B: Tensor) -> Tensor:
        _save(ctx, basis, gate, up, weight)
        ctx.B_dtype = B.dtype
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        basis, (gate, up, weight) = _saved(ctx)
        grad_product = grad_output @ weight.to(gate.dtype)
        activated = F.silu(gate)
        projected = (activated * up).flatten(0, -2) @ basis
        del basis
        (grad_B,) = _coefficient_gradients([grad_output.flatten(0, -2)], projected, [ctx.B_dtype])
        grad_up = activated.mul_(grad_product)
        return torch.ops.aten.silu_backward(grad_product.mul_(up), gate), grad_up, None, None, grad_B


def _save(ctx: Context, basis: Basis, *tensors: Tensor) -> None:
    """A basis that is made for each use is made for the backward pass, and not kept until then."""
    ctx.regenerate, kept = (None, [basis]) if isinstance(basis, Tensor) else (basis, [])
    ctx.save_for_backward(*tensors, *kept)


def _saved(ctx: Context) -> tuple[Tensor, Sequence[Tensor]]:
    if ctx.regenerate is not None:
        return ctx.regenerate(), ctx.saved_tensors
    *tensors, basis = ctx.saved_tensors
    return basis, tensors


def _split(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[torch.dtype]]:
    """The weights, and the dtypes of their B, which follow them."""
    count = len(tensors) // 2
    return tensors[:count], [B.dtype for B in tensors[count:]]


def _coefficient_gradients(
    grads: Sequence[Tensor], projected: Tensor, dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """dB = dYᵀ Z of each linear; dY: (tokens, out), Z: (tokens, r)."""
    return [(grad.t() @ projected).to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def subspace_linear(
    x: Tensor, basis: Tensor, weights: Sequence[Tensor], B: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """x Wᵀ for each weight. Autograd saves x P only and gives gradients to x and, as dYᵀ x P, to ``B``.

    x: (..., in); basis: P (in, r) in x's dtype; weights: (out_i, in), which get no gradient; B: (out_i, r),
    whose values are not read. Returns one (..., out_i) for each weight, in x's dtype; the gradient of each
    B has the dtype of that B.
    """
    return _SubspaceLinear.apply(x, basis, *weights, *B)


@dataclass(eq=False)
class InputGroup:
    """One or more linears that read the same input, and the basis on which this input is projected.

    ``name``: the name of the first projected weight. ``layers``: the linears by the names of their weights.
    ``basis``: P (in × r) in the compute dtype, or None where ``regenerate`` samples it for each use. While
    ``observing``, forward passes that need gradients add XᵀX to ``gram`` (in × in, at least float32).
    ``gram`` exists before the first of them, because compiled blocks can add to a tensor but not create it.
    ``valid_mask`` covers all dimensions of x but the last; positions where it is False do not count in XᵀX.
    None: all positions count. ``device_kind``: "cuda" where products of bfloat16 have float32 results.
    """

    name: str
    size: int
    rank: int
    layers: dict[str, "SubspaceLinear"] = field(default_factory=dict)
    basis: Tensor | None = None
    regenerate: Callable[[], Tensor] | None = None
    observing: bool = False
    valid_mask: Tensor | None = None
    gram: Tensor | None = None
    device_kind: str = "cpu"

    def current_basis(self) -> Tensor:
        if self.basis is not None:
            return self.basis
        assert self.regenerate is not None, "the input group has no basis yet"
        return self.regenerate()

    def basis_for_backward(self) -> Basis | None:
        """P, or what makes it. None where it exists for the forward pass alone (``sampled_bases``)."""
        if self.basis is None:
            return self.regenerate
        return self.basis if self.regenerate is None else None

    def start_observing(self, valid_mask: Tensor | None) -> None:
        assert self.basis is not None, "only random bases are regenerated, and they need no data"
        if self.gram is None:
            dtype = torch.promote_types(self.basis.dtype, torch.float32)
            self.gram = self.basis.new_zeros(self.size, self.size, dtype=dtype)
        self.observing, self.valid_mask = True, valid_mask

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """gram ← gram + XᵀX, in its lower blocks only; x: (..., in)."""
        assert self.gram is not None
        inputs = x.reshape(-1, self.size)
        if self.device_kind != "cuda" or self.gram.dtype is not torch.float32:
            inputs = inputs.to(self.gram.dtype)
        if self.valid_mask is not None:  # indexing by it would give a shape that depends on data
            inputs = inputs.masked_fill(~self.valid_mask.reshape(-1, 1), 0.0)
        add_gram_(self.gram, inputs)  # summed in float32: a bfloat16 sum would have 8 bits

    def take_gram(self) -> Tensor:
        """Return the whole symmetric Σ XᵀX and drop it here. Raises RuntimeError if no input was observed."""
        if self.gram is None:
            raise RuntimeError(f"{self.name}: no input was observed; run forward passes inside observing()")
        gram, self.gram = self.gram, None
        return mirrored_(gram)


class SubspaceLinear(Linear):
    """x Wᵀ plus a bias. The backward pass writes dB to ``B.grad`` and gives the weight no gradient.

    ``B`` (out × r, the weight's dtype) is the leaf tensor that receives this gradient. It is a single
    expanded zero in memory and no parameter of the module: the optimizer keeps the values of B.
    """

    def __init__(self, replaced: Linear, input_group: InputGroup) -> None:
        nn.Module.__init__(self)
        self.weight = replaced.weight
        self.weight.requires_grad_(False)
        self.bias = replaced.bias
        self.input_group = input_group
        self.place_leaf()

    def place_leaf(self) -> None:
        """Create ``B`` on the weight's device; it has all rows even if the weight is sharded."""
        zero = local(self.weight).new_zeros(())
        self.B = zero.expand(self.weight.shape[0], self.input_group.rank).requires_grad_()

    @staticmethod
    def products(layers: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
        """x Wᵀ of linears of one input group; x is projected only where gradients are enabled."""
        weights = [layer.weight for layer in layers]
        if not torch.is_grad_enabled():
            return shared_input_linear(x, *weights)
        projected = cast(Sequence[SubspaceLinear], layers)
        input_group = projected[0].input_group
        if input_group.observing:
            input_group.observe(x)
        return subspace_linear(x, input_group.current_basis(), weights, [layer.B for layer in projected])

    @staticmethod
    def products_of_normed(layers: Sequence[Linear], x: Tensor, norm: RMSNorm) -> tuple[Tensor, ...]:
        projected = cast(Sequence[SubspaceLinear], layers)
        input_group = projected[0].input_group
        basis = input_group.basis_for_backward()
        if basis is None or not torch.is_grad_enabled():
            return SubspaceLinear.products(layers, norm(x))
        if input_group.observing:
            with torch.no_grad():
                input_group.observe(norm(x))
        weights, B = [layer.weight for layer in layers], [layer.B for layer in projected]
        return _SubspaceNormedLinear.apply(x, norm.weight, norm.eps, basis, *weights, *B)

    def product_of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        basis = self.input_group.basis_for_backward()
        if basis is None or not torch.is_grad_enabled():
            return self.products([self], swiglu(gate, up))[0]
        if self.input_group.observing:
            with torch.no_grad():
                self.input_group.observe(swiglu(gate, up))
        return _SubspaceSwiGLULinear.apply(gate, up, basis, self.weight, self.B)


@contextmanager
def sampled_bases(module: nn.Module) -> Iterator[None]:
    """Inside, the input groups of ``module`` that regenerate their bases keep one sampled basis.

    Where gradients are off nothing is sampled.
    """
    layers = (layer for layer in module.modules() if isinstance(layer, SubspaceLinear))
    regenerating = {
        id(layer.input_group): layer.input_group for layer in layers if layer.input_group.basis is None
    }
    groups = list(regenerating.values()) if torch.is_grad_enabled() else []
    for group in groups:
        group.basis = group.current_basis()
    try:
        yield
    finally:
        for group in groups:
            group.basis = None


def attach_subspace(model: nn.Module, names: Collection[str], rank: int | float) -> list[InputGroup]:
    """Replace the linears whose weights are ``names`` by subspace linears; return their input groups.

    The groups have no bases yet. The weights stay the same parameters under the same names, with
    ``requires_grad`` off; biases are still trained. ``rank``: of each group, as in ``resolve_rank`` with the
    largest min(in, out) of its linears. Raises UserError and leaves the model unchanged if a name is no
    linear of a block or if the rank does not fit.
    """
    named = ([place for place in group if place.name in names] for group in input_groups(model))
    places = [group for group in named if group]
    if missing := sorted(set(names) - {place.name for group in places for place in group}):
        raise UserError(
            f"optimizer.block_parameters matches {missing[0]}, which RSO cannot project: only the linears"
            " of the blocks have an input of their own to project; narrow the pattern"
        )
    groups = []
    for group in places:
        size = max(min(place.weight.shape) for place in group)
        name = group[0].name
        groups.append(InputGroup(name, group[0].weight.shape[1], resolve_rank(rank, size, name)))
    for input_group, group in zip(groups, places, strict=True):
        for place in group:
            layer = SubspaceLinear(getattr(place.parent, place.attribute), input_group)
            input_group.layers[place.name] = layer
            setattr(place.parent, place.attribute, layer)
    return groups
