"""LM head and cross-entropy in one, over chunks of tokens: the (tokens, vocabulary) logits never exist.

In training the gradients with respect to the hidden states and the head are computed already in the
forward pass, while a chunk's probabilities are at hand: the same three GEMMs as the plain loss, no
recomputation, and the only large buffers are one chunk of logits and the head's gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.instruments.devices import device_kind

# Tokens whose logits exist at a time. On two CPU cores (vocabulary 32000, width 512, bf16) the GEMMs
# reach their full rate at 512 tokens (380 GFLOP/s; 350 at 256) and gain nothing beyond. A GPU takes more at
# a time, to launch fewer kernels, as far as their logits have ``_GPU_LOGITS_BYTES``.
CHUNK_TOKENS = 512
_GPU_CHUNK_TOKENS = 4096
_GPU_LOGITS_BYTES = 2**28
# Bytes of an fp32 working buffer. That of a CPU stays in its cache between the passes over it; 8 MiB are no
# faster, and 30 MiB more at the peak.
_CPU_BLOCK_BYTES = 2 * 2**20
_GPU_BLOCK_BYTES = 2**26


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over tokens of −log softmax(hidden weightᵀ)[target], as an fp32 scalar.

    hidden: (tokens, features); weight: (vocabulary, features), cast to hidden's dtype for the GEMMs;
    targets: (tokens,) int64, those equal to ``IGNORE_INDEX`` count nothing. Softmax,
    loss and the sum of the head's gradient over chunks are in fp32; gradients arrive in the dtype of their
    tensor.
    ``z_loss``: weight c of the auxiliary loss Σ c·(log Z)², Z = Σ exp(logits), which keeps the logits from
    drifting (PaLM, arXiv 2204.02311, section 5, with c = 1e-4). It is in the gradients only: the value that
    is returned stays the cross-entropy, so that losses with and without it can be compared.
    The gradients are scaled in place when backward runs, so it can run only once (torch raises the
    second time).
    """
    assert hidden.dim() == 2, hidden.shape
    assert targets.shape == hidden.shape[:1], (targets.shape, hidden.shape)
    kind = device_kind(hidden.device)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, kind, z_loss)
    return _loss_and_gradients(hidden, weight, targets, kind, z_loss, False, False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kind: str, z_loss: float
    ) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        loss, *grads = _loss_and_gradients(hidden, weight, targets, kind, z_loss, *needed)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # Not cast to the gradient's dtype first: 1/tokens in bf16 is off by up to 0.2 %, every entry with it.
        grad_hidden, grad_weight = (
            grad if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kind: str,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss and its gradients with respect to hidden and weight (None where not needed)."""
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    head = weight.to(hidden.dtype)
    chunk_size = max(1, min(num_tokens, chunk_tokens(vocab_size, hidden.dtype, kind)))
    logits = hidden.new_empty(chunk_size, vocab_size)
    valid = (targets != IGNORE_INDEX).unsqueeze(1)
    loss = hidden.new_zeros((), dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    weight_sum = _WeightGradient(weight, hidden.dtype, kind, chunk_size < num_tokens) if need_weight else None
    for start in range(0, num_tokens, chunk_size):
        rows = slice(start, start + chunk_size)
        chunk = hidden[rows]
        chunk_logits = logits[: chunk.shape[0]]
        torch.mm(chunk, head.t(), out=chunk_logits)
        loss += _softmax_loss_(chunk_logits, targets[rows], kind, z_loss, need_hidden or need_weight)
        if grad_hidden is not None:
            torch.mm(chunk_logits, head, out=grad_hidden[rows])
        if weight_sum is not None:
            # Ignored tokens are masked here and below: cheaper than over the whole vocabulary.
            weight_sum.add_(chunk_logits, chunk * valid[rows])
    if grad_hidden is not None:
        grad_hidden.mul_(valid)
    return loss, grad_hidden, weight_sum.sum() if weight_sum is not None else None


def chunk_tokens(vocab_size: int, dtype: torch.dtype, kind: str) -> int:
    """The most tokens whose logits, in ``dtype``, exist at a time."""
    if kind == "cpu":
        return CHUNK_TOKENS
    return max(1, min(_GPU_CHUNK_TOKENS, _GPU_LOGITS_BYTES // (vocab_size * dtype.itemsize)))


def _block_rows(num_rows: int, row_elements: int, kind: str) -> int:
    """How many rows of an fp32 working buffer to work on at a time."""
    block_bytes = _CPU_BLOCK_BYTES if kind == "cpu" else _GPU_BLOCK_BYTES
    return max(1, min(num_rows, block_bytes // (4 * row_elements)))


def _softmax_loss_(logits: Tensor, targets: Tensor, kind: str, z_loss: float, with_gradient: bool) -> Tensor:
    """The summed loss; ``with_gradient`` overwrites logits with the gradient of each token's loss and z-loss.

    That gradient is not zero for ignored tokens: the caller masks what it computes from it.
    """
    loss = logits.new_zeros((), dtype=torch.float32)
    step = _block_rows(logits.shape[0], logits.shape[1], kind)
    block = logits.new_empty(step, logits.shape[1], dtype=torch.float32)
    for rows, target in zip(logits.split(step), targets.split(step), strict=True):
        valid = (target != IGNORE_INDEX).unsqueeze(1)
        # Of other negative targets gather makes an error: no mistake counts as token 0.
        target = target.unsqueeze(1).masked_fill(~valid, 0)
        probability = block[: rows.shape[0]]
        torch.softmax(rows, dim=1, dtype=torch.float32, out=probability)
        # The most likely token has probability 1 / Σ exp(logit − max): no pass for log-sum-exp.
        log_sum = rows.amax(1, keepdim=True).float() - probability.amax(1, keepdim=True).log_()
        loss += (log_sum - rows.gather(1, target)).masked_fill_(~valid, 0.0).sum()
        if with_gradient:
            if z_loss:  # d(log Z)²/dlogits = 2 log Z · softmax
                probability.mul_(log_sum.mul_(2 * z_loss).add_(1.0))
            minus_one = probability.new_full((), -1.0).expand_as(target)
            rows.copy_(probability.scatter_add_(1, target, minus_one))
    return loss


class _WeightGradient:
    """Σ over chunks of grad_logitsᵀ hidden, accumulated in fp32 where there are several.

    A sum in bf16 would round once more per chunk: with 64 chunks its error was four times as large.
    """

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, kind: str, several: bool) -> None:
        self.dtype, self.kind = weight.dtype, kind
        rounded = not several and weight.dtype == compute_dtype  # by the only product
        self.total = torch.empty_like(weight, dtype=compute_dtype if rounded else torch.float32)
        self.begun = False  # the first summand is written, not added to zeros

    def add_(self, grad_logits: Tensor, hidden: Tensor) -> None:
        begun, self.begun = self.begun, True
        if self.total.dtype == hidden.dtype:
            self.total.addmm_(grad_logits.t(), hidden, beta=float(begun))
        elif self.kind == "cpu":
            self._add_by_blocks_(grad_logits, hidden, begun)
        else:
            total = self.total
            torch.addmm(total, grad_logits.t(), hidden, beta=float(begun), out_dtype=torch.float32, out=total)

    def _add_by_blocks_(self, grad_logits: Tensor, hidden: Tensor, begun: bool) -> None:
        """A CPU has no products of bf16 matrices with fp32 results."""
        vocab_size, features = self.total.shape
        step = _block_rows(vocab_size, features, self.kind)
        partial = self.total.new_empty(step, features, dtype=hidden.dtype)
        wide = torch.empty_like(partial, dtype=torch.float32)
        for total, grad_columns in zip(self.total.split(step), grad_logits.split(step, dim=1), strict=True):
            product = torch.mm(grad_columns.t(), hidden, out=partial[: total.shape[0]])
            if begun:
                # Adding bf16 to fp32 in one call takes torch's unvectorised path: convert, then add.
                total.add_(wide[: total.shape[0]].copy_(product))
            else:
                total.copy_(product)

    def sum(self) -> Tensor:
        return (self.total if self.begun else self.total.zero_()).to(self.dtype)
