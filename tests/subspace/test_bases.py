"""Sides, ranks, the refresh schedule, and what happens at a refresh."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from rsotrain.config.choices import OnRefresh
from rsotrain.config.methods import GaLoreConfig
from rsotrain.errors import UserError
from rsotrain.optim.base import Settings, StateKeeper
from rsotrain.optim.galore import GaLore
from rsotrain.optim.subspace_optimizer import Subspace
from rsotrain.subspace.projection import (
    Side,
    add_lifted_,
    oriented,
    project_,
    resolve_rank,
    side_of,
)
from rsotrain.subspace.random_bases import gaussian, haar
from rsotrain.subspace.samplers import Columns, Sampler, SampleRequest
from rsotrain.subspace.schedule import RefreshSchedule
from rsotrain.subspace.spectral import golore, svd

SVD = Sampler("svd", svd, informed=True)


def one_matrix(shape: tuple[int, int] = (12, 8), **own: object) -> tuple[GaLore, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(shape))
    settings = {"sampler": SVD, "rank": 3, "gap": 5, "on_refresh": OnRefresh.keep, "total_steps": 100}
    subspace = Subspace(**(settings | own))  # type: ignore[arg-type]
    return GaLore(
        "galore",
        {"w": parameter},
        0.01,
        Settings(StateKeeper(torch.float32, 0)),
        GaLoreConfig(name="galore"),
        subspace,
    ), parameter


def steps(galore: GaLore, parameter: nn.Parameter, gradients: list[Tensor], first: int = 1) -> None:
    for step, gradient in enumerate(gradients, start=first):
        parameter.grad = gradient
        galore.update(step, 1.0)


def noise(count: int, shape: tuple[int, int] = (12, 8)) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random) for _ in range(count)]


def test_the_smaller_side_is_projected_and_square_counts_as_right() -> None:
    assert side_of((5, 3)) is side_of((3, 3)) is Side.right
    assert side_of((3, 5)) is Side.left
    matrix = torch.zeros(3, 5)
    oriented(matrix, Side.left)[4, 2] = 1.0
    assert matrix[2, 4] == 1.0  # a view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_project_and_lift(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = noise(1, shape)[0]
    a = oriented(matrix, side_of(shape))
    basis = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(1)))[0].to(dtype)
    r = torch.empty(9, 2)
    project_(r, a, basis)
    target = a.clone()
    add_lifted_(target, r, basis, -1.0)
    expected = a - a @ basis.float() @ basis.float().T
    assert bool((target - expected).abs().max() < (1e-5 if dtype is torch.float32 else 0.03))


def test_rank_is_a_number_or_a_fraction() -> None:
    assert resolve_rank(4, 8, "w") == 4
    assert resolve_rank(0.25, 512, "w") == 128
    assert resolve_rank(1.0, 8, "w") == 8
    assert resolve_rank(0.01, 8, "w") == 1
    with pytest.raises(UserError, match=r"rank=9 is larger than .* \(8\) of layers.0.w"):
        resolve_rank(9, 8, "layers.0.w")
    for wrong in (0, -1, 0.0, 1.5, -0.5):
        with pytest.raises(UserError, match=f"rank={wrong}"):
            resolve_rank(wrong, 8, "w")


def test_refreshes_all_at_once() -> None:
    schedule = RefreshSchedule(gap=3, num_matrices=2, staggered=False)
    for position in range(2):
        found = {step: schedule.refresh_index(position, step) for step in range(1, 9)}
        assert {step: i for step, i in found.items() if i is not None} == {1: 0, 4: 1, 7: 2}


@pytest.mark.parametrize(("gap", "count"), [(10, 4), (3, 7), (1, 3), (200, 84)])
def test_staggered_refreshes_are_spread_evenly(gap: int, count: int) -> None:
    schedule = RefreshSchedule(gap, count, staggered=True)
    assert all(schedule.refresh_index(i, 1) == 0 for i in range(count))
    per_step = []
    indices: list[list[int]] = [[] for _ in range(count)]
    for step in range(2, 2 + 3 * gap):
        refreshes = [schedule.refresh_index(i, step) for i in range(count)]
        per_step.append(sum(index is not None for index in refreshes))
        for i, index in enumerate(refreshes):
            if index is not None:
                indices[i].append(index)
    assert all(found == [1, 2, 3] for found in indices)  # once in T steps, numbered without a gap
    assert max(per_step) <= -(-count // gap)


def test_state_is_there_from_construction_and_keeps_its_names() -> None:
    galore, parameter = one_matrix()
    before = set(galore.state["w"])
    assert before == {"basis", "exp_avg", "exp_avg_sq", "step"}
    assert not galore.state["w"]["basis"].any()
    steps(galore, parameter, noise(7))
    assert set(galore.state["w"]) == before


def test_a_basis_changes_at_refreshes_only() -> None:
    galore, parameter = one_matrix()
    changed = []
    for step, gradient in enumerate(noise(12), start=1):
        old = galore.state["w"]["basis"].clone()
        steps(galore, parameter, [gradient], first=step)
        if not torch.equal(old, galore.state["w"]["basis"]):
            changed.append(step)
    assert changed == [1, 6, 11]


def test_reset_and_transport_and_keep_differ_only_from_the_refresh_on() -> None:
    results = {}
    for on_refresh in OnRefresh:
        galore, parameter = one_matrix(on_refresh=on_refresh)
        steps(galore, parameter, noise(5))
        before = parameter.data.clone()
        steps(galore, parameter, noise(6)[5:], first=6)
        results[on_refresh] = (before, parameter.data.clone(), float(galore.state["w"]["step"]))
    kept, reset, transported = (results[o] for o in (OnRefresh.keep, OnRefresh.reset, OnRefresh.transport))
    assert torch.equal(kept[0], reset[0])
    assert torch.equal(kept[0], transported[0])
    assert not torch.equal(kept[1], reset[1])
    assert not torch.equal(kept[1], transported[1])
    assert (kept[2], reset[2], transported[2]) == (6, 1, 6)
    # with its step count, a reset Adam takes a first step again: every entry of N is ±1
    assert float((reset[1] - reset[0]).norm() / 0.01) == pytest.approx((12 * 3) ** 0.5, rel=1e-3)


def test_non_finite_gradient_keeps_the_basis_counts_and_warns_once() -> None:
    galore, parameter = one_matrix(gap=1)
    gradients = noise(4)
    steps(galore, parameter, gradients[:1])
    basis = galore.state["w"]["basis"].clone()
    gradients[1][3, 3] = float("nan")
    gradients[2][0, 0] = float("inf")
    with pytest.warns(RuntimeWarning, match="step 2: the gradient of w is not finite") as caught:
        steps(galore, parameter, gradients[1:3], first=2)
    assert len(caught) == 1
    assert galore.bases.record.skipped == 2
    assert torch.equal(galore.state["w"]["basis"], basis)
    steps(galore, parameter, gradients[3:], first=4)
    assert not torch.equal(galore.state["w"]["basis"], basis)


@pytest.mark.parametrize("first", [0.0, float("nan")])
def test_the_first_refresh_is_due_until_a_gradient_allows_it(first: float) -> None:
    galore, parameter = one_matrix(gap=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(galore, parameter, [torch.full((12, 8), first)])
    assert not galore.state["w"]["basis"].any()
    resumed, other = one_matrix(gap=100)
    for key, tensor in galore.state["w"].items():
        resumed.state["w"][key].copy_(tensor.nan_to_num())
    resumed.resume()
    gradient = noise(1)[0]
    for each, weight in ((galore, parameter), (resumed, other)):
        steps(each, weight, [gradient], first=2)
        dominant = torch.linalg.svd(gradient)[2][:3]
        assert torch.allclose((dominant @ each.state["w"]["basis"]).det().abs(), torch.ones(()), atol=1e-4)
        basis = each.state["w"]["basis"].clone()
        steps(each, weight, noise(4)[3:], first=3)
        assert torch.equal(each.state["w"]["basis"], basis)


def test_a_decomposition_that_fails_keeps_the_basis() -> None:
    calls = []

    def sample(request: SampleRequest) -> torch.Tensor:
        calls.append(request)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return haar(request)

    galore, parameter = one_matrix(gap=1, sampler=Sampler("failing", sample))
    steps(galore, parameter, noise(1))
    basis = galore.state["w"]["basis"].clone()
    with pytest.warns(RuntimeWarning, match="step 2: the gradient of w could not be decomposed; its old"):
        steps(galore, parameter, noise(1), first=2)
    assert torch.equal(galore.state["w"]["basis"], basis)
    assert galore.metrics()["subspace/skipped_draws"] == 1


def test_a_sampler_that_switches_refreshes_at_the_switch() -> None:
    schedule = RefreshSchedule(gap=200, num_matrices=2, staggered=False, restart=321)
    assert [s for s in range(1, 401) if schedule.refresh_index(0, s) is not None] == [1, 201, 321]
    assert [schedule.refresh_index(1, s) for s in (1, 201, 321)] == [0, 1, 2]
    switched = []

    def sample(request: SampleRequest) -> torch.Tensor:
        switched.append(request.switched)
        return haar(request)

    galore, parameter = one_matrix(gap=8, sampler=Sampler("two rules", sample, switch=0.8), total_steps=10)
    steps(galore, parameter, noise(10))
    assert switched == [False, True]


def test_zero_gradient_keeps_the_basis_and_the_weight_stays_finite() -> None:
    galore, parameter = one_matrix(gap=1, on_refresh=OnRefresh.transport)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(galore, parameter, [torch.zeros(12, 8)])
        assert torch.equal(parameter.data, torch.zeros(12, 8))
        steps(galore, parameter, noise(1), first=2)
        basis = galore.state["w"]["basis"].clone()
        steps(galore, parameter, [torch.zeros(12, 8)], first=3)
    assert torch.equal(galore.state["w"]["basis"], basis)
    assert bool(parameter.data.isfinite().all())


def test_metrics_of_the_last_refresh() -> None:
    galore, parameter = one_matrix(gap=2)
    assert galore.metrics() == {}
    fixed = noise(1)[0]
    steps(galore, parameter, [fixed] * 3)
    metrics = galore.metrics()
    assert metrics["subspace/overlap"] == pytest.approx(1.0, abs=1e-5)  # the same gradient, the same basis
    squares = torch.linalg.svdvals(fixed).square()
    assert metrics["subspace/captured_energy"] == pytest.approx(
        float(squares[:3].sum() / squares.sum()), abs=1e-5
    )
    assert 0 < metrics["subspace/refresh_seconds"] < 10


def test_overlap_of_random_bases_is_rank_over_size_and_that_of_others_is_of_their_subspaces() -> None:
    galore, parameter = one_matrix((40, 40), sampler=Sampler("haar", haar), rank=20, gap=1)
    steps(galore, parameter, noise(2, (40, 40)))
    # ‖QᵀQ'‖²/r of independent Haar bases: mean r/k, spread below 1/k
    assert galore.metrics()["subspace/overlap"] == pytest.approx(0.5, abs=0.1)
    scaled, parameter = one_matrix(sampler=Sampler("gaussian", gaussian, Columns.scaled), gap=1)
    gradients = noise(3)
    steps(scaled, parameter, gradients[:1])
    old, _ = torch.linalg.qr(scaled.state["w"]["basis"])
    steps(scaled, parameter, gradients[1:2], first=2)
    new, _ = torch.linalg.qr(scaled.state["w"]["basis"])
    metrics = scaled.metrics()
    assert metrics["subspace/overlap"] == pytest.approx(float((new.T @ old).square().sum() / 3), rel=1e-4)
    share = float((gradients[1] @ new).square().sum() / gradients[1].square().sum())
    assert metrics["subspace/captured_energy"] == pytest.approx(share, rel=1e-4)
    # a refresh every step is measured at one in ten
    steps(scaled, parameter, gradients[2:], first=3)
    assert {k: v for k, v in scaled.metrics().items() if "seconds" not in k} == {
        k: v for k, v in metrics.items() if "seconds" not in k
    }


def test_captured_energy_of_a_sampler_after_the_update_is_of_the_basis_in_use() -> None:
    later = Sampler("later", haar, post_update=True)
    galore, parameter = one_matrix(gap=10, sampler=later)
    gradients = noise(12)
    steps(galore, parameter, gradients[:11])
    basis = galore.state["w"]["basis"].clone()  # sampled after the update of step 11
    steps(galore, parameter, gradients[11:], first=12)
    share = float((gradients[11] @ basis).square().sum() / gradients[11].square().sum())
    assert galore.metrics()["subspace/captured_energy"] == pytest.approx(share, rel=1e-5)


def test_reduced_precision_basis_is_stored_in_it() -> None:
    galore, parameter = one_matrix(compute_dtype=torch.bfloat16)
    steps(galore, parameter, noise(2))
    assert galore.state["w"]["basis"].dtype is torch.bfloat16
    assert galore.state["w"]["exp_avg_sq"].dtype is torch.float32


def test_no_post_update_refresh_follows_in_the_step_of_a_late_first_one() -> None:
    calls: list[int] = []

    def sample(request: SampleRequest) -> torch.Tensor:
        calls.append(len(calls))
        return haar(request)

    later = Sampler("later", sample, informed=True, post_update=True)
    galore, parameter = one_matrix(gap=1, sampler=later)
    refreshes = []
    for step, gradient in enumerate([torch.zeros(12, 8), *noise(3)], start=1):
        steps(galore, parameter, [gradient], first=step)
        refreshes.append(len(calls))
    assert refreshes == [0, 1, 2, 3]


def test_a_switch_to_random_bases_needs_no_gradient() -> None:
    galore, parameter = one_matrix(
        gap=100, total_steps=4, sampler=Sampler("g", golore, informed=True, switch=0.5)
    )
    steps(galore, parameter, noise(2))
    before = galore.state["w"]["basis"].clone()
    steps(galore, parameter, [torch.zeros(12, 8)], first=3)
    assert not torch.equal(galore.state["w"]["basis"], before)
