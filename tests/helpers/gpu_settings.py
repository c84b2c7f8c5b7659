"""Of what size the checks in tests/gpu are: for GPUs, for a dry run on the CPU, for a quick one."""

import os
from dataclasses import dataclass

import pytest
import torch
from helpers.runs import OPTIMIZERS

DRY_RUN = "RSOTRAIN_GPU_DRY_RUN"  # in the environment: 1, or quick


@dataclass(frozen=True)
class Settings:
    """``few``: optimizers of the longer checks. ``compiled``: those that are compiled. ``peaks``: (model,
    overrides) whose planned peak is compared. ``growth_steps``: of the check that memory does not grow.
    ``ranks``: of the checks with several GPUs."""

    device: str
    optimizers: tuple[str, ...]
    few: tuple[str, ...]
    compiled: tuple[str, ...]
    peaks: tuple[tuple[str, ...], ...]
    growth_steps: int
    speed_models: tuple[str, ...]
    speed_overrides: tuple[str, ...]
    with_huggingface: bool
    ranks: int

    @property
    def dry(self) -> bool:
        return self.device == "cpu"


_FEW = ("adam", "galore", "rso")
_SIX = (
    ("model=llama_130m", "optimizer=adam"),
    ("model=llama_130m", "optimizer=rso"),
    ("model=llama_130m", "optimizer=galore", "optimizer.update_proj_gap=3"),
    ("model=llama_130m", "optimizer=adam", "precision=bf16", "optimizer.state_dtype=int8"),
    ("model=llama_130m", "optimizer=rso", "precision=bf16", "activation_checkpointing=block"),
    ("model=llama_350m", "optimizer=carry", "optimizer.update_proj_gap=3", "micro_batch_size=4"),
)
_TINY_SIX = tuple(("model=llama_tiny", *settings[1:]) for settings in _SIX)
_TIMED = ("llama_130m", "llama_350m", "llama_1b")


def settings() -> Settings:
    how = os.environ.get(DRY_RUN)
    if how is None:
        ranks = max(1, torch.cuda.device_count())
        sizes = ("seq_len=1024", "batch_size=16")
        everything = tuple(OPTIMIZERS)
        return Settings("cuda", everything, _FEW, (*_FEW, "rso_pca"), _SIX, 200, _TIMED, sizes, True, ranks)
    quick = how == "quick"
    return Settings(
        "cpu",
        ("rso",) if quick else tuple(OPTIMIZERS),
        ("rso",) if quick else _FEW,
        () if quick else _FEW,  # the compiler alone takes seconds to import
        _TINY_SIX[1:2] if quick else _TINY_SIX,
        4 if quick else 20,
        ("llama_tiny",),
        ("seq_len=64", "batch_size=4"),
        not quick,
        2,
    )


HERE = settings()

needs_a_gpu = pytest.mark.skipif(
    not (HERE.dry or torch.cuda.is_available()),
    reason=f"needs a CUDA device; {DRY_RUN}=1 walks the same checks on the CPU",
)
needs_gpus = pytest.mark.skipif(
    not HERE.dry and torch.cuda.device_count() < 2,
    reason=f"needs two CUDA devices or more; {DRY_RUN}=1 takes two processes on the CPU",
)
