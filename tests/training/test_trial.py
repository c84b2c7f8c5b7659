"""The trial of a user's own optimizer: ours pass it, and each thing that it is for is found."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.runs import compose
from torch import Tensor

from rsotrain import plugged
from rsotrain.config.methods import OptimizerConfig
from rsotrain.config.registry import CODE
from rsotrain.config.schema import Config
from rsotrain.errors import UserError
from rsotrain.optim.full_rank import FullRankOptimizer
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.parallel.ranks import World
from rsotrain.training import trial

ALONE = World(torch.device("cpu"))
OURS = ("adam", "galore", "muon", "rso_pca", "relora", "scale")


@pytest.fixture(autouse=True)
def _all_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugged, "is_plugged", lambda settings: True)


def config_of(*overrides: str) -> Config:
    return compose(["model=llama_tiny", *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_ours_pass(name: str) -> None:
    for more in ([], ["optimizer.update_in_backward=true", "optimizer.state_dtype=int8"]):
        assert trial.try_plugged(config_of(f"optimizer={name}", *more), ALONE) is None


class Momentum(FullRankOptimizer):
    """Right in all; the methods below differ from it in one thing each."""

    @classmethod
    def moment_shapes(cls, config: Any, name: str, piece: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"exp_avg": piece}

    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        return -moments[0].lerp_(gradient, 0.1)


class WholeNorms(Momentum):
    """Takes the norm of a matrix as one must."""

    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        (norm,) = self.shards[name].norms(gradient)
        return super().negative_update(name, gradient, moments, step) / norm


class NormsOfPieces(Momentum):
    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        return super().negative_update(name, gradient, moments, step) / gradient.norm()


class LateState(Momentum):
    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        if "late" not in self.state[name]:
            self.add_tensor(name, "late", torch.zeros_like(gradient), self.shards[name].dim)
        return super().negative_update(name, gradient, moments, step)


class UnknownState(Momentum):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for state in self.state.values():
            state["own"] = torch.zeros(1)


class NoTensor(Momentum):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for state in self.state.values():
            state["count"] = 0  # type: ignore[assignment]


class OtherState(Momentum):
    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        self.state[name]["exp_avg"] = moments[0].double()
        return super().negative_update(name, gradient, moments, step)


class OwnDice(Momentum):
    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        return super().negative_update(name, gradient, moments, step) * torch.rand(())


class OwnRate(Momentum):
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        self.peak_lr = self.peak_lr or 0.01
        super().update_of(names, step, lr_factor)


class NoUpdate(Momentum):
    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        return super().negative_update(name, gradient, moments, step) * ("q_proj" not in name)


class Divides(Momentum):
    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        return super().negative_update(name, gradient, moments, step) / 0.0


class WrongFormula(Momentum):
    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        return StateSize((matrix.piece, matrix.piece))


class AllTogether(Momentum):
    """Its update depends on which parameters it is asked for at a time."""

    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        super().update_of(names, step, lr_factor / len(names))


class Breaks(Momentum):
    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        return gradient @ moments[0]


def with_method(method: type, *overrides: str) -> Config:
    """A run of ``method``, whose settings are those of all optimizers."""

    @dataclass
    class Own(OptimizerConfig):
        pass

    config = config_of("optimizer=adam", *overrides)
    own = Own(**vars(config.optimizer))
    CODE[Own] = f"{__name__}:{method.__name__}"
    return replace(config, optimizer=replace(own, name="own"))


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (LateState, "has the state .*late only after a step; make all state in the constructor"),
        (UnknownState, r"keeps the state .*\.own, which no add_moment or add_tensor has made"),
        (NoTensor, r"keeps a int as the state .*\.count; a checkpoint holds tensors alone"),
        (OtherState, "turns the state .*exp_avg from torch.float32 of .* into torch.float64"),
        (OwnDice, "does not go on from a checkpoint as without one: .* differs"),
        (OwnRate, "moves .* at a learning rate of 0"),
        (NoUpdate, "leaves .*q_proj.weight as it is in 3 steps"),
        (Divides, "makes .* infinite or NaN|fails on a small model: NonFiniteError"),
        (WrongFormula, "has .* bytes of state on a small model, and .* by its matrix_state"),
        (Breaks, "fails on a small model: RuntimeError: .*test_trial.py, line"),
    ],
)
def test_what_a_run_relies_on_is_tried(method: type, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^optimizer=own {sentence}"):
        trial.try_plugged(with_method(method), ALONE)


def test_updates_in_the_backward_pass_are_tried_where_the_run_has_them() -> None:
    assert trial.try_plugged(with_method(Momentum, "optimizer.update_in_backward=true"), ALONE) is None
    with pytest.raises(UserError, match="update_in_backward=true does not do what it does without"):
        trial.try_plugged(with_method(AllTogether, "optimizer.update_in_backward=true"), ALONE)


def test_settings_that_do_not_suit_the_small_model_are_no_mistake() -> None:
    untried = trial.try_plugged(config_of("optimizer=sn", "optimizer.subset_size=64"), ALONE)
    assert untried is not None
    assert "optimizer=sn was not tried on a small model, which its settings do not suit: " in untried


@pytest.mark.slow
def test_sharding_is_tried_on_the_ranks_of_the_run(tmp_path: Path) -> None:
    configs = {"rso_pca": config_of("optimizer=rso_pca", "parallelism=fsdp")}
    for method in (WholeNorms, NormsOfPieces):
        configs[method.__name__] = with_method(method, "parallelism=fsdp")
    checks: dict[str, Callable[[World], Any]] = {
        name: partial(trial.try_plugged, config) for name, config in configs.items()
    }
    found = ranks.run(2, checks, tmp_path)
    for outcome in found.pop("NormsOfPieces"):
        assert "does not train 2 processes as one" in str(outcome)
        assert "sum what is taken over a whole matrix" in str(outcome)
    for outcomes in found.values():
        assert ranks.succeeded(outcomes) == [None, None]
