"""The common base of optimizers with low-rank bases, and the settings of these bases."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rsotrain.config.choices import OnRefresh
from rsotrain.config.methods import SubspaceConfig
from rsotrain.errors import require
from rsotrain.optim.base import ParamGroupOptimizer
from rsotrain.subspace.bases import Bases
from rsotrain.subspace.samplers import Sampler


def pair(config: SubspaceConfig, sampler: Sampler) -> str:
    """The beginning of a sentence that refuses an optimizer with a sampler."""
    return f"optimizer={config.name} with sampler={sampler.name}"


def require_sampler(config: SubspaceConfig, sampler: Sampler | None) -> Sampler:
    """Return ``sampler``; UserError if it is None."""
    require(
        sampler is not None,
        f"optimizer={config.name} needs a sampler; sampler=none is for optimizers without a subspace",
    )
    assert sampler is not None
    return sampler


def require_orthonormal(config: SubspaceConfig, sampler: Sampler, *, always: bool) -> None:
    """Raise UserError if bases must be orthonormal (``always``, or to transport moments) and are not."""
    transports = config.on_refresh is OnRefresh.transport
    what = f"optimizer={config.name}" if always else "optimizer.on_refresh=transport"
    otherwise = "" if always else ", or set optimizer.on_refresh=keep"
    require(
        sampler.orthonormal or not (always or transports),
        f"{pair(config, sampler)}: {what} needs orthonormal bases, which this sampler's are not;"
        f" {sampler.hint}{otherwise}",
    )


@dataclass(frozen=True)
class Subspace:
    """How the bases of a parameter group are chosen.

    ``rank``: as in ``resolve_rank``. ``gap``: update_proj_gap, optimizer steps between two refreshes.
    ``seed``, ``total_steps``: those of the run. ``compute_dtype``: the dtype of projections and stored bases;
    None: at least float32. Bases of a sampler that optimises them (``post_update``) are stored in float32 in
    any case, except in RSO, which multiplies them by activations in ``compute_dtype``.
    """

    sampler: Sampler
    rank: int | float
    gap: int
    on_refresh: OnRefresh
    staggered: bool = False
    seed: int = 0
    total_steps: int = 1
    compute_dtype: torch.dtype | None = None


class OptimizerWithBases(ParamGroupOptimizer):
    """The base of ``SubspaceOptimizer`` and of RSO, which set ``subspace`` and ``bases``."""

    subspace: Subspace
    bases: Bases
    # Are bases sampled at the end of the step before the one that first uses them?
    samples_ahead: ClassVar[bool] = False

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        require_sampler(config, sampler)

    def is_replicated(self, name: str, key: str) -> bool:
        """Bases are the same on all ranks."""
        return super().is_replicated(name, key) or key in self.bases.state.get(name, ())

    def joined_keys(self, name: str) -> list[str]:
        return [key for key in super().joined_keys(name) if key not in self.bases.state.get(name, ())]

    def refresh_work(self) -> list[tuple[object, str]]:
        """(owner, method name) of the work that a step does only because bases are refreshed."""
        return [(self, "refresh")]

    def begins_round(self, step: int) -> bool:
        return self.bases.schedule.refresh_index(0, step) is not None

    def resume(self) -> None:
        self.bases.resume()

    def metrics(self) -> dict[str, float]:
        self.bases.hear()
        return self.bases.record.metrics()
