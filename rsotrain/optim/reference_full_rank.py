"""Transcriptions, as those of ``reference.py``, of methods without a subspace.

Each function takes W (m×n) and the gradients of steps t = 1, 2, … and returns W after all, in float64.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Betas = tuple[float, float]


def foam(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, level: int, betas: Betas, eps: float,
    weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """FOAM by explicit fold and unfold matrices; entries beyond the last column count as 0."""
    W, block = weight.double().clone(), 2**level
    columns = W.shape[1]
    width = -(-columns // block)
    unfold = torch.zeros(width, columns, dtype=W.dtype)
    for j in range(columns):
        unfold[j // block, j] = 1
    fold = unfold.T / block
    M = V = torch.zeros(W.shape[0], width, dtype=W.dtype)
    for t, gradient in enumerate(gradients, start=1):
        G = gradient.double()
        M = betas[0] * M + (1 - betas[0]) * G @ fold
        V = betas[1] * V + (1 - betas[1]) * G**2 @ fold
        R = G - G @ fold @ unfold
        U, Q = M @ unfold + R, V @ unfold + R**2
        N = (U / (1 - betas[0] ** t)) / ((Q / (1 - betas[1] ** t)).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * N
    return W


def lion(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, betas: Betas, weight_decay: float = 0.0
) -> Tensor:
    W = weight.double().clone()
    M = torch.zeros_like(W)
    for gradient in gradients:
        G = gradient.double()
        update = torch.sign(betas[0] * M + (1 - betas[0]) * G)
        W = (1 - lr * weight_decay) * W - lr * update
        M = betas[1] * M + (1 - betas[1]) * G
    return W


def scale(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, momentum: float = 0.0, columns: bool = False,
    weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """SCALE of one matrix: of the head with ``momentum``, of the embedding with ``columns``."""
    W = weight.double().clone()
    M = torch.zeros_like(W)
    for gradient in gradients:
        M = momentum * M + (1 - momentum) * gradient.double()
        rms = (M**2).mean(dim=0 if columns else 1, keepdim=True).sqrt()
        W = (1 - lr * weight_decay) * W - lr * M / rms
    return W


def racs(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, decay: float = 0.9, iterations: int = 5,
    max_growth: float = 1.01, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """RACS with diagonal matrices, as the paper writes it."""
    W = weight.double().clone()
    m, n = W.shape
    q_mean, s_mean, previous = torch.zeros(m, dtype=W.dtype), torch.zeros(n, dtype=W.dtype), 0.0
    for t, gradient in enumerate(gradients, start=1):
        G = gradient.double()
        q = s = torch.ones(m, dtype=W.dtype)
        for _ in range(iterations):
            s = torch.diagonal(G.T @ torch.diag(q) @ G) / q.norm() ** 2
            q = torch.diagonal(G @ torch.diag(s) @ G.T) / s.norm() ** 2
        q_mean = decay * q_mean + (1 - decay) * q
        s_mean = decay * s_mean + (1 - decay) * s
        update = torch.diag(q_mean**-0.5) @ G @ torch.diag(s_mean**-0.5)
        norm = float(update.norm())
        eta = 1.0 if t == 1 else max_growth / max(norm / previous, max_growth)
        previous = eta * norm
        W = (1 - lr * weight_decay) * W - lr * eta * update
    return W


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """The quintic iteration X ← aX + (bA + cA²)X with A = XXᵀ, from X of norm 1; Muon's coefficients."""
    a, b, c = 3.4445, -4.775, 2.0315
    X = matrix / matrix.norm()
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def normuon(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, momentum: float = 0.95,
    row_decay: float = 0.95, nesterov: bool = True, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    W = weight.double().clone()
    M, v = torch.zeros_like(W), torch.zeros(W.shape[0], dtype=W.dtype)
    for gradient in gradients:
        G = gradient.double()
        M = momentum * M + (1 - momentum) * G
        O = newton_schulz(momentum * M + (1 - momentum) * G if nesterov else M)  # noqa: E741
        v = row_decay * v + (1 - row_decay) * (O**2).mean(1)
        U = torch.diag(v**-0.5) @ O
        U = U * O.norm() / U.norm()
        W = (1 - lr * weight_decay) * W - lr * 0.2 * max(W.shape) ** 0.5 * U
    return W


def dion2(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, fraction: float, momentum: float = 0.95,
    weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    turned = weight.shape[0] > weight.shape[1]
    W = (weight.T if turned else weight).double().clone()
    M = torch.zeros_like(W)
    for gradient in gradients:
        M = M + (gradient.T if turned else gradient).double()
        K = M.abs().sum(1).argsort(descending=True)[: math.ceil(fraction * W.shape[0])]
        W = (1 - lr * weight_decay) * W
        W[K] = W[K] - lr * 0.2 * W.shape[1] ** 0.5 * newton_schulz(M[K])
        M[K] = momentum * M[K]
    return W.T if turned else W


def eigenvectors(P: Tensor) -> Tensor:
    """By descending eigenvalues; fixed waves complete those of eigenvalues below 10⁻⁶ of the largest.

    What the first gradient says nothing about has no eigenvectors of its own, and the paper leaves it open.
    """
    values, vectors = torch.linalg.eigh(P)
    Q, k = vectors.flip(1), len(P)
    i, golden = torch.arange(k, dtype=P.dtype), (5**0.5 - 1) / 2
    for j in range(k):
        if values[k - 1 - j] < 1e-6 * values[-1]:
            Q[:, j] = torch.cos(math.pi * (i + 0.5) * ((j + 1) * golden % 1.0))
    return positive_qr(Q)


def positive_qr(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition whose R has a positive diagonal."""
    Q, R = torch.linalg.qr(matrix)
    return Q * R.diagonal().sign()


def soap(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, betas: Betas, eps: float, frequency: int,
    longest: int = 10_000, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """SOAP; the first gradient gives the bases alone. Sides longer than ``longest`` have the identity."""
    W = weight.double().clone()
    m, n = W.shape
    M = V = torch.zeros_like(W)
    L, R = torch.zeros(m, m, dtype=W.dtype), torch.zeros(n, n, dtype=W.dtype)
    Q_L, Q_R = torch.eye(m, dtype=W.dtype), torch.eye(n, dtype=W.dtype)
    for t, gradient in enumerate(gradients, start=1):
        G, N = gradient.double(), torch.zeros_like(W)
        if t > 1:
            M = betas[0] * M + (1 - betas[0]) * G
            V = betas[1] * V + (1 - betas[1]) * (Q_L.T @ G @ Q_R) ** 2
            rotated = Q_L.T @ M @ Q_R / (1 - betas[0] ** (t - 1))
            N = rotated / ((V / (1 - betas[1] ** (t - 1))).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * Q_L @ N @ Q_R.T
        L = betas[1] * L + (1 - betas[1]) * G @ G.T
        R = betas[1] * R + (1 - betas[1]) * G.T @ G
        if m <= longest and (t == 1 or t % frequency == 0):
            Q_L = eigenvectors(L) if t == 1 else positive_qr(L @ Q_L)
        if n <= longest and (t == 1 or t % frequency == 0):
            Q_R = eigenvectors(R) if t == 1 else positive_qr(R @ Q_R)
    return W


def adam_mini(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, block: int, betas: Betas, eps: float,
    weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """Adam-mini with one second moment for ``block`` rows."""
    W = weight.double().clone()
    M, v = torch.zeros_like(W), torch.zeros(W.shape[0] // block, dtype=W.dtype)
    for t, gradient in enumerate(gradients, start=1):
        G = gradient.double()
        M = betas[0] * M + (1 - betas[0]) * G
        v = betas[1] * v + (1 - betas[1]) * torch.stack([(g**2).mean() for g in G.split(block)])
        roots = ((v / (1 - betas[1] ** t)).sqrt() + eps).repeat_interleave(block)
        W = (1 - lr * weight_decay) * W - lr * (M / (1 - betas[0] ** t)) / roots[:, None]
    return W
