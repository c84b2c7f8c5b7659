"""Methods without a subspace: against float64 transcriptions of their papers, and in limits."""

from dataclasses import replace

import pytest
import torch
from helpers.one_matrix import BASE, BETAS, EPS, LR, PRECISIONS, SHAPES, Transcription, build, error_of
from torch import Tensor, nn

from rsotrain.config.methods import (
    AdamConfig,
    AdamMiniConfig,
    FoamConfig,
    LionConfig,
    OptimizerConfig,
    RacsConfig,
    ScaleConfig,
)
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.errors import UserError
from rsotrain.optim import full_rank
from rsotrain.optim import reference_full_rank as reference
from rsotrain.optim.racs import row_and_column_scales
from rsotrain.parallel.sharding import Shard

NONE = NoSamplerConfig(name="none")
DECAY = {"lr": LR, "weight_decay": 0.1}


def _foam(level: int) -> tuple[OptimizerConfig, Transcription]:
    return (
        FoamConfig(name="foam", level=level, **BASE),
        lambda w, g: reference.foam(w, g, level=level, betas=BETAS, eps=EPS, **DECAY),
    )


def _adam_mini(block: int) -> tuple[OptimizerConfig, Transcription]:
    """``block``: rows of a head; 1: no heads."""
    heads = {"head_parameters": ["^w$"] if block > 1 else []}
    return (
        AdamMiniConfig(name="adam_mini", num_heads=block, **heads, **BASE),  # set by the test for the shape
        lambda w, g: reference.adam_mini(w, g, block=block, betas=BETAS, eps=EPS, **DECAY),
    )


CASES: dict[str, tuple[OptimizerConfig, Transcription]] = {
    "adam_mini": _adam_mini(1),
    "adam_mini-heads": _adam_mini(2),
    "foam-0": _foam(0),
    "foam-1": _foam(1),
    "foam-2": _foam(2),  # 10 columns in blocks of four: the last is not full
    "foam-3": _foam(3),
    "lion": (LionConfig(name="lion", **BASE), lambda w, g: reference.lion(w, g, betas=(0.9, 0.99), **DECAY)),
    "scale": (ScaleConfig(name="scale", **BASE), lambda w, g: reference.scale(w, g, **DECAY)),
    "scale-head": (
        ScaleConfig(name="scale", momentum_parameters=["^w$"], **BASE),
        lambda w, g: reference.scale(w, g, momentum=0.9, **DECAY),
    ),
    "scale-embedding": (
        ScaleConfig(name="scale", column_parameters=["^w$"], **BASE),
        lambda w, g: reference.scale(w, g, columns=True, **DECAY),
    ),
    "racs": (RacsConfig(name="racs", **BASE), lambda w, g: reference.racs(w, g, **DECAY)),
    "racs-1": (
        RacsConfig(name="racs", iterations=1, scale_decay=0.5, max_growth=1.2, **BASE),
        lambda w, g: reference.racs(w, g, iterations=1, decay=0.5, max_growth=1.2, **DECAY),
    ),
}

# As in test_reference.py. There are no products, so bf16_mixed is as exact as fp32; the smallest entries of
# a gradient of 0.003 rounded to float32 decide no sign. In bf16 the weight itself is rounded 20 times.
TOLERANCE = {"fp32": 1e-4, "bf16_mixed": 1e-4, "bf16": 0.12}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("side", SHAPES)
@pytest.mark.parametrize("method", CASES)
def test_twenty_steps_equal_the_reference(method: str, side: str, precision: str) -> None:
    config, transcription = CASES[method]
    if isinstance(config, AdamMiniConfig) and config.head_parameters:  # of two rows each
        config = replace(config, num_heads=SHAPES[side][1] // 2)
    assert error_of(config, NONE, transcription, SHAPES[side], precision) < TOLERANCE[precision]


@pytest.mark.parametrize("method", CASES)
def test_runs_of_rows_are_the_whole(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes as many rows at a time as its cache holds."""
    config, _ = CASES[method]
    if isinstance(config, AdamMiniConfig) and config.head_parameters:
        config = replace(config, num_heads=5)
    weights = []
    for limit in (1 << 18, 64 * 10):
        monkeypatch.setattr(full_rank, "CACHE_ELEMENTS", limit)
        random = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(200, 10, generator=random))
        optimizer = build(parameter, config, NONE)
        for _ in range(3):
            parameter.grad = torch.randn(200, 10, generator=random)
            optimizer.step()
        weights.append(parameter.data)
    assert torch.equal(*weights)


def moved(config: OptimizerConfig, grads: list[Tensor]) -> Tensor:
    parameter = nn.Parameter(torch.zeros(grads[0].shape))
    optimizer = build(parameter, config, NONE)
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.data


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_foam_of_level_0_is_adam() -> None:
    grads = [noise(12, 10, seed=i) for i in range(15)]
    foam = moved(FoamConfig(name="foam", level=0, **BASE), grads)
    adam = moved(AdamConfig(name="adam", **BASE), grads)
    # both divide and take roots in float32 in another order: a few units in the last place a step
    assert torch.allclose(foam, adam, rtol=1e-5, atol=1e-7)


def test_foam_of_equal_neighbours_is_adam() -> None:
    """Where all entries of a block are the same there is no residual, and a block is one entry of Adam's."""
    grads = [noise(12, 3, seed=i).repeat_interleave(4, 1) for i in range(15)]
    foam = moved(FoamConfig(name="foam", level=2, **BASE), grads)
    adam = moved(AdamConfig(name="adam", **BASE), grads)
    assert torch.allclose(foam, adam, rtol=1e-5, atol=1e-7)


def test_adam_mini_of_rows_with_one_size_is_adam() -> None:
    """Where all entries of a row have one square, their mean is each of them."""
    signs = [noise(12, 10, seed=i).sign() * noise(12, 1, seed=100 + i).abs() for i in range(15)]
    mini = moved(CASES["adam_mini"][0], signs)
    adam = moved(AdamConfig(name="adam", **BASE), signs)
    assert torch.allclose(mini, adam, rtol=1e-4, atol=1e-7)


def test_adam_mini_refuses_heads_that_do_not_fit() -> None:
    for own, message in (
        ({"head_parameters": ["^q$"]}, "matches none of the matrices"),
        ({"head_parameters": ["^w$"], "num_heads": 3}, r"num_heads=3 does not divide w \(12 x 10\)"),
    ):
        with pytest.raises(UserError, match=message):
            moved(replace(CASES["adam_mini"][0], **own), [noise(12, 10)])  # type: ignore[arg-type]


def test_scale_is_row_normalised_gradient_descent_of_any_scale() -> None:
    gradient = noise(12, 10) * torch.logspace(-3, 3, 12)[:, None]
    update = moved(ScaleConfig(name="scale", **(BASE | {"lr": 1.0})), [gradient])
    assert torch.allclose(update.square().mean(1), torch.ones(12), rtol=1e-5)
    assert torch.allclose(-update / update.norm(dim=1, keepdim=True), nn.functional.normalize(gradient))


def test_racs_of_a_rank_one_matrix_is_its_signs() -> None:
    """G² = u²v²ᵀ is the fixed point's own form, so G diag(q)^-½ diag(s)^-½ has entries ±1."""
    gradient = noise(12, 1) @ noise(1, 10, seed=1)
    update = moved(RacsConfig(name="racs", scale_decay=0.0, **(BASE | {"lr": 1.0})), [gradient])
    assert torch.allclose(update, -gradient.sign(), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e12])
def test_racs_takes_gradients_of_any_size(size: float) -> None:
    """In a float32 the fourth power of 1e-15 is 0."""
    config = RacsConfig(name="racs", scale_decay=0.0, **BASE)
    expected = moved(config, [noise(12, 10)])
    assert torch.allclose(moved(config, [noise(12, 10) * size]), expected, rtol=1e-4)


def test_rows_and_columns_without_a_gradient_stay() -> None:
    for method in ("racs", "scale", "scale-embedding", "foam-2", "lion"):
        gradient = noise(12, 12)
        gradient[3] = 0
        gradient[:, 4:8] = 0
        update = moved(CASES[method][0], [gradient, torch.zeros(12, 12), gradient])
        assert update.isfinite().all(), method
        assert not update[3].any(), method
        assert not update[:, 4:8].any(), method


def test_the_fixed_point_is_the_best_approximation_of_rank_one() -> None:
    """Many iterations find the leading singular vectors of G² (the paper's proposition 3)."""
    gradient = noise(12, 10)
    ((q,), (s,)) = row_and_column_scales([gradient[None]], [Shard((12, 10))], 200, torch.ones(1, 1))
    u, values, vh = torch.linalg.svd(gradient.square())
    assert torch.allclose(torch.outer(q[0], s[0]), values[0] * torch.outer(u[:, 0], vh[0]), rtol=1e-3)


@pytest.mark.parametrize("iterations", [1, 5, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_a_stack_are_the_papers(dtype: torch.dtype, iterations: int) -> None:
    """Also of gradients of zeros, or with rows and columns of them, or of a single entry.

    99 iterations in float32 add up some 10⁻⁷ each. bfloat16 rounds each number of q and s, and squares.
    """
    gradients = (noise(3 * 60, 40) * noise(3 * 60, 1, seed=1)).view(3, 60, 40).to(dtype)
    gradients[0, :, 5] = gradients[0, 3] = 0
    gradients[1, 1:] = gradients[1, :, 1:] = 0
    gradients[2] = 0
    shard = Shard((60, 40))
    (rows,), (columns,) = row_and_column_scales([gradients], [shard], iterations, torch.ones(1, 1))
    for gradient, q, s in zip(gradients[:2].double(), rows, columns, strict=False):
        q_exact = torch.ones(60, dtype=torch.float64)
        for _ in range(iterations):
            s_exact = gradient.square().T @ q_exact / q_exact.norm() ** 2
            q_exact = gradient.square() @ s_exact / s_exact.norm() ** 2
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        assert float((q - q_exact).norm() / q_exact.norm()) < tolerance
        assert float((s - s_exact).norm() / s_exact.norm()) < tolerance
    assert not rows[2].any()
    assert not columns[2].any()


def test_racs_limits_the_growth_of_the_update() -> None:
    """The averages of the scales lag behind a gradient that becomes 100 times as large."""
    grads = [noise(12, 10)] * 60
    config = RacsConfig(name="racs", **(BASE | {"lr": 1.0, "weight_decay": 0.0}))
    for own, growth in ((config, 1.01), (replace(config, max_growth=1e12), 100 / 1000.9**0.5)):
        before, now = moved(own, grads[:-1]), moved(own, grads)
        last = moved(own, [*grads, noise(12, 10) * 100]) - now
        assert float(last.norm() / (now - before).norm()) == pytest.approx(growth, rel=1e-2), growth
