"""Bases in batches, as on a GPU: what a sampler gives for a batch, and what becomes of bad gradients."""

import warnings
from dataclasses import replace

import pytest
import torch
from helpers.methods import sampler_config, small
from helpers.samplers import BUILT, GRADIENTS, ORTHONORMAL, RANK, ROWS, SIZE, spectrum
from torch import Tensor, nn

from rsotrain.config.choices import OnRefresh
from rsotrain.config.samplers import SamplerConfig, SvdConfig
from rsotrain.instruments.devices import planning_for
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.with_bases import OptimizerWithBases
from rsotrain.subspace import batches
from rsotrain.subspace.batches import BatchedBases
from rsotrain.subspace.gram import GradientGram, add_gram_, mirrored_
from rsotrain.subspace.random_bases import haar, srht
from rsotrain.subspace.samplers import SampleRequest
from rsotrain.subspace.seeding import counted_uniforms
from rsotrain.subspace.spectral import weighted_sample

CPU = torch.device("cpu")


def request_of(
    gradients: Tensor, rank: int, previous: Tensor | None = None, first_seed: int = 0
) -> SampleRequest:
    """For a batch of gradients, n×M×k."""
    seeds = tuple(range(first_seed, first_seed + len(gradients)))
    states = [{} for _ in seeds]
    return SampleRequest(
        gradients.shape[-1], rank, GradientGram(gradients), torch.Generator(), CPU, previous=previous,
        states=states, counted=seeds, batched=True,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, RANK, SIZE])
@pytest.mark.parametrize("name", ORTHONORMAL)
def test_orthonormal_for_every_gradient_of_a_batch(name: str, rank: int) -> None:
    tall = [g.float() for g in GRADIENTS.values() if g.shape == (ROWS, SIZE)]
    bad = [torch.full((ROWS, SIZE), value) for value in (torch.nan, torch.inf)]
    previous = None
    for index in range(2):
        request = request_of(torch.stack([*tall, *bad]), rank, previous, first_seed=100 * index)
        basis = ORTHONORMAL[name](request)
        assert basis.shape == (len(tall) + 2, SIZE, rank)
        assert basis.dtype is torch.float32
        products = basis[: len(tall)].mT @ basis[: len(tall)]
        # rounded entries, and eigenvectors to the errors of eigh: as of one matrix
        assert bool((products - torch.eye(rank)).abs().max() < 5e-6)
        previous = basis.where(basis.isfinite(), 0.0)


# where the basis follows from the gradient alone; the others draw other numbers in a batch
DETERMINED = ("svd", "full_svd", "dct", "topk_norm", "block_power", "online_pca", "online_pca-orthonormal")


@pytest.mark.parametrize("name", DETERMINED)
def test_a_batch_gives_what_each_gradient_gives_alone(name: str) -> None:
    sampler = BUILT[name]
    gradients = torch.stack([spectrum(d ** torch.arange(SIZE)) for d in (0.5, 0.8, 0.9)])

    def states() -> list[dict[str, Tensor]]:
        shapes = sampler.state_shapes(SIZE, RANK).items()
        return [{key: torch.zeros(shape) for key, shape in shapes} for _ in gradients]

    one_by_one, of_batch = states(), states()
    previous: list[Tensor | None] = [None] * 3
    for index in range(3):
        random = torch.Generator().manual_seed(index)
        drifted = gradients + 0.1 * torch.randn(gradients.shape, generator=random)
        alone = [
            sampler.sample(
                SampleRequest(SIZE, RANK, GradientGram(a), torch.Generator(), CPU, previous=old, states=[own])
            )
            for a, old, own in zip(drifted, previous, one_by_one, strict=True)
        ]
        before = None if index == 0 else torch.stack([old for old in previous if old is not None])
        together = sampler.sample(replace(request_of(drifted, RANK, before), states=of_batch))
        for own, basis in zip(together, alone, strict=True):
            if index == 0:  # signs are free where there is no basis to align with
                own = own * torch.where((own * basis).sum(0) < 0, -1.0, 1.0)
            # float32 products in other orders, and Adam's first steps are signs of what they give
            assert torch.allclose(own, basis, atol=2e-4), float((own - basis).abs().max())
        previous = list(alone)


@pytest.mark.parametrize("name", ["randomized_svd", "block_power", "switching"])
def test_a_gradient_that_has_left_the_basis_in_use_is_found_again(name: str) -> None:
    sampler = BUILT[name]
    gradient = torch.zeros(ROWS, SIZE)
    gradient[:, SIZE // 2 :] = spectrum(0.5 ** torch.arange(SIZE // 2))
    previous = torch.eye(SIZE, RANK)[None]
    for index in range(4):
        previous = sampler.sample(request_of(gradient[None], RANK, previous, first_seed=index))
    captured = (gradient @ previous[0]).square().sum() / gradient.square().sum()
    assert float(captured) > 0.99


def test_randomized_svd_of_a_batch_captures_as_much_as_of_one() -> None:
    sampler = BUILT["randomized_svd"]
    gradient = spectrum((torch.arange(200) + 1.0) ** -0.75, rows=300)
    exact = float(torch.linalg.svdvals(gradient)[:50].square().sum())
    basis = sampler.sample(request_of(gradient[None], 50))
    assert float((gradient @ basis[0]).square().sum()) > 0.99 * exact


def test_drawn_axes_and_weights_are_those_of_the_distribution() -> None:
    """In 4,000 draws each frequency is within five standard errors of its probability."""
    count, size = 4000, 5
    uniform = counted_uniforms(size, range(count), CPU)
    assert float(uniform.min()) > 0 < 1 - float(uniform.max())
    request = SampleRequest(size, 1, None, torch.Generator(), CPU, counted=tuple(range(count)), batched=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0], dtype=torch.float64)
    for picked, expected in (
        (request.axes(), torch.full((size,), 1 / size)),
        (weighted_sample(weights.log().expand(count, size), request), weights / weights.sum()),
    ):
        found = picked.flatten().bincount(minlength=size) / count
        errors = (expected * (1 - expected) / count).sqrt()
        assert bool(((found - expected).abs() <= 5 * errors).all())


def test_a_draw_belongs_to_its_matrix_and_not_to_its_batch() -> None:
    def drawn(seeds: tuple[int, ...]) -> SampleRequest:
        return SampleRequest(SIZE, RANK, None, torch.Generator(), CPU, counted=seeds, batched=True)

    for sample in (haar, srht):
        assert torch.allclose(sample(drawn((1, 2, 3)))[1:], sample(drawn((2, 3))), atol=1e-6)
        one = SampleRequest(SIZE, RANK, None, torch.Generator(), CPU, counted=(2,))  # on a CPU
        assert torch.allclose(sample(drawn((1, 2, 3)))[1], sample(one), atol=1e-6)


# --- the bases of an optimizer ---------------------------------------------------------------------

EXACT = SvdConfig(name="svd", power_on_gpu=False)
SHAPES = {"w0": (24, 10), "w1": (10, 24), "w2": (12, 12), "w3": (24, 10), "w4": (6, 40)}


def built(
    method: str, sampler: str | SamplerConfig, kind: str, **own: object
) -> tuple[CompositeOptimizer, dict[str, nn.Parameter]]:
    config, _ = small(method, rank=3, gap=3, lr=0.01, betas=(0.9, 0.99), scale=1.0)
    config = replace(config, name=method, block_parameters=["w"], **own)  # type: ignore[arg-type]
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    chosen = sampler_config(sampler) if isinstance(sampler, str) else sampler
    with planning_for(kind):
        optimizer = build_optimizer(parameters.items(), config, chosen, seed=0, total_steps=12)
    return optimizer, parameters


def gradient_of(name: str, step: int) -> Tensor:
    """Of a determined subspace that drifts."""
    random = torch.Generator().manual_seed(17 * int(name[1]))
    rows, columns = SHAPES[name]
    small_side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, small_side, generator=random))[0]
    right = torch.linalg.qr(torch.randn(columns, small_side, generator=random))[0]
    drift = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 * int(name[1]) + step))
    return (left * 0.6 ** torch.arange(small_side)) @ right.T + 0.003 * drift


def train(optimizer: CompositeOptimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = gradient_of(name, step)
        optimizer.step()


@pytest.mark.parametrize("on_refresh", OnRefresh)
@pytest.mark.parametrize("sampler", [EXACT, "topk_norm", "dct", "block_power"])
def test_a_run_in_batches_is_the_run_of_one_matrix_at_a_time(
    sampler: str | SamplerConfig, on_refresh: OnRefresh
) -> None:
    weights = []
    for kind in ("cpu", "cuda"):
        optimizer, parameters = built("galore", sampler, kind, on_refresh=on_refresh)
        train(optimizer, parameters, range(1, 13))
        weights.append(parameters)
    for name, parameter in weights[0].items():
        moved = parameter.abs().max()
        # float32 products in other orders, through Adam's quotients
        assert float((parameter - weights[1][name]).detach().abs().max() / moved) < 1e-3


def test_svd_on_a_gpu_is_randomized_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("a decomposition")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    weights = []
    for sampler in ("svd", "randomized_svd"):
        optimizer, parameters = built("galore", sampler, "cuda")
        train(optimizer, parameters, range(1, 8))  # bases are drawn at 1, 4 and 7
        weights.append(parameters)
    for name, parameter in weights[0].items():
        assert torch.equal(parameter, weights[1][name])


@pytest.mark.parametrize("method", ["ldadam", "osd", "alice", "sumo", "carry", "i3s", "apollo"])
def test_batches_of_any_size_give_one_run(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = small(method, rank=3, gap=3)[1].name
    weights = []
    for elements in (1 << 22, 1):
        monkeypatch.setattr(batches, "BATCH_ELEMENTS", elements)
        optimizer, parameters = built(method, sampler, "cuda")
        train(optimizer, parameters, range(1, 13))
        weights.append(parameters)
    for name, parameter in weights[0].items():
        moved = parameter.abs().max()
        assert float(moved) > 0.01
        assert float((parameter - weights[1][name]).abs().max() / moved) < 0.02  # signs of what is near 0


def bases_of(optimizer: CompositeOptimizer) -> BatchedBases:
    group = optimizer.groups[0]
    assert isinstance(group, OptimizerWithBases)
    assert isinstance(group.bases, BatchedBases)
    return group.bases


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_told_a_step_later_and_leaves_the_basis(bad: float) -> None:
    optimizer, parameters = built("galore", "svd", "cuda")
    bases = bases_of(optimizer)
    train(optimizer, parameters, range(1, 4))
    old = {name: bases[name].clone() for name in SHAPES}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, parameter in parameters.items():
            parameter.grad = gradient_of(name, 4)
        assert parameters["w0"].grad is not None
        parameters["w0"].grad[3, 5] = bad
        optimizer.step()
    assert torch.equal(bases["w0"], old["w0"])
    assert not torch.equal(bases["w3"], old["w3"])  # of its batch
    with pytest.warns(RuntimeWarning, match="step 4: the gradient of w0 is not finite; its old basis stays"):
        assert optimizer.metrics()["subspace/skipped_draws"] == 1


def test_a_zero_gradient_has_no_basis_until_there_is_another() -> None:
    """The first refresh is due again in the next step, and no failure is counted."""
    optimizer, parameters = built("galore", "svd", "cuda")
    bases = bases_of(optimizer)
    for step in range(1, 4):
        for name, parameter in parameters.items():
            parameter.grad = gradient_of(name, step) * (name != "w0" or step == 3)
        optimizer.step()
        assert bool(bases["w0"].any()) == (step == 3)
        assert bool(bases["w1"].any())
    assert "subspace/skipped_draws" not in optimizer.metrics()
    assert not bases.waiting


def test_online_pca_keeps_its_moments_where_the_gradient_is_zero() -> None:
    optimizer, parameters = built("osd", "online_pca", "cuda", update_proj_gap=1)
    train(optimizer, parameters, range(1, 4))
    state = optimizer.groups[0].state
    before = {key: tensor.clone() for key, tensor in state["w0"].items() if "basis" in key}
    other = state["w1"]["basis_exp_avg"].clone()
    for name, parameter in parameters.items():
        parameter.grad = gradient_of(name, 4) * (name != "w0")
    optimizer.step()
    for key, tensor in before.items():
        assert torch.equal(state["w0"][key], tensor), key
    assert not torch.equal(state["w1"]["basis_exp_avg"], other)


def test_a_decomposition_that_fails_leaves_the_old_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, parameters = built("galore", EXACT, "cuda")
    bases = bases_of(optimizer)
    train(optimizer, parameters, range(1, 4))
    old = bases["w0"].clone()

    def fails(*_: object) -> None:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    train(optimizer, parameters, range(4, 5))
    assert torch.equal(bases["w0"], old)
    with pytest.warns(RuntimeWarning, match="could not be decomposed"):
        assert optimizer.metrics()["subspace/skipped_draws"] == len(SHAPES)


@pytest.mark.parametrize("method", ["galore", "osd", "ldadam", "alice"])
def test_a_run_that_resumes_goes_on_bitwise(method: str) -> None:
    sampler = small(method, rank=3, gap=3)[1].name
    whole, ends = built(method, sampler, "cuda")
    train(whole, ends, range(1, 6))
    resumed, begins = built(method, sampler, "cuda")
    for name, parameter in begins.items():
        parameter.data.copy_(ends[name].data)
    resumed.load_state_dict({key: tensor.clone() for key, tensor in whole.state_dict().items()})
    for optimizer, parameters in ((whole, ends), (resumed, begins)):
        train(optimizer, parameters, range(6, 11))
    for name, parameter in ends.items():
        assert torch.equal(parameter, begins[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_product_of_bfloat16_has_every_bit_of_float32_on_a_gpu() -> None:
    rows = torch.randn(512, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(300, 300, device="cuda")
    add_gram_(total, rows.cuda())
    exact = rows.double().T @ rows.double()
    # sums of 512 products of 1 in float32: 6e-8 of them, in any order
    assert float((mirrored_(total).cpu().double() - exact).abs().max()) < 512 * 6e-8 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ORTHONORMAL)
def test_a_gpu_samples_what_a_batch_on_the_cpu_samples(name: str) -> None:
    gradients = torch.stack([spectrum(d ** torch.arange(SIZE)) for d in (0.5, 0.8, 0.9)])
    bases = []
    for device in (CPU, torch.device("cuda")):
        request = request_of(gradients.to(device), RANK)
        bases.append(ORTHONORMAL[name](replace(request, device=device)).cpu())
    # up to the signs of eigenvectors, and to float32 in the logarithms and cosines of random numbers
    assert float(((bases[0] * bases[1]).sum(-2).abs() - 1).abs().max()) < 1e-3
