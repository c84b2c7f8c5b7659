"""Time and captured energy of each way to find a basis, against torch.linalg.svd.

    python tests/benchmark/refresh.py [--shape 4096 11008] [--rank 1024] [--threads 2] [--no-svd]

The matrix has the spectrum σ_i = i^(−decay) plus noise. Energy is relative to that of the exact dominant
basis (from an eigendecomposition in float64). The SVD of 4096×11008 alone takes minutes.
"""

import argparse
import time

import torch
from torch import Tensor

from rsotrain.subspace import samplers
from rsotrain.subspace.gram import GradientGram
from rsotrain.subspace.online_pca import online_pca
from rsotrain.subspace.projection import oriented, side_of
from rsotrain.subspace.samplers import SampleRequest
from rsotrain.subspace.seeding import generator


def matrix(rows: int, columns: int, decay: float) -> Tensor:
    """Random with a power-law spectrum in random directions, plus a floor of noise."""
    random = torch.Generator().manual_seed(0)
    k = min(rows, columns)
    left = torch.randn(rows, k, generator=random) * torch.arange(1, k + 1).float().pow(-decay)
    return left @ torch.randn(k, columns, generator=random) / columns**0.5 + 0.01 * torch.randn(
        rows, columns, generator=random
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 2752])
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--decay", type=float, default=0.75)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-svd", action="store_true", help="leave out torch.linalg.svd")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gradient = matrix(*arguments.shape, decay=arguments.decay)
    a = oriented(gradient, side_of(gradient.shape))
    size, rank = a.shape[1], arguments.rank

    def request(index: int, previous: Tensor | None) -> SampleRequest:
        gram = GradientGram.of_finite(a)
        return SampleRequest(size, rank, gram, generator(0, index), a.device, previous)

    # the basis that a run would have in use: that of a gradient which differs by a third
    drifted = a + torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) * a.std() / 3
    values, previous_vectors = torch.linalg.eigh(drifted.T @ drifted)
    previous = previous_vectors[:, -rank:].flip(1)
    exact = torch.linalg.eigvalsh(a.T.double() @ a.double())[-rank:].sum()
    del drifted, values, previous_vectors

    ways = {
        "svd": lambda: samplers.svd(request(0, None)),
        "importance": lambda: samplers.importance(request(0, None), power=1.0),
        "randomized_svd, first": lambda: samplers.randomized_svd(request(0, None), rounds=2),
        "randomized_svd, later": lambda: samplers.randomized_svd(request(0, previous), rounds=2),
        "block_power, later": lambda: samplers.randomized_svd(request(0, previous), rounds=1),
        "online_pca, later": lambda: online_pca(
            request(0, previous), lr=0.005, penalty=0.1, use_adam=False, orthonormalize=False
        ),
        "haar": lambda: samplers.haar(request(0, None)),
        "srht": lambda: samplers.srht(request(0, None)),
    }
    if not arguments.no_svd:
        ways = {"torch.linalg.svd": lambda: samplers.full_svd(request(0, None))} | ways
    print(f"{arguments.shape[0]}×{arguments.shape[1]}, rank {rank}, {arguments.threads} threads")
    print(f"{'basis':24s} {'seconds':>8s} {'energy':>8s} {'of svd':>8s}")
    base = None
    for name, find in ways.items():
        start = time.perf_counter()
        basis = find()
        seconds = time.perf_counter() - start
        base = base or (seconds if name == "torch.linalg.svd" else None)
        energy = float((a @ basis).square().sum() / exact)
        ratio = f"1/{base / seconds:.1f}" if base else "–"
        print(f"{name:24s} {seconds:8.2f} {energy:8.4f} {ratio:>8s}", flush=True)


if __name__ == "__main__":
    main()
