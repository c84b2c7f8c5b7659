"""Linears under RSO: their backward needs Z = x P (tokens × r), never x, and gives dB, never dW.

With y = x Wᵀ and the update W + B Pᵀ (P: in × r, B: out × r), dB = dYᵀ X P = dYᵀ Z. The weight is kept
effective: after a step of the inner solver, W ← W + ΔB Pᵀ in place, so the forward pass is one product
with W, and B's value plays no part in it. Linears that read the same input share P and Z: they form a
site. (RSO: arXiv 2502.07222; see ``rsotrain.optim.rso``.)
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
from rsotrain.models.functional import Context, shared_input_linear, swiglu
from rsotrain.models.layers import Linear, RMSNorm
from rsotrain.parallel.sharding import local
from rsotrain.subspace.gram import add_gram_, mirrored_
from rsotrain.subspace.projection import resolve_rank


class _SubspaceLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, basis: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights = tensors[: len(tensors) // 2]
        ctx.coefficient_dtypes = [t.dtype for t in tensors[len(weights) :]]
        ctx.save_for_backward(x @ basis, *weights)
        return tuple(F.linear(x, weight.to(x.dtype)) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        projected, *weights = ctx.saved_tensors
        inputs = projected.reshape(-1, projected.shape[-1])
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        grad_x = None
        if ctx.needs_input_grad[0]:
            # addmm_ sums inside the GEMM: no buffer per weight, and one rounding less than adding them.
            grad_x = grads[0] @ weights[0].to(projected.dtype)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_x.addmm_(grad, weight.to(projected.dtype))
            grad_x = grad_x.view(*projected.shape[:-1], -1)
        grad_coefficients = [
            (grad.t() @ inputs).to(dtype) for grad, dtype in zip(grads, ctx.coefficient_dtypes, strict=True)
        ]
        return grad_x, None, *(None for _ in weights), *grad_coefficients


def subspace_linear(
    x: Tensor, basis: Tensor, weights: Sequence[Tensor], coefficients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One x Wᵀ per weight, keeping only x P; gradients go to x and, as dYᵀ x P, to ``coefficients``.

    x: (..., in); basis: (in, r) in x's dtype; weights: (out_i, in), without gradient; coefficients:
    (out_i, r), whose values are not read. Returns (..., out_i) each, in x's dtype; the gradient of each
    coefficient has its dtype.
    """
    return _SubspaceLinear.apply(x, basis, *weights, *coefficients)


@dataclass(eq=False)
class Site:
    """An input that one or more projected linears read, with the basis it is projected on.

    ``name``: of the site's first projected weight. ``layers``: by the names of their weights. ``basis``:
    P (in × r) in the compute dtype, or None where ``regenerate`` draws it anew for each use. While
    ``observing``, forward passes with gradients add XᵀX to ``gram`` (in × in, float32 at least), which is
    there before the first of them: compiled blocks can add to a tensor, but not make it. Of x at the
    positions that are ``reached``, a mask over all but its last dimension; None: all.
    """

    name: str
    size: int
    rank: int
    layers: dict[str, "SubspaceLinear"] = field(default_factory=dict)
    basis: Tensor | None = None
    regenerate: Callable[[], Tensor] | None = None
    observing: bool = False
    reached: Tensor | None = None
    gram: Tensor | None = None

    def current_basis(self) -> Tensor:
        if self.basis is not None:
            return self.basis
        assert self.regenerate is not None, "the site has no basis yet"
        return self.regenerate()

    def start_observing(self, reached: Tensor | None) -> None:
        assert self.basis is not None, "only random bases are regenerated, and they need no data"
        if self.gram is None:
            dtype = torch.promote_types(self.basis.dtype, torch.float32)
            self.gram = self.basis.new_zeros(self.size, self.size, dtype=dtype)
        self.observing, self.reached = True, reached

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """gram ← gram + XᵀX, its lower blocks only; x: (..., in)."""
        assert self.gram is not None
        inputs = x.reshape(-1, self.size).to(self.gram.dtype)
        if self.reached is not None:  # as zeros: what is picked by a mask has a shape that depends on data
            inputs = inputs.masked_fill(~self.reached.reshape(-1, 1), 0.0)
        add_gram_(self.gram, inputs)  # in float32: a product in bf16 would round each entry to 8 bits

    def take_gram(self) -> Tensor:
        """The whole symmetric Σ XᵀX, which is then forgotten. Raises RuntimeError if none was gathered."""
        if self.gram is None:
            raise RuntimeError(f"{self.name}: no input was observed; run forward passes inside observing()")
        gram, self.gram = self.gram, None
        return mirrored_(gram)


class SubspaceLinear(Linear):
    """x Wᵀ, plus a bias, whose backward leaves dB in ``coefficients.grad`` and no gradient in the weight.

    ``coefficients`` (out × r, the weight's dtype) is a leaf for autograd to write to, a single zero in
    memory: the values of B are the optimizer's affair. It is no parameter of the module.
    """

    def __init__(self, replaced: Linear, site: Site) -> None:
        nn.Module.__init__(self)
        self.weight = replaced.weight
        self.weight.requires_grad_(False)
        self.bias = replaced.bias
        self.site = site
        self.place_coefficients()

    def place_coefficients(self) -> None:
        """Make ``coefficients`` anew, where the weight is; of a sharded weight, too, for all its rows."""
        zero = local(self.weight).new_zeros(())
        self.coefficients = zero.expand(self.weight.shape[0], self.site.rank).requires_grad_()

    @staticmethod
    def products(layers: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
        """Of linears of one site; without gradients nothing is projected."""
        weights = [layer.weight for layer in layers]
        if not torch.is_grad_enabled():
            return shared_input_linear(x, *weights)
        projected = cast(Sequence[SubspaceLinear], layers)
        site = projected[0].site
        if site.observing:
            site.observe(x)
        return subspace_linear(x, site.current_basis(), weights, [layer.coefficients for layer in projected])

    @staticmethod
    def products_of_normed(layers: Sequence[Linear], x: Tensor, norm: RMSNorm) -> tuple[Tensor, ...]:
        return SubspaceLinear.products(layers, norm(x))  # which keeps Z, not its input

    def product_of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.products([self], swiglu(gate, up))[0]


@contextmanager
def drawn_bases(module: nn.Module) -> Iterator[None]:
    """Inside, sites of ``module`` whose bases are drawn for each use have them, unless gradients are off."""
    layers = (layer for layer in module.modules() if isinstance(layer, SubspaceLinear))
    sites = {id(layer.site): layer.site for layer in layers if layer.site.basis is None}
    drawn = list(sites.values()) if torch.is_grad_enabled() else []
    for site in drawn:
        site.basis = site.current_basis()
    try:
        yield
    finally:
        for site in drawn:
            site.basis = None


def attach_subspace(model: nn.Module, names: Collection[str], rank: int | float) -> list[Site]:
    """Replace the linears whose weights are ``names`` by subspace linears; their sites, without bases yet.

    The weights stay the same parameters under the same names, with ``requires_grad`` off; biases stay
    trained. ``rank``: of all linears of a site, as in ``resolve_rank`` with the largest min(in, out) among
    them. Raises UserError, the model untouched, if a name is no linear of a block or the rank does not fit.
    """
    claimed = ([place for place in group if place.name in names] for group in input_groups(model))
    groups = [group for group in claimed if group]
    if missing := sorted(set(names) - {place.name for group in groups for place in group}):
        raise UserError(
            f"optimizer.block_parameters matches {missing[0]}, which RSO cannot project: only the linears"
            " of the blocks have an input of their own to project; narrow the pattern"
        )
    sites = []
    for group in groups:
        size = max(min(place.weight.shape) for place in group)
        name = group[0].name
        sites.append(Site(name, group[0].weight.shape[1], resolve_rank(rank, size, name)))
    for site, group in zip(sites, groups, strict=True):
        for place in group:
            layer = SubspaceLinear(getattr(place.parent, place.attribute), site)
            site.layers[place.name] = layer
            setattr(place.parent, place.attribute, layer)
    return sites
