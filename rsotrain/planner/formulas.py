"""Bytes of the optimizer state in closed form, from the shapes of a model alone.

Of an m×n matrix with larger side M and smaller side k at rank r (elements): adam 2mn; galore and its kin
kr + 2Mr (a basis, two moments); sn_sm kr + Mr + M·k/subset; sn mn + M·k/subset; muon mn; ldadam mn more
than galore. rso: 2r·out for each linear and r·in for each input, which several linears share. Outside the
blocks: adam. This is the check on the planner, which asks the optimizer itself.
"""

import re
from dataclasses import dataclass

from rsotrain.config.methods import (
    AdamConfig,
    ApolloConfig,
    BasisStorage,
    FiraConfig,
    InnerSolver,
    LDAdamConfig,
    MuonConfig,
    OnlinePCAConfig,
    PCASolver,
    RSOConfig,
    SNConfig,
    SNSMConfig,
    StateDtype,
    SubspaceConfig,
)
from rsotrain.config.schema import Config, ModelConfig, Precision
from rsotrain.models import architecture
from rsotrain.models.architecture import Weight
from rsotrain.models.build import model_without_memory
from rsotrain.parallel.ranks import shards_of
from rsotrain.parallel.sharding import preferred_dim
from rsotrain.subspace.projection import resolve_rank

_SEED = 8  # bytes of a regenerated basis' seed, int64
_COUNT = 4  # bytes of a step count or a norm: one float32 a matrix


def weights_of(model: ModelConfig, vocab_size: int) -> list[Weight]:
    """Every parameter of a model; tied ones once."""
    return architecture.weights_of(model_without_memory(model, vocab_size))


@dataclass(frozen=True)
class StateBytes:
    """Of rank 0, which has the largest pieces. ``blocks``: of the matrices that the method updates."""

    blocks: int
    rest: int

    @property
    def total(self) -> int:
        return self.blocks + self.rest


def state_bytes(config: Config, vocab_size: int) -> StateBytes:
    """Of the optimizer state on rank 0 of ``parallelism.world_size`` ranks."""
    formula = _Formula(config)
    claimed = [re.compile(pattern) for pattern in config.optimizer.block_parameters]
    blocks: list[Weight] = []
    rest = 0
    for weight in weights_of(config.model, vocab_size):
        if any(pattern.search(weight.name) for pattern in claimed):
            blocks.append(weight)
        else:
            rest += 2 * formula.moment * formula.piece(weight.shape)
    return StateBytes(formula.blocks(blocks), rest)


class _Formula:
    def __init__(self, config: Config) -> None:
        self.optimizer, self.sampler = config.optimizer, config.sampler
        self.pieces = shards_of(config.parallelism, config.parallelism.world_size or 1)
        self.moment = 2 if self.optimizer.state_dtype is StateDtype.bfloat16 else 4
        lagged = isinstance(self.sampler, OnlinePCAConfig) and not isinstance(self.optimizer, RSOConfig)
        self.basis = 4 if lagged or config.precision is Precision.fp32 else 2

    def piece(self, shape: tuple[int, ...], rows: bool = False) -> int:
        """Elements of the largest piece."""
        dim = preferred_dim(shape, self.pieces, rows=rows)
        others = shape[1 - dim] if len(shape) == 2 else 1
        return -(-shape[dim] // self.pieces) * others

    def blocks(self, weights: list[Weight]) -> int:
        if isinstance(self.optimizer, RSOConfig):
            return self._rso(self.optimizer, weights)
        return sum(self._matrix(weight) for weight in weights)

    def _matrix(self, weight: Weight) -> int:
        optimizer, shape = self.optimizer, weight.shape
        size = min(shape)
        whole = self.moment * self.piece(shape)
        right = shape[0] >= shape[1]
        projected_is_sharded = preferred_dim(shape, self.pieces, rows=False) == (1 if right else 0)
        rows = max(shape) if projected_is_sharded else -(-max(shape) // self.pieces)
        match optimizer:
            case AdamConfig():
                return 2 * whole
            case MuonConfig():
                return whole
            case SNConfig():
                return whole + self.moment * rows * (size // (optimizer.subset_size or size))
        assert isinstance(optimizer, SubspaceConfig)
        rank = resolve_rank(optimizer.rank, size, weight.name)
        basis = self._bases(size, rank)
        low_rank = self.moment * rows * rank
        match optimizer:
            case SNSMConfig():
                return basis + low_rank + self.moment * rows * (size // (optimizer.subset_size or size))
            case FiraConfig() | ApolloConfig():
                return basis + 2 * low_rank + 2 * _COUNT
            case LDAdamConfig():
                return basis + 2 * low_rank + _COUNT + 4 * self.piece(shape)
        return basis + 2 * low_rank + _COUNT

    def _bases(self, size: int, rank: int) -> int:
        result = self.basis * size * rank
        if isinstance(self.sampler, OnlinePCAConfig) and self.sampler.solver is PCASolver.adam:
            result += 2 * 4 * size * rank + _COUNT
        return result

    def _rso(self, optimizer: RSOConfig, weights: list[Weight]) -> int:
        sites: dict[str, list[Weight]] = {}
        for weight in weights:
            sites.setdefault(weight.site, []).append(weight)
        moments = 2 if optimizer.solver is InnerSolver.adam else 1
        total = 0
        for name, members in sites.items():
            rank = resolve_rank(optimizer.rank, max(min(w.shape) for w in members), name)
            if optimizer.projection is BasisStorage.stored:
                total += self._bases(members[0].shape[1], rank)
            else:
                total += _SEED
            for weight in members:
                rows = -(-weight.shape[0] // self.pieces)
                total += moments * self.moment * rows * rank + _COUNT
                if optimizer.proximal_eta is not None:
                    total += 4 * rows * rank
        return total
