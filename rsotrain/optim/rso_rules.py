"""Which settings and samplers RSO takes."""

from typing import Any

from rsotrain.config.choices import BasisStorage
from rsotrain.errors import require
from rsotrain.optim.with_bases import pair, require_orthonormal, require_sampler
from rsotrain.subspace.samplers import Columns, Sampler


def refuse_pair(config: Any, sampler: Sampler | None) -> None:
    """Raise UserError for settings of RSO that make no sense, alone or with this sampler."""
    sampler = require_sampler(config, sampler)
    both, scaled = pair(config, sampler), sampler.columns is Columns.scaled
    require(
        sampler.orthonormal or scaled,
        f"{both}: RSO needs bases of a known scale, which this sampler's are not; {sampler.hint}",
    )
    require(
        config.basis_scale or not scaled,
        f"{both}: these bases are scaled already, so optimizer.basis_scale=false would do nothing;"
        " leave it true or use sampler=haar",
    )
    require(
        not sampler.needs_gradient,
        f"{both}: sampler.solver=full decomposes the gradient, which RSO never forms;"
        " use sampler.solver=gram",
    )
    require(
        config.projection is BasisStorage.stored or not sampler.informed,
        f"{both}: these bases depend on data, which cannot be regenerated from a seed;"
        " use optimizer.projection=stored, or a random sampler such as haar",
    )
    eta, warmup = config.proximal_eta, config.refresh_warmup_steps
    require(eta is None or eta > 0, f"optimizer.proximal_eta={eta} must be positive, or null for no term")
    require(
        0 <= warmup < config.update_proj_gap,
        f"optimizer.refresh_warmup_steps={warmup} must be at least 0 and less than"
        f" optimizer.update_proj_gap={config.update_proj_gap}",
    )
    require_orthonormal(config, sampler, always=False)
