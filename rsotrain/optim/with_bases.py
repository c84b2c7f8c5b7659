"""What every optimizer with low-rank bases has: how they are chosen, when they change, what they tell."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rsotrain.config.methods import OnRefresh, SubspaceConfig
from rsotrain.errors import require
from rsotrain.optim.base import ParamGroupOptimizer
from rsotrain.subspace.bases import Bases
from rsotrain.subspace.samplers import Sampler


def pair(config: SubspaceConfig, sampler: Sampler) -> str:
    """What is refused, where a method and a sampler do not go together."""
    return f"optimizer={config.name} with sampler={sampler.name}"


def require_sampler(config: SubspaceConfig, sampler: Sampler | None) -> Sampler:
    """The sampler; UserError where there is none."""
    require(
        sampler is not None,
        f"optimizer={config.name} needs a sampler; sampler=none is for optimizers without a subspace",
    )
    assert sampler is not None
    return sampler


def require_orthonormal(config: SubspaceConfig, sampler: Sampler, *, always: bool) -> None:
    """Raise UserError where bases must be orthonormal, ``always`` or to transport moments, and are not."""
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
    """How the bases of a part are chosen.

    ``rank``: as in ``resolve_rank``. ``gap``: optimizer steps between refreshes. ``seed``: the run's.
    ``compute_dtype``: of the projections and of the stored bases; None: at least float32. A basis that
    is itself optimised, by a sampler that samples after the update, is stored in float32 whatever this says,
    but RSO's: it is multiplied by activations in ``compute_dtype``.
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
    """Base of GaLore's kin (``SubspaceOptimizer``) and of RSO, which set ``subspace`` and ``bases``."""

    subspace: Subspace
    bases: Bases
    # Are new bases sampled at the end of the step before the one that uses them first?
    samples_ahead: ClassVar[bool] = False

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        require_sampler(config, sampler)

    def is_replicated(self, name: str, key: str) -> bool:
        """All ranks have the same bases."""
        return super().is_replicated(name, key) or key in self.bases.state.get(name, ())

    def refresh_work(self) -> list[tuple[object, str]]:
        """The methods, as owner and name, in which a step does what it does only because bases change."""
        return [(self, "refresh")]

    def begins_round(self, step: int) -> bool:
        return self.bases.schedule.draw_index(0, step) is not None

    def resume(self) -> None:
        self.bases.resume()

    def metrics(self) -> dict[str, float]:
        return self.bases.record.metrics()
