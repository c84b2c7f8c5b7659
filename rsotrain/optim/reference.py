"""Slow, readable transcriptions of the methods for one matrix in float64, which the tests compare with.

Each function takes W (m×n) and the gradients of steps t = 1, 2, … (m×n each) and returns W after all of them.
They share no code with the optimizers. ``lr`` is the learning rate of the matrix (lr·scale).
``sample(t, A, rank, old)`` returns the basis Q (k×r) of a refresh; A is oriented (M×k, k ≤ M), and ``old`` is
the basis before, None at t = 1. Refreshes are at t = 1, 1+T, 1+2T, … with T = ``gap`` (update_proj_gap).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Sample = Callable[[int, Tensor, int, Tensor | None], Tensor]
Betas = tuple[float, float]


def _orient(weight: Tensor, gradients: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], bool]:
    """Float64 copies with the larger dimension first, and whether they are transposed."""
    turn = weight.shape[0] < weight.shape[1]
    matrices = [(x.T if turn else x).double().clone() for x in (weight, *gradients)]
    return matrices[0], matrices[1:], turn


def dominant(t: int, gradient: Tensor, rank: int, old: Tensor | None) -> Tensor:
    """The top right singular vectors, with signs such that none points against its predecessor in ``old``."""
    basis = torch.linalg.svd(gradient)[2][:rank].T
    if old is not None:
        for i in range(rank):
            if torch.dot(basis[:, i], old[:, i]) < 0:
                basis[:, i] = -basis[:, i]
    return basis


def one_power_round(t: int, gradient: Tensor, rank: int, old: Tensor | None) -> Tensor:
    """orth(AᵀA Q_old) by QR with a positive diagonal of R; at t = 1 the basis of the SVD."""
    if old is None:
        return dominant(t, gradient, rank, None)
    q, r = torch.linalg.qr(gradient.T @ (gradient @ old))
    return q * torch.sign(torch.diagonal(r))


def adam(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, betas: Betas, eps: float,
    weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    W = weight.double().clone()
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for t, G in enumerate(gradients, start=1):
        G = G.double()
        M = betas[0] * M + (1 - betas[0]) * G
        V = betas[1] * V + (1 - betas[1]) * G**2
        N = (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * N
    return W


def _limited(update: Tensor, previous: float, growth: float) -> Tensor:
    norm = float(update.norm())
    if previous > 0 and norm > growth * previous:
        return update * (growth * previous / norm)
    return update


def galore(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, rank: int, gap: int, betas: Betas,
    eps: float, weight_decay: float = 0.0, on_refresh: str = "keep", sample: Sample = dominant,
    outside: str = "dropped", free_scale: float = 1.0, max_growth: float = 1.01, rounding: float = 0.0,
    residual_lr: float | None = None, group: int = 1,
) -> Tensor:  # fmt: skip
    """GaLore, or by ``outside`` "fira", "frugal" or "orbit", which differ in the residual only.

    ``rounding``: relative rounding error of the arithmetic under test, below which FRUGAL's residual counts
    as 0. ``residual_lr``: of Fira's residual; None: ``lr``. ``group``: ORBIT's, in rows.
    """
    W, gradients, turned = _orient(weight, gradients)
    M = V = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    Q, count, residual_norm = None, 0, 0.0
    for t, A in enumerate(gradients, start=1):
        if (t - 1) % gap == 0:
            old, Q = Q, sample(t, A, rank, Q)
            if old is not None and on_refresh == "reset":
                M, V, count = torch.zeros_like(M), torch.zeros_like(V), 0
            if old is not None and on_refresh == "transport":
                C = Q.T @ old
                m, v = M / (1 - betas[0] ** count), V / (1 - betas[1] ** count)
                v = (((v - m**2) @ (C**2).T) + (m @ C.T) ** 2).abs()
                M, V = m @ C.T * (1 - betas[0] ** count), v * (1 - betas[1] ** count)
        assert Q is not None
        R = A @ Q
        count += 1
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R**2
        correction1, correction2 = 1 - betas[0] ** count, 1 - betas[1] ** count
        N = (M / correction1) / ((V / correction2).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * N @ Q.T
        residual = A - R @ Q.T
        if outside == "fira" and rank < W.shape[1]:
            residual = residual * (N.norm(dim=1) / R.norm(dim=1))[:, None]
            residual = _limited(residual, residual_norm, max_growth)
            residual_norm = float(residual.norm())
            W = W - (lr if residual_lr is None else residual_lr) * residual
        if outside == "frugal" and rank < W.shape[1]:
            noise = 4 * W.shape[1] ** 0.5 * rounding * A.norm(dim=1, keepdim=True)
            W = W - lr * free_scale * torch.sign(residual) * (residual.abs() > noise)
        if outside == "orbit" and rank < W.shape[1]:
            parts = [_newton_schulz(part, 5) for part in residual.split(group)]
            W = W - lr * free_scale * W.shape[1] ** 0.5 * torch.cat(parts)
    return W.T if turned else W


def _newton_schulz(X: Tensor, iterations: int) -> Tensor:
    X = X / X.norm()
    for _ in range(iterations):
        X = 3.4445 * X - 4.775 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
    return X


def apollo(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, rank: int, gap: int, betas: Betas,
    eps: float, sample: Sample, per_tensor: bool = False, max_growth: float = 1.01, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """APOLLO; ``sample`` returns P with E[PPᵀ] = I. A refresh keeps the moments."""
    W, gradients, turned = _orient(weight, gradients)
    M = V = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    P, update_norm = None, 0.0
    for t, A in enumerate(gradients, start=1):
        if (t - 1) % gap == 0:
            P = sample(t, A, rank, P)
        assert P is not None
        R = A @ P
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R**2
        N = (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
        scales = N.norm() / R.norm() if per_tensor else (N.norm(dim=1) / R.norm(dim=1))[:, None]
        update = _limited(A * scales, update_norm, max_growth)
        update_norm = float(update.norm())
        W = (1 - lr * weight_decay) * W - lr * update
    return W.T if turned else W


def osd(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, rank: int, betas: Betas, eps: float,
    basis_lr: float, penalty: float, use_adam: bool = True, basis_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """Online subspace descent: Q starts at the first gradient's SVD and takes a step after each update of W.

    At t = 1 there is no step, because the SVD's basis minimises the loss. Autograd computes its gradient.
    """
    W, gradients, turned = _orient(weight, gradients)
    M = V = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    Q = dominant(1, gradients[0], rank, None).requires_grad_()
    solver: torch.optim.Optimizer = torch.optim.AdamW([Q], lr=basis_lr, weight_decay=basis_decay)
    if not use_adam:
        solver = torch.optim.SGD([Q], lr=basis_lr, weight_decay=basis_decay)
    for t, A in enumerate(gradients, start=1):
        with torch.no_grad():
            R = A @ Q
            M = betas[0] * M + (1 - betas[0]) * R
            V = betas[1] * V + (1 - betas[1]) * R**2
            N = (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
            W = W - lr * N @ Q.T
        if t > 1:
            unit = A / A.norm()
            identity = torch.eye(rank, dtype=Q.dtype)
            loss = ((unit @ Q @ Q.T - unit) ** 2).sum() + penalty * ((Q.T @ Q - identity) ** 2).sum()
            solver.zero_grad()
            loss.backward()
            solver.step()
    return W.T if turned else W


def sn_sm(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, rank: int | None, gap: int, betas: Betas,
    eps: float, subset_size: int, on_refresh: str = "reset", sample: Sample = dominant,
    weight_decay: float = 0.0, corrected: bool = True,
) -> Tensor:  # fmt: skip
    """Subset norm with subspace momentum; with momentum of full size (SN alone) if ``rank`` is None."""
    W, gradients, turned = _orient(weight, gradients)
    rows, size = W.shape
    M = torch.zeros(rows, size if rank is None else rank, dtype=W.dtype)
    V = torch.zeros(rows, size // subset_size, dtype=W.dtype)
    Q = None
    for t, A in enumerate(gradients, start=1):
        if rank is None:
            M = betas[0] * M + (1 - betas[0]) * A
            numerator = M
        else:
            if (t - 1) % gap == 0:
                old, Q = Q, sample(t, A, rank, Q)
                if old is not None and on_refresh == "reset":
                    M = torch.zeros_like(M)
                if old is not None and on_refresh == "transport":
                    M = M @ (Q.T @ old).T
            assert Q is not None
            R = A @ Q
            M = betas[0] * M + (1 - betas[0]) * R
            numerator = M @ Q.T + (A - R @ Q.T)
        sums = (A**2).reshape(rows, -1, subset_size).sum(2)
        V = V + sums if betas[1] == 1 else betas[1] * V + (1 - betas[1]) * sums
        correction2 = 1.0 if betas[1] == 1 else 1 - betas[1] ** t
        denominator = (V.sqrt() + eps).repeat_interleave(subset_size, dim=1)
        step_size = lr * correction2**0.5 / (1 - betas[0] ** t) if corrected else lr
        W = (1 - lr * weight_decay) * W - step_size * numerator / denominator
    return W.T if turned else W


def ldadam(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, rank: int, betas: Betas, eps: float,
    rho: float, sample: Sample = one_power_round, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """LDAdam with a new basis every step."""
    W, gradients, turned = _orient(weight, gradients)
    M = V = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    E = torch.zeros_like(W)
    Q = None
    for t, G in enumerate(gradients, start=1):
        A = G + E
        if Q is None:
            Q = sample(t, A, rank, None)
            R = A @ Q
            E = A - R @ Q.T
        else:
            correction1, correction2 = 1 - betas[0] ** (t - 1), 1 - betas[1] ** (t - 1)
            old = Q
            Q = sample(t, rho * (M / correction1) @ old.T + (1 - rho) * A, rank, old)
            C = Q.T @ old
            R = A @ Q
            E = A - R @ Q.T + betas[0] / (1 - betas[0]) * (M @ old.T - M @ C.T @ Q.T)
            m, v = M / correction1, V / correction2
            V = correction2 * (((v - m**2) @ (C**2).T) + (m @ C.T) ** 2).abs()
            M = M @ C.T
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R**2
        N = (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * N @ Q.T
    return W.T if turned else W


def rso(
    weight: Tensor, inputs: Sequence[Tensor], output_gradient: Callable[[int, Tensor], Tensor], *, lr: float,
    rank: int, gap: int, betas: Betas, eps: float, sample: Sample, solver: str = "adam",
    on_refresh: str = "reset", basis_scale: float = 1.0, proximal_eta: float | None = None,
    weight_decay: float = 0.0, refresh_warmup_steps: int = 0,
) -> Tensor:  # fmt: skip
    """RSO with whole inputs X (tokens × in) that forms y = X (W + B Pᵀ)ᵀ, P = basis_scale·Q, at each step.

    ``output_gradient(t, y)`` returns dY. ``sample(t, X, rank, old)`` returns an orthonormal basis Q before
    step t, where X is the input of step t−1 (of step 1 for t = 1) and ``old`` is None at t = 1.
    """
    W = weight.double().clone()
    xs = [x.double() for x in inputs]
    B = M = V = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    Q, count = None, 0
    for t, X in enumerate(xs, start=1):
        if (t - 1) % gap == 0:
            if Q is not None:
                W = W + B @ (basis_scale * Q).T
            old, Q, B = Q, sample(t, xs[max(t - 2, 0)], rank, Q), torch.zeros_like(B)
            if old is not None and on_refresh == "reset":
                M, V, count = torch.zeros_like(M), torch.zeros_like(V), 0
            if old is not None and on_refresh == "transport":
                C = Q.T @ old
                m, v = M / (1 - betas[0] ** count), V / (1 - betas[1] ** count)
                if solver == "adam":
                    v = (((v - m**2) @ (C**2).T) + (m @ C.T) ** 2).abs()
                    V = v * (1 - betas[1] ** count)
                if solver == "adagrad":
                    V = V @ (C**2).T
                M = M @ C.T
        assert Q is not None
        P = basis_scale * Q
        dY = output_gradient(t, X @ (W + B @ P.T).T)
        g = (dY.T @ X) @ P
        if proximal_eta is not None:
            g = g + B / proximal_eta
        count += 1
        M = betas[0] * M + (1 - betas[0]) * g
        V = V + g**2 if solver == "adagrad" else betas[1] * V + (1 - betas[1]) * g**2
        N = {
            "adam": (M / (1 - betas[0] ** count)) / ((V / (1 - betas[1] ** count)).sqrt() + eps),
            "momentum": M / (1 - betas[0] ** count),
            "adagrad": g / (V.sqrt() + eps),
        }[solver]
        rate = lr * (min(1.0, ((t - 1) % gap + 1) / (refresh_warmup_steps + 1)) if t > gap else 1.0)
        # weight decay acts on W + B Pᵀ
        W = W - rate * weight_decay * (W + B @ P.T)
        B = B - rate * N
    assert Q is not None
    return W + B @ (basis_scale * Q).T


def alice(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, rank: int, gap: int, betas: Betas, eps: float,
    tracking: float, compensation: float, max_growth: float = 1.01, sample: Sample = dominant,
    on_refresh: str = "keep", weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """Alice; ``sample`` gets a matrix whose Gram matrix is AᵀA + β₃/(1−β₃)·U S Uᵀ, with β₃ = ``tracking``."""
    W, gradients, turned = _orient(weight, gradients)
    rows, size = W.shape
    M = V = torch.zeros(rows, rank, dtype=W.dtype)
    S, p = torch.zeros(rank, rank, dtype=W.dtype), torch.zeros(rows, dtype=W.dtype)
    U, previous = None, 0.0
    for t, A in enumerate(gradients, start=1):
        if (t - 1) % gap == 0:
            seen, old = A, U
            if old is not None:
                values, vectors = torch.linalg.eigh(S * tracking / (1 - tracking))
                seen = torch.cat([A, (vectors * values.clamp(min=0).sqrt()).T @ old.T])
            U = sample(t, seen, rank, old)
            if old is not None and on_refresh == "transport":
                C = U.T @ old
                m, v = M / (1 - betas[0] ** (t - 1)), V / (1 - betas[1] ** (t - 1))
                v = (((v - m**2) @ (C**2).T) + (m @ C.T) ** 2).abs()
                M, V, S = M @ C.T, v * (1 - betas[1] ** (t - 1)), C @ S @ C.T
        assert U is not None
        R = A @ U
        S = tracking * S + (1 - tracking) * R.T @ R
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R**2
        p = betas[0] * p + (1 - betas[0]) * ((A**2).sum(1) - (R**2).sum(1))
        C = (size - rank) ** 0.5 * torch.diag(p**-0.5) @ (A - R @ U.T)
        C = _limited(C, previous, max_growth)
        previous = float(C.norm())
        W = (1 - lr * weight_decay) * W - lr * ((M / (V.sqrt() + eps)) @ U.T + compensation * C)
    return W.T if turned else W


def sumo(
    weight: Tensor, gradients: Sequence[Tensor], *, lr: float, rank: int, gap: int, momentum: float,
    on_refresh: str = "transport", sample: Sample = dominant, weight_decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """SUMO with an SVD of the momentum."""
    W, gradients, turned = _orient(weight, gradients)
    M = torch.zeros(W.shape[0], rank, dtype=W.dtype)
    Q = None
    for t, A in enumerate(gradients, start=1):
        if (t - 1) % gap == 0:
            old, Q = Q, sample(t, A, rank, Q)
            if old is not None and on_refresh == "transport":
                M = M @ (Q.T @ old).T
            if old is not None and on_refresh == "reset":
                M = torch.zeros_like(M)
        assert Q is not None
        M = momentum * M + (1 - momentum) * A @ Q
        left, _, right = torch.linalg.svd(M, full_matrices=False)
        W = (1 - lr * weight_decay) * W - lr * 0.2 * W.shape[0] ** 0.5 * left @ right @ Q.T
    return W.T if turned else W
