"""A word at the start of a run on a GPU whose refreshes take a large share of it."""

from rsotrain.optim.with_bases import OptimizerWithBases
from rsotrain.subspace.cost import eigenvectors_seconds
from rsotrain.training.trainer import Trainer

# FLOP/s of products in bfloat16 on one H100, about half of what its makers state
_PRODUCTS_PER_SECOND = 4e14
_SHARE = 0.05  # of the training, up to which nothing is said


def costly_refreshes(trainer: Trainer, device_kind: str) -> list[str]:
    """A sentence for each method whose refreshes take eigenvectors for more than a twentieth of the time.

    They are what takes time on a GPU: chains of small kernels, which on a CPU are no slower than products.
    Both times are rules of thumb. ``device_kind``: "cpu", for which there are none, or "cuda".
    """
    if device_kind != "cuda":
        return []
    config, ranks = trainer.config, trainer.world.size
    tokens = config.batch_size * config.seq_len
    step_seconds = tokens * trainer.flops_per_token / ranks / _PRODUCTS_PER_SECOND
    said = []
    for group in trainer.optimizer.groups:
        if not isinstance(group, OptimizerWithBases):
            continue
        sampler = group.subspace.sampler.on_gpu or group.subspace.sampler
        if not sampler.decomposes:
            continue
        sizes = [size for size, _ in group.bases.sizes.values()]
        seconds = sum(map(eigenvectors_seconds, sizes)) / ranks
        share = seconds / (seconds + group.subspace.gap * step_seconds)
        if share > _SHARE:
            said.append(
                f"sampler={sampler.name} takes the eigenvectors of {len(sizes)} matrices every"
                f" {group.subspace.gap} steps, about {seconds:.2g} s on a GPU, {share:.0%} of the time (both"
                " estimated); sampler=randomized_svd finds nearly the same subspaces by products"
            )
    return said
