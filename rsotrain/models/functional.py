"""The differentiable pieces of a LLaMA block, each keeping no more than its backward needs.

Shapes: activations are (..., features) in the compute dtype (bf16 or fp32); statistics, rotations and
weight gradients of the norms are computed in fp32. Weights may have another dtype than activations
(fp32 weights under bf16 compute): they are cast where they are used, the cast is not kept, and
their gradients arrive in their own dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rsotrain.instruments.devices import device_kind

# torch types the context of an autograd.Function too loosely to name what save_for_backward brings.
Context = Any
# Elements of an embedding's gradient that are added up in float32 at a time: 16 MiB
_SUMMED_ELEMENTS = 1 << 22


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return norm_output(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        normalized, rstd = normalize(x.reshape(-1, x.shape[-1]), ctx.eps)
        grad_x, grad_weight = norm_gradients(
            normalized, rstd, weight, grad_output.reshape(-1, x.shape[-1]), ctx.needs_input_grad[1], x.dtype
        )
        return grad_x.view_as(x), grad_weight, None


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ = x · rstd in fp32, and rstd."""
    x_float = x.float()
    rstd = _reciprocal_rms(x_float, eps)
    return x_float * rstd, rstd


def norm_output(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normalized, _ = normalize(x, eps)
    return normalized.mul_(weight).to(x.dtype)


def norm_gradients(
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    grad_output: Tensor,
    need_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Of x, in ``dtype``, and of the weight, all (tokens, features); overwrites ``normalized``."""
    grad = grad_output.to(torch.float32, copy=True)
    # With x̂ = x·rstd and g = grad·w: dw = Σ_tokens grad·x̂, dx = rstd·(g − x̂·mean(g·x̂)).
    product = grad * normalized
    grad_weight = product.sum(0).to(weight.dtype) if need_weight else None
    mean = torch.mv(product, weight.float()).div_(normalized.shape[-1]).unsqueeze(-1)
    return grad.mul_(weight).sub_(normalized.mul_(mean)).mul_(rstd).to(dtype), grad_weight


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


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        grad_product = grad_output @ weight.to(gate.dtype)
        activated = F.silu(gate)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            product = (activated * up).flatten(0, -2)
            grad_weight = (grad_output.flatten(0, -2).t() @ product).to(weight.dtype)
        grad_up = activated.mul_(grad_product)
        return torch.ops.aten.silu_backward(grad_product.mul_(up), gate), grad_up, grad_weight


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``swiglu(gate, up)`` Wᵀ; keeps gate and up, and not their product, which is one pass to make again.

    gate, up: (..., in); weight: (out, in), in any dtype. Returns (..., out) in gate's dtype.
    """
    return _SwiGLULinear.apply(gate, up, weight)


def products(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x Wᵀ for each weight, which is cast to x's dtype."""
    return tuple(F.linear(x, weight.to(x.dtype)) for weight in weights)


class _SharedInputLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return products(x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        grad_x = input_gradient(grads, weights, x.dtype).view_as(x) if ctx.needs_input_grad[0] else None
        inputs = x.reshape(-1, x.shape[-1])
        return grad_x, *_weight_gradients(grads, weights, inputs, ctx.needs_input_grad[1:])


def input_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Σ dY W. addmm_ sums inside the GEMM: no buffer per weight, and one rounding less than adding them."""
    grad_x = grads[0] @ weights[0].to(dtype)
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        grad_x.addmm_(grad, weight.to(dtype))
    return grad_x


def _weight_gradients(
    grads: Sequence[Tensor], weights: Sequence[Tensor], inputs: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    return [
        (grad.t() @ inputs).to(weight.dtype) if needs else None
        for grad, weight, needs in zip(grads, weights, needed, strict=True)
    ]


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, norm_weight: Tensor, eps: float, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, norm_weight, *weights)
        ctx.eps = eps
        return products(norm_output(x, norm_weight, eps), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, *weights = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        normalized, rstd = normalize(x.reshape(-1, x.shape[-1]), ctx.eps)
        normed = (normalized * norm_weight).to(x.dtype)
        grad_weights = _weight_gradients(grads, weights, normed, ctx.needs_input_grad[3:])
        del normed
        grad_normed = input_gradient(grads, weights, x.dtype)
        grad_x, grad_norm = norm_gradients(
            normalized, rstd, norm_weight, grad_normed, ctx.needs_input_grad[1], x.dtype
        )
        return grad_x.view_as(x), grad_norm, None, *grad_weights


def normed_linear(x: Tensor, norm_weight: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
    """``shared_input_linear`` of ``rms_norm(x)``; keeps x, and not the norm's output, made again from it.

    x: (..., in); norm_weight: (in,); weights: (out_i, in). Returns (..., out_i) each, in x's dtype.
    """
    if not torch.is_grad_enabled():  # as in shared_input_linear
        return shared_input_linear(rms_norm(x, norm_weight, eps), *weights)
    return _NormedLinear.apply(x, norm_weight, eps, *weights)


def shared_input_linear(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """One x Wᵀ per weight, all reading the same x, which is kept once; no cast of a weight is kept.

    x: (..., in); weights: (out_i, in). Returns (..., out_i) each, in x's dtype.
    """
    if not torch.is_grad_enabled():  # torch.compile miscounts the arguments of a variadic forward then
        return products(x, weights)
    return _SharedInputLinear.apply(x, *weights)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        flat, width = grad.reshape(-1, grad.shape[-1]), grad.shape[-1]
        result = flat.new_empty(ctx.rows, width)
        columns = max(1, _SUMMED_ELEMENTS // ctx.rows)
        for start in range(0, width, columns):
            run = slice(start, start + columns)
            result[:, run] = torch.ops.aten.embedding_dense_backward(
                flat[:, run].to(torch.float32), tokens.reshape(-1), ctx.rows, -1, False
            )
        return result, None


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """The rows of ``weight`` (rows, width) for ``tokens`` (...): (..., width).

    A row's gradient is a sum over all its tokens, which may be thousands. torch adds those of a bfloat16
    weight up in bfloat16 on a CPU, where small summands are lost beside a large sum; here they are added in
    float32, some columns at a time, and rounded once.
    """
    on_cpu = device_kind(weight.device) == "cpu"
    if weight.dtype is not torch.bfloat16 or not on_cpu or not torch.is_grad_enabled():
        return F.embedding(tokens, weight)
    return _Embedding.apply(weight, tokens)


def rotary_tables(
    seq_len: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    scaling: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Tables of the rotary embedding, each (seq_len, 1, head_dim) in fp32 (arXiv 2104.09864).

    The cosines of the angles, twice side by side, and their sines, the first half negated. ``scaling``: of
    the frequencies (head_dim / 2), in radians per position.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling(frequencies)
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).unsqueeze(1)
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
    # By halves, for the pass over a swapped copy that it saves.
    wide = x.float()
    half = x.shape[-1] // 2
    rotated = wide * cos
    rotated[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=direction)
    rotated[..., half:].addcmul_(wide[..., :half], sin[..., half:], value=direction)
    return rotated.to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + head_dim/2}) by their position's angles, in fp32; keeps the tables only.

    x: (batch, seq_len, heads, head_dim); cos, sin: those of ``rotary_tables``.
    """
    return _Rotary.apply(x, cos, sin)
