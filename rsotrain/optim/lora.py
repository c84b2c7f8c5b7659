"""Low-rank adapters: LoRA (Hu et al., arXiv 2106.09685) and ReLoRA (Lialin et al., arXiv 2307.05695)."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rsotrain.config.choices import Pruning
from rsotrain.config.methods import LoRAConfig, ReLoRAConfig
from rsotrain.errors import require
from rsotrain.instruments.phases import Phase, phase
from rsotrain.models.architecture import Kind
from rsotrain.models.build import initial_generator
from rsotrain.models.lora_linear import LoraLinear, adapter_values, attach_adapters, factor_names
from rsotrain.optim.adamw import AdamW
from rsotrain.optim.base import Settings
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.parameter_groups import ParameterGroups
from rsotrain.optim.state_size import Weight, WeightsLayout
from rsotrain.optim.weights import Weights
from rsotrain.parallel.sharding import local, shard_of
from rsotrain.subspace.projection import resolve_rank
from rsotrain.subspace.samplers import Sampler
from rsotrain.subspace.seeding import generator


class LoRA(AdamW):
    """AdamW on A and B of W + (α/r) B A (``rsotrain.models.lora_linear``). W gets neither gradient nor state.

    A begins uniform in ±1/√in, B with 0. The optimizer state is 2·r·(in + out) elements for each linear. The
    norm that is logged and clipped is that of the gradients of A, B and the rest. Weight decay is that of A
    and B. There is no dropout.
    """

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: LoRAConfig,
        *,
        adapted: dict[str, LoraLinear],
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        assert set(parameters) == {factor for name in adapted for factor in factor_names(name)}
        self.adapted = adapted
        self.frozen = {name: layer.weight for name, layer in adapted.items()}
        for name in adapted:
            self._begin(name, initial_generator(factor_names(name)[0], self.keeper.seed))

    @torch.no_grad()
    def _begin(self, name: str, random: torch.Generator) -> None:
        """A drawn from ``random``, B = 0."""
        down, up = factor_names(name)
        A, B, shard = local(self.parameters[down]), local(self.parameters[up]), self.shards[down]
        B.zero_()
        if not A.is_meta:  # random numbers may come from the CPU, which takes seconds for a large model
            A.copy_(shard.of(adapter_values(shard.shape, random)))

    @classmethod
    def prepare_model(
        cls, model: Any, groups: ParameterGroups, config: Any
    ) -> tuple[ParameterGroups, dict[str, Any]]:
        """Give the linears of ``groups.blocks`` adapters, which are trained in place of their weights."""
        assert isinstance(model, nn.Module), "LoRA replaces modules, so it needs the model itself"
        adapted = attach_adapters(model, list(groups.blocks), config.rank, config.alpha)
        factors = {
            factor: parameter
            for name, layer in adapted.items()
            for factor, parameter in zip(factor_names(name), (layer.lora_A, layer.lora_B), strict=True)
        }
        frozen = groups.frozen | groups.blocks
        return replace(groups, blocks=factors, frozen=frozen), {"adapted": adapted}

    @classmethod
    def state_bytes_formula(cls, config: Any, weights: Sequence[Weight], layout: WeightsLayout) -> int:
        factors = []
        for weight in weights:
            rows, columns = weight.shape
            rank = resolve_rank(config.rank, min(weight.shape), weight.name)
            down, up = factor_names(weight.name)
            factors += [
                Weight(down, (rank, columns), Kind.down_factor),
                Weight(up, (rows, rank), Kind.up_factor),
            ]
        return super().state_bytes_formula(config, factors, layout)

    def weights_held(self) -> Iterable[Tensor]:
        yield from super().weights_held()
        yield from self.frozen.values()

    def ranks(self) -> list[int]:
        return [layer.lora_A.shape[0] for layer in self.adapted.values()]


class ReLoRA(LoRA):
    """LoRA with W ← W + (α/r) B A, a new A, B = 0 and pruned moments after every T (``merge_every``) steps.

    A merge is the end of its step, so that a checkpoint holds what the next step begins with. With
    ``restart_warmup_steps`` n, the rates of all weights are multiplied by (s+1)/(n+1) in steps s = 0, 1, …,
    n−1 after a merge, whatever the schedule: the paper's jagged schedule, but that the paper's begins with a
    rate of 0, which trains nothing.

    Of each moment of A and B the share ``prune_ratio`` becomes 0: the entries that are smallest in magnitude,
    as in the paper, or random ones. An entry keeps both moments or none. The authors' code prunes each moment
    for itself, and where only the first is left Adam divides it by ε, since A has no gradient in
    the first step after a merge, because B is 0. As in the code the count of Adam's bias correction goes on:
    until the second moments have grown again steps are up to (1−β₁)/√(1−β₂) rates long, which the warm-up is
    for.

    A merge gathers A and, for pruning by magnitude, the moments of A and B, of one linear at a time.
    """

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: ReLoRAConfig,
        *,
        adapted: dict[str, LoraLinear],
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config, adapted=adapted)
        shards = {name: shard_of(weight) for name, weight in self.frozen.items()}
        self.targets = Weights(self.frozen, shards, settings.weight_rounding, self.keeper.seed)
        for name in adapted:
            assert shards[name].dim == self.shards[factor_names(name)[1]].dim, (
                "W and B share their rows alike"
            )

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        super().refuse(config, sampler)
        warmup, gap = config.restart_warmup_steps, config.merge_every
        require(
            warmup == 0 or warmup < gap,
            f"optimizer.restart_warmup_steps={warmup} must be less than optimizer.merge_every={gap}",
        )

    def rate_factor(self, step: int) -> float:
        merges, since = divmod(step - 1, self.config.merge_every)
        return 1.0 if merges == 0 else min(1.0, (since + 1) / (self.config.restart_warmup_steps + 1))

    def costliest_step(self) -> int | None:
        return self.config.merge_every

    def units(self) -> list[list[str]]:
        """A merge needs both factors of a linear, after their update."""
        return [list(factor_names(name)) for name in self.adapted]

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        super().update_of(names, step, lr_factor)
        if step % self.config.merge_every == 0:
            with phase(Phase.refresh):
                for name in self.adapted:
                    if factor_names(name)[0] in names:
                        self._merge(name, step)

    def _merge(self, name: str, step: int) -> None:
        down, up = factor_names(name)
        A, B = (local(self.parameters[factor]).detach() for factor in (down, up))
        wide = work_dtype(A.dtype)
        basis = self.shards[down].all_gather(A).to(wide).T
        self.targets.add_lifted_(name, B.to(wide), basis, self.adapted[name].scale, step, decay=0.0)
        self._begin(name, generator(self.keeper.seed, "lora_A", name, step, device=A.device))
        for factor in (down, up):
            self._prune(factor, step)

    def _prune(self, factor: str, step: int) -> None:
        moments = list(self.moments[factor].values())
        if self.config.prune_ratio == 1.0:
            for moment in moments:
                moment.zero_()
            return
        wide = self.keeper.read(moments)
        kept = self._kept(factor, wide, step)
        for values in wide:
            values.mul_(kept)
        self.keeper.write(moments, wide, step, "merge")

    def _kept(self, factor: str, moments: Sequence[Tensor], step: int) -> Tensor:
        """Which entries keep both their moments, on this rank's piece."""
        shard, ratio, device = self.shards[factor], self.config.prune_ratio, moments[0].device
        if self.config.pruning is Pruning.random:
            random = generator(self.keeper.seed, "pruning", factor, step, device=device)
            return shard.of(torch.rand(shard.shape, generator=random, device=device)) >= ratio
        kept = torch.ones_like(moments[0], dtype=torch.bool)
        number = round(ratio * math.prod(shard.shape))
        for values in moments if number > 0 else ():
            sizes = values.abs()
            kept &= sizes > shard.all_gather(sizes).flatten().kthvalue(number).values
        return kept
