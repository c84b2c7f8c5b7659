"""Every optimizer and sampler of ``conf/``, small: what is added there is tested without another list."""

from dataclasses import replace
from functools import cache

from helpers.command import ROOT
from helpers.runs import OPTIMIZERS, compose

from rsotrain.config.choices import InnerSolver
from rsotrain.config.methods import (
    AdamMiniConfig,
    LoRAConfig,
    OptimizerConfig,
    ReLoRAConfig,
    ScaleConfig,
    SoapConfig,
    SolverConfig,
    SubspaceConfig,
)
from rsotrain.config.samplers import SamplerConfig
from rsotrain.optim.build import method_of

# Newton-Schulz has three significant digits.
ORTHOGONALISED_IN_BFLOAT16 = ("muon", "normuon", "dion2")
SAMPLERS = sorted(path.stem for path in (ROOT / "conf" / "sampler").glob("*.yaml"))


@cache
def _composed(name: str) -> tuple[OptimizerConfig, SamplerConfig]:
    config = compose(["model=llama_tiny", f"optimizer={name}"])
    return config.optimizer, config.sampler


def sampler_config(name: str) -> SamplerConfig:
    return compose(["model=llama_tiny", "optimizer=galore", f"sampler={name}"]).sampler


def small(name: str, *, rank: int, gap: int, **settings: object) -> tuple[OptimizerConfig, SamplerConfig]:
    """``optimizer=name`` with its own sampler, of a rank and with refreshes that small matrices can have."""
    optimizer, sampler = _composed(name)
    if isinstance(optimizer, SubspaceConfig):
        own_rank = optimizer.rank if isinstance(optimizer.rank, int) else rank
        settings |= {
            "rank": min(rank, own_rank), "update_proj_gap": min(gap, optimizer.update_proj_gap),
        }  # fmt: skip
    if isinstance(optimizer, SoapConfig):
        settings |= {"precondition_frequency": gap}
    if isinstance(optimizer, LoRAConfig):
        settings |= {"rank": rank}
    if isinstance(optimizer, ReLoRAConfig):
        settings |= {"merge_every": gap, "restart_warmup_steps": 1}
    if isinstance(optimizer, ScaleConfig):  # these matrices are neither head nor embedding
        settings |= {"momentum_parameters": [], "column_parameters": []}
    if isinstance(optimizer, AdamMiniConfig):  # nor those of queries and keys
        settings |= {"head_parameters": []}
    return replace(optimizer, **settings), replace(sampler)  # type: ignore[arg-type]


def refreshed_every(name: str, steps: int) -> list[str]:
    """Overrides by which ``optimizer=name`` draws its bases, or merges its adapters, so often."""
    config, _ = _composed(name)
    if isinstance(config, SoapConfig):
        return [f"optimizer.precondition_frequency={steps}"]
    if isinstance(config, ReLoRAConfig):
        return [f"optimizer.merge_every={steps}", "optimizer.restart_warmup_steps=1"]
    return [f"optimizer.update_proj_gap={steps}"] if isinstance(config, SubspaceConfig) else []


OF_MATRICES = [name for name in OPTIMIZERS if not method_of(_composed(name)[0]).changes_modules()]


def solver_variants(name: str) -> dict[str, InnerSolver]:
    """``name-solver`` for each solver that the method can have beside Adam."""
    if not isinstance(_composed(name)[0], SolverConfig):
        return {}
    return {f"{name}-{solver.name}": solver for solver in InnerSolver if solver is not InnerSolver.adam}
