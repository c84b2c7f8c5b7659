"""NorMuon and Dion2: against float64 transcriptions of their papers, and in limits."""

from dataclasses import replace

import pytest
import torch
from helpers.one_matrix import BASE, LR, PRECISIONS, SHAPES, Transcription, build, error_of
from torch import Tensor, nn

from rsotrain.config.choices import NewtonSchulzDtype
from rsotrain.config.methods import Dion2Config, MuonConfig, NorMuonConfig, OptimizerConfig
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.optim import reference_full_rank as reference

NONE = NoSamplerConfig(name="none")
DECAY = {"lr": LR, "weight_decay": 0.1}


def _dion2(fraction: float) -> tuple[OptimizerConfig, Transcription]:
    return (
        Dion2Config(name="dion2", fraction=fraction, **BASE),
        lambda w, g: reference.dion2(w, g, fraction=fraction, **DECAY),
    )


CASES: dict[str, tuple[OptimizerConfig, Transcription]] = {
    "normuon": (NorMuonConfig(name="normuon", **BASE), lambda w, g: reference.normuon(w, g, **DECAY)),
    "normuon-plain": (
        NorMuonConfig(name="normuon", nesterov=False, momentum=0.8, row_decay=0.9, **BASE),
        lambda w, g: reference.normuon(w, g, nesterov=False, momentum=0.8, row_decay=0.9, **DECAY),
    ),
    "dion2": _dion2(0.25),
    "dion2-half": _dion2(0.5),
    "dion2-whole": _dion2(1.0),
}

# Newton-Schulz runs in bfloat16, an error of 2e-3 for each product, enlarged by the slope at small singular
# values, 3.4⁵; 20 such updates of about the same direction. In bf16 the weight is rounded in addition.
TOLERANCE = {"fp32": 0.06, "bf16_mixed": 0.06, "bf16": 0.12}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("side", SHAPES)
@pytest.mark.parametrize("method", CASES)
def test_twenty_steps_equal_the_reference(method: str, side: str, precision: str) -> None:
    config, transcription = CASES[method]
    assert error_of(config, NONE, transcription, SHAPES[side], precision) < TOLERANCE[precision]


@pytest.mark.parametrize("side", SHAPES)
@pytest.mark.parametrize("method", ["normuon", "dion2"])
def test_iterations_in_float32_follow_the_reference_closely(method: str, side: str) -> None:
    """The slope of 3.4⁵ at small singular values times float32's error, in 20 updates of one direction."""
    config, transcription = CASES[method]
    config = replace(config, ns_dtype=NewtonSchulzDtype.float32)
    assert error_of(config, NONE, transcription, SHAPES[side], "fp32") < 1e-4


def test_muon_in_float32_is_muon_but_for_the_rounding() -> None:
    """Rounding to bfloat16, which one step shows, is all that ``ns_dtype`` changes."""
    for shape in SHAPES.values():
        fine, coarse = (
            moved(MuonConfig(name="muon", ns_dtype=dtype, **BASE), [noise(*shape)])[0]
            for dtype in (NewtonSchulzDtype.float32, NewtonSchulzDtype.bfloat16)
        )
        expected = reference.newton_schulz(noise(*shape).double())
        scale = float(expected.norm() / fine.norm())
        assert torch.allclose(-fine.double() * scale, expected, atol=1e-5)
        assert 1e-4 < float((fine - coarse).norm() / fine.norm()) < 0.06


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(config: OptimizerConfig, grads: list[Tensor]) -> list[Tensor]:
    """The weight, from 0, after each step."""
    parameter = nn.Parameter(torch.zeros(grads[0].shape))
    optimizer = build(parameter, replace(config, weight_decay=0.0), NONE)
    weights = []
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
        weights.append(parameter.data.clone())
    return weights


@pytest.mark.parametrize("shape", SHAPES.values())
def test_normuons_rows_are_of_one_size_and_the_update_as_large_as_muons(shape: tuple[int, int]) -> None:
    gradient = noise(*shape) * torch.logspace(-1, 1, shape[0])[:, None]
    (normuon,) = moved(NorMuonConfig(name="normuon", **BASE), [gradient])
    (muon,) = moved(MuonConfig(name="muon", **BASE), [gradient])
    rows = normuon.norm(dim=1)
    assert torch.allclose(rows, rows.mean(), rtol=1e-4)
    assert float(normuon.norm()) == pytest.approx(float(muon.norm()), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values())
def test_dion2_of_all_rows_is_muon_of_a_sum(shape: tuple[int, int]) -> None:
    """Without Nesterov, and with μM + G instead of an average; orthogonalised, both are the same."""
    grads = [noise(*shape, seed=i) for i in range(5)]
    dion2 = moved(Dion2Config(name="dion2", fraction=1.0, momentum=0.9, **BASE), grads)[-1]
    muon = moved(MuonConfig(name="muon", nesterov=False, momentum=0.9, **BASE), grads)[-1]
    # the normalisation by a norm ten times as large rounds to other bfloat16 numbers
    assert float((dion2 - muon).norm() / muon.norm()) < 0.05


@pytest.mark.parametrize("shape", SHAPES.values())
def test_dion2_moves_its_part_and_keeps_the_rest_for_later(shape: tuple[int, int]) -> None:
    turned = shape[0] > shape[1]
    grads = [noise(*shape), *[torch.zeros(shape)] * 2]
    config = Dion2Config(name="dion2", fraction=0.25, momentum=0.0, **BASE)
    weights = moved(config, grads)
    used: set[int] = set()
    for before, now in zip([torch.zeros(shape), *weights], weights, strict=False):
        change = (now - before).T if turned else now - before
        rows = set(change.abs().sum(1).nonzero().flatten().tolist())
        assert len(rows) == -(-min(shape) // 4)
        assert not rows & used, "what has been used is gone where momentum is 0"
        used |= rows


def test_a_gradient_of_zero_moves_nothing() -> None:
    for config, _ in CASES.values():
        weights = moved(config, [torch.zeros(8, 6), noise(8, 6)])
        assert not weights[0].any()
        assert weights[1].isfinite().all()
        assert weights[1].any()
