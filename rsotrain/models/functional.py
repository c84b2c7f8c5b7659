"""The differentiable pieces of a LLaMA block, each keeping no more than its backward needs.

Shapes: activations are (..., features) in the compute dtype (bf16 or fp32); statistics, rotations and
weight gradients of the norms are computed in fp32. Weights may have another dtype than activations
(fp32 weights under bf16 compute): they are cast where they are used, the cast is not kept, and
their gradients arrive in their own dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch types the context of an autograd.Function too loosely to name what save_for_backward brings.
Context = Any


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalized = x.float()
        rstd = _reciprocal_rms(normalized, eps)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return (normalized * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        features = x.shape[-1]
        x_float = x.reshape(-1, features).float()
        rstd = _reciprocal_rms(x_float, ctx.eps)
        normalized = x_float * rstd
        grad = grad_output.reshape(-1, features).to(torch.float32, copy=True)
        # With x̂ = x·rstd and g = grad·w: dw = Σ_tokens grad·x̂, dx = rstd·(g − x̂·mean(g·x̂)).
        product = grad * normalized
        grad_weight = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = torch.mv(product, weight.float()).div_(features).unsqueeze(-1)
        grad_x = grad.mul_(weight).sub_(normalized.mul_(mean)).mul_(rstd).to(x.dtype).view_as(x)
        return grad_x, grad_weight, None


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) over the last dimension, kept: (..., features) fp32 -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension; keeps x and weight (arXiv 1910.07467, eq. 4).

    x: (..., features); weight: (features,). Statistics and both products in fp32, one rounding to x's
    dtype at the end.
    """
    return _RMSNorm.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad_output)
        grad_gate = torch.ops.aten.silu_backward(grad_output * up, gate)
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise; keeps gate and up (arXiv 2002.05202). Shapes and dtypes equal."""
    return _SwiGLU.apply(gate, up)


class _SharedInputLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight.to(x.dtype)) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        inputs = x.reshape(-1, x.shape[-1])
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        grad_x = None
        if ctx.needs_input_grad[0]:
            # addmm_ sums inside the GEMM: no buffer per weight, and one rounding less than adding them.
            grad_x = grads[0] @ weights[0].to(x.dtype)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_x.addmm_(grad, weight.to(x.dtype))
            grad_x = grad_x.view_as(x)
        grad_weights = [
            (grad.t() @ inputs).to(weight.dtype) if needed else None
            for grad, weight, needed in zip(grads, weights, ctx.needs_input_grad[1:], strict=True)
        ]
        return grad_x, *grad_weights


def shared_input_linear(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """One x Wᵀ per weight, all reading the same x, which is kept once; no cast of a weight is kept.

    x: (..., in); weights: (out_i, in). Returns (..., out_i) each, in x's dtype.
    """
    if not torch.is_grad_enabled():  # torch.compile miscounts the arguments of a variadic forward then
        return tuple(F.linear(x, weight.to(x.dtype)) for weight in weights)
    return _SharedInputLinear.apply(x, *weights)


def rotary_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables of the rotary embedding, each (seq_len, 1, head_dim) in fp32 (arXiv 2104.09864).

    The cosines of the angles, twice side by side, and their sines, the first half negated.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_output, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1).float()
    return (x.float() * cos).addcmul_(swapped, sin, value=direction).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + head_dim/2}) by their position's angles, in fp32; keeps the tables only.

    x: (batch, seq_len, heads, head_dim); cos, sin: those of ``rotary_tables``.
    """
    return _Rotary.apply(x, cos, sin)
